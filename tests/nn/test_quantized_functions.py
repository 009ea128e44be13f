"""eagerq.nn.quantized.functional: torch.ao's integers from the same arguments, and errors for others."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.calls import SCALE_KINDS, scales
from torch import Tensor

import eagerq
from eagerq import NotQuantizedError, QTensor, quantize_per_channel, quantize_per_tensor
from eagerq.errors import InvalidArgumentError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.nn.quantized import functional as qF

Call = Callable[[Any, Any], Any]

# what the function is called with, its own or torch.ao's; pooled images have three channels
ON_IMAGES: dict[str, Call] = {
    "avg_pool2d": lambda f, q: f.avg_pool2d(q, 3, 2, 1),
    "avg_pool2d, not counting padding": lambda f, q: f.avg_pool2d(q, (2, 3), None, (1, 0), True, False),
    "avg_pool2d, divisor": lambda f, q: f.avg_pool2d(q, 2, divisor_override=3),
    "adaptive_avg_pool2d": lambda f, q: f.adaptive_avg_pool2d(q, (2, 3)),
    "max_pool1d": lambda f, q: f.max_pool1d(q.flatten(2), 3, 2, 1, ceil_mode=True),
    "max_pool2d": lambda f, q: f.max_pool2d(q, 3, 2, 1, 2),
    "interpolate": lambda f, q: f.interpolate(q, scale_factor=2),
    "interpolate, size": lambda f, q: f.interpolate(q, (9, 5)),
    "interpolate, bilinear": lambda f, q: f.interpolate(q, (8, 8), mode="bilinear", align_corners=False),
}
ON_VOLUMES: dict[str, Call] = {
    "avg_pool3d": lambda f, q: f.avg_pool3d(q, 2, 1, 1),
    "adaptive_avg_pool3d": lambda f, q: f.adaptive_avg_pool3d(q, (1, 2, 3)),
}
ACTIVATIONS: dict[str, Callable[[Any, Any, float, int], Any]] = {
    "celu": lambda f, q, scale, zero_point: f.celu(q, scale, zero_point, 1.3),
    "elu": lambda f, q, scale, zero_point: f.elu(q, scale, zero_point, 0.6),
    "hardswish": lambda f, q, scale, zero_point: f.hardswish(q, scale, zero_point),
    "leaky_relu": lambda f, q, scale, zero_point: f.leaky_relu(q, 0.2, False, scale, zero_point),
    "leaky_relu, parameters kept": lambda f, q, scale, zero_point: f.leaky_relu(q, 0.2),
    "leaky_relu in place": lambda f, q, scale, zero_point: f.leaky_relu(q, 0.2, True),
    "hardtanh": lambda f, q, scale, zero_point: f.hardtanh(q, -0.4, 2.0),
    "hardtanh in place": lambda f, q, scale, zero_point: f.hardtanh(q, inplace=True),
    "hardsigmoid": lambda f, q, scale, zero_point: f.hardsigmoid(q),
    "threshold": lambda f, q, scale, zero_point: f.threshold(q, 0.3, -0.2),
    "clamp": lambda f, q, scale, zero_point: f.clamp(q, -0.5, 1.5),
}


def twin(q: QTensor) -> Tensor:
    if q.axis is None:
        return torch._make_per_tensor_quantized_tensor(q.integers.clone(), q.scale, q.zero_point)
    return torch._make_per_channel_quantized_tensor(q.integers, q.scale, q.zero_point, q.axis)


def functions(ao: Oracle) -> Any:
    return ao.quantized.functional


def images(*shape: int) -> QTensor:
    x = torch.randint(0, 256, shape or (2, 3, 7, 8), dtype=torch.uint8)
    return QTensor(x, 0.0371, 117)


def weight(*shape: int, per_channel: bool) -> QTensor:
    w = torch.randn(shape)
    if per_channel:
        return quantize_per_channel(w, torch.rand(shape[0]) * 0.02 + 0.01, torch.zeros(shape[0]).int(), 0, torch.int8)
    return quantize_per_tensor(w, 0.0213, 0, torch.int8)


def test_names_are_those_of_torch_ao(ao: Oracle) -> None:
    assert set(qF.__all__) >= set(functions(ao).__all__)
    assert eagerq.nn.quantized.functional is qF


@pytest.mark.parametrize("name", [*ON_IMAGES, *ON_VOLUMES])
def test_pooling_and_interpolation(name: str, ao: Oracle) -> None:
    q = images(2, 3, 4, 5, 6) if name in ON_VOLUMES else images()
    call = (ON_IMAGES | ON_VOLUMES)[name]
    got, wanted = call(qF, q), call(functions(ao), twin(q))
    exact = call(F, q.int_repr().double() - q.zero_point)
    tie = (exact - exact.floor() - 0.5).abs() < 1e-4  # there torch's builds part
    assert torch.equal(got.int_repr()[~tie], wanted.int_repr()[~tie])
    assert torch.equal(got.int_repr()[tie], (exact[tie] + q.zero_point).round().to(torch.uint8))
    assert (got.q_scale(), got.q_zero_point()) == (q.scale, q.zero_point)


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(data=st.data())
def test_activations(name: str, ao: Oracle, data: st.DataObject) -> None:
    kind, zero_points = data.draw(SCALE_KINDS), st.integers(0, 255)
    q = QTensor(torch.arange(256, dtype=torch.uint8), data.draw(scales(kind)), data.draw(zero_points))
    output = (data.draw(scales(kind)), data.draw(zero_points))
    wanted = ACTIVATIONS[name](functions(ao), twin(q), *output)
    got = ACTIVATIONS[name](qF, q.clone(), *output)
    assert torch.equal(got.int_repr(), wanted.int_repr())
    assert (got.q_scale(), got.q_zero_point()) == (wanted.q_scale(), wanted.q_zero_point())


@pytest.mark.parametrize("name", ["celu", "elu", "hardswish", "leaky_relu"])
@given(seed=st.integers(0, 2**31))
def test_activations_next_to_ties(name: str, ao: Oracle, seed: int) -> None:
    # where the last bit of each step of the calculation tells
    generator = random.Random(seed)
    q = QTensor(torch.arange(256, dtype=torch.uint8), generator.uniform(0.001, 0.3), generator.randrange(256))
    real = {"celu": F.celu, "elu": F.elu, "hardswish": F.hardswish, "leaky_relu": F.leaky_relu}[name](q.dequantize())
    tie = generator.randrange(120) + 0.5
    scale = real[generator.randrange(256)].abs().item() / tie * (1 + generator.uniform(-1e-7, 1e-7)) or 0.1
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "celu": lambda f, x: f.celu(x, scale, 120),
        "elu": lambda f, x: f.elu(x, scale, 120),
        "hardswish": lambda f, x: f.hardswish(x, scale, 120),
        "leaky_relu": lambda f, x: f.leaky_relu(x, 0.01, False, scale, 120),
    }
    wanted = calls[name](functions(ao), twin(q))
    assert torch.equal(calls[name](qF, q).int_repr(), wanted.int_repr())


def test_thresholds_are_rounded_as_float32() -> None:
    # 1 / 0.4 is 2.5 there, so 1.0 lies on a tie, and goes to the even integer
    q = QTensor(torch.arange(256, dtype=torch.uint8), torch.tensor(0.4).item(), 1)
    assert qF.hardtanh(q).int_repr().max() == 4
    infinite = qF.hardtanh(q, -float("inf"), float("inf"))
    assert torch.equal(infinite.int_repr(), q.int_repr())


def test_in_place() -> None:
    for function in (qF.leaky_relu, qF.hardtanh, qF.hardsigmoid):
        q = images()
        assert function(q, inplace=True) is q


@settings(max_examples=8)
@given(
    dim=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    per_channel=st.booleans(),
    with_bias=st.booleans(),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
)
def test_convolutions(
    ao: Oracle, dim: int, groups: int, per_channel: bool, with_bias: bool, stride: int, padding: int, dilation: int
) -> None:
    q = images(2, 8, *[7] * dim)
    w = weight(4, 8 // groups, *[3] * dim, per_channel=per_channel)
    bias = torch.randn(4) if with_bias else None
    how: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    how |= dict(scale=0.1137, zero_point=119)
    got = getattr(qF, f"conv{dim}d")(q, w, bias, **how)
    wanted = getattr(functions(ao), f"conv{dim}d")(twin(q), twin(w), bias, **how)
    assert torch.equal(got.int_repr(), wanted.int_repr())
    assert (got.q_scale(), got.q_zero_point(), got.dtype) == (0.1137, 119, torch.uint8)


def test_convolution_to_signed_integers() -> None:
    q, w = images(), weight(4, 3, 3, 3, per_channel=True)
    signed = qF.conv2d(q, w, None, scale=0.2, zero_point=-9, dtype=torch.int8)
    unsigned = qF.conv2d(q, w, None, scale=0.2, zero_point=119)
    assert signed.dtype is torch.int8
    assert torch.equal(signed.dequantize(), unsigned.dequantize())


@settings(max_examples=8)
@given(per_channel=st.booleans(), with_bias=st.booleans(), given_output=st.booleans(), rows=st.integers(1, 5))
def test_linear(ao: Oracle, per_channel: bool, with_bias: bool, given_output: bool, rows: int) -> None:
    q, w = images(rows, 3, 12), weight(5, 12, per_channel=per_channel)
    bias = torch.randn(5) if with_bias else None
    output: dict[str, Any] = dict(scale=0.1137, zero_point=119) if given_output else {}
    got = qF.linear(q, w, bias, **output)
    wanted = functions(ao).linear(twin(q), twin(w), bias, **output)
    assert torch.equal(got.int_repr(), wanted.int_repr())
    assert (got.q_scale(), got.q_zero_point()) == (wanted.q_scale(), wanted.q_zero_point())


DEPRECATED: dict[str, tuple[Call, Call]] = {
    "upsample": (lambda f, q: f.upsample(q, scale_factor=2), lambda f, q: f.interpolate(q, scale_factor=2)),
    "upsample_bilinear": (
        lambda f, q: f.upsample_bilinear(q, (9, 9)),
        lambda f, q: f.interpolate(q, (9, 9), mode="bilinear", align_corners=True),
    ),
    "upsample_nearest": (lambda f, q: f.upsample_nearest(q, (9, 9)), lambda f, q: f.interpolate(q, (9, 9))),
}


@pytest.mark.parametrize("name", DEPRECATED)
def test_upsampling_is_interpolation(name: str) -> None:
    old, new = DEPRECATED[name]
    q = images()
    with pytest.warns(UserWarning, match=rf"functional\.{name} is deprecated: use interpolate") as caught:
        got = old(qF, q)
    assert caught[0].filename == __file__
    assert torch.equal(got.int_repr(), new(qF, q).int_repr())


def test_maxima_with_their_places() -> None:
    q = images()
    values, places = qF.max_pool2d(q, 2, return_indices=True)
    wanted, expected_places = F.max_pool2d(q.int_repr().float(), 2, return_indices=True)
    assert torch.equal(values.int_repr().float(), wanted)
    assert torch.equal(places, expected_places)


def test_dropout_gives_what_it_gets() -> None:
    q = images()
    assert qF.dropout(q, 0.5, 3, 0.9, True) is q


@pytest.mark.parametrize("name", [name for name in qF.__all__ if not name.startswith("upsample_")])
@pytest.mark.filterwarnings("ignore:.*upsample is deprecated")
def test_float_tensors_are_refused(name: str) -> None:
    x = torch.randn(2, 3, 7, 8)
    arguments: dict[str, tuple[Any, ...]] = {
        **{f"conv{dim}d": (weight(4, 3, *[3] * dim, per_channel=True), None) for dim in (1, 2, 3)},
        "linear": (weight(4, 8, per_channel=True),),
        **dict.fromkeys(["celu", "elu", "hardswish"], (0.1, 3)),
        **dict.fromkeys(["clamp", "threshold"], (0.1, 0.3)),
        **dict.fromkeys(["hardtanh", "leaky_relu", "hardsigmoid", "dropout"], ()),
        **dict.fromkeys(["interpolate", "upsample"], (9,)),
    }
    asked = "interpolate" if name == "upsample" else name
    for error in (NotQuantizedError, ValueError, InvalidInputError, RuntimeError):
        with pytest.raises(
            error, match=rf"Input to 'quantized\.{asked}' must be quantized! It got .*float32.*QuantStub"
        ):
            getattr(qF, name)(x, *arguments.get(name, (2,)))


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "per-channel input": (
        lambda: qF.elu(weight(2, 3, per_channel=True), 0.1, 3),
        InvalidInputError,
        r"'quantized\.elu' got a per-channel tensor",
    ),
    "alpha": (lambda: qF.celu(images(), 0.1, 3, 0.0), InvalidArgumentError, "alpha of 0"),
    "rescaled in place": (
        lambda: qF.leaky_relu(images(), 0.1, True, 0.1, 3),
        InvalidConfigError,
        "Cannot rescale with `inplace`",
    ),
    "threshold": (lambda: qF.threshold(images(), None, 1.0), ValueError, "Input to 'threshold' must be specified!"),  # type: ignore[arg-type]
    "value": (lambda: qF.threshold(images(), 1.0, None), ValueError, "Input to 'value' must be specified!"),  # type: ignore[arg-type]
    "padding_mode": (
        lambda: qF.conv2d(images(), weight(4, 3, 3, 3, per_channel=True), None, padding_mode="reflect"),
        NotImplementedError,
        "Only zero-padding is supported!",
    ),
    "axes": (
        lambda: qF.conv1d(images(), weight(4, 3, 3, per_channel=True), None),
        ValueError,
        r"Input shape must be `\(N, C, L\)`!",
    ),
    "channels": (
        lambda: qF.conv2d(images(), weight(4, 5, 3, 3, per_channel=True), None),
        InvalidArgumentError,
        r"3 input features, and a weight of shape \(4, 5, 3, 3\) for 5",
    ),
    "features": (
        lambda: qF.linear(images(), weight(4, 5, per_channel=False)),
        InvalidArgumentError,
        r"8 input features",
    ),
    "float weight": (
        lambda: qF.linear(images(), torch.randn(4, 8)),  # type: ignore[arg-type]
        UnsupportedError,
        r"'quantized\.linear' got a weight of torch\.float32",
    ),
    "unsigned weight": (lambda: qF.linear(images(), images(4, 8)), NotImplementedError, r"torch\.uint8.*torch\.int8"),
    "another axis": (
        lambda: qF.linear(
            images(), quantize_per_channel(torch.randn(4, 8), torch.ones(8), torch.zeros(8), 1, torch.int8)
        ),
        InvalidArgumentError,
        "axis 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert isinstance(caught.value, eagerq.EagerqError)


@pytest.mark.usefixtures("fresh_compiler")
def test_through_the_compiler_and_export() -> None:
    w = weight(4, 3, 3, 3, per_channel=True)

    class Functions(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = quantize_per_tensor(x, 0.05, 100, torch.uint8)
            q = qF.conv2d(q, w, None, padding=1, scale=0.1, zero_point=90)
            q = qF.hardswish(q, 0.08, 20)
            q = qF.avg_pool2d(qF.elu(q, 0.07, 30), 2)
            return qF.hardsigmoid(q).dequantize()

    model, x = Functions(), torch.randn(2, 3, 6, 6)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    assert torch.equal(torch.export.export(model, (x,), strict=False).module()(x), model(x))


# --- the map of operators -----------------------------------------------------------------------------


def test_operators_of_float_functions(ao: Oracle) -> None:
    ours = eagerq.get_default_float_to_quantized_operator_mappings()
    theirs = ao.quantization.get_default_float_to_quantized_operator_mappings()
    assert set(ours) == set(theirs)
    q, ones = images(), torch.ones(3)
    calls: dict[Any, tuple[Any, ...]] = {
        F.elu: (0.06, 20),
        F.hardswish: (0.06, 20),
        F.leaky_relu: (0.1, False, 0.06, 20),
        F.dropout: (0.06, 20),
        F.instance_norm: (ones, ones, 1e-5, 0.06, 20),
        F.layer_norm: ((8,), torch.ones(8), torch.ones(8), 1e-5, 0.06, 20),
    }
    for function, arguments in calls.items():
        assert eagerq.get_quantized_operator(function) is ours[function]
        wanted = ao.quantization.get_quantized_operator(function)(twin(q), *arguments)
        # of short tensors torch.ao rounds the last values another way
        got = ours[function](q, *arguments)
        assert (got.int_repr().int() - wanted.int_repr()).abs().max() <= 1
        assert (got.q_scale(), got.q_zero_point()) == (wanted.q_scale(), wanted.q_zero_point())


def test_the_map_given_out_is_a_copy() -> None:
    eagerq.get_default_float_to_quantized_operator_mappings().clear()
    assert eagerq.DEFAULT_FLOAT_TO_QUANTIZED_OPERATOR_MAPPINGS


def test_an_unknown_operator_is_refused() -> None:
    with pytest.raises(AssertionError, match="does not have corresponding quantized op"):
        eagerq.get_quantized_operator(F.silu)
