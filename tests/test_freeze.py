"""A frozen model gives the converted model's very numbers, by its plan where it has one and by the model elsewhere."""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eagerq
from eagerq import errors, native
from eagerq.freeze import plan as planning
from eagerq.nn.quantized import FloatFunctional


class Net(nn.Module):
    """Convolutions, a shortcut, pools, a concatenation, a Linear; and a float layer behind."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.act = nn.Hardswish()
        self.join, self.both = FloatFunctional(), FloatFunctional()
        self.fc = nn.Linear(32, 10)
        self.scale = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(self.quant(x)), 3, 2, 1)
        y = self.join.add_relu(self.depthwise(x), x)
        y = self.act(self.both.cat([y, self.grouped(y)], 1))
        y = self.fc(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))
        return self.scale(self.dequant(y))


def converted(net: nn.Module, *shape: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net.eval()
    net.qconfig = eagerq.get_default_qconfig("onednn")
    if isinstance(net, Net):
        eagerq.fuse_modules(net.stem, [["0", "1", "2"]], inplace=True)
        net.scale.qconfig = None
    prepared = eagerq.prepare(net)
    with torch.no_grad():
        prepared(torch.randn(shape))
    return eagerq.convert(prepared).requires_grad_(False)


def images(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> nn.Module:
    return converted(Net(), 2, 3, 32, 32)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a plan is run."""
    made: list[int] = []
    run = planning.Plan.run

    def counted(self: Any, inputs: Any) -> Any:
        made.append(1)
        return run(self, inputs)

    monkeypatch.setattr(planning.Plan, "run", counted)
    return made


def assert_planned(frozen: nn.Module, model: nn.Module, x: Any, runs: list[int], planned: bool = True) -> None:
    runs.clear()
    result = frozen(x)
    assert bool(runs) == planned
    assert torch.equal(result, model(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_same_numbers(model: nn.Module, runs: list[int], layout: Any, inference_mode: bool) -> None:
    frozen = eagerq.freeze(model, (images().contiguous(memory_format=layout),))
    with torch.inference_mode(inference_mode):
        for seed in range(4):
            assert_planned(frozen, model, images(seed=seed).contiguous(memory_format=layout), runs)


def test_results_are_not_overwritten(model: nn.Module) -> None:
    frozen = eagerq.freeze(model[:2] if isinstance(model, nn.Sequential) else model.stem, (quantized(model, 1),))
    first, second = quantized(model, 1), quantized(model, 2)
    one = frozen(first)
    frozen(second)
    assert torch.equal(one.int_repr(), model.stem(first).int_repr())


def quantized(model: nn.Module, seed: int) -> eagerq.QTensor:
    return model.quant(images(seed=seed))


def test_qtensors_in_and_out(model: nn.Module, runs: list[int]) -> None:
    frozen = eagerq.freeze(model.stem, (quantized(model, 1),))
    runs.clear()
    result, wanted = frozen(quantized(model, 2)), model.stem(quantized(model, 2))
    assert runs
    assert torch.equal(result, wanted)
    assert (result.q_scale(), result.q_zero_point()) == (wanted.q_scale(), wanted.q_zero_point())
    # of other parameters, it is another call
    other = eagerq.quantize_per_tensor(images(), 0.3, 7, torch.uint8)
    assert_planned(frozen, model.stem, other, runs, planned=False)


def test_other_inputs_go_through_the_model(model: nn.Module, runs: list[int]) -> None:
    frozen = eagerq.freeze(model, (images(),))
    for other in (images(3), images()[:, :, :20], images().contiguous(memory_format=torch.channels_last)):
        assert_planned(frozen, model, other, runs, planned=False)
    frozen.add((images(3),))
    assert_planned(frozen, model, images(3, seed=9), runs)
    assert_planned(frozen, model, images(seed=9), runs)
    assert torch.equal(frozen(x=images()), model(images()))


def change_weight(model: Any) -> None:
    model.fc._weight.mul_(-1)


def replace_layer(model: Any) -> None:
    model.depthwise = converted(Net(), 2, 3, 32, 32, seed=5).depthwise


def load(model: Any) -> None:
    model.load_state_dict(converted(Net(), 2, 3, 32, 32, seed=5).state_dict())


def change_output(model: Any) -> None:
    model.join.scale *= 2


def change_float_layer(model: Any) -> None:
    with torch.no_grad():
        model.scale.weight.neg_()


@pytest.mark.parametrize("change", [change_weight, replace_layer, load, change_output, change_float_layer])
def test_a_changed_model_is_planned_anew(model: nn.Module, runs: list[int], change: Callable[[Any], None]) -> None:
    frozen = eagerq.freeze(model, (images(),))
    before = frozen(images())
    change(model)
    assert not torch.equal(frozen(images()), before)
    assert_planned(frozen, model, images(seed=3), runs)


def test_hooks_are_called(model: nn.Module, runs: list[int]) -> None:
    frozen = eagerq.freeze(model, (images(),))
    seen: list[int] = []
    handle = model.fc.register_forward_hook(lambda *_: seen.append(1))
    assert_planned(frozen, model, images(), runs, planned=False)
    assert len(seen) == 2
    handle.remove()
    assert_planned(frozen, model, images(), runs)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(model: nn.Module, runs: list[int], how: str) -> None:
    frozen = eagerq.freeze(model, (images(),))
    if how == "deepcopy":
        other: Any = copy.deepcopy(frozen)
    else:
        file = io.BytesIO()
        torch.save(frozen, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    change_weight(other.model)
    assert_planned(other, other.model, images(), runs)
    assert_planned(frozen, model, images(), runs)
    assert {*frozen.state_dict()} == {f"model.{name}" for name in model.state_dict()}


def test_threads(model: nn.Module) -> None:
    """Whoever finds the plan at work takes the model itself."""
    frozen = eagerq.freeze(model, (images(),))
    wanted = {seed: model(images(seed=seed)) for seed in range(4)}
    wrong: list[int] = []

    def run(seed: int) -> None:
        for _ in range(20):
            if not torch.equal(frozen(images(seed=seed)), wanted[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_and_exported(model: nn.Module) -> None:
    frozen = eagerq.freeze(model, (images(),))
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(images()), model(images()), atol=1e-5)
    program = torch.export.export(frozen, (images(),)).module()
    assert torch.allclose(program(images()), model(images()), atol=1e-5)


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Remembering(nn.Module):
    """Its second answer holds numbers of the first, got behind torch's back."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.numpy().copy())


@pytest.mark.parametrize("net", [Deciding(), Noisy(), Remembering()])
def test_refused(net: nn.Module) -> None:
    with pytest.raises(errors.UnsupportedError, match=r"cannot be planned.*itself"):
        eagerq.freeze(net.eval(), (torch.randn(3, 4),))


def test_dynamic_layers_keep_to_the_values() -> None:
    """Where their scales pass through Python they are refused, elsewhere repeated with the scales of the moment."""
    net = eagerq.quantize_dynamic(nn.Sequential(nn.Linear(8, 4)).eval())
    x = torch.randn(3, 8) * 7 + 5
    with contextlib.suppress(errors.UnsupportedError):
        assert torch.equal(eagerq.freeze(net, (torch.randn(3, 8),))(x), net(x))


def test_mistakes(model: nn.Module) -> None:
    with pytest.raises(errors.InvalidArgumentError, match="training mode"):
        eagerq.freeze(nn.Linear(2, 2).train(), (torch.randn(1, 2),))
    with pytest.raises(errors.InvalidArgumentError, match="example_inputs"):
        eagerq.freeze(model, ([images()],))
    with pytest.raises(errors.InvalidInputError, match="float"):
        eagerq.freeze(model.stem, (images(),))
    x = images()
    with pytest.raises(errors.UnsupportedError, match="same tensor twice"):
        eagerq.freeze(Adding().eval(), (x, x))


class Adding(nn.Module):
    def forward(self, x: Tensor, y: Tensor, factor: float = 1.0) -> list[Tensor]:
        z = x + y * factor
        return [z.view(-1), x]


def test_several_arguments_and_results() -> None:
    frozen = eagerq.freeze(Adding().eval(), (torch.ones(2, 2), torch.ones(2, 2), 3.0))
    x, y = torch.randn(2, 2), torch.randn(2, 2)
    z, same = frozen(x, y, 3.0)
    assert torch.equal(z, (x + 3 * y).view(-1))
    assert same is x
    assert torch.equal(frozen(x, y, 2.0)[0], (x + 2 * y).view(-1))


@pytest.mark.skipif(not native.conv_ready(), reason="no compiler at installation, or no AVX-512 VNNI")
def test_memory_is_reused(model: nn.Module) -> None:
    net = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)))
    wrapped = converted(eagerq.QuantWrapper(net), 1, 8, 16, 16)
    frozen = eagerq.freeze(wrapped, (torch.randn(1, 8, 16, 16),))
    ((_, plan),) = frozen._plans.values()
    assert len(plan._buffers) == 7
    assert len({buffer.untyped_storage().data_ptr() for buffer in plan._buffers.values()}) == 2


def test_every_c_function_is_recorded() -> None:
    """One that a tape does not hear of would be left out of the plan."""
    names = [
        "add",
        "conv",
        "dequantize",
        "embedding",
        "embedding_bag",
        "layer_norm",
        "linear",
        "look_up",
        "max_pool",
        "quantize",
    ]
    for name in [*names, "quantize_dynamic", "spatial_mean"]:
        assert hasattr(getattr(native, name), "unrecorded"), name
