"""QAT layers of every kind for the tests: drawn, built from either library, run and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq import intrinsic
from eagerq.intrinsic import qat as intrinsic_qat
from eagerq.nn import qat

# How closely two modules have to agree: outputs by their largest value, gradients by their norm,
# statistics and quantization parameters by a few of float32's neighbours.
OUTPUT, GRADIENT, STATISTIC = 1e-6, 1e-5, 1e-6


@dataclass(frozen=True)
class Kind:
    """One class of QAT modules."""

    layer: str
    dim: int = 0
    bn: bool = False
    relu: bool = False

    def __str__(self) -> str:
        suffix = f"{self.dim}d" if self.dim else "1d" * self.bn
        return f"{self.layer}{'Bn' * self.bn}{'ReLU' * self.relu}{suffix}"

    @property
    def fused(self) -> bool:
        return self.bn or self.relu

    @property
    def qat(self) -> Any:
        return getattr(intrinsic_qat if self.fused else qat, str(self))

    def twin(self, ao: Any) -> Any:
        return getattr(ao.intrinsic_qat if self.fused else ao.qat, str(self))


PLAIN = (Kind("Linear"), *(Kind("Conv", dim) for dim in (1, 2, 3)))
FUSED = (
    Kind("Linear", relu=True),
    Kind("Linear", bn=True),
    *(Kind("Conv", dim, bn, relu) for dim in (1, 2, 3) for bn, relu in ((False, True), (True, False), (True, True))),
)
KINDS = PLAIN + FUSED
WITH_BN = tuple(kind for kind in FUSED if kind.bn)
BY_NAME = {str(kind): kind for kind in KINDS}


def _backend(backend: str, version: int) -> Callable[[Any], Any]:
    return lambda library: library.get_default_qat_qconfig(backend, version)


# From either library, as both have these names.
QCONFIGS: dict[str, Callable[[Any], Any]] = {
    **{
        f"{backend}-{version}": _backend(backend, version)
        for backend in ("x86", "fbgemm", "qnnpack", "onednn")
        for version in (0, 1)
    },
    "symmetric-1": lambda library: library.default_symmetric_qnnpack_qat_qconfig,
    "symmetric-channels-1": lambda library: library.default_per_channel_symmetric_qnnpack_qat_qconfig,
}


def _by_channel(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (weight.dim() - 1))


def _mixed(weight: Tensor) -> Tensor:
    signs = torch.tensor([0.0, 1.0, -1.0])[: len(weight)]
    return torch.cat([weight[:3].abs() * _by_channel(signs, weight), weight[3:]])


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda weight: weight,
    "positive": torch.abs,
    "negative": lambda weight: -weight.abs(),
    "mixed": _mixed,  # a channel of zeros, a positive and a negative one
    "zero": torch.zeros_like,
    "tiny": lambda weight: weight * 1e-7,
    "spread": lambda weight: weight * 10.0 ** _by_channel(torch.arange(len(weight)) - 3, weight),
    "ties": lambda weight: (weight * 8).round() / 8,
}


@dataclass(frozen=True)
class Layer:
    """A layer's hyperparameters, the shape of its input, and what its numbers are like."""

    kind: Kind
    arguments: dict[str, Any]
    input_shape: tuple[int, ...]
    weights: str = "ordinary"
    momentum: float | None = 0.1
    seed: int = 0

    def parts(self) -> list[Any]:
        """The float modules in order, with the same numbers at every call."""
        kind, generator = self.kind, torch.Generator().manual_seed(self.seed)
        layer: Any = getattr(nn, f"Conv{kind.dim}d" if kind.dim else "Linear")(**self.arguments)
        weight = torch.randn(layer.weight.shape, generator=generator) / layer.weight[0].numel() ** 0.5
        layer.weight.data = WEIGHTS[self.weights](weight)
        if layer.bias is not None:
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator)
        parts = [layer]
        if kind.bn:
            count = len(layer.weight)
            bn: Any = getattr(nn, f"BatchNorm{kind.dim or 1}d")(count, eps=1e-3, momentum=self.momentum)
            sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
            bn.weight.data = (torch.rand(count, generator=generator) + 0.3) * sign
            bn.bias.data = torch.randn(count, generator=generator)
            bn.running_mean.copy_(torch.randn(count, generator=generator) * 0.5)
            bn.running_var.copy_(torch.rand(count, generator=generator) * 2 + 0.2)
            parts.append(bn)
        if kind.relu:
            parts.append(nn.ReLU())
        return parts

    def inputs(self, steps: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return [torch.randn(self.input_shape, generator=generator) * (1 + step) for step in range(steps)]

    def float_module(self, fused: Any, qconfig: Any) -> Any:
        """What ``from_float`` takes; ``fused`` is the package of the fused modules."""
        parts = self.parts()
        module = getattr(fused, str(self.kind))(*parts) if self.kind.fused else parts[0]
        module.qconfig = qconfig
        return module

    def module(self, qconfig: str = "x86-1") -> Any:
        """The QAT module."""
        return self.kind.qat.from_float(self.float_module(intrinsic, QCONFIGS[qconfig](eagerq)))

    def twin(self, ao: Any, qconfig: str = "x86-1") -> Any:
        """The QAT module of torch.ao."""
        config = QCONFIGS[qconfig](ao.quantization)
        module = self.float_module(ao.intrinsic, config)
        if self.kind.fused:
            module[0].qconfig = config  # where its from_float looks
        return self.kind.twin(ao).from_float(module)


@st.composite
def layers(draw: st.DrawFn, kind: Kind) -> Layer:
    """Small layers of a kind, with all that such layers may have."""
    common = {
        "weights": draw(st.sampled_from(sorted(WEIGHTS))),
        "momentum": draw(st.sampled_from([0.1, 0.3, None])),
        "seed": draw(st.integers(0, 2**16)),
    }
    # Of two values, or of one weight, a batch norm leaves the order or the sign: then the gradient is
    # nothing but rounding noise, and not to be compared.
    bias, batch = draw(st.booleans()), draw(st.integers(3, 5))
    fewest = 2 if kind.bn else 1
    if not kind.dim:
        inside, outside = draw(st.integers(fewest, 9)), draw(st.integers(1, 7))
        return Layer(kind, {"in_features": inside, "out_features": outside, "bias": bias}, (batch, inside), **common)

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(kind.dim))

    groups = draw(st.integers(1, 3))
    kernel, stride, padding, dilation = each(1, 3), each(1, 2), each(0, 2), each(1, 2)
    # room for the kernel, and for every padding mode
    size = tuple((k - 1) * d + extra for k, d, extra in zip(kernel, dilation, each(3, 5), strict=True))
    arguments = {
        "in_channels": groups * draw(st.integers(fewest, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": bias,
        "padding_mode": draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    }
    return Layer(kind, arguments, (batch, arguments["in_channels"], *size), **common)


def plain_layer(kind: Kind | str, seed: int = 0, weights: str = "ordinary", **arguments: Any) -> Layer:
    """An ordinary layer, for tests in which its shape does not matter."""
    kind = BY_NAME[kind] if isinstance(kind, str) else kind
    if not kind.dim:
        return Layer(kind, {"in_features": 6, "out_features": 5, **arguments}, (4, 6), weights, seed=seed)
    given = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "groups": 2, **arguments}
    return Layer(kind, given, (3, given["in_channels"], *[6] * kind.dim), weights, seed=seed)


@dataclass(frozen=True)
class Phase:
    """How a module is switched during a pass."""

    observer: bool = True
    fake_quant: bool = True
    frozen: bool = False
    training: bool = True

    def apply(self, module: Any) -> None:
        if hasattr(module, "bn"):
            (module.freeze_bn_stats if self.frozen else module.update_bn_stats)()
        module.train(self.training)
        module.weight_fake_quant.enable_observer(self.observer)
        module.weight_fake_quant.enable_fake_quant(self.fake_quant)


PHASES = st.builds(Phase, st.booleans(), st.booleans(), st.booleans(), st.booleans())


@dataclass(frozen=True)
class Step:
    """What a forward and backward pass gave."""

    output: Tensor
    upstream: Tensor
    gradients: dict[str, Tensor | None]
    state: dict[str, Tensor]
    bn_trains: bool


def run(module: Any, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> Step:
    """Forward and backward; modules with outputs of the same shape get the same upstream gradient."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    output = (module if call is None else call)(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output)
    output.backward(upstream)
    gradients = {"input": x.grad, **{name: value.grad for name, value in module.named_parameters()}}
    return Step(
        output.detach(),
        upstream,
        {name: None if value is None else value.clone() for name, value in gradients.items()},
        {name: value.detach().clone() for name, value in module.state_dict().items()},
        hasattr(module, "bn") and module.bn.training,
    )


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def gradient_unit(name: str, gradient: Tensor, step: Step) -> Tensor:
    """The norm that a difference between gradients is to be compared with: its own, as a rule."""
    # sums over the batch, whose terms may cancel: a bias before a batch norm has no effect at all
    sums = name.startswith("bn.") or (name == "bias" and step.bn_trains)
    return torch.maximum(gradient.norm(), step.upstream.norm()) if sums else gradient.norm()


def assert_same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor], leave: Iterable[str] = ()) -> None:
    """Same keys, shapes, dtypes and values (integers exactly), but for the values of those to ``leave``."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        assert ours[name].dtype == value.dtype, name
        if name not in leave:
            rtol = STATISTIC if value.is_floating_point() else 0
            close = torch.testing.assert_close
            close(ours[name], value, rtol=rtol, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")


def assert_same_pass(ours: Step, theirs: Step, output: float = OUTPUT, gradient: float = GRADIENT) -> None:
    """Equal outputs and gradients."""
    assert ours.output.shape == theirs.output.shape
    assert distance(ours.output, theirs.output) <= output
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, value in theirs.gradients.items():
        mine = ours.gradients[name]
        assert (mine is None) == (value is None), name
        if mine is not None and value is not None:
            assert (mine - value).norm() <= gradient * gradient_unit(name, value, theirs), name


QPARAMS = ("weight_fake_quant.scale", "weight_fake_quant.zero_point")


def assert_twins(ao: Any, layer: Layer, qconfig: str, phases: Iterable[Phase]) -> None:
    """Ours and torch.ao's give the same through several passes, switched as told."""
    ours, theirs = layer.module(qconfig), layer.twin(ao, qconfig)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    phases = list(phases)
    for x, phase in zip(layer.inputs(len(phases)), phases, strict=True):
        phase.apply(ours)
        phase.apply(theirs)
        mine, twins = run(ours, x), run(theirs, x)
        assert_same_pass(mine, twins)
        # torch.ao's fused one works its parameters out while it rounds, so they may be old until then
        old = () if phase.fake_quant or qconfig.endswith("-0") else QPARAMS
        assert_same_state(mine.state, twins.state, leave=old)
