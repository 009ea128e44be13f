"""The example of docs/exporting.md runs, and makes the graph that the page draws."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "exporting.md"


def test_the_example_makes_the_graph_that_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert example is not None
    names: dict[str, Any] = {}
    exec(compile(example.group(1), PAGE.name, "exec"), names)
    assert capsys.readouterr().out == "torch.Size([7, 2])\n"
    nodes = [node for node in names["program"].graph.nodes if node.op == "call_function"]
    drawn = [
        *("quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel", "conv2d", "quantize_per_tensor"),
        *("dequantize_per_tensor", "mean", "quantize_per_tensor"),
        *("dequantize_per_tensor", "dequantize_per_channel", "linear", "quantize_per_tensor", "dequantize_per_tensor"),
    ]
    assert sorted(node.target.overloadpacket.__name__ for node in nodes) == sorted(drawn)
    assert {node.meta.get("quantization_tag") for node in nodes} == {"conv", "mean", "classify", None}
