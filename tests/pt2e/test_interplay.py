"""eagerq.pt2e beside torchao: loaded before it, after it, without it, and without torch.ao too."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRAPH_SIDE = ("eagerq.pt2e", "torch.ao.quantization.fx._decomposed", "torchao", "executorch", "onnx", "onnxscript")


# --- in the other process -----------------------------------------------------------------------------------


def absent(*packages: str) -> None:
    """Make packages as absent as if they had never been there."""
    import torch

    for package in packages:
        for name in [package, *sys.modules]:
            if name == package or name.startswith(f"{package}."):
                sys.modules[name] = None  # type: ignore[assignment]
    if "torch.ao" in packages:
        vars(torch).pop("ao", None)


def torchao() -> tuple[ModuleType, ModuleType, type]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao.quantization.pt2e.quantize_pt2e as flow
        import torchao.quantization.pt2e.quantizer as quantizer
        from torchao.quantization.pt2e.observer import MinMaxObserver
    return flow, quantizer, MinMaxObserver


def answer(flow: Any, quantizers: Any, observer: type) -> list[float]:
    """The output of a linear quantized by this flow, with a quantizer made of these classes, exported again."""
    import torch

    spec = quantizers.QuantizationSpec(torch.int8, observer, -128, 127, torch.per_tensor_affine)

    class Linears(quantizers.Quantizer):  # type: ignore[misc]
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                if node.target == torch.ops.aten.linear.default:
                    x, weight, _ = node.args
                    annotation = quantizers.QuantizationAnnotation({x: spec, weight: spec}, spec)
                    node.meta["quantization_annotation"] = annotation
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(4, 3).eval(), (torch.randn(5, 4),)
    prepared = flow.prepare_pt2e(torch.export.export(model, inputs).module(), Linears())
    prepared(*inputs)
    converted = flow.convert_pt2e(prepared)
    assert sum("quantize_per_tensor" in str(node.target) for node in converted.graph.nodes) == 5
    exported = torch.export.export(converted, inputs).module()
    assert torch.equal(exported(*inputs), converted(*inputs))
    return converted(*inputs).flatten().tolist()


def alone() -> None:
    import torch  # what it loads is not our doing

    before = set(sys.modules)
    import eagerq

    loaded = {name for name in set(sys.modules) - before if name.startswith(GRAPH_SIDE)}
    assert not loaded, loaded
    assert not hasattr(eagerq, "pt2f")
    assert eagerq.pt2e.convert_pt2e is sys.modules["eagerq.pt2e"].convert_pt2e
    assert hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor")


def run(order: str) -> None:
    if order == "never":
        absent("torchao")
    if order == "never, nor torch.ao":
        absent("torchao", "torch.ao")
    theirs = torchao() if order == "before" else None
    import eagerq.pt2e
    import eagerq.pt2e.quantizer

    if order == "after":
        theirs = torchao()
    answers = [answer(eagerq.pt2e, eagerq.pt2e.quantizer, eagerq.MinMaxObserver)]
    if theirs is not None:
        answers += [
            answer(*theirs),
            answer(eagerq.pt2e, *theirs[1:]),
            answer(eagerq.pt2e, theirs[1], eagerq.MinMaxObserver),
        ]
    assert all(one == answers[0] for one in answers), answers
    assert ("eagerq.pt2e.own_operators" in sys.modules) is (order == "never, nor torch.ao")
    print(answers[0])


# --- in this one --------------------------------------------------------------------------------------------


def in_a_process_of_its_own(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_the_graph_side_is_loaded_on_first_use() -> None:
    in_a_process_of_its_own("alone")


@pytest.fixture(scope="module")
def without_torchao() -> str:
    return in_a_process_of_its_own("never")


def test_the_same_answer_without_torch_ao(without_torchao: str) -> None:
    assert in_a_process_of_its_own("never, nor torch.ao") == without_torchao


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_same_answers_beside_torchao(order: str, without_torchao: str) -> None:
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    assert in_a_process_of_its_own(order) == without_torchao


if __name__ == "__main__":
    warnings.filterwarnings("error", module="eagerq")  # torch's tracers warn about torch
    alone() if sys.argv[1] == "alone" else run(sys.argv[1])
