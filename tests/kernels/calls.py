"""Calls of the integer kernels: drawn arguments, and what they have to give, computed step by step in numpy.

A call is a dictionary of arguments in the order of the kernel's signature.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from eagerq.kernels.reference import channels_last

Call = dict[str, Any]

RANGES = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
}
BYTES = st.sampled_from([torch.uint8, torch.int8])

# Powers of two make ties; float32's other numbers make rounding errors; a plain Python number has to
# become the float32 that the kernels see.
SCALE_KINDS = st.sampled_from(["power", "single", "plain"])


def scales(kind: str, low: float = 2.0**-8, high: float = 0.5) -> st.SearchStrategy[float]:
    if kind == "power":
        return st.integers(int(np.ceil(np.log2(low))), int(np.log2(high))).map(lambda exponent: 2.0**exponent)
    return st.floats(low, high, width=32 if kind == "single" else 64)


def zero_points(dtype: torch.dtype) -> st.SearchStrategy[int]:
    low, high = RANGES[dtype]
    return st.sampled_from([low, high]) | st.integers(low, high)


@st.composite
def bounds(draw: st.DrawFn, dtype: torch.dtype, zero_point: int) -> tuple[int, int]:
    """The integers in use: all, those of a ReLU, of a ReLU6, or any."""
    low, high = RANGES[dtype]
    kind = draw(st.sampled_from(["all", "relu", "relu6", "some"]))
    if kind == "all":
        return low, high
    if kind == "relu":
        return zero_point, high
    if kind == "relu6":
        return zero_point, draw(st.integers(zero_point, high))
    return draw(st.tuples(st.integers(low, high), st.integers(low, high)).map(lambda two: (min(two), max(two))))


def integers(shape: Any, dtype: torch.dtype, generator: torch.Generator, spread: int = 256, around: int = 0) -> Tensor:
    """Random integers of ``dtype``, at most ``spread`` from ``around``."""
    low, high = RANGES[dtype]
    drawn = torch.randint(max(low, around - spread), min(high, around + spread) + 1, tuple(shape), generator=generator)
    return drawn.to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values elsewhere in memory."""
    if layout == "channels last" and 3 <= x.dim() <= 5:
        return channels_last(x)
    if layout == "strided":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


LAYOUTS = st.sampled_from(["contiguous", "channels last", "strided", "transposed"])


@st.composite
def _requantized(
    draw: st.DrawFn, x_shape: Any, weight_shape: Any, x_dtypes: Any, output_dtypes: Any, middle: Call
) -> Call:
    """The arguments that linear and conv share, ``middle`` between those of the weight and of the output."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(SCALE_KINDS)
    x_dtype, dtype = draw(x_dtypes), draw(output_dtypes)
    x_zero_point, zero_point = draw(zero_points(x_dtype)), draw(zero_points(dtype))
    out, terms = weight_shape[0], int(np.prod(weight_shape[1:]))
    x_scale = draw(scales(kind))
    count = draw(st.sampled_from([1, out]))
    weight_scale = torch.tensor([draw(scales(kind)) for _ in range(min(count, 3))]).repeat(-(-count // 3))[:count]
    # results mostly within the range, and with powers of two one in a few on a tie
    if kind == "power":
        x_spread, weight_spread = draw(st.sampled_from([(3, 2), (30, 3), (256, 128)]))
        steps = x_spread * weight_spread * terms**0.5 / draw(st.sampled_from([3, 20]))
        scale = x_scale * weight_scale.max().item() * 2.0 ** max(1, round(np.log2(steps)))
    else:
        x_spread, weight_spread = draw(st.sampled_from([(3, 128), (256, 2), (256, 128)]))
        size = x_scale * weight_scale.max().item() * min(x_spread, 128) * min(weight_spread, 64) * terms**0.5
        scale = size / draw(st.sampled_from([3.0, 30.0, 100.0]))
        scale = float(np.float32(scale)) if kind == "single" else scale
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(out, generator=generator) * scale * 20
        if kind == "power":
            bias = (bias / scale * 4).round() * scale / 4
    low, high = draw(bounds(dtype, zero_point))
    return {
        "x": laid_out(integers(x_shape, x_dtype, generator, x_spread, x_zero_point), draw(LAYOUTS)),
        "x_scale": x_scale,
        "x_zero_point": x_zero_point,
        "weight": integers(weight_shape, torch.int8, generator, weight_spread),
        "weight_scale": weight_scale,
        "weight_zero_point": torch.zeros(count, dtype=torch.int32),
        "bias": bias,
        **middle,
        "scale": scale,
        "zero_point": zero_point,
        "dtype": dtype,
        "low": low,
        "high": high,
    }


@st.composite
def linear_calls(draw: st.DrawFn, x_dtypes: Any = BYTES, output_dtypes: Any = BYTES) -> Call:
    inside, outside = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    leading = draw(st.sampled_from([(), (1,), (5,), (33,), (2, 3), (2, 1, 3)]))
    return draw(_requantized((*leading, inside), (outside, inside), x_dtypes, output_dtypes, {}))


@st.composite
def _axis(draw: st.DrawFn, in_padding: bool) -> tuple[int, int, int, int, int]:
    """Length, taps, stride, padding and dilation of a spatial axis; ``in_padding``: some window sees no input."""
    taps, step, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    span = step * (taps - 1)
    if in_padding:
        pad = span + draw(st.integers(1, 2))
        return draw(st.integers(1, 4)), taps, stride, pad, step
    pad = draw(st.integers(0, span))
    least = max(1, span + 1 - 2 * pad, step if pad else 1)
    return least + draw(st.integers(2, 8)), taps, stride, pad, step


@st.composite
def conv_calls(
    draw: st.DrawFn, dim: int, x_dtypes: Any = BYTES, output_dtypes: Any = BYTES, in_padding: bool = False
) -> Call:
    """Convolutions: dense, grouped, depthwise; on one image and on several."""
    axes = [draw(_axis(in_padding and axis == 0)) for axis in range(dim)]
    length, taps, stride, pad, step = (list(values) for values in zip(*axes, strict=True))
    groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    inside, outside = draw(st.sampled_from([3, 8, 1, 2])), draw(st.sampled_from([3, 8, 1, 2]))
    middle = {"stride": stride, "padding": pad, "dilation": step, "groups": groups}
    x_shape = (draw(st.integers(1, 3)), groups * inside, *length)
    return draw(_requantized(x_shape, (groups * outside, inside, *taps), x_dtypes, output_dtypes, middle))


# --- the rule, in numpy -------------------------------------------------------------------------


def _windows(x: np.ndarray, call: Call) -> tuple[np.ndarray, ...]:
    """For each tap of the kernel, the input that each window has there: ``[taps, N, C, *windows]``."""
    sizes = call["weight"].shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), *[(pad, pad) for pad in call["padding"]]])
    counts = [
        (length - step * (taps - 1) - 1) // stride + 1
        for length, step, taps, stride in zip(padded.shape[2:], call["dilation"], sizes, call["stride"], strict=True)
    ]
    taken = []
    for tap in np.ndindex(*sizes):
        where = tuple(
            slice(place * step, place * step + (count - 1) * stride + 1, stride)
            for place, step, count, stride in zip(tap, call["dilation"], counts, call["stride"], strict=True)
        )
        taken.append(padded[(slice(None), slice(None), *where)])
    return tuple(taken)


def sums(call: Call) -> np.ndarray:
    """The sums of products, in int64."""
    x = call["x"].numpy().astype(np.int64) - call["x_zero_point"]
    weight = call["weight"].numpy().astype(np.int64)
    shift = call["weight_zero_point"].numpy().astype(np.int64)
    weight = weight - shift.reshape(-1, *[1] * (weight.ndim - 1))
    if "groups" not in call:
        return np.asarray(x @ weight.T)
    groups = call["groups"]
    taps = _windows(x, call)
    flat = weight.reshape(*weight.shape[:2], -1)
    total = 0
    for number, taken in enumerate(taps):
        grouped = taken.reshape(taken.shape[0], groups, taken.shape[1] // groups, *taken.shape[2:])
        factors = flat[..., number].reshape(groups, -1, flat.shape[1])
        total = total + np.einsum("ngi...,goi->ngo...", grouped, factors)
    total = np.asarray(total)
    return total.reshape(total.shape[0], len(weight), *total.shape[3:])


def _lined_up(values: Tensor, call: Call, total: np.ndarray) -> np.ndarray:
    """A value for each output channel, ready to meet the sums."""
    return values.numpy().reshape(-1, *[1] * (total.ndim - 2 if "groups" in call else 0))


def expected(call: Call, total: np.ndarray | None = None) -> Tensor:
    """``clamp(round(((sum·sx)·sw + bias)·(1/so) + zo))``, each step rounded to float32."""
    total = sums(call) if total is None else total
    single = np.float32
    y = total.astype(single) * single(call["x_scale"]) * _lined_up(call["weight_scale"], call, total)
    if call["bias"] is not None:
        y = y + _lined_up(call["bias"], call, total)
    y = y * (single(1) / single(call["scale"])) + single(call["zero_point"])
    assert y.dtype == single
    return torch.from_numpy(np.rint(y).astype(np.float64).clip(call["low"], call["high"])).to(call["dtype"])


def real(call: Call) -> np.ndarray:
    """The unrounded result in steps of the output, in float64."""
    total = sums(call)
    y = total * call["x_scale"] * _lined_up(call["weight_scale"], call, total).astype(np.float64)
    if call["bias"] is not None:
        y = y + _lined_up(call["bias"], call, total)
    return np.asarray(y / call["scale"] + call["zero_point"])
