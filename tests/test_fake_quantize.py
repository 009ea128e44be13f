"""Fake quantizers: torch.ao's numbers and checkpoints, switches that cost nothing, errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import eagerq
from eagerq import fake_quantize, observer
from eagerq.errors import EagerqError, InvalidConfigError, InvalidInputError, UnsupportedError
from eagerq.fake_quantize import FakeQuantize, FixedQParamsFakeQuantize, FusedMovingAvgObsFakeQuantize

# torch.ao knows 8 and 32 bits by the names of the dtypes that torch is dropping
AO_DTYPES = {torch.uint8: "quint8", torch.int8: "qint8", torch.int16: "int16", torch.int32: "qint32"}
NAMES = ("FakeQuantize", "FusedMovingAvgObsFakeQuantize")
SCHEMES = {
    (False, False): torch.per_tensor_affine,
    (False, True): torch.per_tensor_symmetric,
    (True, False): torch.per_channel_affine,
    (True, True): torch.per_channel_symmetric,
}


@dataclass(frozen=True)
class Recipe:
    """A fake quantizer that either library can make."""

    name: str = "FusedMovingAvgObsFakeQuantize"
    per_channel: bool = False
    symmetric: bool = False
    dtype: torch.dtype = torch.uint8
    limits: tuple[int, int] = (0, 255)
    reduce_range: bool = False
    ch_axis: int = 0
    averaging_constant: float = 0.01

    def make(self, ao: Any = None) -> Any:
        library = ao.quantization if ao else eagerq
        kind = "MovingAveragePerChannelMinMaxObserver" if self.per_channel else "MovingAverageMinMaxObserver"
        arguments: dict[str, Any] = {"ch_axis": self.ch_axis} if self.per_channel else {}
        return getattr(library, self.name)(
            getattr(library, kind),
            *self.limits,
            dtype=getattr(torch, AO_DTYPES[self.dtype]) if ao else self.dtype,
            qscheme=SCHEMES[self.per_channel, self.symmetric],
            reduce_range=self.reduce_range,
            averaging_constant=self.averaging_constant,
            **arguments,
        )


WEIGHT = Recipe(per_channel=True, symmetric=True, dtype=torch.int8, limits=(-128, 127))
RECIPES = [
    Recipe(name, per_channel, symmetric, torch.int8, (-128, 127))
    for name in NAMES
    for per_channel in (False, True)
    for symmetric in (False, True)
]


def described(recipe: Recipe) -> str:
    kind = "fused" if recipe.name == NAMES[1] else "plain"
    return f"{kind}-{'channel' if recipe.per_channel else 'tensor'}-{'symmetric' if recipe.symmetric else 'affine'}"


every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=described)


@st.composite
def limits(draw: st.DrawFn) -> tuple[torch.dtype, tuple[int, int]]:
    """A dtype, and a range of its integers: all of them, four bits, or any that holds zero."""
    dtype = draw(st.sampled_from(list(AO_DTYPES)))
    info = torch.iinfo(dtype)
    whole = (info.min, info.max) if info.bits < 32 else (-(2**16), 2**16 - 1)
    four_bits = (0, 15) if info.min == 0 else (-8, 7)
    any_range = st.tuples(st.integers(max(info.min, -(2**16)), 0), st.integers(1, min(info.max, 2**16)))
    return dtype, draw(st.sampled_from([whole, four_bits]) | any_range)


@st.composite
def recipes(draw: st.DrawFn, dim: int) -> Recipe:
    """What torch.ao can do: its fused one has the channels in front, and wants two dimensions."""
    dtype, chosen = draw(limits())
    symmetric = draw(st.booleans())
    name = draw(st.sampled_from(NAMES))
    return Recipe(
        name,
        dim > 1 and draw(st.booleans()),
        symmetric,
        dtype,
        chosen,
        # refused by either library for symmetric unsigned types
        draw(st.booleans()) and chosen[1] > 1 and not (symmetric and dtype is torch.uint8),
        draw(st.integers(0, dim - 1)) if dim > 1 and name == "FakeQuantize" else 0,
        draw(st.sampled_from([0.01, 0.3, 1.0])),
    )


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda x: x,
    "positive": torch.abs,
    "negative": lambda x: -x.abs(),
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-8,
    "large": lambda x: x * 1e6,
    "ties": lambda x: (x * 4).round() / 8,
}


@dataclass(frozen=True)
class Pass:
    """One forward pass: what is switched on, and what comes in."""

    observer: bool = True
    rounding: bool = True
    values: str = "ordinary"


PASSES = st.builds(Pass, st.booleans(), st.booleans(), st.sampled_from(sorted(VALUES)))


def values(shape: tuple[int, ...], seed: int, kind: str = "ordinary") -> Tensor:
    return VALUES[kind](torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def forward_backward(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(torch.arange(1.0, out.numel() + 1).reshape(out.shape))
    assert x.grad is not None
    return out.detach(), x.grad


def assert_same_state(ours: Any, theirs: Any, leave: tuple[str, ...] = ()) -> None:
    """Equal keys, shapes, dtypes and (but for those to ``leave``) values."""
    mine, expected = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(expected)
    for name, value in expected.items():
        assert (mine[name].shape, mine[name].dtype) == (value.shape, value.dtype), name
        assert name in leave or torch.equal(mine[name], value), f"{name}: {mine[name]}, not {value}"


# --- the numbers of torch.ao --------------------------------------------------------------------


@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    passes=st.lists(PASSES, min_size=1, max_size=4),
    first=st.sampled_from(sorted(VALUES)),
    seed=st.integers(0, 2**16),
)
def test_equals_torch_ao(
    ao: Any, data: st.DataObject, shape: tuple[int, ...], passes: list[Pass], first: str, seed: int
) -> None:
    recipe = data.draw(recipes(len(shape)))
    ours, theirs = recipe.make(), recipe.make(ao)
    assert (ours.quant_min, ours.quant_max) == (theirs.quant_min, theirs.quant_max)
    assert_same_state(ours, theirs)
    for number, one in enumerate([Pass(values=first), *passes]):
        for module in (ours, theirs):
            module.enable_observer(one.observer)
            module.enable_fake_quant(one.rounding)
        x = values(shape, seed + number, one.values)
        mine, expected = forward_backward(ours, x), forward_backward(theirs, x)
        assert torch.equal(mine[0], expected[0])
        assert torch.equal(mine[1], expected[1])
        # torch.ao's fused one works its parameters out while it rounds, so they may be old until then
        old = one.rounding or recipe.name == "FakeQuantize"
        assert_same_state(ours, theirs, () if old else ("scale", "zero_point"))
        for told, known in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
            torch.testing.assert_close(told, known, rtol=0, atol=0, check_dtype=False)


@given(shape=st.tuples(st.integers(1, 6), st.integers(1, 5)), seed=st.integers(0, 2**16), four_bits=st.booleans())
def test_embedding_schemes_equal_torch_ao(ao: Any, shape: tuple[int, int], seed: int, four_bits: bool) -> None:
    name = f"default_embedding_fake_quant{'_4bit' * four_bits}"
    ours, theirs = getattr(eagerq, name)(), getattr(ao.quantization, name)()
    for number in range(2):
        x = values(shape, seed + number)
        mine, expected = forward_backward(ours, x), forward_backward(theirs, x)
        torch.testing.assert_close(mine[0], expected[0], rtol=0, atol=1e-6)
        assert torch.equal(mine[1], expected[1])
        assert_same_state(ours, theirs)


@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple), seed=st.integers(0, 99))
def test_channels_may_be_on_any_axis(data: st.DataObject, shape: tuple[int, ...], seed: int) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    symmetric = data.draw(st.booleans())
    x = values(shape, seed)
    for name in NAMES:
        recipe = Recipe(name, True, symmetric, torch.int8, (-128, 127), ch_axis=axis)
        module, alone = recipe.make(), replace(recipe, per_channel=False)
        whole = forward_backward(module, x)
        for channel in range(shape[axis]):
            one = alone.make()
            part = forward_backward(one, x.select(axis, channel))
            assert torch.equal(whole[0].select(axis, channel), part[0])
            assert torch.equal(module.scale[channel], one.scale[0])
            assert torch.equal(module.zero_point[channel], one.zero_point[0])


@pytest.mark.parametrize("reach", ["0to1", "neg1to1"])
def test_fixed_parameters_equal_torch_ao(ao: Any, reach: str) -> None:
    name = f"default_fixed_qparams_range_{reach}_fake_quant"
    ours, theirs = getattr(eagerq, name)(), getattr(ao.quantization, name)()
    for number in range(2):
        x = values((4, 5), number)
        mine, expected = forward_backward(ours, x), forward_backward(theirs, x)
        assert torch.equal(mine[0], expected[0])
        assert torch.equal(mine[1], expected[1])
        assert_same_state(ours, theirs)
    assert torch.equal(ours.calculate_qparams()[0], theirs.calculate_qparams()[0])
    ours.disable_fake_quant()
    assert torch.equal(ours(x), x)


DEFAULTS = sorted(name for name in fake_quantize.__all__ if name.startswith(("default_", "fused_")))


@pytest.mark.parametrize("name", DEFAULTS)
def test_ready_made_ones_equal_torch_ao(ao: Any, name: str) -> None:
    ours, theirs = getattr(fake_quantize, name)(), getattr(ao.quantization.fake_quantize, name)()
    assert type(ours).__name__ == type(theirs).__name__
    for attribute in ("quant_min", "quant_max", "is_dynamic", "qscheme", "ch_axis", "is_per_channel"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    # four bits have a dtype of their own; torch.ao's old one is of eight
    assert ours.dtype.itemsize == theirs.dtype.itemsize
    inner, twin = ours.activation_post_process, theirs.activation_post_process
    assert type(inner).__name__ == type(twin).__name__
    for attribute in ("averaging_constant", "reduce_range"):
        assert getattr(inner, attribute, None) == getattr(twin, attribute, None), attribute
    assert_same_state(ours, theirs)
    x = values((6, 5), 3)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    assert_same_state(ours, theirs)


def test_before_any_data_values_round_to_integers() -> None:
    for recipe in RECIPES:
        module = recipe.make()
        module.disable_observer()
        x = values((3, 4), 0) * 5
        assert torch.equal(module(x), x.round())
        assert module.scale.tolist() == [1]


# --- batches that are not finite ----------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_batch_that_is_not_finite_leaves_no_trace(recipe: Recipe, bad: float) -> None:
    module, steady = recipe.make(), recipe.make()
    for number in range(3):
        x = values((3, 4), number)
        module(x), steady(x)
        broken = values((3, 4), 100) * 100
        broken[1, 2] = bad
        if recipe.per_channel:
            broken[0], broken[2] = steady.activation_post_process.min_val[0], steady.activation_post_process.max_val[2]
        module(broken)
        assert int(module.activation_post_process.nonfinite_batches) == number + 1
        for name in ("min_val", "max_val"):
            got = getattr(module.activation_post_process, name)
            expected = getattr(steady.activation_post_process, name)
            if recipe.per_channel:  # of the other channels there is nothing to hide
                got, expected = got[1], expected[1]
            assert torch.equal(got, expected)
    if not recipe.per_channel:
        assert_same_state(module, steady)
    assert module(x).isfinite().all()


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.per_channel], ids=described)
def test_channels_with_finite_values_are_observed(recipe: Recipe) -> None:
    module = recipe.make()
    broken = values((3, 4), 0)
    broken[1, 2] = torch.nan
    module(broken)
    inner = module.activation_post_process
    assert torch.equal(inner.max_val[[0, 2]], broken.amax(1)[[0, 2]])
    assert module.scale.shape == (3,)
    assert module.scale[1] == 1


@every_recipe
def test_a_first_batch_that_is_not_finite(recipe: Recipe) -> None:
    module, steady = recipe.make(), recipe.make()
    module(torch.full((3, 4), torch.nan))
    assert module.scale.eq(1).all()
    x = values((3, 4), 0)
    assert torch.equal(module(x), steady(x))
    assert_same_state(module, steady)


@every_recipe
def test_an_empty_batch_is_nothing(recipe: Recipe) -> None:
    module, steady = recipe.make(), recipe.make()
    assert module(torch.empty(3, 0)).shape == (3, 0)
    x = values((3, 4), 0)
    assert torch.equal(module(x), steady(x))
    assert module(torch.empty(3, 0)).shape == (3, 0)
    assert_same_state(module, steady)


# --- the switches -------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts the values that are read back from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def rounds(module: Any) -> bool:
    x = values((3, 4), 1)
    return not torch.equal(module(x), x)


def observes(module: Any) -> bool:
    before = module.activation_post_process.max_val.clone()
    module(torch.full((3, 4), 1e3))
    return not torch.equal(module.activation_post_process.max_val, before)


def made(recipe: Recipe) -> Any:
    """One that has seen data."""
    module = recipe.make()
    module(values((3, 4), 0))
    return module


@every_recipe
def test_methods_and_functions_switch(recipe: Recipe) -> None:
    module = made(recipe)
    net = nn.Sequential(nn.Sequential(module), nn.ReLU())
    assert rounds(module)
    assert observes(module)
    module.disable_fake_quant()
    assert not rounds(module)
    assert observes(module)
    net.apply(eagerq.enable_fake_quant)
    net.apply(eagerq.disable_observer)
    assert rounds(module)
    assert not observes(module)
    module.enable_observer()
    net.apply(eagerq.disable_fake_quant)
    assert not rounds(module)
    assert observes(module)
    module.enable_fake_quant(False)
    module.enable_observer(False)
    net.apply(eagerq.enable_observer)
    assert module.fake_quant_enabled.tolist() == [0]
    assert module.observer_enabled.tolist() == [1]
    assert observes(module)


def _same(module: Any) -> Any:
    return module


def _reloaded(module: Any) -> Any:
    module.load_state_dict(module.state_dict())
    return module


def _assigned(module: Any) -> Any:
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    return module


def _pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def _saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


JOURNEYS: dict[str, Callable[[Any], Any]] = {
    "itself": _same,
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "torch.save": _saved,
    "to": lambda module: module.to(torch.device("cpu"), torch.float32),
    "double and back": lambda module: module.double().float(),
    "load_state_dict": _reloaded,
    "load_state_dict(assign)": _assigned,
    "share_memory": lambda module: module.share_memory(),
}


@pytest.mark.parametrize("journey", JOURNEYS)
@pytest.mark.parametrize("name", NAMES)
def test_writing_to_the_buffers_switches(name: str, journey: str) -> None:
    travel = JOURNEYS[journey]
    module = made(Recipe(name))
    module.fake_quant_enabled[0] = 0  # and nothing has run since
    module = travel(module)
    assert not rounds(module)
    module.fake_quant_enabled.fill_(1)
    module.observer_enabled[0] = 0
    assert rounds(module)
    assert not observes(module)
    module = travel(module)
    assert rounds(module)
    assert not observes(module)
    module.observer_enabled = torch.ones_like(module.observer_enabled)  # replaced altogether
    assert observes(module)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("journey", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_switches_of_its_own(name: str, journey: str) -> None:
    module = made(Recipe(name))
    copied = JOURNEYS[journey](module)
    copied.fake_quant_enabled[0] = 0
    copied.disable_observer()
    assert not rounds(copied)
    assert not observes(copied)
    assert rounds(module)
    assert observes(module)


@pytest.mark.parametrize("name", NAMES)
def test_switches_come_with_a_state_dict(name: str) -> None:
    module = made(Recipe(name))
    state = copy.deepcopy(module.state_dict())
    state["fake_quant_enabled"].zero_()
    module.load_state_dict(state)
    assert not rounds(module)
    state["fake_quant_enabled"].fill_(1)
    module.load_state_dict(state)
    assert rounds(module)


@pytest.mark.parametrize("name", NAMES)
def test_a_switch_is_read_once_after_it_was_written_to(name: str) -> None:
    module = made(Recipe(name))
    module.disable_observer()
    x = values((3, 4), 0)
    with Reads() as reads:
        module(x)
        assert reads.count == 0
        module.fake_quant_enabled[0] = 0
        module(x)
        assert reads.count == 1
        for _ in range(3):
            module(x)
        module.enable_fake_quant()
        module(x)
        assert reads.count == 1


@every_recipe
def test_forward_never_reads_the_device(recipe: Recipe, device: torch.device) -> None:
    x = values((3, 4), 0)
    if device.type == "cpu":
        with FakeTensorMode():  # whose tensors have no values to read
            module = recipe.make()
            for _ in range(3):
                out = module(torch.empty(3, 4, requires_grad=True))
                out.sum().backward()
        assert module.scale.shape == ((3,) if recipe.per_channel else (1,))
        return
    module = recipe.make().to(device)
    x = x.to(device).requires_grad_()
    module(x)  # after a move, the switches are read once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            module(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_recipe
def test_first_data_under_inference_mode(recipe: Recipe) -> None:
    module, steady = recipe.make(), recipe.make()
    x = values((3, 4), 0)
    with torch.inference_mode():
        module(x)
    steady(x)
    assert torch.equal(forward_backward(module, x)[0], forward_backward(steady, x)[0])
    assert_same_state(module, steady)


@pytest.mark.parametrize("name", NAMES)
def test_made_under_inference_mode(name: str) -> None:
    with torch.inference_mode():
        module = made(Recipe(name))
        module.fake_quant_enabled[0] = 0
        assert not rounds(module)
        module.enable_fake_quant()
        module.observer_enabled[0] = 0
        assert rounds(module)
        assert not observes(module)


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_pass_through(recipe: Recipe, dtype: torch.dtype) -> None:
    module, single = recipe.make(), recipe.make()
    x = values((3, 4), 0).to(dtype)
    out = module(x)
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), single(x.float()), rtol=2**-7, atol=1e-6)
    assert module.scale.dtype is torch.float32


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_modules_of_other_dtypes(recipe: Recipe, dtype: torch.dtype) -> None:
    module = recipe.make().to(dtype)
    x = values((3, 4), 0).to(dtype)
    for _ in range(2):
        out = module(x)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), x.double(), rtol=0, atol=0.1)


# --- state_dicts --------------------------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("seen", [(False, True), (True, False), (True, True), (False, False)])
def test_state_dicts_cross_both_ways(ao: Any, recipe: Recipe, seen: tuple[bool, bool]) -> None:
    source_seen, target_seen = seen
    for source, target in ((recipe.make(), recipe.make(ao)), (recipe.make(ao), recipe.make())):
        if source_seen:
            source(values((3, 4), 0))
        if target_seen:
            target(values((3, 4), 1))
        source.disable_observer()
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same_state(target, source)
        if source_seen:
            x = values((3, 4), 2)
            assert torch.equal(source(x), target(x))
            assert_same_state(target, source)


def test_a_state_dict_that_lacks_something() -> None:
    module = made(WEIGHT)
    state = module.state_dict()
    del state["scale"]
    with pytest.raises(RuntimeError, match="scale"):
        WEIGHT.make().load_state_dict(state)


def test_a_state_dict_is_a_copy() -> None:
    """Loading must not tie two fake quantizers together."""
    first, second = made(WEIGHT), WEIGHT.make()
    second.load_state_dict(first.state_dict())
    before = first.scale.clone()
    second(values((3, 4), 5) * 100)
    assert torch.equal(first.scale, before)


# --- construction and errors --------------------------------------------------------------------


def test_with_args_makes_anew() -> None:
    factory = FakeQuantize.with_args(quant_min=0, quant_max=127)
    first, second = factory(), factory(quant_max=63)
    assert (first.quant_max, second.quant_max) == (127, 63)
    assert first.activation_post_process is not second.activation_post_process
    counted = FakeQuantize.with_callable_args(quant_max=iter([7, 15]).__next__)
    assert [counted(quant_min=0).quant_max for _ in range(2)] == [7, 15]


@pytest.mark.parametrize("dtype", ["quint8", "qint8", "qint32"])
def test_old_dtypes_mean_plain_ones(ao: Any, dtype: str) -> None:
    assert FakeQuantize(dtype=getattr(torch, dtype)).dtype is getattr(torch, dtype.replace("q", "", 1))


def test_the_range_is_the_dtypes_when_left_out() -> None:
    module = FakeQuantize(dtype=torch.int16)
    assert (module.quant_min, module.quant_max) == (-(2**15), 2**15 - 1)


def test_repr_tells_the_parameters() -> None:
    shown = repr(made(WEIGHT))
    for part in ("fake_quant_enabled=tensor([1])", "quant_min=-128", "quant_max=127", "scale=tensor(["):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quant_min": -1, "quant_max": 255}, "quant_min out of bound|wider than"),
        ({"quant_min": 0, "quant_max": 256}, "quant_max out of bound|wider than"),
        ({"quant_min": -128, "quant_max": 127}, "quant_min out of bound.*does not fit torch.uint8.*another dtype"),
        ({"quant_min": 5, "quant_max": 10}, r"\[5, 10\] must include 0"),
        ({"quant_min": 0, "quant_max": 0}, r"quant_min \(0\) must be less than quant_max \(0\)"),
        ({"dtype": torch.float16}, "cannot be quantized to torch.float16.*use one of torch.uint8"),
        ({"qscheme": "per_tensor"}, "unknown qscheme 'per_tensor'"),
    ],
)
def test_configurations_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message) as caught:
        FakeQuantize(**arguments)
    assert isinstance(caught.value, AssertionError)  # what callers of torch.ao catch


def test_a_scheme_that_the_observer_lacks() -> None:
    with pytest.raises(UnsupportedError, match="MovingAverageMinMaxObserver works with a per-tensor qscheme"):
        FakeQuantize(qscheme=torch.per_channel_symmetric, dtype=torch.int8)


@pytest.mark.parametrize("kind", [observer.MinMaxObserver, observer.HistogramObserver])
def test_the_fused_one_takes_moving_averages_only(kind: Any) -> None:
    with pytest.raises(InvalidConfigError, match=f"moving-average observers only, got {kind.__name__}"):
        FusedMovingAvgObsFakeQuantize(kind)


def test_fixed_parameters_take_their_own_observer_only() -> None:
    with pytest.raises(InvalidConfigError, match="needs a per-tensor FixedQParamsObserver"):
        FixedQParamsFakeQuantize(observer.MinMaxObserver)
    per_channel = observer.FixedQParamsObserver.with_args(scale=1.0, zero_point=0, qscheme=torch.per_channel_affine)
    with pytest.raises(InvalidConfigError, match="needs a per-tensor FixedQParamsObserver"):
        FixedQParamsFakeQuantize(per_channel)


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_channels(name: str) -> None:
    module = made(Recipe(name, per_channel=True))
    state = copy.deepcopy(module.state_dict())
    with pytest.raises(InvalidInputError, match=r"got 5 channels, but 3 were observed before.*ch_axis"):
        module(torch.randn(5, 4))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_an_axis_that_is_not_there(name: str) -> None:
    with pytest.raises(EagerqError, match=r"a tensor of shape \(4,\) has no axis 1"):
        Recipe(name, per_channel=True, ch_axis=1).make()(torch.randn(4))


class Halving(fake_quantize.FakeQuantizeBase):
    """A user's own: only ``forward`` and ``calculate_qparams`` are asked for."""

    def forward(self, x: Tensor) -> Tensor:
        self._read_switches()
        return x / 2 if self._fake_quant_on else x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return torch.ones(1), torch.zeros(1, dtype=torch.int64)


def test_a_class_of_the_users() -> None:
    module = Halving()
    assert module(torch.ones(1)).item() == 0.5
    nn.Sequential(module).apply(eagerq.disable_fake_quant)
    assert module(torch.ones(1)).item() == 1


@example(x=[0.125, 0.375, -0.125], scale=0.25)
@given(x=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=8), scale=st.sampled_from([2.0**-4, 0.25, 0.1]))
def test_rounds_half_to_even_before_the_zero_point(x: list[float], scale: float) -> None:
    module = FixedQParamsFakeQuantize(observer.FixedQParamsObserver.with_args(scale=scale, zero_point=101))
    value = torch.tensor(x)
    inverse = 1.0 / torch.tensor(scale)
    expected = ((value * inverse).round() + 101).clamp(0, 255).sub(101).mul(scale)
    assert torch.equal(module(value), expected)
