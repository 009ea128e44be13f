"""docs/graph_flow.md: its examples run, and every name of its table exists on both sides."""

from __future__ import annotations

import importlib
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pt2e.graphs import peer
from torch._inductor import config
from torch.fx import GraphModule

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "graph_flow.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("<!-- names -->\n")[2].partition("\n\n")[0].splitlines()[2:]


def block(marker: str) -> str:
    found = re.search(rf"^<!-- {marker} -->\n```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found, f"no block marked {marker}"
    return found.group(1)


def run(*sources: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for source in sources:
        exec(compile(source, "graph_flow.md", "exec"), names)
    return names


def operators(graph: GraphModule) -> list[str]:
    return [getattr(node.target, "_opname", "") for node in graph.graph.nodes]


def close(names: dict[str, Any], model: str = "net") -> bool:
    """Whether int8 says what the float or the trained model says, within some steps of the range."""
    with torch.no_grad():
        real = names[model](names["images"])
    return bool((names["scores"] - real).abs().max() < 0.05 * (real.max() - real.min()))


def test_after_training() -> None:
    names = run(block("model"), block("ptq"))
    assert close(names)
    assert operators(names["int8"]).count("dequantize_per_channel") == 2
    assert "batch_norm" not in " ".join(operators(names["int8"]))
    assert names["program"].module()(names["images"][:3]).shape == (3, 10)
    assert torch.equal(names["program"].module()(names["images"]), names["scores"])


def test_while_training() -> None:
    names = run(block("model"), block("qat"))
    assert close(names, "prepared")
    assert operators(names["int8"]).count("dequantize_per_channel") == 2
    assert "batch_norm" not in " ".join(operators(names["int8"]))


@pytest.fixture
def torchao() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's, of its optional parts, and Inductor's
        peer("torchao")
        yield


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.usefixtures("fresh_compiler")
def test_with_torchaos_quantizer(torchao: None) -> None:
    with config.patch(freezing=False):  # the page sets it for good
        names = run(block("model"), block("x86"))
    assert close(names)
    assert operators(names["int8"]).count("dequantize_per_channel") == 2


def test_training_with_torchaos_quantizer(torchao: None) -> None:
    training = block("qat").replace("XNNPACKQuantizer", "X86InductorQuantizer")
    training = re.sub(r"get_symmetric\w+\(.*", "get_default_x86_inductor_quantization_config(is_qat=True)", training)
    names = run(block("model"), block("x86").partition("\n\n")[0], training)
    assert close(names, "prepared")
    assert operators(names["int8"]).count("dequantize_per_channel") == 2


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.split("`")[1])
def test_names(row: str) -> None:
    old, new = (re.findall(r"`([\w.]+)`", cell) for cell in row.strip("|").split(" | "))
    place = importlib.import_module(new[0])
    assert all(hasattr(place, name) for name in old[1:])
    pytest.importorskip(old[0].partition(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = importlib.import_module(old[0])
    assert [name for name in old[1:] if not hasattr(there, name)] == []
