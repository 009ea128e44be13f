"""The contenders: the float model, torch.ao, eagerq. Each takes a net down the same road in its own way."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .models import Functional, fusable


class _FloatFunctional(nn.Module):
    """The plain operations that a FloatFunctional stands for."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + y)


class Backend:
    """A contender; this one is the float model, for which each step of the road does nothing."""

    name = "float"
    QuantStub: Callable[[], nn.Module] = nn.Identity
    DeQuantStub: Callable[[], nn.Module] = nn.Identity
    FloatFunctional: Callable[[], Functional] = _FloatFunctional

    def fuse(self, model: nn.Module) -> nn.Module:
        """The model itself, its layers fused and its qconfig set."""
        return model.train()

    def prepare(self, model: nn.Module) -> nn.Module:
        """A fused model made ready for quantization-aware training."""
        return model

    def freeze(self, model: nn.Module) -> nn.Module:
        """The same model late in training: observers off, batch norm's statistics frozen."""
        return model

    def convert(self, model: nn.Module) -> nn.Module:
        """The model for inference on images in channels_last."""
        return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def deploy(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        """A converted model as it runs at its best on inputs such as this one."""
        return model

    def serve(self, model: nn.Module, examples: Sequence[Tensor]) -> Callable[[Tensor], object]:
        """The same for several inputs, and with nothing in memory that they do not need."""
        return model


class Quantizing(Backend):
    """A library with the eager-mode interface: two differ in where names come from, and in little else."""

    def __init__(
        self,
        name: str,
        api: Any,
        float_functional: Callable[[], Functional],
        freeze_bn_stats: Callable[[nn.Module], None],
        qconfig: str,
        convert_options: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.QuantStub = api.QuantStub
        self.DeQuantStub = api.DeQuantStub
        self.FloatFunctional = float_functional
        self.api = api
        self._freeze_bn_stats = freeze_bn_stats
        self._qconfig = qconfig
        self._convert_options = convert_options

    def fuse(self, model: nn.Module) -> nn.Module:
        model.train()
        groups = fusable(model)
        if groups:
            self.api.fuse_modules_qat(model, groups, inplace=True)
        model.qconfig = self.api.get_default_qat_qconfig(self._qconfig)
        return model

    def prepare(self, model: nn.Module) -> nn.Module:
        prepared: nn.Module = self.api.prepare_qat(model)
        return prepared

    def freeze(self, model: nn.Module) -> nn.Module:
        model.apply(self.api.disable_observer)
        return model.apply(self._freeze_bn_stats)

    def convert(self, model: nn.Module) -> nn.Module:
        converted: nn.Module = self.api.convert(model.eval(), **self._convert_options)
        return converted


class _Eagerq(Quantizing):
    def deploy(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        frozen: Callable[[Tensor], object] = self.api.freeze(model, (example,))
        return frozen

    def serve(self, model: nn.Module, examples: Sequence[Tensor]) -> Callable[[Tensor], object]:
        frozen: Any = self.deploy(model, examples[0])
        for example in examples[1:]:
            frozen.add((example,))
        frozen.pack_weights()
        served: Callable[[Tensor], object] = frozen
        return served


class Deployed(Backend):
    """A converted model of another contender, run by something else."""

    def __init__(
        self, name: str, source: Backend, run: Callable[[nn.Module, Tensor], Callable[[Tensor], object]]
    ) -> None:
        self.name = name
        self.QuantStub = source.QuantStub
        self.DeQuantStub = source.DeQuantStub
        self.FloatFunctional = source.FloatFunctional
        self._source = source
        self._run = run

    def fuse(self, model: nn.Module) -> nn.Module:
        return self._source.fuse(model)

    def prepare(self, model: nn.Module) -> nn.Module:
        return self._source.prepare(model)

    def convert(self, model: nn.Module) -> nn.Module:
        return self._source.convert(model)

    def deploy(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
        return self._run(model, example)


def engines() -> list[str]:
    """What torch.ao can run on here, its usual choice first."""
    quantized = getattr(torch.backends, "quantized", None)
    names = [name for name in getattr(quantized, "supported_engines", ()) if name != "none"]
    return sorted(names, key=lambda name: name != "x86") or ["none"]


def torch_ao(engine: str) -> Backend | None:
    """torch.ao with one of its engines and that engine's qconfig; None where torch no longer has it."""
    try:
        from torch.ao import quantization
        from torch.ao.nn.intrinsic.qat import freeze_bn_stats
        from torch.ao.nn.quantized import FloatFunctional
    except ImportError:
        return None
    # Its own warnings, wherever they are pinned: on its caller, or inside itself.
    warnings.filterwarnings("ignore", message=r"torch\.ao\.quantization is deprecated")
    warnings.filterwarnings("ignore", module=r"torch\.ao\.")
    torch.backends.quantized.engine = engine
    return Quantizing("torch.ao", quantization, FloatFunctional, freeze_bn_stats, engine, {})


def eagerq() -> Backend:
    """eagerq as its README recommends: the full-range qconfig, and int8 that keeps what was trained."""
    import eagerq as api
    from eagerq.intrinsic.qat import freeze_bn_stats
    from eagerq.nn.quantized import FloatFunctional

    return _Eagerq("eagerq", api, FloatFunctional, freeze_bn_stats, "onednn", {"as_trained": True})


def contenders(engine: str) -> dict[str, Backend]:
    """Every contender that this installation has, by name; ``engine`` is torch.ao's."""
    found = (Backend(), torch_ao(engine), eagerq())
    return {backend.name: backend for backend in found if backend is not None}
