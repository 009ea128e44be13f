"""Layers of transformers, recurrent and recommending nets: int8, static and dynamic."""

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..backends import Backend, Quantizing
from ..encoder import EncoderLayer, example
from ..models import Parts
from ..report import Goal
from ..timing import Samples, Timed, repeated
from ..workloads import converted
from .base import Benchmark, Setup

SECTION = "Linear, recurrent and embedding layers in 8 bits"
_ROWS, _COLUMNS, _BAGS, _BAG = 100_000, 64, 512, 20
_STEPS, _STATE = 32, 256


def _timed(model: Callable[..., object], *inputs: Tensor) -> Timed:
    def forward() -> object:
        with torch.no_grad():  # inference_mode is not for torchao's tensors
            return model(*inputs)

    return repeated(forward)


def _static(batch: int, setup: Setup) -> Samples:
    x = example(batch)
    return setup.race(lambda backend: _timed(backend.deploy(converted(backend, EncoderLayer, x), x), x))


def _quantized(backend: Backend, model: nn.Module, kinds: set[type[nn.Module]], dtype: torch.dtype) -> nn.Module:
    """A float model by ``quantize_dynamic`` of a contender; the float one's as it is."""
    if not isinstance(backend, Quantizing):
        return model
    made: nn.Module = backend.api.quantize_dynamic(model, kinds, dtype=dtype)
    return made


def _torchao(model: nn.Module, x: Tensor, compiled: bool) -> Timed:
    """torchao's dynamic int8, a scale for each token."""
    library = importlib.import_module("torchao.quantization")
    model = copy.deepcopy(model)
    library.quantize_(model, library.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return _timed(torch.compile(model) if compiled else model, x)


def _makers(
    setup: Setup, model: nn.Module, kinds: set[type[nn.Module]], inputs: tuple[Tensor, ...], dtype: torch.dtype
) -> Mapping[str, Callable[[], Timed]]:
    return {
        name: lambda backend=backend: _timed(_quantized(backend, model, kinds, dtype), *inputs)
        for name, backend in setup.backends.items()
    }


def _dynamic(batch: int, setup: Setup) -> Samples:
    torch.manual_seed(0)
    model, x = EncoderLayer(Backend()).eval(), example(batch)
    makers = {
        **_makers(setup, model, {nn.Linear}, (x,), torch.qint8),
        "torchao": lambda: _torchao(model, x, compiled=False),
        "torchao, compiled": lambda: _torchao(model, x, compiled=True),
    }
    return setup.interleave(makers)


class _Alone(nn.Module):
    """A layer within a model: ``quantize_dynamic`` swaps children."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.eval()

    def forward(self, *inputs: Tensor) -> object:
        return self.layer(*inputs)


def _recurrent(kind: type[nn.Module], batch: int, setup: Setup) -> Samples:
    model, x = _Alone(kind(_STATE, _STATE)), torch.randn(_STEPS, batch, _STATE)
    return setup.interleave(_makers(setup, model, {kind}, (x,), torch.qint8))


class _Between(nn.Module):
    """A layer between stubs, of whose results the first counts."""

    def __init__(self, layer: nn.Module, parts: Parts) -> None:
        super().__init__()
        self.quant, self.layer, self.dequant = parts.QuantStub(), layer, parts.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dequant(self.layer(self.quant(x))[0])
        return y


def _static_lstm(batch: int, setup: Setup) -> Samples:
    x = torch.randn(_STEPS, batch, _STATE)

    def make(backend: Backend) -> Timed:
        torch.manual_seed(0)
        model: nn.Module = _Between(nn.LSTM(_STATE, _STATE), backend).eval()
        if isinstance(backend, Quantizing):
            model.qconfig = backend.api.get_default_qconfig("onednn")
            model = backend.api.prepare(model)
            model(x)
            model = backend.api.convert(model)
        return _timed(backend.deploy(model, x), x)

    return setup.race(make)


def _bags(dtype: torch.dtype, setup: Setup) -> Samples:
    model = _Alone(nn.EmbeddingBag(_ROWS, _COLUMNS, mode="sum"))
    inputs = torch.randint(0, _ROWS, (_BAGS * _BAG,)), torch.arange(_BAGS) * _BAG
    return setup.interleave(_makers(setup, model, {nn.EmbeddingBag}, inputs, dtype))


def benchmarks() -> Iterator[Benchmark]:
    """Every row of this table."""
    ahead, of_all = Goal("eagerq / torch.ao", 1.0), Goal("eagerq / best peer", 1.0)
    for batch in (1, 8):
        name = f"encoder layer (BERT-base, 128 tokens) batch {batch}"
        yield Benchmark(SECTION, f"int8 {name}", "ms", (ahead, of_all), partial(_static, batch))
        yield Benchmark(SECTION, f"dynamic int8 {name}", "ms", (ahead, of_all), partial(_dynamic, batch))
    for batch in (1, 8):
        name = f"int8 LSTM of {_STATE}, {_STEPS} steps, batch {batch}"
        yield Benchmark(SECTION, name, "ms", ahead, partial(_static_lstm, batch))
    for kind in (nn.LSTM, nn.GRU):
        name = f"dynamic int8 {kind.__name__} of {_STATE}, {_STEPS} steps, batch 1"
        yield Benchmark(SECTION, name, "ms", ahead, partial(_recurrent, kind, 1), detail=True)
    for bits, dtype in ((8, torch.quint8), (4, torch.quint4x2)):
        name = f"bags of {_BAG} rows of {bits} bits, {_ROWS}×{_COLUMNS}, batch {_BAGS}"
        yield Benchmark(SECTION, name, "ms", ahead, partial(_bags, dtype), detail=True)
