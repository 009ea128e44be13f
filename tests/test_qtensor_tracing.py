"""Quantized tensors through torch.compile and both kinds of torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagerq import QTensor, quantize_per_channel, quantize_per_tensor

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def quantized(x: Tensor) -> QTensor:
    return quantize_per_tensor(x, 0.05, 120, torch.uint8)


def images(device: Any = "cpu", batch: int = 2) -> Tensor:
    return torch.randn(batch, 8, 6, 6, device=device)


FUNCTIONS: dict[str, Callable[[QTensor], Any]] = {
    # movements
    "view": lambda q: q.view(q.size(0), -1),
    "reshape": lambda q: q.reshape(q.shape[0], -1),
    "flatten": lambda q: torch.flatten(q, 1),
    "permute": lambda q: q.permute(0, 2, 3, 1).contiguous(),
    "T": lambda q: q[0, 0].T,
    "mT": lambda q: q.mT,
    "index": lambda q: q[:, ::2, None],
    "chunk": lambda q: q.chunk(2, 1),
    "split": lambda q: torch.split(q, [2, 6], 1)[1],
    "unbind": lambda q: q.unbind(0)[1],
    "cat": lambda q: torch.cat([q, F.relu(q)], 1),
    "stack": lambda q: torch.stack([q, q]),
    "pad": lambda q: F.pad(q, (1, 2)),
    "pixel_shuffle": lambda q: F.pixel_shuffle(q, 2),
    "channel shuffle": lambda q: q.view(q.size(0), 2, 4, 6, 6).transpose(1, 2).contiguous().view(q.size()),
    "channels_last": lambda q: q.contiguous(memory_format=torch.channels_last),
    # order
    "relu": F.relu,
    "relu in place": lambda q: F.relu(q.clone(), inplace=True),
    "relu6": F.relu6,
    "hardtanh": lambda q: F.hardtanh(q, 0.0, 6.0),
    "clamp": lambda q: q.clamp(min=0, max=1),
    "max_pool1d": lambda q: F.max_pool1d(q.flatten(2), 2),
    "max_pool2d": lambda q: F.max_pool2d(q, 3, 2, 1),
    "adaptive_max_pool2d": lambda q: F.adaptive_max_pool2d(q, 2),
    "max": lambda q: q.max(1)[0],
    "maximum": lambda q: torch.maximum(q, q.flip(-1)),
    "topk": lambda q: q.topk(2).values,
    "sort": lambda q: torch.sort(q, dim=1),
    "argmax": lambda q: q.argmax(1),
    # averages
    "mean": lambda q: q.mean([2, 3]),
    "avg_pool2d": lambda q: F.avg_pool2d(q, 2),
    "adaptive_avg_pool2d": lambda q: F.adaptive_avg_pool2d(q, 1),
    "interpolate": lambda q: F.interpolate(q, scale_factor=2),
    # activations
    "sigmoid": torch.sigmoid,
    "tanh": lambda q: q.tanh(),
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid in place": lambda q: F.hardsigmoid(q.clone(), inplace=True),
    "leaky_relu": lambda q: F.leaky_relu(q, 0.2),
    "leaky_relu in place": lambda q: F.leaky_relu(q.clone(), 0.2, True),
    "threshold": lambda q: F.threshold(q, 0.1, 0.0),
    "gelu": F.gelu,
    "softmax": lambda q: F.softmax(q, 1),
    "Softmax": torch.nn.Softmax(1),
    # questions and copies
    "compare": lambda q: q > 0,
    "dequantize": lambda q: q.dequantize(),
    "int_repr": lambda q: q.int_repr() + 1,
    "parameters": lambda q: (q.int_repr().float() - q.zero_point) * q.scale,
    "class": lambda q: q.dequantize() if isinstance(q, QTensor) else q,
    "is_quantized": lambda q: q.dequantize() if q.is_quantized else q,
    "dtype and device": lambda q: torch.ones(2, dtype=q.dtype, device=q.device),
    "sizes": lambda q: q.flatten(1) if q.dim() == q.ndim == 4 and len(q) > 1 else q,
    "clone": lambda q: q.clone().detach(),
    "to": lambda q: q.to(q.device),
    "dropout": lambda q: F.dropout(q, 0.5, training=False),
    "requantize": lambda q: quantize_per_tensor(q.dequantize(), 0.1, 5, torch.int8),
    "several": lambda q: (q, {"relu": F.relu(q)}, [q.int_repr()]),
}


def assert_same(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, QTensor):
        assert (got.scale, got.zero_point, got.axis) == (expected.scale, expected.zero_point, expected.axis)
        assert_same(got.int_repr(), expected.int_repr())
        assert got.stride() == expected.stride()
    elif isinstance(expected, Tensor):
        assert got.dtype is expected.dtype
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert_same(list(got.values()), list(expected.values()))
    else:
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_function_takes_and_returns_them(name: str, device: torch.device) -> None:
    q = quantized(images(device))
    assert_same(compiled(FUNCTIONS[name])(q), FUNCTIONS[name](q))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_function_makes_them_inside(name: str) -> None:
    def function(x: Tensor) -> Any:
        return FUNCTIONS[name](quantized(x))

    x = images()
    assert_same(compiled(function)(x), function(x))


def test_default_backend(device: torch.device) -> None:
    def function(q: QTensor) -> tuple[QTensor, Tensor]:
        pooled = F.avg_pool2d(F.max_pool2d(F.relu(q), 2), 3)
        return pooled, F.interpolate(pooled, scale_factor=2).dequantize()

    q = quantized(images(device))
    assert_same(torch.compile(function, fullgraph=True)(q), function(q))


def test_compiled_bilinear_interpolation_is_within_a_step() -> None:
    # the compiler has arithmetic of its own for it, which may round a half the other way
    def function(q: QTensor) -> QTensor:
        return F.interpolate(q, size=(9, 9), mode="bilinear")

    q = quantized(images())
    off = compiled(function)(q).int_repr().int() - function(q).int_repr()
    assert off.abs().max() <= 1
    assert (off != 0).float().mean() < 0.05


def test_compiled_per_channel_tensors() -> None:
    scales, zero_points = torch.rand(8) + 0.1, torch.zeros(8, dtype=torch.int32)
    q = quantize_per_channel(images(), scales, zero_points, 1, torch.int8)
    assert torch.equal(compiled(lambda q: q.dequantize() * 2)(q), q.dequantize() * 2)
    got = compiled(lambda q: q.clone())(q)
    assert torch.equal(got.int_repr(), q.int_repr())
    assert torch.equal(got.q_per_channel_scales(), scales)
    assert got.q_per_channel_axis() == 1


def test_other_parameters_compile_again() -> None:
    function = compiled(lambda q: q.dequantize())
    for scale, zero_point in ((0.5, 1), (0.25, 1), (0.25, 3)):
        q = QTensor(torch.tensor([5], dtype=torch.uint8), scale, zero_point)
        assert function(q).item() == scale * (5 - zero_point)


def test_compiled_for_any_batch() -> None:
    def function(q: QTensor) -> Tensor:
        return F.relu(q).mean([2, 3]).dequantize()

    dynamic = compiled(function, dynamic=True)
    for batch in (2, 3, 5):
        q = quantized(images(batch=batch))
        assert torch.equal(dynamic(q), function(q))


def test_compiled_in_inference_mode() -> None:
    with torch.inference_mode():
        q = quantized(images())
        assert_same(compiled(F.relu)(q), F.relu(q))


def test_refused_operations_say_so_through_the_compiler() -> None:
    for function in (lambda q: q + q, lambda q: torch.exp(q)):
        with pytest.raises(Exception, match="got a quantized tensor"):
            compiled(function)(quantized(images()))


class Inside(nn.Module):
    """A model that quantizes, does something, and gives plain tensors."""

    def __init__(self, function: Callable[[QTensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        result = self.function(quantized(x))
        several = isinstance(result, (tuple, list))
        return [self.real(part) for part in result] if several else self.real(result)

    def real(self, part: Any) -> Any:
        return part.dequantize() if isinstance(part, QTensor) else part


EXPORTED = sorted(set(FUNCTIONS) - {"several"})  # a model gives tensors


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", EXPORTED)
def test_export(name: str, strict: bool) -> None:
    model, x = Inside(FUNCTIONS[name]), images()
    exported = torch.export.export(model, (x,), strict=strict)
    assert_same(exported.module()(x), model(x))
    # what is left are plain tensors and operators
    for node in exported.graph.nodes:
        assert not isinstance(node.meta.get("val"), QTensor)


@pytest.mark.parametrize("strict", [True, False])
def test_export_for_any_batch(strict: bool) -> None:
    model = Inside(lambda q: F.max_pool2d(F.relu(q), 2).mean([2, 3]).flatten(1))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    x = images(batch=7)
    assert torch.equal(exported.module()(x), model(x))
