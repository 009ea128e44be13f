"""Layers with other weights, ranges and options than their defaults, in Q/DQ form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pt2e.exporting.cases import Around, step
from pt2e.exporting.graphs import exported, quantized_as, steps_between, used
from torch import Tensor, nn
from torch.export import Dim

import eagerq
from eagerq import QConfig, QTensor
from eagerq.fake_quantize import FusedMovingAvgObsFakeQuantize as FakeQuantize
from eagerq.nn import quantized
from eagerq.nn.quantized import FloatFunctional
from eagerq.nn.quantized import functional as qF
from eagerq.pt2e.operators import QUANTIZE_PER_TENSOR


def _of(low: int, high: int, **options: Any) -> Any:
    return FakeQuantize.with_args(quant_min=low, quant_max=high, **options)


PER_TENSOR_WEIGHT = _of(-128, 127, dtype=torch.int8, qscheme=torch.per_tensor_symmetric)
QCONFIGS = {
    "reduced range": eagerq.get_default_qat_qconfig("x86"),
    "weights per tensor": eagerq.get_default_qat_qconfig("qnnpack"),
    "int8": QConfig(_of(-128, 127, dtype=torch.int8, qscheme=torch.per_tensor_affine), PER_TENSOR_WEIGHT),
    "symmetric": QConfig(_of(-128, 127, dtype=torch.int8, qscheme=torch.per_tensor_symmetric), PER_TENSOR_WEIGHT),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(9, 7, bias=False), (9,)),
    "LinearReLU": (lambda: nn.Sequential(nn.Linear(9, 7), nn.ReLU()), (9,)),
    "ConvReLU": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.ReLU()), (4, 6, 6)),
    "Conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "ConvTranspose": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "PReLU": (nn.PReLU, (5,)),
}


def _trained(layer: nn.Module, shape: tuple[int, ...], qconfig: Any, inputs: int = 1) -> Any:
    torch.manual_seed(0)
    model: Any = Around(layer, inputs).train()
    if isinstance(layer, nn.Sequential):
        model = eagerq.fuse_modules_qat(model, ["inner.0", "inner.1"])
    model.qconfig = qconfig
    model = eagerq.prepare_qat(model)
    for _ in range(3):
        model(*(torch.randn(8, *shape) * 2 for _ in range(inputs)))
    return eagerq.convert(model.eval(), as_trained=True)


CLAMP = torch.ops.aten.clamp.default


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_other_ranges_and_weights(layer: str, qconfig: str) -> None:
    make, shape = LAYERS[layer]
    model, x = _trained(make(), shape, QCONFIGS[qconfig]), torch.randn(16, *shape) * 2
    program, graph = exported(model, (x,))
    assert steps_between(graph(x), model(x), step(model)).max() <= 1
    made = next(node for node in program.graph.nodes if node.target is QUANTIZE_PER_TENSOR)
    dtype = model.quants[0].output.dtype
    assert quantized_as(made)[2:] == (torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype)


@torch.no_grad()
@pytest.mark.parametrize("zero_point", [0, 100])
def test_a_fused_relu_is_said_where_the_range_does_not_say_it(zero_point: int) -> None:
    make, shape = LAYERS["LinearReLU"]
    model, x = _trained(make(), shape, QCONFIGS["weights per tensor"]), torch.randn(16, *shape) * 2
    model.inner[0].zero_point = zero_point
    program, graph = exported(model, (x,))
    assert used(program)[torch.ops.aten.relu.default] == (zero_point > 0)
    wanted = model(x)
    assert wanted.min() == 0
    assert steps_between(graph(x), wanted, step(model)).max() <= 1


def test_a_reduced_range_is_clamped_between_two_quantizes_that_fill_the_dtype() -> None:
    make, shape = LAYERS["Conv"]
    model = _trained(make(), shape, QCONFIGS["reduced range"])
    program, _ = exported(model, (torch.randn(2, *shape),))
    assert {quantized_as(one)[2:4] for one in program.graph.nodes if one.target is QUANTIZE_PER_TENSOR} == {(0, 255)}
    assert used(program)[QUANTIZE_PER_TENSOR] == 2 * used(program)[CLAMP] == 4  # the stub's and the layer's


@torch.no_grad()
@pytest.mark.parametrize("layer", ["Linear", "Conv", "ConvTranspose"])
def test_channels_of_weights_of_one_sign(layer: str) -> None:
    """Their zero points are not zero, so that their weights are rounded once more: that costs a step at most."""
    make, shape = LAYERS[layer]
    float_layer: Any = make()
    float_layer.weight.data.abs_()
    model = _trained(float_layer, shape, eagerq.get_default_qat_qconfig("onednn"))
    x = torch.randn(32, *shape) * 2
    _, graph = exported(model, (x,))
    assert steps_between(graph(x), model(x), step(model)).max() <= 1


SCALES = st.one_of(st.integers(-8, -2).map(lambda power: 2.0**power), st.floats(0.004, 0.2))


@torch.no_grad()
@settings(max_examples=25, deadline=None)
@given(
    dim=st.sampled_from((1, 2, 2, 3)),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.one_of(st.integers(0, 2), st.just("same")),
    mode=st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")),
    transposed=st.booleans(),
    scales=st.tuples(SCALES, SCALES),
    signed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_convolutions_of_any_shape(
    dim: int,
    groups: int,
    kernel: int,
    stride: int,
    padding: Any,
    mode: str,
    transposed: bool,
    scales: tuple[float, float],
    signed: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"groups": groups, "bias": bool(seed % 2)}
    if transposed:
        options |= {"stride": stride, "padding": min(kernel - 1, 1)}
    elif padding == "same":
        options |= {"padding": "same", "padding_mode": mode}
    else:
        options |= {"stride": stride, "padding": padding, "padding_mode": mode}
    inner: Any = getattr(quantized, f"Conv{'Transpose' * transposed}{dim}d")(2 * groups, 3 * groups, kernel, **options)
    axis = int(transposed)
    shape = inner.weight().shape
    w = torch.randint(-128, 128, shape, dtype=torch.int8)
    weight_scale = torch.rand(shape[axis]) * 0.01 + 0.001
    w = QTensor(w, weight_scale, torch.zeros(shape[axis], dtype=torch.int32), axis)
    inner.set_weight_bias(w, torch.randn(3 * groups) if options["bias"] else None)
    inner.scale, inner.zero_point = scales[1] * 8, 100
    dtype, zero_point = (torch.int8, -5) if signed else (torch.uint8, 120)
    model = nn.Sequential(quantized.Quantize(scales[0], zero_point, dtype), inner, quantized.DeQuantize())
    x = torch.randn(2, 2 * groups, *(5,) * dim) * scales[0] * 60
    _, graph = exported(model, (x,))
    assert steps_between(graph(x), model(x), inner.scale).max() <= 1


class _Operation(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.functional, self.function = FloatFunctional(), function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.functional, *inputs)


OPERATIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "add": (2, lambda f, x, y: f.add(x, y)),
    "add a row": (2, lambda f, x, y: f.add(x, y[:, :1])),
    "add_relu": (2, lambda f, x, y: f.add_relu(x, y)),
    "mul": (2, lambda f, x, y: f.mul(x, y)),
    "matmul": (2, lambda f, x, y: f.matmul(x, y.transpose(1, 2))),
    "cat": (2, lambda f, x, y: f.cat([x, y, x], 1)),
    "add_scalar": (1, lambda f, x: f.add_scalar(x, 0.31)),
    "add_scalar above": (1, lambda f, x: f.add_scalar(x, 31.0)),
    "add_scalar below": (1, lambda f, x: f.add_scalar(x, -31.0)),
    "mul_scalar": (1, lambda f, x: f.mul_scalar(x, 0.4)),
    "mul_scalar mirrored": (1, lambda f, x: f.mul_scalar(x, -1.7)),
    "mul_scalar by nothing": (1, lambda f, x: f.mul_scalar(x, 0.0)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("qconfig", ["reduced range", "symmetric"])
def test_operations_of_functional_modules(name: str, qconfig: str) -> None:
    count, function = OPERATIONS[name]
    model = _trained(_Operation(function), (3, 5), QCONFIGS[qconfig], count)
    inputs = tuple(torch.randn(6, 3, 5) * 2 for _ in range(count))
    program, graph = exported(model, inputs)
    wanted, got = model(*inputs), graph(*inputs)
    if "scalar" in name:  # nothing is rounded, so nothing may differ but the scale's last digit
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
        assert used(program)[QUANTIZE_PER_TENSOR] - used(program)[CLAMP] == 2
    assert steps_between(got, wanted, step(model)).max() <= 1


def _q(x: Tensor) -> QTensor:
    return eagerq.quantize_per_tensor(x, 0.05, 110, torch.uint8)


torch.manual_seed(1)
WEIGHT = eagerq.quantize_per_tensor(torch.randn(4, 6), 0.02, 3, torch.int8)
FILTERS = eagerq.quantize_per_channel(torch.randn(4, 6, 3), torch.rand(4) * 0.02, torch.zeros(4), 0, torch.int8)
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda q: qF.linear(q.transpose(1, 2), WEIGHT, None, 0.05, 110),
    "conv1d": lambda q: qF.conv1d(q, FILTERS, None, padding=1, scale=0.05, zero_point=110),
    "celu": lambda q: qF.celu(q, 0.05, 110, 0.5),
    "elu": lambda q: qF.elu(q, 0.05, 110, 0.7),
    "leaky_relu": lambda q: qF.leaky_relu(q, 0.1, scale=0.05, zero_point=110),
    "GroupNorm": quantized.GroupNorm(3, 6, None, None, 0.05, 110),
    "InstanceNorm1d": quantized.InstanceNorm1d(6, None, None, 0.05, 110),
    "one image": lambda q: quantized.InstanceNorm1d(6, None, None, 0.05, 110)(q[0]),
    "LayerNorm": quantized.LayerNorm(8, None, None, 0.05, 110),
    "Sigmoid": quantized.Sigmoid(0.05, 110),
    "Softmax": quantized.Softmax(1, 0.05, 110),
    "per-channel tensors": lambda q: q.dequantize() + FILTERS.dequantize().sum() * 0.05,
    "quantize_per_channel": lambda q: eagerq.quantize_per_channel(
        q.dequantize(), torch.rand(6) + 0.1, torch.zeros(6, dtype=torch.int32), 1, torch.int8
    ).dequantize(),
}


class _Functional(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.quant, self.function = quantized.Quantize(0.05, 110, torch.uint8), function

    def forward(self, x: Tensor) -> Any:
        torch.manual_seed(0)
        y = self.function(self.quant(x))
        return y.dequantize() if isinstance(y, QTensor) else y


@torch.no_grad()
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_told_their_parameters(name: str) -> None:
    model, x = _Functional(FUNCTIONS[name]), torch.randn(3, 6, 8) * 2
    _, graph = exported(model, (x,), (({0: Dim("batch", min=2, max=64)}),))
    assert steps_between(graph(x), model(x), 0.05).max() <= 1
