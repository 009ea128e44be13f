"""XNNPACKQuantizer says of a graph, node by node, what ExecuTorch's says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pt2e.flows import quiet
from pt2e.graphs import peer
from pt2e.quantizer.models import ALL_INPUTS, All, said
from torch import nn
from torch.fx import GraphModule

import eagerq.pt2e
import eagerq.pt2e.quantizer as ours
import eagerq.pt2e.quantizer.xnnpack_quantizer
import eagerq.pt2e.quantizer.xnnpack_quantizer_utils
from eagerq.pt2e.rewriting import copied

CONFIGS: list[dict[str, Any]] = [
    {},
    {"is_per_channel": True, "act_qmin": -100, "weight_qmax": 100},
    {"is_qat": True},
    {"is_qat": True, "is_per_channel": True},
    {"is_dynamic": True},
    {"is_dynamic": True, "is_per_channel": True},
    {"is_dynamic": True, "is_qat": True},
]


@pytest.fixture(scope="module")
def theirs() -> Any:
    with quiet():
        return peer("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")


@pytest.fixture(scope="module")
def graphs() -> dict[bool, GraphModule]:
    """By whether they are for training."""
    with quiet():
        modes: Any = {train: torch.export.export(All().train(train), ALL_INPUTS) for train in (False, True)}
    return {train: program.module() for train, program in modes.items()}


def both(graph: GraphModule, theirs: Any, configure: Any) -> list[dict[str, tuple[Any, ...]]]:
    """What the two quantizers say, each of its own copy of the graph."""
    result = []
    for library in (theirs, ours):
        model, quantizer = copied(graph), configure(library, library.XNNPACKQuantizer())
        with quiet():  # theirs exports patterns to match
            quantizer.validate(quantizer.annotate(quantizer.transform_for_annotation(model)))
        result.append(said(model))
    return result


def by_output_channel(notes: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """ExecuTorch gives transposed convolutions one scale for each *input* channel where BatchNorm follows them."""
    for name, (inputs, *_) in notes.items():
        for source, spec in inputs.items():
            if name.startswith("conv_transpose") and source.endswith("weight"):
                spec["ch_axis"] = 1
    return notes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(config) or "default")
def test_global(graphs: dict[bool, GraphModule], theirs: Any, config: dict[str, Any]) -> None:
    """Training graphs for training, evaluation graphs for the rest."""

    def configure(library: Any, quantizer: Any) -> Any:
        return quantizer.set_global(library.get_symmetric_quantization_config(**config))

    wanted, got = both(graphs["is_qat" in config], theirs, configure)
    assert got == by_output_channel(wanted)
    assert len(got) > (20 if "is_dynamic" in config else 50)


def test_settings(graphs: dict[bool, GraphModule], theirs: Any) -> None:
    """Linears by class and by name, an operator, a filter, and the rest of the model by the global setting."""

    def configure(library: Any, quantizer: Any) -> Any:
        config = library.get_symmetric_quantization_config
        quantizer.set_module_name("parts.0.first", config(is_dynamic=True)).set_module_type(torch.nn.Linear, None)
        quantizer.set_operator_type(torch.ops.aten.mul.Tensor, config(is_qat=True))
        quantizer.set_filter_function(lambda node: "cat" not in node.name and "1d" not in node.name)
        return quantizer.set_global(config(is_per_channel=True))

    wanted, got = both(graphs[False], theirs, configure)
    for notes in (wanted, got):
        # theirs annotates cat whatever the filter says
        assert {name.split("_")[0] for name in notes} >= {"linear", "mul", "add", "conv2d", "relu"}
    assert got == by_output_channel({name: note for name, note in wanted.items() if name in got})
    assert [name for name in wanted if name not in got and not name.startswith("cat")] == []


@pytest.mark.parametrize("config", [{"is_per_channel": True}, {"is_dynamic": True}], ids="-".join)
def test_numbers(theirs: Any, config: dict[str, Any]) -> None:
    """Each library's quantizer on its own flow."""
    with quiet():
        from torchao.quantization.pt2e import quantize_pt2e as their_flow
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model = nn.Sequential(*net, nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    data = [torch.randn(4, 3, 6, 6) for _ in range(3)]
    outputs = []
    for library, flow in ((theirs, their_flow), (ours, eagerq.pt2e)):
        quantizer = library.XNNPACKQuantizer().set_global(library.get_symmetric_quantization_config(**config))
        with quiet():
            prepared = flow.prepare_pt2e(torch.export.export(model, (data[0],)).module(), quantizer)
            for x in data:
                prepared(x)
            outputs.append(flow.convert_pt2e(prepared)(data[0]))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model(data[0]))


def test_public_names(theirs: Any) -> None:
    """What can be imported from ExecuTorch's modules can be from ours."""
    with quiet():
        utils = peer("executorch.backends.xnnpack.quantizer.xnnpack_quantizer_utils")
    for their_module, our_module in (
        (theirs, eagerq.pt2e.quantizer.xnnpack_quantizer),
        (utils, eagerq.pt2e.quantizer.xnnpack_quantizer_utils),
    ):
        names = [
            name
            for name, value in vars(their_module).items()
            if not name.startswith("_")
            and (name in their_module.__all__ or getattr(value, "__module__", None) == their_module.__name__)
        ]
        assert [name for name in names if not hasattr(our_module, name)] == []
        assert set(their_module.OP_TO_ANNOTATOR) <= set(our_module.OP_TO_ANNOTATOR)


def test_supported(theirs: Any) -> None:
    for name in ("get_supported_operators", "get_supported_quantization_configs"):
        assert len(getattr(ours.XNNPACKQuantizer, name)()) == len(getattr(theirs.XNNPACKQuantizer, name)())
    everything = theirs.XNNPACKQuantizer.get_supported_operator_for_quantization_config(None)
    assert ours.XNNPACKQuantizer.get_supported_operator_for_quantization_config(None) == everything
    names = [
        (pattern.name, pattern.is_dynamic, pattern.is_qat) for pattern in theirs.XNNPACKQuantizer.SUPPORTED_PATTERNS
    ]
    assert names == [
        (pattern.name, pattern.is_dynamic, pattern.is_qat) for pattern in ours.XNNPACKQuantizer.SUPPORTED_PATTERNS
    ]
