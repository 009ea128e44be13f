"""Layers on inputs that are quantized as they come: torch's numbers, bit for bit, and float64's."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from kernels.calls import integers
from torch import Tensor

from eagerq import kernels
from eagerq.functional import dynamic_qparams
from eagerq.kernels import dynamic

NAMES = ("x", "weight", "weight_scale", "weight_zero_point", "bias")
SPANS = {False: 255, True: 127}


@st.composite
def real_inputs(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Inputs of any size; ranges of powers of two and symmetric ones make ties."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "one-sided", "ties", "symmetric", "constant", "zero"]))
    size = 10.0 ** draw(st.integers(-8, 4))
    x = torch.randn(shape, generator=generator) * size
    flat = x.view(-1)
    if kind == "one-sided":
        x = x.abs() if draw(st.booleans()) else -x.abs()
    elif kind == "ties":
        x = torch.randint(-64, 64, shape, generator=generator) * 2.0 ** draw(st.integers(-12, 6))
    elif kind == "symmetric":
        flat[0], flat[-1] = flat.abs().max(), -flat.abs().max()
    elif kind != "normal":
        x = torch.full(shape, size if kind == "constant" else 0.0)
    return x


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of ``linear_dynamic``."""
    rows, width, out = draw(st.integers(1, 9)), draw(st.integers(1, 70)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    channels = draw(st.sampled_from([1, out]))
    scale = torch.rand(channels, generator=generator) * 0.1 + 1e-3
    if draw(st.booleans()):
        scale = 2.0 ** torch.randint(-8, 0, (channels,), generator=generator)
    return {
        "x": draw(real_inputs(draw(st.sampled_from([(rows, width), (2, rows, width), (width,)])))),
        "weight": integers((out, width), torch.int8, generator),
        "weight_scale": scale,
        "weight_zero_point": torch.zeros(channels, dtype=torch.int32),
        "bias": torch.randn(out, generator=generator) if draw(st.booleans()) else None,
        "reduce_range": draw(st.booleans()),
    }


def every_way(call: dict[str, Any]) -> list[Tensor]:
    """What the door gives, and its reference."""
    return [kernels.linear_dynamic(*call.values()), kernels.linear_dynamic.reference(*call.values())]


def torchs(call: dict[str, Any]) -> Tensor:
    """What torch's own operator gives; there the weight is a quantized tensor of torch's."""
    weight, scale, zero_point = call["weight"], call["weight_scale"], call["weight_zero_point"]
    if scale.numel() == 1:
        quantized = torch._make_per_tensor_quantized_tensor(weight, scale.item(), 0)
    else:
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zero_point.long(), 0)
    packed = torch.ops.quantized.linear_prepack(quantized, call["bias"])
    x = torch.atleast_2d(call["x"])  # torch's refuses a lone vector
    result: Tensor = torch.ops.quantized.linear_dynamic(x, packed, reduce_range=call["reduce_range"])
    return result.reshape(*call["x"].shape[:-1], -1)


@given(calls())
def test_linear_is_torchs(ao: Any, call: dict[str, Any]) -> None:
    wanted = torchs(call)
    for ours in every_way(call):
        assert ours.dtype is torch.float32
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("reduce_range", [False, True])
def test_ties_of_symmetric_ranges_are_torchs(ao: Any, reduce_range: bool) -> None:
    """Their ends lie between two integers: how sums and inverses are rounded decides."""
    for end in range(1, 120):
        x = torch.tensor([[1.0, -1.0, 1 / 3, -1 / 3, 0.2, -0.6]]) * end
        identity = torch.eye(6).mul(127).to(torch.int8)
        call = dict(zip(NAMES, (x, identity, torch.ones(1), torch.zeros(1, dtype=torch.int32), None), strict=True))
        call["reduce_range"] = reduce_range
        wanted = torchs(call)
        for ours in every_way(call):
            assert torch.equal(ours, wanted)


@given(calls())
def test_linear_against_float64(call: dict[str, Any]) -> None:
    """However the input is rounded, the result is that of some input within half a step."""
    x = call["x"].double()
    weight = call["weight"].double() * call["weight_scale"].double()[:, None]
    wanted = torch.nn.functional.linear(x, weight, None if call["bias"] is None else call["bias"].double())
    span = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
    # a zero point is rounded too, which moves the ends of the range by another half
    step = max(span / SPANS[call["reduce_range"]], 6.1e-5)
    allowed = step * weight.abs().sum(1) + 1e-5 * wanted.abs() + 1e-6
    for ours in every_way(call):
        assert bool(((ours - wanted).abs() <= allowed).all())


@given(calls(), st.data())
def test_weights_with_zero_points(call: dict[str, Any], data: st.DataObject) -> None:
    count = call["weight_zero_point"].numel()
    shifts = data.draw(st.lists(st.sampled_from([0, 0, 0, -7, 5]), min_size=count, max_size=count))
    call["weight_zero_point"] = torch.tensor(shifts, dtype=torch.int32)
    fast, reference = every_way(call)
    assert torch.equal(fast, reference)
    centred = call["weight"].double() - call["weight_zero_point"][:, None]
    steps, scale, zero_point = dynamic._by_tensors(call["x"], call["reduce_range"])
    wanted = torch.nn.functional.linear((steps.double() - zero_point) * scale, centred * call["weight_scale"][:, None])
    wanted = wanted if call["bias"] is None else wanted + call["bias"]
    torch.testing.assert_close(fast.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()) + 1e-9)


@given(real_inputs((3, 17)), st.booleans())
@example(torch.tensor([-4.0, 4.0]), False)
@example(torch.tensor([-1e-45, 1e-45]), True)
@example(torch.tensor([-3e38, 3e38]), True)
def test_parameters_are_the_native_ones(x: Tensor, reduce_range: bool) -> None:
    scale, zero_point = dynamic_qparams(x.min(), x.max(), SPANS[reduce_range])
    assert dynamic._NATIVE is not None
    assert (scale.item(), zero_point.item()) == dynamic._NATIVE(x, reduce_range)


@given(calls())
def test_without_the_native_formula(call: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        wanted = kernels.linear_dynamic(*call.values())
        patch.setattr(dynamic, "_NATIVE", None)
        assert torch.equal(kernels.linear_dynamic(*call.values()), wanted)


LAYER = (torch.ones(5, 4, dtype=torch.int8), torch.ones(1), torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_input_that_is_not_finite(bad: float) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = bad
    assert kernels.linear_dynamic(x, *LAYER, None, True).isnan().all()


def test_empty_inputs() -> None:
    bias = torch.arange(5.0)
    assert kernels.linear_dynamic(torch.ones(0, 4), *LAYER, bias, True).shape == (0, 5)
    narrow = (LAYER[0][:, :0], *LAYER[1:])
    assert torch.equal(kernels.linear_dynamic(torch.ones(2, 0), *narrow, bias, True), bias.expand(2, 5))


def test_no_gradient_and_no_change_of_the_input() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    before = x.detach().clone()
    for result in (
        kernels.linear_dynamic(x, *LAYER, None, True),
        kernels.linear_dynamic.reference(x, *LAYER, None, True),
    ):
        assert not result.requires_grad
    assert torch.equal(x, before)


def test_under_torchs_checks() -> None:
    torch.library.opcheck(torch.ops.eagerq.linear_dynamic.default, (torch.randn(3, 4), *LAYER, torch.ones(5), True))
    torch.library.opcheck(torch.ops.eagerq.linear_dynamic.default, (torch.randn(2, 3, 4), *LAYER, None, False))


def test_half_precision_inputs() -> None:
    x = torch.randn(3, 4)
    wanted = kernels.linear_dynamic(x.bfloat16().float(), *LAYER, None, True)
    assert torch.equal(kernels.linear_dynamic(x.bfloat16(), *LAYER, None, True), wanted)


@given(calls())
def test_float16_is_torchs(ao: Any, call: dict[str, Any]) -> None:
    weight = call["weight"] * call["weight_scale"][:, None]
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(weight, call["bias"])
        wanted = torch.ops.quantized.linear_dynamic_fp16(torch.atleast_2d(call["x"]), packed)
    finally:
        torch.backends.quantized.engine = before
    ours = kernels.linear_dynamic_float16(torch.atleast_2d(call["x"]), weight.half(), call["bias"])
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()) + 1e-12)


def test_a_layer_goes_when_its_tensors_go() -> None:
    """What is kept for a layer does not keep the layer."""
    weight, scale = torch.ones(8, 4, dtype=torch.int8), torch.ones(8)
    kernels.linear_dynamic(torch.randn(3, 4), weight, scale, torch.zeros(8, dtype=torch.int32), None, False)
    gone = [weakref.ref(weight), weakref.ref(scale)]
    del weight, scale
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_a_changed_scale_is_seen() -> None:
    x, (weight, scale, zero_point) = torch.randn(3, 4), LAYER
    scale = scale.clone()
    before = kernels.linear_dynamic(x, weight, scale, zero_point, None, False)
    scale.mul_(2)
    torch.testing.assert_close(kernels.linear_dynamic(x, weight, scale, zero_point, None, False), before * 2)
