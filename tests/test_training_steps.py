"""Whole models prepared by both libraries: the same checkpoints, and the same losses step by step."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from intrinsic.layers import QCONFIGS
from torch import Tensor, nn

import eagerq
from eagerq.errors import CheckpointError
from eagerq.intrinsic import qat as intrinsic_qat


class Library:
    """One of the two, under the names that both use."""

    def __init__(self, ao: Any = None) -> None:
        self.is_ao = ao is not None
        self.top: Any = ao.quantization if self.is_ao else eagerq
        self.functional: Any = (ao.quantized if self.is_ao else eagerq.nn.quantized).FloatFunctional
        self.mapping = self.top.get_default_qat_module_mappings()
        if self.is_ao:  # complete what its map forgets
            self.mapping[nn.Conv1d] = ao.qat.Conv1d
            self.mapping[ao.intrinsic.ConvReLU1d] = ao.intrinsic_qat.ConvReLU1d

    def prepare(self, model: nn.Module, groups: list[list[str]], qconfig: str, **more: Any) -> Any:
        fused = self.top.fuse_modules_qat(model.train(), groups)
        fused.qconfig = QCONFIGS[qconfig](self.top)
        return self.top.prepare_qat(fused, **{"mapping": self.mapping, **more})


def freeze_batch_norms(model: nn.Module) -> None:
    # torch.ao's function passes LinearBn1d by; its method does not
    for module in model.modules():
        if hasattr(module, "freeze_bn_stats"):
            module.freeze_bn_stats()


# --- nets of two or three layers ----------------------------------------------------------------


class Net(nn.Module):
    """Layers between stubs; what comes out of the convolutions is averaged over space."""

    def __init__(self, library: Library, *layers: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.quant, self.dequant = library.top.QuantStub(), library.top.DeQuantStub()
        self.layers = nn.Sequential(*layers)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.quant(x))
        if self.head is not None:
            x = self.head(x.flatten(2).mean(2))
        return self.dequant(x)


class Residual(Net):
    """Adds the second convolution's output to the first's."""

    def __init__(self, library: Library, *layers: nn.Module, head: nn.Module) -> None:
        super().__init__(library, *layers, head=head)
        self.add = library.functional()

    def forward(self, x: Tensor) -> Tensor:
        conv, bn, relu, conv2, bn2 = self.layers
        y = relu(bn(conv(self.quant(x))))
        y = self.add.add_relu(y, bn2(conv2(y)))
        assert self.head is not None
        return self.dequant(self.head(y.flatten(2).mean(2)))


def _conv1d(library: Library) -> Net:
    first = (nn.Conv1d(3, 8, 3, padding=1), nn.ReLU())
    return Net(library, *first, nn.Conv1d(8, 8, 3, stride=2, bias=False), nn.BatchNorm1d(8), head=nn.Linear(8, 4))


def _conv2d(library: Library) -> Net:
    first = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    depthwise = (nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    return Net(library, *first, *depthwise, head=nn.Linear(8, 4))


def _conv3d(library: Library) -> Net:
    return Net(library, nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), head=nn.Linear(6, 4))


def _linear(library: Library) -> Net:
    return Net(library, nn.Linear(10, 12), nn.BatchNorm1d(12), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))


def _residual(library: Library) -> Net:
    first = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return Residual(library, *first, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), head=nn.Linear(8, 4))


# a net, the groups to fuse in it, and the shape of its input
NETS: dict[str, tuple[Callable[[Library], Net], list[list[str]], tuple[int, ...]]] = {
    "conv1d": (_conv1d, [["layers.0", "layers.1"], ["layers.2", "layers.3"]], (3, 12)),
    "conv2d": (_conv2d, [["layers.0", "layers.1", "layers.2"], ["layers.3", "layers.4"]], (3, 8, 8)),
    "conv3d": (_conv3d, [["layers.0", "layers.1", "layers.2"]], (2, 4, 4, 4)),
    "linear": (_linear, [["layers.0", "layers.1"], ["layers.2", "layers.3"]], (10,)),
    "residual": (_residual, [["layers.0", "layers.1", "layers.2"], ["layers.3", "layers.4"]], (3, 8, 8)),
}


def prepared(library: Library, net: str, qconfig: str) -> Any:
    torch.manual_seed(11)
    make, groups, _ = NETS[net]
    return library.prepare(make(library), groups, qconfig)


def losses(model: Any, library: Library, shape: tuple[int, ...], steps: int = 20) -> list[float]:
    """Of SGD with momentum; the batch norms are frozen after 8 steps, the observers after 14."""
    generator = torch.Generator().manual_seed(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for step in range(steps):
        if step == 8:
            freeze_batch_norms(model)
        if step == 14:
            model.apply(library.top.disable_observer)
        wanted = torch.randint(0, 4, (16,), generator=generator)
        x = torch.randn(16, *shape, generator=generator) + wanted.reshape(-1, *[1] * len(shape)) / 2
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), wanted)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("qconfig", ["x86-1", "onednn-0", "symmetric-1"])
def test_losses_follow_torch_aos(ao: Any, net: str, qconfig: str) -> None:
    ours, theirs = Library(), Library(ao)
    models = prepared(ours, net, qconfig), prepared(theirs, net, qconfig)
    mine, expected = (
        losses(model, library, NETS[net][2]) for model, library in zip(models, (ours, theirs), strict=True)
    )
    assert mine == pytest.approx(expected, rel=1e-3)
    assert min(expected) < 0.95 * expected[0]  # they did learn something
    for (name, value), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


def test_switches_of_the_schedule_take_effect() -> None:
    library = Library()
    model = prepared(library, "conv2d", "onednn-1")
    losses(model, library, NETS["conv2d"][2])
    assert not any(module.bn.training for module in model.modules() if hasattr(module, "bn"))
    kept = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.randn(4, *NETS["conv2d"][2]) * 50)
    assert all(torch.equal(value, kept[name]) for name, value in model.named_buffers())


# --- checkpoints --------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Every module of torch.ao's QAT map, each with an input of its own."""

    def __init__(self, library: Library) -> None:
        super().__init__()
        self.quant, self.dequant = library.top.QuantStub(), library.top.DeQuantStub()
        self.linear, self.linear_relu, self.linear_bn = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)
        self.lonely, self.lonely_bn = nn.ReLU(), nn.BatchNorm1d(5)
        for dim in (1, 2, 3):
            conv, bn = getattr(nn, f"Conv{dim}d"), getattr(nn, f"BatchNorm{dim}d")
            for kind in ("", "_relu", "_bn", "_bn_relu"):
                parts = [conv(2, 4, 3, bias="bn" not in kind)]
                parts += [bn(4)] if "bn" in kind else []
                parts += [nn.ReLU()] if "relu" in kind else []
                self.add_module(f"conv{kind}{dim}", nn.Sequential(*parts))
        self.add = library.functional()

    def groups(self) -> list[list[str]]:
        convs = [name for name, module in self.named_children() if isinstance(module, nn.Sequential)]
        return [
            ["linear_relu", "lonely"],
            ["linear_bn", "lonely_bn"],
            *([f"{name}.{i}" for i in range(len(getattr(self, name)))] for name in convs if "_" in name),
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        flat = self.quant(x)
        outputs = [self.linear(flat), self.lonely(self.linear_relu(flat)), self.lonely_bn(self.linear_bn(flat))]
        for dim in (1, 2, 3):
            spread = flat.repeat_interleave(4**dim // 2, 1).reshape(-1, 3, 4**dim)[:, :2].reshape(-1, 2, *[4] * dim)
            outputs += [getattr(self, f"conv{kind}{dim}")(spread) for kind in ("", "_relu", "_bn", "_bn_relu")]
        return [self.dequant(output) for output in [*outputs, self.add.add(flat, flat)]]


def prepared_zoo(library: Library, qconfig: str, seed: int, **more: Any) -> Any:
    torch.manual_seed(seed)
    zoo = Zoo(library)
    return library.prepare(zoo, zoo.groups(), qconfig, **more)


def shapes(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


def test_the_zoo_is_complete(ao: Any) -> None:
    zoo = prepared_zoo(Library(), "x86-1", 0)
    here = {type(module).__name__ for module in zoo.modules() if type(module).__module__.startswith("eagerq")}
    wanted = {kind.__name__ for kind in Library(ao).mapping.values()}
    assert wanted <= here


@pytest.mark.parametrize("qconfig", ["x86-0", "x86-1", "qnnpack-0", "symmetric-channels-1"])
def test_prepared_state_dicts_cross_both_ways(ao: Any, qconfig: str) -> None:
    x = torch.randn(5, 6)
    for source_library, target_library in ((Library(), Library(ao)), (Library(ao), Library())):
        source = prepared_zoo(source_library, qconfig, 1)
        target = prepared_zoo(target_library, qconfig, 2)
        assert list(shapes(source).items()) == list(shapes(target).items())
        target.load_state_dict(source.state_dict(), strict=True)  # before any data

        source(x)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert list(shapes(source).items()) == list(shapes(target).items())
        for name, value in target.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name
        for mode in (True, False):
            for model in (source, target):
                model.train(mode)
            for output, expected in zip(target(x), source(x), strict=True):
                torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


def test_switches_cross_too(ao: Any) -> None:
    x = torch.randn(5, 6)
    for source_library, target_library in ((Library(), Library(ao)), (Library(ao), Library())):
        source = prepared_zoo(source_library, "onednn-1", 1)
        source(x)
        source.apply(source_library.top.disable_fake_quant)
        source.apply(source_library.top.disable_observer)
        target = prepared_zoo(target_library, "onednn-1", 2)
        target(x * 3)
        target.load_state_dict(source.state_dict(), strict=True)
        before = {name: value.clone() for name, value in target.state_dict().items() if "min_val" in name}
        for output, expected in zip(target(x * 9), source(x * 9), strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(target.state_dict()[name], value) for name, value in before.items())


def test_a_checkpoint_without_conv1d_quantizers_is_refused(ao: Any) -> None:
    theirs = Library(ao)
    incomplete = prepared_zoo(theirs, "onednn-1", 1, mapping=theirs.top.get_default_qat_module_mappings())
    ours = prepared_zoo(Library(), "onednn-1", 2)
    ours(torch.randn(5, 6))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(CheckpointError, match=r"it lacks conv1\.0\.weight_fake_quant.*The model is unchanged.*mapping"):
        ours.load_state_dict(incomplete.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_training_goes_on_from_a_checkpoint_of_torch_ao(ao: Any) -> None:
    shape = NETS["conv2d"][2]
    theirs, ours = Library(ao), Library()
    started = prepared(theirs, "conv2d", "onednn-1")
    losses(started, theirs, shape, steps=5)
    resumed = prepared(ours, "conv2d", "onednn-1")
    resumed.load_state_dict(started.state_dict(), strict=True)
    assert losses(resumed, ours, shape) == pytest.approx(losses(started, theirs, shape), rel=1e-3)


def test_freezing_functions_reach_linear_too() -> None:
    model = prepared(Library(), "linear", "onednn-1")
    model.apply(intrinsic_qat.freeze_bn_stats)
    assert [module.bn.training for module in model.modules() if hasattr(module, "bn")] == [False]
