"""Observers, fake quantizers and quantized tensors, with no import but torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.ao.quantization.observer import ObserverBase


def observers(dtype: torch.dtype) -> list[torch.ao.quantization.observer.ObserverBase]:
    assert hasattr(torch.ao.quantization.observer, "MinMaxObserver")
    return [
        torch.quantization.MinMaxObserver(dtype=dtype),
        torch.ao.quantization.observer.HistogramObserver(dtype=dtype, bins=128),
        torch.ao.quantization.MovingAverageMinMaxObserver.with_args(averaging_constant=0.5)(dtype=dtype),
    ]


def qparams(observer: "ObserverBase", x: torch.Tensor) -> list:
    def seen() -> "torch.ao.quantization.observer.ObserverBase":
        observer(x)
        observer(2 * x)
        return observer

    scale, zero_point = seen().calculate_qparams()
    return [scale.tolist(), zero_point.tolist()]


def main() -> dict:
    x = torch.linspace(-1.5, 4, 240).reshape(4, 3, 20)
    found = {str(number): qparams(observer, x) for number, observer in enumerate(observers(torch.quint8))}
    q = torch.quantize_per_tensor(x, 0.03, 60, torch.quint8)
    found["tensor"] = [q.int_repr().sum().item(), q.q_scale(), q.q_zero_point(), q.dequantize().mean().item()]
    scales = torch.tensor([0.01, 0.02, 0.04])
    c = torch.quantize_per_channel(x, scales, torch.zeros(3, dtype=torch.int), 1, torch.qint8)
    found["channels"] = [c.int_repr().int().abs().sum().item(), c.q_per_channel_scales().tolist()]
    fake = torch.ao.quantization.FakeQuantize(
        observer=torch.ao.quantization.MovingAverageMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    )
    found["fake"] = [fake(x).sum().item(), fake.apply(torch.quantization.disable_observer)(3 * x).max().item()]
    return found
