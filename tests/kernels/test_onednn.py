"""The oneDNN kernels: integer for integer the reference's, and silent where they would be wrong."""

from __future__ import annotations

import copy
import gc
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.calls import RANGES, Call, conv_calls, expected, integers, linear_calls
from torch import Tensor

from eagerq import kernels
from eagerq.kernels import onednn, packing, reference
from eagerq.nn import quantized as nnq

pytestmark = pytest.mark.skipif(
    not onednn.available() or onednn._saturates(), reason="needs oneDNN on a processor with VNNI"
)


@pytest.fixture(scope="module", autouse=True)
def no_kernel_before() -> Iterator[None]:
    """The doors without kernels that would be asked before oneDNN's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.conv._fast, "cpu", [onednn.conv])
        patch.setitem(kernels.linear._fast, "cpu", [onednn.linear])
        yield


def assert_fast_and_equal(fast: Callable[..., Any], slow: Callable[..., Tensor], call: Call) -> None:
    result = fast(*call.values())
    assert result is not NotImplemented
    wanted = slow(*call.values())
    assert result.dtype is wanted.dtype is call["dtype"]
    assert torch.equal(result, wanted)


def assert_left_to_reference(call: Call, rule: Callable[[Call], Tensor] = expected) -> None:
    name = "conv" if "groups" in call else "linear"
    assert getattr(onednn, name)(*call.values()) is NotImplemented
    # several times: what oneDNN gets wrong in padding varies from run to run
    for _ in range(3):
        assert torch.equal(getattr(kernels, name)(*call.values()), rule(call))


@given(linear_calls())
def test_linear(call: Call) -> None:
    assert_fast_and_equal(onednn.linear, reference.linear, call)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_conv(dim: int) -> None:
    @given(conv_calls(dim))
    def check(call: Call) -> None:
        assert_fast_and_equal(onednn.conv, reference.conv, call)

    check()


def with_some_zero_points(call: Call, data: st.DataObject) -> Call:
    """Zero points for up to half of the channels: those that training saw with weights of one sign."""
    channels = len(call["weight"])
    shifts = data.draw(st.lists(st.integers(-128, 127), min_size=channels, max_size=channels))
    odd = data.draw(st.sets(st.integers(0, channels - 1), max_size=channels // 2))
    scale = call["weight_scale"]
    return {
        **call,
        "weight_scale": scale if len(scale) == channels or data.draw(st.booleans()) else scale.expand(channels).clone(),
        "weight_zero_point": torch.tensor(
            [shift * (channel in odd) for channel, shift in enumerate(shifts)], dtype=torch.int32
        ),
    }


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_some_weight_zero_points(dim: int) -> None:
    @given(conv_calls(dim) if dim else linear_calls(), st.data())
    def check(call: Call, data: st.DataObject) -> None:
        call = with_some_zero_points(call, data)
        fast, slow = (onednn.conv, reference.conv) if dim else (onednn.linear, reference.linear)
        assert_fast_and_equal(fast, slow, call)

    check()


# --- shapes that say more than drawn ones -----------------------------------------------------------


def conv_call(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], x_dtype: torch.dtype = torch.uint8, **changed: Any
) -> Call:
    generator = torch.Generator().manual_seed(7)
    dim, out = len(x_shape) - 2, weight_shape[0]
    call = {
        "x": integers(x_shape, x_dtype, generator),
        "x_scale": 0.02,
        "x_zero_point": 3,
        "weight": integers(weight_shape, torch.int8, generator),
        "weight_scale": torch.rand(out, generator=generator) * 0.01 + 0.001,
        "weight_zero_point": torch.zeros(out, dtype=torch.int32),
        "bias": torch.randn(out, generator=generator),
        "stride": [1] * dim,
        "padding": [0] * dim,
        "dilation": [1] * dim,
        "groups": x_shape[1] // weight_shape[1],
        "scale": 0.1 * weight_shape[1] ** 0.5 * 2,
        "zero_point": 100,
        "dtype": torch.uint8,
        "low": 0,
        "high": 255,
    }
    assert changed.keys() <= call.keys()
    return {**call, **changed}


def linear_call(x_shape: tuple[int, ...], out: int, **changed: Any) -> Call:
    call = conv_call((1, x_shape[-1], 1), (out, x_shape[-1], 1))
    for name in ("stride", "padding", "dilation", "groups"):
        del call[name]
    generator = torch.Generator().manual_seed(8)
    call.update(x=integers(x_shape, torch.uint8, generator), weight=call["weight"].flatten(1).clone())
    assert changed.keys() <= call.keys()
    return {**call, **changed}


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "padding"),
    [
        ((2, 3, 33, 33), (16, 3, 3, 3), 1),  # a network's first layer
        ((2, 32, 14, 14), (32, 1, 3, 3), 1),  # depthwise
        ((2, 24, 9, 9), (8, 24, 1, 1), 0),  # pointwise
        ((1, 64, 8, 8), (64, 64, 3, 3), 1),
        ((2, 16, 40), (24, 16, 5), 2),
        ((2, 16, 40), (16, 1, 7), 3),
        ((2, 4, 6, 8, 8), (8, 4, 3, 3, 3), 1),
        ((2, 8, 6, 8, 8), (8, 1, 3, 3, 3), 1),
    ],
)
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("clamp", ["none", "relu", "relu6"])
def test_ordinary_layers(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], padding: int, x_dtype: torch.dtype, clamp: str
) -> None:
    low, high = {"none": (0, 255), "relu": (100, 255), "relu6": (100, 160)}[clamp]
    pads = [padding] * (len(x_shape) - 2)
    call = conv_call(x_shape, weight_shape, x_dtype, padding=pads, low=low, high=high)
    assert_fast_and_equal(onednn.conv, reference.conv, call)


@pytest.mark.parametrize("x_value", [0, 255])
@pytest.mark.parametrize("weight_value", [-128, 127])
@pytest.mark.parametrize("x_zero_point", [0, 255])
def test_extreme_sums(x_value: int, weight_value: int, x_zero_point: int) -> None:
    """At the longest sum still taken, the extremes do not leave int32."""
    terms = onednn.LONGEST_SUM
    call = linear_call(
        (2, terms),
        3,
        x=torch.full((2, terms), x_value, dtype=torch.uint8),
        weight=torch.full((3, terms), weight_value, dtype=torch.int8),
        x_zero_point=x_zero_point,
        scale=2.0**16,
    )
    assert_fast_and_equal(onednn.linear, reference.linear, call)
    assert_fast_and_equal(onednn.linear, lambda *_: expected(call), call)


# --- what is left to the reference ------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "padding"), [(3, 3), (2, 2), (1, 1), (3, 4)])
@pytest.mark.parametrize("batch", [1, 2])
def test_thin_groups_in_padding(kernel: int, padding: int, batch: int) -> None:
    call = conv_call((batch, 3, 7, 7), (9, 1, kernel, kernel), padding=[padding] * 2)
    assert_left_to_reference(call)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_windows_in_padding(dim: int) -> None:
    @given(conv_calls(dim, in_padding=True))
    def check(call: Call) -> None:
        assert_left_to_reference(call)

    check()


def test_window_that_straddles_a_short_input() -> None:
    """No tap of the middle window meets the only column: its taps are further apart than that."""
    call = conv_call((2, 3, 1), (6, 1, 2), padding=[1], dilation=[2])
    assert_left_to_reference(call)


@pytest.mark.parametrize(
    "changed",
    [
        {"weight_zero_point": torch.arange(6, dtype=torch.int32) - 1},
        {"weight_zero_point": torch.tensor([-3], dtype=torch.int32), "weight_scale": torch.tensor([0.01])},
        {"dtype": torch.int16, "low": -(2**15), "high": 2**15 - 1},
        {"dtype": torch.int32, "low": -(2**31), "high": 2**31 - 1, "scale": 1e-12},
        {"x": torch.arange(60, dtype=torch.int16).reshape(1, 4, 15) - 30},
        {"x": torch.zeros(0, 4, 15, dtype=torch.uint8)},
        {"weight": torch.arange(72, dtype=torch.int16).reshape(6, 4, 3)},
    ],
    ids=["weight zero points", "one weight zero point", "int16", "int32", "int16 input", "empty", "int16 weight"],
)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_left_to_reference(kind: str, changed: Call) -> None:
    if kind == "conv":
        assert_left_to_reference(conv_call((2, 4, 15), (6, 4, 3), **changed))
        return
    flat = dict(changed)
    if "x" in flat:
        flat["x"] = flat["x"].flatten(1) if flat["x"].numel() else flat["x"].reshape(0, 12)
    if "weight" in flat:
        flat["weight"] = flat["weight"].flatten(1)
    columns = flat["x"].shape[1] if "x" in flat else 12
    call = linear_call((5, columns), 6, **flat)
    assert_left_to_reference(call)


@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_beyond_int32(sign: int) -> None:
    terms = onednn.LONGEST_SUM + 1
    x = torch.full((1, terms), 255, dtype=torch.uint8)
    weight = torch.full((2, terms), -128 if sign < 0 else 127, dtype=torch.int8)
    exact = {"x_zero_point": 0, "x_scale": 1.0, "weight_scale": torch.ones(2), "bias": None, "scale": 2.0**25}
    call = linear_call((1, terms), 2, x=x, weight=weight, **exact)
    assert abs(255 * int(weight[0, 0]) * terms) > 2**31 - 2**25
    assert_left_to_reference(call)
    assert_left_to_reference(conv_call((1, terms, 1), (2, terms, 1), x=x[..., None], weight=weight[..., None], **exact))


def test_no_columns() -> None:
    """A layer without inputs gives its bias."""
    call = linear_call((3, 4), 5, x=torch.zeros(3, 0, dtype=torch.uint8), weight=torch.zeros(5, 0, dtype=torch.int8))
    assert_left_to_reference(call)
    empty = linear_call((3, 4), 5, weight=torch.zeros(0, 4, dtype=torch.int8), weight_scale=torch.ones(1), bias=None)
    empty["weight_zero_point"] = torch.zeros(1, dtype=torch.int32)
    assert kernels.linear(*empty.values()).shape == (3, 0)


MISFITS: dict[str, Callable[[], Call]] = {
    "features": lambda: linear_call((3, 4), 5, x=torch.zeros(3, 6, dtype=torch.uint8)),
    "linear scales": lambda: linear_call((3, 4), 5, weight_scale=torch.ones(4)),
    "channels": lambda: conv_call((2, 4, 9), (6, 4, 3), x=torch.zeros(2, 5, 9, dtype=torch.uint8)),
    "groups": lambda: conv_call((2, 9, 9), (4, 3, 3)),
    "too short": lambda: conv_call((2, 4, 2), (6, 4, 3)),
    "conv scales": lambda: conv_call((2, 4, 9), (6, 4, 3), weight_scale=torch.ones(5)),
    "no outputs": lambda: conv_call((2, 4, 9), (6, 4, 3), weight=torch.zeros(0, 4, 3, dtype=torch.int8)),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfits_are_refused(misfit: str) -> None:
    """oneDNN reads past the end of scales that are too few, and gives results for too short an input."""
    call = MISFITS[misfit]()
    kernel = kernels.conv if "groups" in call else kernels.linear
    if misfit == "groups":  # four outputs in three groups
        assert call["groups"] == 3
    with pytest.raises(RuntimeError):
        kernel(*call.values())
    name = "conv" if "groups" in call else "linear"
    assert getattr(onednn, name)(*call.values()) is NotImplemented


def test_only_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not onednn.available()


SATURATING = """
import torch
from eagerq import kernels
from eagerq.kernels import onednn, packing, reference

def run(name, x, weight, *middle):
    zero_point = torch.zeros(1, dtype=torch.int32)
    call = (x, 0.02, 3, weight, torch.tensor([0.01]), zero_point, None, *middle, 0.5, 90, torch.uint8, 0, 255)
    wanted = getattr(reference, name)(*call)
    assert torch.equal(getattr(kernels, name)(*call), wanted), name
    fast = getattr(onednn, name)(*call)
    assert fast is NotImplemented or torch.equal(fast, wanted), name
    return fast is not NotImplemented

weight = torch.randint(100, 128, (16, 32)).to(torch.int8)
kernel = torch.randint(100, 128, (16, 8, 3)).to(torch.int8)
where = [1], [1], [1], 1
for dtype in (torch.uint8, torch.int8):
    span = torch.iinfo(dtype)
    run("linear", torch.randint(span.min, span.max + 1, (40, 32)).to(dtype), weight)
    run("conv", torch.randint(span.min, span.max + 1, (4, 8, 30)).to(dtype), kernel, *where)
assert run("linear", torch.randint(0, 128, (40, 32), dtype=torch.uint8), weight)
assert run("conv", torch.randint(0, 128, (4, 8, 30), dtype=torch.uint8), kernel, *where)
"""


@pytest.mark.parametrize("processor", ["AVX2", "AVX512_CORE"])
def test_processors_without_vnni(processor: str) -> None:
    """Their 16-bit sums of two products saturate: 7-bit inputs stay fast, others go to the reference."""
    program = [sys.executable, "-c", textwrap.dedent(SATURATING)]
    done = subprocess.run(
        program,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": processor},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- packed weights ---------------------------------------------------------------------------------


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A note for each weight packed."""
    made: list[str] = []
    for name in ("qlinear_prepack", "qconv_prepack"):
        packet = getattr(torch.ops.onednn, name)

        class Counted:
            @staticmethod
            def default(*args: Any, name: str = name, operator: Any = packet.default) -> Tensor:
                made.append(name)
                packed: Tensor = operator(*args)
                return packed

        monkeypatch.setattr(torch.ops.onednn, name, Counted)
    return made


def conv_case() -> Call:
    return conv_call((2, 4, 9, 9), (6, 4, 3, 3))


def linear_case() -> Call:
    return linear_call((5, 12), 6)


CASES = pytest.mark.parametrize("case", [linear_case, conv_case])


def run(call: Call) -> Tensor:
    """Fast when it can be; always right."""
    kernel = kernels.conv if "groups" in call else kernels.linear
    result = kernel(*call.values())
    assert torch.equal(result, expected(call))
    return result


@CASES
def test_packed_once(case: Callable[[], Call], packs: list[str]) -> None:
    call = case()
    for _ in range(3):
        run(call)
    assert len(packs) == 1


@CASES
@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_weight_changed_in_place(case: Callable[[], Call], packs: list[str], in_inference_mode: bool) -> None:
    call = case()
    before = run(call)
    with torch.inference_mode(in_inference_mode):
        call["weight"].mul_(-1)
    assert not torch.equal(run(call), before)
    call["weight"][0] = 5
    run(call)
    assert len(packs) == 3


@CASES
def test_weight_replaced(case: Callable[[], Call]) -> None:
    call = case()
    run(call)
    for step in range(5):  # each may get the place in memory, and the id, of the one before
        weight = integers(call["weight"].shape, torch.int8, torch.Generator().manual_seed(step))
        call["weight"] = weight
        del weight
        run(call)


@CASES
def test_weight_zero_points_changed(case: Callable[[], Call]) -> None:
    """The same weight means other numbers: packed for zero points of 0, it must not be used with others."""
    call = case()
    run(call)
    for shifts in ([0, 1, 2, 3, 4, 5], [0, 0, 7, 0, 0, 0], [0, 7, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]):
        call["weight_zero_point"] = torch.tensor(shifts, dtype=torch.int32)
        run(call)
    call["weight_zero_point"].add_(2)
    run(call)
    call["weight_zero_point"][2:].zero_()
    run(call)
    call["weight_zero_point"].zero_()
    run(call)


@pytest.mark.parametrize(
    "changed",
    [
        {"x_scale": 0.7},
        {"x_zero_point": 77},
        {"stride": [2, 1]},
        {"padding": [1, 2]},
        {"dilation": [2, 2]},
        {"weight_scale": torch.tensor([0.004]), "weight_zero_point": torch.zeros(1, dtype=torch.int32)},
        {"scale": 1.5},
        {"bias": None},
        {"x": torch.arange(324, dtype=torch.int32).to(torch.uint8).reshape(1, 4, 9, 9)},
    ],
    ids=lambda changed: " ".join(changed),
)
def test_weight_shared_by_layers(changed: Call) -> None:
    """One weight, two convolutions that differ elsewhere, in turn."""
    one = conv_case()
    other = {**one, **changed}
    for call in (one, other, one, other):
        run(call)


@pytest.mark.parametrize("batch", [1, 2])
def test_weight_shared_by_groups(batch: int) -> None:
    one = conv_call((batch, 6, 5, 5), (6, 1, 3, 3))
    other = {**one, "x": one["x"][:, :3].contiguous(), "groups": 3}
    for call in (one, other, one):
        run(call)


def test_images_of_several_sizes(packs: list[str]) -> None:
    """A single image has a weight packed for its size, a batch one for any; only so many are kept."""
    weight, zero_point = conv_case()["weight"], torch.zeros(6, dtype=torch.int32)

    def packed_for(*shapes: tuple[int, int]) -> int:
        packs.clear()
        for batch, size in shapes:
            shared = {"weight": weight, "weight_zero_point": zero_point}
            run(conv_call((batch, 4, size, size), (6, 4, 3, 3), **shared))
        return len(packs)

    assert packed_for((1, 9), (1, 12), (1, 9), (1, 12), (2, 9), (3, 7)) == 3
    assert packed_for(*((1, size) for size in range(5, 15))) == 10
    assert len(packing._entries[id(weight)].layouts) == packing.MOST_LAYOUTS
    assert packed_for((1, 14), (1, 13)) == 0


@CASES
def test_equal_weights_are_packed_apart(case: Callable[[], Call]) -> None:
    one, other = case(), case()
    other["weight"] = copy.deepcopy(one["weight"])
    run(one)
    run(other)
    other["weight"].neg_()
    run(other)
    run(one)


@CASES
def test_packed_weight_dies_with_its_weight(case: Callable[[], Call]) -> None:
    gc.collect()
    before = set(packing._entries)
    call = case()
    run(call)
    assert set(packing._entries) - before == {id(call["weight"])}
    del call["weight"]
    gc.collect()
    assert set(packing._entries) == before


@CASES
def test_inference_tensors(case: Callable[[], Call]) -> None:
    """They count no changes, so nothing packed from them is kept."""
    gc.collect()
    before = set(packing._entries)
    with torch.inference_mode():
        call = case()
        assert call["weight"].is_inference()
        run(call)
        call["weight"].neg_()
        run(call)
    call["weight"] = call["weight"].clone()
    assert call["weight_zero_point"].is_inference()
    run(call)
    assert set(packing._entries) == before


def module(kind: str, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    new: Any = nnq.Linear(12, 6) if kind == "linear" else nnq.Conv2d(4, 6, 3)
    new._weight = integers(new._weight.shape, torch.int8, generator)
    new._weight_scale.fill_(0.01)
    new._bias = torch.randn(6, generator=generator)
    new.scale = 0.5
    return new


def output(layer: Any, x: Any) -> Tensor:
    integers_out: Tensor = layer(x).int_repr()
    return integers_out


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_modules_copied_and_loaded(kind: str) -> None:
    from eagerq import quantize_per_tensor

    x = quantize_per_tensor(torch.randn(2, 12) if kind == "linear" else torch.randn(2, 4, 9, 9), 0.02, 128, torch.uint8)
    gc.collect()
    before = set(packing._entries)
    one, other = module(kind, 1), module(kind, 2)
    wanted, others = output(one, x), output(other, x)
    assert not torch.equal(wanted, others)
    twin = copy.deepcopy(one)
    assert torch.equal(output(twin, x), wanted)
    twin._weight.neg_()
    assert not torch.equal(output(twin, x), wanted)
    assert torch.equal(output(one, x), wanted)
    for assign in (False, True):
        twin.load_state_dict(one.state_dict(), assign=assign)
        assert torch.equal(output(twin, x), wanted)
        twin.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(output(twin, x), others)
    assert torch.equal(output(one, x), wanted)
    del one, other, twin
    gc.collect()
    assert set(packing._entries) == before


def test_threads_share_a_weight() -> None:
    from concurrent.futures import ThreadPoolExecutor

    calls = [conv_case() for _ in range(4)]
    for call in calls[1:]:
        call["weight"] = calls[0]["weight"]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda call: kernels.conv(*call.values()), calls * 5))
    assert all(torch.equal(result, expected(calls[0])) for result in results)


@given(st.sampled_from([torch.uint8, torch.int8]), st.data())
def test_every_range_is_clamped_exactly(dtype: torch.dtype, data: st.DataObject) -> None:
    """Ranges that miss the zero point, too: above it, below it, or of a single integer."""
    low, high = sorted(data.draw(st.tuples(*[st.integers(*RANGES[dtype])] * 2)))
    zero_point = data.draw(st.integers(*RANGES[dtype]))
    for call in (
        conv_call((2, 3, 8), (4, 3, 3), dtype=dtype, zero_point=zero_point, low=low, high=high),
        conv_call((2, 3, 5, 5), (4, 3, 3, 3), dtype=dtype, zero_point=zero_point, low=low, high=high),
        conv_call((2, 3, 4, 4, 4), (4, 3, 3, 3, 3), dtype=dtype, zero_point=zero_point, low=low, high=high),
    ):
        assert_fast_and_equal(onednn.conv, lambda *_, call=call: expected(call), call)
    call = linear_call((7, 9), 4, dtype=dtype, zero_point=zero_point, low=low, high=high)
    assert_fast_and_equal(onednn.linear, lambda *_, call=call: expected(call), call)
