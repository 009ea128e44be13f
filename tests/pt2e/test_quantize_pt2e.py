"""prepare_pt2e and convert_pt2e: the models given stay as they are, and what comes out runs and exports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from eagerq.errors import InvalidArgumentError, UnsupportedError
from eagerq.pt2e import MinMaxObserver, convert_pt2e, prepare_pt2e
from eagerq.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

aten = torch.ops.aten
ops = torch.ops.quantized_decomposed
ACTIVATION = QuantizationSpec(torch.uint8, MinMaxObserver, 0, 255, torch.per_tensor_affine)
WEIGHT = QuantizationSpec(torch.int8, MinMaxObserver, -127, 127, torch.per_tensor_symmetric)


class Linears(Quantizer):
    def annotate(self, model: GraphModule) -> None:
        for node in model.graph.nodes:
            if node.target is aten.linear.default:
                inputs = {node.args[0]: ACTIVATION, node.args[1]: WEIGHT}
                node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, ACTIVATION)

    def validate(self, model: GraphModule) -> None:
        pass


X = (torch.linspace(-2, 2, 8).reshape(2, 4),)


def exported() -> GraphModule:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    return torch.export.export(net, X).module()


def calls(model: GraphModule) -> list[object]:
    return [node.target for node in model.graph.nodes if node.op == "call_function"]


def text(model: GraphModule) -> str:
    return str(model.graph) + model.code + str(list(model.state_dict()))


def test_a_net_of_linears() -> None:
    prepared = prepare_pt2e(exported(), Linears())
    observed: Tensor = prepared(*X)
    assert calls(prepared) == [aten.linear.default, aten.relu.default, aten.linear.default]
    converted = convert_pt2e(prepared)
    q, dq = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    one = [q, dq, aten.linear.default, q, dq]
    assert calls(converted) == [dq, dq, *one, aten.relu.default, *one]
    torch.testing.assert_close(converted(*X), observed, atol=0.05, rtol=0)
    assert {value.dtype for name, value in converted.state_dict().items() if "frozen" in name} == {torch.int8}
    assert not [name for name in converted.state_dict() if name.endswith("weight")]


def test_the_models_given_stay_as_they_are() -> None:
    model = exported()
    before = text(model)
    prepared = prepare_pt2e(model, Linears())
    assert text(model) == before
    prepared(*X)
    middle = text(prepared)
    first = convert_pt2e(prepared)
    assert text(prepared) == middle
    assert torch.equal(convert_pt2e(prepared)(*X), first(*X))


def test_quantizes_are_left_where_folding_is_not_wanted() -> None:
    prepared = prepare_pt2e(exported(), Linears())
    prepared(*X)
    folded, plain = convert_pt2e(prepared), convert_pt2e(prepared, fold_quantize=False)
    assert calls(plain).count(ops.quantize_per_tensor.default) == 6
    assert calls(folded).count(ops.quantize_per_tensor.default) == 4
    assert torch.equal(plain(*X), folded(*X))


def test_what_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"got Linear.*torch\.export"):
        prepare_pt2e(nn.Linear(2, 2), Linears())  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="reference representation"):
        convert_pt2e(prepare_pt2e(exported(), Linears()), use_reference_representation=True)


def test_a_graph_is_prepared_once_and_converted_once() -> None:
    prepared = prepare_pt2e(exported(), Linears())
    with pytest.raises(InvalidArgumentError, match=r"observers already, such as activation_post_process_\d"):
        prepare_pt2e(prepared, Linears())
    prepared(*X)
    converted = convert_pt2e(prepared)
    for model in (exported(), converted):
        with pytest.raises(InvalidArgumentError, match="has no observers"):
            convert_pt2e(model)


def test_a_quantizer_may_want_nothing() -> None:
    class Nothing(Linears):
        def annotate(self, model: GraphModule) -> None:
            pass

    model = exported()
    assert torch.equal(convert_pt2e(prepare_pt2e(model, Nothing()))(*X), model(*X))


def test_a_model_moved_since_it_was_exported() -> None:
    model = exported().to("meta")
    prepared = prepare_pt2e(model, Linears())
    assert {buffer.device.type for buffer in prepared.buffers()} == {"meta"}


@pytest.mark.parametrize("quantizer", [None, Linears])
def test_what_is_no_quantizer_is_refused(quantizer: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"got (NoneType|the class Linears), but a quantizer is needed"):
        prepare_pt2e(exported(), quantizer)
