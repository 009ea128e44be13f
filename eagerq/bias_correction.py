"""Bias correction: what quantized layers are off by on average, taken out of their biases.

Nagel et al. 2019, arXiv:1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from eagerq.errors import InvalidArgumentError
from eagerq.nn.quantized import Conv1d, Conv2d, Conv3d, Linear, WeightedQuantizedModule
from eagerq.numeric_suite import Logger, Shadow, remove_loggers
from eagerq.qtensor import QTensor

__all__ = ["MeanShadowLogger", "bias_correction"]


class MeanShadowLogger(Logger):
    """Keeps the mean output of a quantized module and of its float shadow over all samples.

    ``stats["quantized"]`` and ``stats["float"]`` have an output's shape without its first dimension,
    in float64; None before the first output.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.stats = {"float": None, "quantized": None}
        self.count = 0

    def forward(self, x: Tensor, y: Tensor) -> None:
        real = x.dequantize() if isinstance(x, QTensor) else x
        fresh = real.shape[0]
        self.count += fresh
        for name, value in (("quantized", real), ("float", y)):
            total, mean = value.detach().double().sum(0), self.stats[name]
            self.stats[name] = total / self.count if mean is None else mean + (total - fresh * mean) / self.count


@torch.no_grad()
def bias_correction(
    float_model: nn.Module,
    quantized_model: nn.Module,
    img_data: Iterable[Any],
    target_modules: Iterable[type[nn.Module]] = (Linear, Conv1d, Conv2d, Conv3d),
    neval_batches: int | None = None,
) -> None:
    """Shift each int8 layer's bias so that its mean output, channel by channel, is the float layer's.

    Layers are corrected one after the other, each on inputs that the corrected ones before it give.

    Args:
        float_model: the model that ``quantized_model`` was converted from, fused as it is.
        quantized_model: changed in place: only its biases.
        img_data: batches whose first entry is the input; gone through once for each layer.
        target_modules: int8 classes to correct; by default those without an activation behind, which
            would hide part of the error.
        neval_batches: use so many batches only.

    Raises:
        InvalidArgumentError: when no layer of a target class has a bias and a float twin.
    """
    targets = tuple(target_modules)
    float_modules = dict(float_model.named_modules())
    chosen = [
        (name, module)
        for name, module in quantized_model.named_modules()
        if type(module) in targets
        and isinstance(module, WeightedQuantizedModule)
        and module.bias() is not None
        and name in float_modules
    ]
    if not chosen:
        raise InvalidArgumentError(
            f"no layer of {', '.join(kind.__name__ for kind in targets)} has a bias and a float twin of its name",
            module=quantized_model,
            remedy="pass the float model that it was converted from, and int8 classes that it has",
        )
    for name, module in chosen:
        path, _, last = name.rpartition(".")
        parent, shadow = quantized_model.get_submodule(path), Shadow(module, float_modules[name], MeanShadowLogger)
        parent._modules[last] = shadow
        try:
            for batch in islice(img_data, neval_batches):
                quantized_model(batch[0])
        finally:
            remove_loggers(quantized_model)
        stats: dict[str, Any] = shadow.logger.stats  # type: ignore[assignment]
        if stats["float"] is None:
            raise InvalidArgumentError("img_data has no batches", remedy="pass a list or a DataLoader, not an iterator")
        error = stats["quantized"] - stats["float"]
        # channels are the first of an image's dimensions, the last of what Linear gives
        by_channel = error if module.weight().dim() > 2 else error.movedim(-1, 0)
        bias = module.bias()
        assert bias is not None
        bias.sub_(by_channel.reshape(len(bias), -1).mean(1).to(bias))
