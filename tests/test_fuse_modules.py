"""Fusing: the same function in fewer modules, for inference and for training; what cannot be fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Oracle
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import eagerq
from eagerq import fuse_modules, fuse_modules_qat, intrinsic
from eagerq.errors import EagerqError, InvalidArgumentError, InvalidConfigError, UnsupportedError

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def stirred(*layers: nn.Module, training: bool = False) -> nn.Sequential:
    """A Sequential whose batch norms have statistics and factors of their own."""
    model = nn.Sequential(*layers)
    for module in model:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.track_running_stats:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias)
    return model.train(training)


def sequences(dim: int) -> dict[str, Callable[[], list[nn.Module]]]:
    conv, bn = CONVS[dim], NORMS[dim]
    return {
        f"ConvBn{dim}d": lambda: [conv(3, 4, 3), bn(4)],
        f"ConvBnReLU{dim}d": lambda: [conv(3, 4, 3, bias=False), bn(4), nn.ReLU()],
        f"ConvReLU{dim}d": lambda: [conv(3, 4, 3, padding=1), nn.ReLU()],
    }


SEQUENCES: dict[str, Callable[[], list[nn.Module]]] = {
    **{name: make for dim in (1, 2, 3) for name, make in sequences(dim).items()},
    "LinearReLU": lambda: [nn.Linear(3, 4), nn.ReLU()],
    "LinearBn1d": lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4)],
    "BNReLU2d": lambda: [nn.BatchNorm2d(3), nn.ReLU()],
    "BNReLU3d": lambda: [nn.BatchNorm3d(3), nn.ReLU()],
}
# what each becomes for inference: batch norms are folded away
FOLDED = {
    **{f"ConvBn{dim}d": f"Conv{dim}d" for dim in (1, 2, 3)},
    **{f"ConvBnReLU{dim}d": f"ConvReLU{dim}d" for dim in (1, 2, 3)},
    "LinearBn1d": "Linear",
}
each_sequence = pytest.mark.parametrize("name", SEQUENCES)


def names_of(model: nn.Sequential) -> list[str]:
    return [str(index) for index in range(len(model))]


def sample(name: str, batch: int = 2) -> Tensor:
    spatial = 0 if name.startswith("Linear") else int(name[-2])
    return torch.randn(batch, 3, *[6] * spatial)


def kinds(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


# --- the same function --------------------------------------------------------------------------------


@each_sequence
def test_for_inference_the_batch_norm_is_folded_away(name: str) -> None:
    model = stirred(*SEQUENCES[name]())
    fused = fuse_modules(model, names_of(model))
    assert kinds(fused) == [FOLDED.get(name, name)] + ["Identity"] * (len(model) - 1)
    x = sample(name)
    torch.testing.assert_close(fused(x), model(x))
    if name in FOLDED:
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fused.modules())


@each_sequence
@pytest.mark.parametrize("training", [True, False])
def test_for_training_the_layers_stay_inside_one_module(name: str, training: bool) -> None:
    model = stirred(*SEQUENCES[name](), training=training)
    layers = list(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    reference = copy.deepcopy(model)
    fused = fuse_modules_qat(model, names_of(model), inplace=True)
    assert kinds(fused) == [name] + ["Identity"] * (len(layers) - 1)
    assert type(fused[0]) is getattr(intrinsic, name)
    assert list(fused[0]) == layers  # the very modules, with their parameters
    assert {id(parameter) for parameter in fused.parameters()} == parameters
    assert {module.training for module in fused.modules()} == {training}
    x = sample(name, batch=4)
    assert torch.equal(fused(x), reference(x))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_transposed_convolutions_are_folded_for_inference_only(dim: int, groups: int) -> None:
    """Grouped ones too, which torch's own folding refuses."""
    model = stirred(TRANSPOSED[dim](6, 4, 3, stride=2, groups=groups, bias=groups == 1), NORMS[dim](4))
    fused = fuse_modules(model, ["0", "1"])
    assert kinds(fused) == [f"ConvTranspose{dim}d", "Identity"]
    x = torch.randn(2, 6, *[4] * dim)
    torch.testing.assert_close(fused(x), model(x))
    with pytest.raises(
        UnsupportedError, match=r"cannot fuse '0', '1'.*ConvTranspose.*not supported in QAT.*model\.eval"
    ):
        fuse_modules_qat(model.train(), ["0", "1"])


@given(
    dim=st.integers(1, 3),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding_mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3]),
    relu=st.booleans(),
)
def test_folding_of_drawn_convolutions(
    dim: int,
    groups: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding_mode: str,
    bias: bool,
    affine: bool,
    eps: float,
    relu: bool,
) -> None:
    options = {"groups": groups, "stride": stride, "dilation": dilation, "padding": 1, "padding_mode": padding_mode}
    conv = CONVS[dim](2 * groups, 2 * groups, kernel, bias=bias, **options)
    model = stirred(conv, NORMS[dim](2 * groups, eps=eps, affine=affine), *([nn.ReLU()] if relu else []))
    fused = fuse_modules(model, names_of(model))
    x = torch.randn(2, 2 * groups, *[7] * dim)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    folded = fused[0][0] if relu else fused[0]
    for option, value in options.items():
        assert getattr(folded, option) == getattr(conv, option), (option, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_device_are_kept(dtype: torch.dtype, device: torch.device) -> None:
    model = stirred(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).to(device, dtype)
    fused = fuse_modules(model, ["0", "1", "2"])
    assert {(p.dtype, p.device.type) for p in fused.parameters()} == {(dtype, device.type)}


# --- names ----------------------------------------------------------------------------------------------


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.inner = nn.ModuleDict({"block": nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())})
        self.tail = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.inner["block"](self.relu(self.bn(self.conv(x)))))


def test_one_list_or_several_and_nested_names() -> None:
    model = stirred(Branched())[0]
    x = torch.randn(2, 3, 2, 2)
    expected = model(x)
    one = fuse_modules(model, ["conv", "bn", "relu"])
    assert type(one.conv) is intrinsic.ConvReLU2d
    assert type(one.bn) is type(one.relu) is nn.Identity
    all_of_them = [("conv", "bn", "relu"), ["inner.block.0", "inner.block.1"], ["tail.1", "tail.2"]]
    several = fuse_modules(model, all_of_them)
    assert type(several.inner["block"][0]) is intrinsic.ConvReLU2d
    assert type(several.tail[1]) is intrinsic.LinearReLU
    for fused in (one, several):
        torch.testing.assert_close(fused(x), expected)
    assert kinds(fuse_modules(model, [])) == kinds(model)


def test_inplace_or_a_copy() -> None:
    model = stirred(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = kinds(model)
    assert fuse_modules(model, ["0", "1"]) is not model
    assert kinds(model) == before
    assert fuse_modules(model, ["0", "1"], inplace=True) is model
    assert kinds(model) == ["Conv2d", "Identity"]


def test_already_fused_neighbours_do_not_stand_between() -> None:
    model = stirred(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    fuse_modules(model, ["0", "1"], inplace=True)
    fuse_modules(model, ["0", "2"], inplace=True)  # an Identity is between them
    assert kinds(model) == ["ConvReLU2d", "Identity", "Identity"]


def test_a_module_under_two_names() -> None:
    relu = nn.ReLU()
    model = stirred(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1), relu)
    x = torch.randn(1, 3, 2, 2)
    fused = fuse_modules(model, [["0", "1"], ["2", "3"]])
    assert kinds(fused) == ["ConvReLU2d", "Identity", "ConvReLU2d", "Identity"]
    assert torch.equal(fused(x), model(x))


def test_parametrized_layers() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU())
    fused = fuse_modules(model.eval(), ["0", "1"])
    assert type(fused[0]) is intrinsic.LinearReLU
    x = torch.randn(2, 3)
    assert torch.equal(fused(x), model(x))


# --- hooks ------------------------------------------------------------------------------------------------


def hooked(model: nn.Sequential) -> list[str]:
    calls: list[str] = []
    for index, module in enumerate(model):
        module.register_forward_pre_hook(lambda module, args, index=index: calls.append(f"pre {index}"))
        module.register_forward_hook(lambda module, args, output, index=index: calls.append(f"post {index}"))
    return calls


def test_hooks_of_all_layers_still_run_in_training() -> None:
    model = stirred(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), training=True)
    calls = hooked(model)
    fused = fuse_modules_qat(model, ["0", "1", "2"])
    fused(torch.randn(2, 3, 2, 2))
    assert calls == ["pre 0", "post 0", "pre 1", "post 1", "pre 2", "post 2"]
    assert len(fused[0]._forward_pre_hooks) == len(fused[0]._forward_hooks) == 1
    assert not fused[0][0]._forward_pre_hooks
    assert not fused[0][2]._forward_hooks
    assert len(model[0]._forward_pre_hooks) == 1  # the original has kept its own


@pytest.mark.parametrize("layers", [2, 3])
def test_the_first_ones_pre_hook_and_the_last_ones_hook_run_once_after_folding(layers: int) -> None:
    model = stirred(*[nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()][:layers])
    calls = hooked(model)
    fused = fuse_modules(model, names_of(model))
    fused(torch.randn(2, 3, 2, 2))
    assert calls.count("pre 0") == 1
    assert calls[0] == "pre 0"
    assert calls.count(f"post {layers - 1}") == 1
    assert calls[-1] == f"post {layers - 1}"
    assert "pre 1" not in calls  # what stood there is gone


def test_keyword_and_always_called_hooks_move_as_they_are() -> None:
    model = stirred(nn.Linear(3, 3), nn.ReLU())
    seen: list[Any] = []
    model[0].register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model[1].register_forward_hook(lambda module, args, output: seen.append("always"), always_call=True)
    fused = fuse_modules(model, ["0", "1"])
    with pytest.raises(RuntimeError):
        fused[0](torch.randn(2, 4))
    assert seen == [{}, "always"]


# --- methods of one's own ---------------------------------------------------------------------------------------


def side_by_side(is_qat: bool, *modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules, nn.Identity() if is_qat else nn.Flatten())


@pytest.mark.parametrize(("fuse", "last"), [(fuse_modules, nn.Flatten), (fuse_modules_qat, nn.Identity)])
def test_a_method_for_further_sequences(fuse: Any, last: type[nn.Module]) -> None:
    table = {"additional_fuser_method_mapping": {(nn.Linear, nn.Tanh): side_by_side}}
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    fused = fuse(model, ["0", "1"], fuse_custom_config_dict=table)
    assert [type(part) for part in fused[0]] == [nn.Linear, nn.Tanh, last]
    assert type(fused[1]) is nn.Identity


def test_a_method_may_replace_a_known_one() -> None:
    table = {"additional_fuser_method_mapping": {(nn.Linear, nn.ReLU): side_by_side}}
    fused = fuse_modules(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), ["0", "1"], fuse_custom_config_dict=table)
    assert type(fused[0]) is nn.Sequential
    assert type(fuse_modules(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), ["0", "1"])[0]) is intrinsic.LinearReLU


def test_another_fuser() -> None:
    asked: list[Any] = []

    def fuser(modules: list[nn.Module], is_qat: bool, methods: Any = None) -> list[nn.Module]:
        asked.append(([type(module) for module in modules], is_qat))
        return [nn.Sequential(*modules), *(nn.Identity() for _ in modules[1:])]

    fused = fuse_modules_qat(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), [["0", "1"]], fuser_func=fuser)
    assert asked == [([nn.Linear, nn.Tanh], True)]
    assert kinds(fused) == ["Sequential", "Identity"]


def test_fuse_known_modules_alone() -> None:
    layers = [nn.Linear(3, 4), nn.ReLU()]
    fused, identity = eagerq.fuse_known_modules(layers, is_qat=True)
    assert type(fused) is intrinsic.LinearReLU
    assert type(identity) is nn.Identity
    assert eagerq.get_fuser_method((nn.Linear, nn.ReLU))(False, *layers)[0] is layers[0]


def test_identity_can_be_fused_by_a_method_of_ones_own() -> None:
    table = {"additional_fuser_method_mapping": {(nn.Linear, nn.Identity): side_by_side}}
    fused = fuse_modules(nn.Sequential(nn.Linear(3, 4), nn.Identity()), ["0", "1"], fuse_custom_config_dict=table)
    assert type(fused[0]) is nn.Sequential


# --- what is refused ------------------------------------------------------------------------------------------------


def layered() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()


class Subclass(nn.Sequential):
    """Runs its parts in order, as its base does."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a missing name": (
        lambda: fuse_modules(stirred(Branched())[0], ["conv", "bn1"]),
        r"no module named 'bn1' to fuse; nearest names: 'bn'.*named_modules",
    ),
    "a missing nested name": (
        lambda: fuse_modules(stirred(Branched())[0], ["inner.block.0", "inner.blck.1"]),
        r"'inner\.blck\.1' to fuse; nearest names: 'inner\.block",
    ),
    "others between": (
        lambda: fuse_modules(layered(), ["0", "2"]),
        r"'0', '2' do not follow one another in their Sequential, whose order is 0, 1, 2, 3, 4",
    ),
    "others between in a subclass": (lambda: fuse_modules(Subclass(*layered()), ["0", "2"]), "do not follow"),
    "the wrong order": (lambda: fuse_modules(layered(), ["1", "0"]), "do not follow one another"),
    "the wrong order elsewhere": (
        lambda: fuse_modules(stirred(Branched())[0], ["bn", "conv"]),
        "cannot fuse 'bn', 'conv': did not find fuser method for: BatchNorm2d, Conv2d.*in the order they run",
    ),
    "listed twice": (lambda: fuse_modules(layered(), [["0", "1"], ["1", "2"]]), "'1' is listed twice"),
    "twice in one": (lambda: fuse_modules(layered(), ["0", "0"]), "'0' is listed twice"),
    "one alone": (lambda: fuse_modules(layered(), ["0"]), "did not find fuser method for: Conv2d"),
    "an unknown pair": (
        lambda: fuse_modules(nn.Sequential(nn.Linear(1, 1), nn.Tanh()), ["0", "1"]),
        "did not find fuser method for: Linear, Tanh.*additional_fuser_method_mapping",
    ),
    "numbers": (lambda: fuse_modules(layered(), [0, 1]), "modules_to_fuse has 0 in it.*list of names"),
    "a name among lists": (lambda: fuse_modules(layered(), [["0", "1"], "2"]), "modules_to_fuse has '2' in it"),
    "folding while training": (
        lambda: fuse_modules(layered().train(), ["0", "1"]),
        r"cannot fuse '0', '1'.*training mode.*model\.eval\(\) first, or use fuse_modules_qat",
    ),
    "mixed modes": (
        lambda: fuse_modules_qat(mixed(), ["0", "1"]),
        "same mode.* are in train, eval",
    ),
    "mixed modes, folding": (lambda: fuse_modules(mixed(), ["0", "1", "2"]), "are in train, eval, eval"),
    "no affine": (
        lambda: fuse_modules_qat(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)), ["0", "1"]),
        "BatchNorm2d has affine=False",
    ),
    "no statistics": (
        lambda: fuse_modules(stirred(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), ["0", "1"]),
        "BatchNorm2d has track_running_stats=False",
    ),
    "no statistics to train": (
        lambda: fuse_modules_qat(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), ["0", "1"]
        ),
        "BatchNorm1d has track_running_stats=False",
    ),
    "another width": (
        lambda: fuse_modules(stirred(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5)), ["0", "1"]),
        "Conv2d has 4 outputs, but BatchNorm2d takes 5",
    ),
    "another width to train": (
        lambda: fuse_modules_qat(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)), ["0", "1"]),
        "Linear has 4 outputs, but BatchNorm1d takes 5",
    ),
    "a prepared model": (
        lambda: fuse_modules_qat(quantizable(eagerq.prepare_qat), ["1", "2"]),
        "fuse_modules_qat got a model that is prepared already",
    ),
    "a converted model": (
        lambda: fuse_modules(eagerq.convert(quantizable(eagerq.prepare_qat)), ["1", "2"]),
        "fuse_modules got a model that is converted already",
    ),
}


def mixed() -> nn.Module:
    model = layered().train()
    model[1].eval()
    model[2].eval()
    return model


def quantizable(walk: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = nn.Sequential(eagerq.QuantStub(), nn.Linear(2, 2), nn.ReLU()).train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    return walk(model)


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_refused_by_name(mistake: str) -> None:
    call, match = REFUSED[mistake]
    with pytest.raises(EagerqError, match=match):
        call()


def test_mistakes_are_of_the_types_that_torch_raises() -> None:
    with pytest.raises(AssertionError, match="did not find fuser method for"):
        eagerq.get_fuser_method((nn.Linear, nn.Linear))
    with pytest.raises(NotImplementedError, match="Cannot fuse modules"):
        eagerq.fuse_conv_bn(True, nn.ConvTranspose2d(1, 1, 1).train(), nn.BatchNorm2d(1).train())
    assert issubclass(InvalidConfigError, AssertionError)
    assert issubclass(InvalidArgumentError, ValueError)


def test_an_int8_or_qat_class_is_shown_in_full() -> None:
    with pytest.raises(InvalidConfigError, match=r"eagerq\.nn\.qat\.linear\.Linear, ReLU"):
        eagerq.get_fuser_method((eagerq.nn.qat.Linear, nn.ReLU))


@pytest.mark.parametrize("fuse", [fuse_modules, fuse_modules_qat])
def test_a_failure_half_way_leaves_the_model_as_it_was(fuse: Any) -> None:
    def failing(is_qat: bool, *modules: nn.Module) -> nn.Module:
        raise RuntimeError("no")

    model = layered().train(fuse is fuse_modules_qat)
    hooked(model)
    tables = ("_forward_pre_hooks", "_forward_hooks")

    def anatomy() -> Any:
        return [(name, id(m), m.training, [dict(getattr(m, t)) for t in tables]) for name, m in model.named_modules()]

    before, values = anatomy(), copy.deepcopy(model.state_dict())
    table = {"additional_fuser_method_mapping": {(nn.Conv2d, nn.ReLU): failing}}
    with pytest.raises(RuntimeError, match="no"):
        fuse(model, [["0", "1", "2"], ["3", "4"]], inplace=True, fuse_custom_config_dict=table)
    with pytest.raises(InvalidArgumentError):
        fuse(model, [["0", "1", "2"], ["3", "5"]], inplace=True)
    assert anatomy() == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])


# --- torch.ao as the yardstick ----------------------------------------------------------------------------------------


@each_sequence
@pytest.mark.parametrize("training", [True, False])
def test_as_the_oracle_fuses(ao: Oracle, name: str, training: bool) -> None:
    model = stirred(*SEQUENCES[name](), training=training)
    ours_of, theirs_of = (
        (fuse_modules_qat, ao.quantization.fuse_modules_qat)
        if training
        else (fuse_modules, ao.quantization.fuse_modules)
    )
    ours, theirs = ours_of(model, names_of(model)), theirs_of(copy.deepcopy(model), names_of(model))
    assert kinds(ours) == kinds(theirs)
    assert [kinds(part) for part in ours] == [kinds(part) for part in theirs]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = sample(name, batch=4)
    assert torch.equal(ours(x), theirs(x))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
