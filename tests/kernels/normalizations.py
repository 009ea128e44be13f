"""Normalizations of integers: drawn calls, and what they are in float64.

A call is a dictionary of arguments in the order of the kernel's signature.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from kernels.calls import BYTES, SCALE_KINDS, Call, bounds, integers, scales, zero_points
from torch import Tensor

from eagerq.kernels import batch_norm, group_norm, layer_norm

KERNELS: dict[str, Any] = {"layer_norm": layer_norm, "group_norm": group_norm, "batch_norm": batch_norm}

# Where the mean is this many times the deviation, squared, torch.ao's float32 variances are off by more than
# the last bits, and eagerq goes another way.
CANCELLED = 2.0**14


def _values(generator: torch.Generator, length: int, power: bool) -> Tensor:
    """Weights or biases; of few bits where ties are wanted."""
    real = torch.randn(length, generator=generator)
    return (real * 8).round() / 8 if power else real


@st.composite
def calls(draw: st.DrawFn, name: str, x_dtypes: Any = BYTES, dtypes: Any = None, whole: bool = False) -> Call:
    """A call of one kernel; with ``whole``, of the whole range of the output's type."""
    x_dtype, kind = draw(x_dtypes), draw(SCALE_KINDS)
    dtype = x_dtype if dtypes is None else draw(dtypes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    arguments: Call = {}
    if name == "layer_norm":
        inner = draw(st.lists(st.integers(1, 40), min_size=1, max_size=2))
        shape = [*draw(st.lists(st.integers(1, 7), max_size=2)), *inner]
        arguments["normalized_shape"] = inner
        parameters = torch.Size(inner)
    else:
        groups = draw(st.integers(1, 6)) if name == "group_norm" else 1
        channels = groups * draw(st.integers(1, 6 if name == "group_norm" else 70))
        space = draw(st.lists(st.integers(1, 9), min_size=1 if name == "batch_norm" else 0, max_size=3))
        shape = [draw(st.integers(1, 3)), channels, *space]
        if name == "group_norm":
            arguments["num_groups"] = draw(st.sampled_from([groups, channels]))
        parameters = torch.Size([channels])
    spread, around = draw(st.sampled_from([(256, 0), (40, 100), (6, 60), (1, 120), (0, 7)]))
    power = kind == "power"
    weight, bias = (
        _values(generator, parameters.numel(), power).reshape(parameters) if draw(st.booleans()) else None
        for _ in range(2)
    )
    arguments |= {"weight": weight, "bias": bias}
    if name == "batch_norm":
        arguments["mean"] = _values(generator, parameters.numel(), power) * 4
        variance = torch.rand(parameters, generator=generator) * 4 + 0.01
        arguments["var"] = 4.0 ** variance.log2().round() if power else variance
    zero_point = draw(zero_points(dtype))
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    if not whole:
        low, high = draw(bounds(dtype, zero_point))
    return {
        "x": integers(shape, x_dtype, generator, spread, around),
        "x_scale": draw(scales(kind)),
        "x_zero_point": draw(zero_points(x_dtype)),
        **arguments,
        "eps": draw(st.sampled_from([1e-5, 1e-3, 2.0**-10])),
        "scale": draw(scales(kind, 2.0**-6, 0.25)),
        "zero_point": zero_point,
        "dtype": dtype,
        "low": low,
        "high": high,
    }


def _groups(x: Tensor, call: Call) -> tuple[Tensor, list[int]]:
    """``x`` in the shape in which the axes given are those of a group."""
    if "normalized_shape" in call:
        return x, list(range(-len(call["normalized_shape"]), 0))
    grouped = x.unflatten(1, (call["num_groups"], -1))
    return grouped, list(range(2, grouped.dim()))


def _per_channel(value: Tensor, call: Call) -> Tensor:
    if "normalized_shape" in call:
        return value
    return value.reshape(-1, *[1] * (call["x"].dim() - 2))


def in_float64(call: Call) -> Tensor:
    """The result in steps of the output, neither rounded nor clamped, its zero point added."""
    x = (call["x"].double() - call["x_zero_point"]) * call["x_scale"]
    if "mean" in call:
        mean, var = _per_channel(call["mean"].double(), call), _per_channel(call["var"].double(), call)
        y = (x - mean) / (var + call["eps"]).sqrt()
    else:
        grouped, axes = _groups(x, call)
        centred = grouped - grouped.mean(axes, keepdim=True)
        y = (centred / (centred.square().mean(axes, keepdim=True) + call["eps"]).sqrt()).reshape(x.shape)
    if call["weight"] is not None:
        y = y * _per_channel(call["weight"].double(), call)
    if call["bias"] is not None:
        y = y + _per_channel(call["bias"].double(), call)
    return y / call["scale"] + call["zero_point"]


def cancelled(call: Call) -> Tensor:
    """For each value, whether its group's mean is so much larger than its deviation that float32 is not enough."""
    grouped, axes = _groups(call["x"].double(), call)
    square, mean = grouped.square().mean(axes, keepdim=True), grouped.mean(axes, keepdim=True)
    variance = (grouped - mean).square().mean(axes, keepdim=True) + call["eps"] / call["x_scale"] ** 2
    return (square > CANCELLED * variance).expand_as(grouped).reshape(call["x"].shape)


def run(name: str, call: Call) -> Tensor:
    result: Tensor = KERNELS[name](*call.values())
    return result
