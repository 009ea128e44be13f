"""A small model around each layer that converts, for the tests of what they are exported as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import eagerq
from eagerq import intrinsic
from eagerq.nn.quantized import FloatFunctional
from eagerq.nn.quantized.base import RequantizingModule
from eagerq.quantization_mappings import Row

QCONFIG = "onednn"


class Around(nn.Module):
    """A layer with each float input quantized before it, and each result dequantized behind."""

    def __init__(self, inner: nn.Module, inputs: int = 1) -> None:
        super().__init__()
        self.quants, self.inner, self.dequant = nn.ModuleList(), inner, eagerq.DeQuantStub()
        self.quants.extend(eagerq.QuantStub() for _ in range(inputs))

    def forward(self, *inputs: Tensor) -> Any:
        y = self.inner(*(quant(x) for quant, x in zip(self.quants, inputs, strict=True)))
        return self.dequant(y)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sum = FloatFunctional()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.sum.add(x, y)


class Case(NamedTuple):
    """How a row is tested.

    Attributes:
        layers: makes the float modules of the row's sequence.
        shape: of the input, less its batch.
        inputs: how many inputs there are; what makes them where they are no random floats.
    """

    layers: Callable[[], list[nn.Module]]
    shape: tuple[int, ...]
    inputs: Any = 1


def _conv(dim: int, *more: Callable[[], nn.Module], **options: Any) -> Case:
    def layers() -> list[nn.Module]:
        return [getattr(nn, f"Conv{dim}d")(4, 6, 3, padding=1, **options), *(one() for one in more)]

    return Case(layers, (4, 7, 6, 5)[: dim + 1])


def _transposed(dim: int) -> Case:
    kind = getattr(nn, f"ConvTranspose{dim}d")
    return Case(lambda: [kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)], (4, 5, 4, 3)[: dim + 1])


def _convolutions(dim: int) -> dict[tuple[type, ...], Case]:
    conv, bn = getattr(nn, f"Conv{dim}d"), getattr(nn, f"BatchNorm{dim}d")
    return {
        (conv,): _conv(dim, groups=2),
        (conv, nn.ReLU): _conv(dim, nn.ReLU, stride=2),
        (conv, bn): _conv(dim, lambda: bn(6), bias=False),
        (conv, bn, nn.ReLU): _conv(dim, lambda: bn(6), nn.ReLU),
        (getattr(nn, f"ConvTranspose{dim}d"),): _transposed(dim),
    }


def _one(make: Callable[[], nn.Module], *shape: int, inputs: Any = 1) -> Case:
    return Case(lambda: [make()], shape, inputs)


def _indices(batch: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 12, (batch, 5)),)


CASES: dict[tuple[type, ...], Case] = {
    (eagerq.QuantStub,): _one(nn.Identity, 3, 4),
    (eagerq.DeQuantStub,): _one(nn.Identity, 5),
    (FloatFunctional,): _one(Sum, 3, 4, inputs=2),
    **_convolutions(1),
    **_convolutions(2),
    **_convolutions(3),
    (nn.Linear,): _one(lambda: nn.Linear(9, 7), 3, 9),
    (NonDynamicallyQuantizableLinear,): _one(lambda: NonDynamicallyQuantizableLinear(9, 7), 9),
    (nn.Linear, nn.ReLU): Case(lambda: [nn.Linear(9, 7), nn.ReLU()], (9,)),
    (nn.Linear, nn.BatchNorm1d): Case(lambda: [nn.Linear(9, 7, bias=False), nn.BatchNorm1d(7)], (9,)),
    (nn.BatchNorm2d,): _one(lambda: nn.BatchNorm2d(6), 6, 5, 4),
    (nn.BatchNorm3d,): _one(lambda: nn.BatchNorm3d(6), 6, 5, 4, 3),
    (nn.GroupNorm,): _one(lambda: nn.GroupNorm(3, 6), 6, 5, 4),
    (nn.InstanceNorm1d,): _one(lambda: nn.InstanceNorm1d(6), 6, 9),
    (nn.InstanceNorm2d,): _one(lambda: nn.InstanceNorm2d(6, affine=True), 6, 5, 4),
    (nn.InstanceNorm3d,): _one(lambda: nn.InstanceNorm3d(6, track_running_stats=True), 6, 5, 4, 3),
    (nn.LayerNorm,): _one(lambda: nn.LayerNorm([6, 5]), 4, 6, 5),
    (nn.BatchNorm2d, nn.ReLU): Case(lambda: [nn.BatchNorm2d(6), nn.ReLU()], (6, 5, 4)),
    (nn.BatchNorm3d, nn.ReLU): Case(lambda: [nn.BatchNorm3d(6), nn.ReLU()], (6, 5, 4, 3)),
    (intrinsic.ConvAdd2d,): _one(
        lambda: intrinsic.ConvAdd2d(nn.Conv2d(4, 4, 3, padding=1), torch.add), 4, 6, 5, inputs=2
    ),
    (intrinsic.ConvAddReLU2d,): _one(
        lambda: intrinsic.ConvAddReLU2d(nn.Conv2d(4, 4, 3, padding=1), torch.add, nn.ReLU()), 4, 6, 5, inputs=2
    ),
    (intrinsic.LinearLeakyReLU,): _one(lambda: intrinsic.LinearLeakyReLU(nn.Linear(9, 7), nn.LeakyReLU(0.2)), 9),
    (intrinsic.LinearTanh,): _one(lambda: intrinsic.LinearTanh(nn.Linear(9, 7), nn.Tanh()), 9),
    (nn.Embedding,): _one(lambda: nn.Embedding(12, 5), inputs=_indices),
    (nn.EmbeddingBag,): _one(lambda: nn.EmbeddingBag(12, 5), inputs=_indices),
    (nn.Dropout,): _one(nn.Dropout, 5),
    (nn.ELU,): _one(lambda: nn.ELU(0.7), 6, 5),
    (nn.Hardswish,): _one(nn.Hardswish, 6, 5),
    (nn.LeakyReLU,): _one(lambda: nn.LeakyReLU(0.2), 6, 5),
    (nn.PReLU,): _one(lambda: nn.PReLU(6), 6, 5),
    (nn.ReLU6,): _one(nn.ReLU6, 6, 5),
    (nn.LSTM,): _one(lambda: nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), 4, 6),
    (nn.GRU,): _one(lambda: nn.GRU(6, 8, batch_first=True), 4, 6),
    (nn.LSTMCell,): _one(lambda: nn.LSTMCell(6, 8), 6),
    (nn.GRUCell,): _one(lambda: nn.GRUCell(6, 8), 6),
    (nn.RNNCell,): _one(lambda: nn.RNNCell(6, 8), 6),
}


def step(model: Any) -> float:
    """The scale of a converted model's result."""
    scales = [module.scale for module in model.modules() if isinstance(module, RequantizingModule)]
    return scales[-1] if scales else 1e-5


def inputs_of(case: Case, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    if callable(case.inputs):
        made: tuple[Tensor, ...] = case.inputs(batch)
        return made
    return tuple(torch.randn(batch, *case.shape) * 2 for _ in range(case.inputs))


def _inner(case: Case) -> nn.Module:
    layers = case.layers()
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def int8_model(row: Row, qconfig: str = QCONFIG) -> nn.Module:
    """The converted model around a row's layer, trained for a moment."""
    case, torch_seed = CASES[row.sequence], 1
    torch.manual_seed(torch_seed)
    embeds = row.sequence[0] in (nn.Embedding, nn.EmbeddingBag)
    model: nn.Module = _inner(case) if embeds else Around(_inner(case), case.inputs)
    model.train()
    if len(row.sequence) > 1:
        names = [f"inner.{number}" for number in range(len(row.sequence))]
        model = eagerq.fuse_modules_qat(model, names)
    if embeds:
        model = nn.Sequential(model)
        model[0].qconfig = eagerq.float_qparams_weight_only_qconfig
        return eagerq.convert(eagerq.prepare(model.eval()))
    if row.qat is not None and row.sequence[0] is not NonDynamicallyQuantizableLinear:
        model.qconfig = eagerq.get_default_qat_qconfig(qconfig)
        model = eagerq.prepare_qat(model)
    else:
        model.qconfig = eagerq.get_default_qconfig(qconfig)
        model = eagerq.prepare(model.eval())
    for batch in (4, 5, 6):
        model(*inputs_of(case, batch, seed=batch))
    return eagerq.convert(model.eval(), as_trained=True)


def dynamic_model(row: Row) -> nn.Module:
    torch.manual_seed(1)
    layers = CASES[row.sequence].layers()
    model: nn.Module = nn.Sequential(*layers).eval()
    if len(layers) > 1:
        model = eagerq.fuse_modules(model, [str(number) for number in range(len(layers))])
    embeds = row.sequence[0] in (nn.Embedding, nn.EmbeddingBag)
    qconfig = eagerq.float_qparams_weight_only_qconfig if embeds else eagerq.default_dynamic_qconfig
    return eagerq.quantize_dynamic(model, {row.float_module: qconfig}, mapping={row.float_module: row.dynamic})
