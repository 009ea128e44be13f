"""Normalizations of integers: right against float64, on every layout and dtype, by whichever door."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.calls import LAYOUTS, Call, laid_out
from kernels.normalizations import KERNELS, calls, in_float64, run
from torch import Tensor

from eagerq import kernels
from eagerq.kernels import normalization

names = pytest.mark.parametrize("name", list(KERNELS))


def assert_within(result: Tensor, call: Call, steps: float) -> None:
    """Equal to float64's result, but where that lies within ``steps`` of the middle between two integers."""
    exact = in_float64(call).clamp(call["low"], call["high"])
    assert result.dtype is call["dtype"]
    assert float((result.double() - exact).abs().max()) <= 0.5 + steps


@names
def test_right_in_float64(name: str) -> None:
    @given(calls(name, dtypes=st.sampled_from([torch.uint8, torch.int8])))
    def check(call: Call) -> None:
        # half a step where the variance has the fewest digits, much less elsewhere
        assert_within(run(name, call), call, 0.5)

    check()


@names
def test_right_where_means_are_small(name: str) -> None:
    """Groups spread over the whole range: nothing cancels, so that only ties are in doubt."""

    @given(calls(name), st.integers(0, 2**31))
    def check(call: Call, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        low, high = torch.iinfo(call["x"].dtype).min, torch.iinfo(call["x"].dtype).max
        ends = torch.tensor([low, high], dtype=call["x"].dtype)
        call = {**call, "x": ends[torch.randint(0, 2, call["x"].shape, generator=generator)]}
        assert_within(run(name, call), call, 2e-3)

    check()


@pytest.mark.parametrize("name", ["layer_norm", "group_norm"])
@pytest.mark.parametrize("odd", [1, 17, 255])
def test_one_value_apart_from_the_rest(name: str, odd: int) -> None:
    """The mean is up to 8000 times the deviation: float32's variance would be wrong by up to 60 steps."""
    for count in (300, 10_000, 100_000):
        x = torch.full((2, 1, count), 250, dtype=torch.uint8)
        x[:, :, :odd] = 251
        how = {"normalized_shape": [count]} if name == "layer_norm" else {"num_groups": 1}
        call = {"x": x, "x_scale": 0.5, "x_zero_point": 3, **how, "weight": None, "bias": None, "eps": 1e-5}
        call |= {"scale": 0.5, "zero_point": 10, "dtype": torch.uint8, "low": 0, "high": 255}
        assert_within(run(name, call), call, 0.05)


@names
def test_parameters_count(name: str) -> None:
    """Weight and bias are those of their own element or channel, and are not the same as none."""
    torch.manual_seed(1)
    x = torch.randint(0, 256, (2, 6, 5), dtype=torch.uint8)
    shape = (6, 5) if name == "layer_norm" else (6,)
    how: dict[str, Any] = {"normalized_shape": [6, 5]} if name == "layer_norm" else {"num_groups": 3}
    statistics = {"mean": torch.randn(6) * 3, "var": torch.rand(6) * 30 + 1}
    call = {"x": x, "x_scale": 0.1, "x_zero_point": 120, **(how if name != "batch_norm" else {})}
    call |= {"weight": torch.randn(shape) * 2, "bias": torch.randn(shape) * 2}
    call |= {**(statistics if name == "batch_norm" else {}), "eps": 1e-5, "scale": 0.03, "zero_point": 100}
    call |= {"dtype": torch.uint8, "low": 0, "high": 255}
    found = [run(name, call)]
    for without in ("weight", "bias"):
        found.append(run(name, {**call, without: None}))
        assert_within(found[-1], {**call, without: None}, 1e-3)
    assert_within(found[0], call, 1e-3)
    assert all(bool((one != other).any()) for one in found for other in found if one is not other)


@names
def test_devices(name: str, device: torch.device) -> None:
    """The same integers everywhere."""

    @settings(max_examples=10)
    @given(calls(name))
    def check(call: Call) -> None:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in call.items()}
        result = run(name, moved)
        assert result.device.type == device.type
        assert torch.equal(result.cpu(), KERNELS[name].reference(*call.values()))

    check()


@names
def test_layouts(name: str) -> None:
    @given(calls(name), LAYOUTS)
    def check(call: Call, layout: str) -> None:
        assert torch.equal(run(name, {**call, "x": laid_out(call["x"], layout)}), run(name, call))

    check()


@pytest.mark.parametrize("block", [2**18, 50])
def test_result_lies_as_the_input_does(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer norm's is contiguous, as its groups are."""
    monkeypatch.setattr(normalization, "_BLOCK", block)
    x = torch.randint(0, 256, (5, 4, 3, 6), dtype=torch.uint8)
    for given_x in (x, laid_out(x, "channels last"), laid_out(x, "transposed"), laid_out(x[0], "transposed")):
        y = kernels.group_norm(given_x, 0.1, 3, given_x.shape[1], None, None, 1e-5, 0.1, 3, torch.uint8, 0, 255)
        assert y.stride() == given_x.stride()
        y = kernels.layer_norm(given_x, 0.1, 3, given_x.shape[-1:], None, None, 1e-5, 0.1, 3, torch.uint8, 0, 255)
        assert y.is_contiguous()


@pytest.mark.parametrize("name", ["layer_norm", "group_norm"])
def test_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images or lines at a time are the same as all at once."""

    @given(calls(name), LAYOUTS)
    def check(call: Call, layout: str) -> None:
        call = {**call, "x": laid_out(call["x"], layout)}
        whole = run(name, call)
        with monkeypatch.context() as patch:
            patch.setattr(normalization, "_BLOCK", 50)
            parts = run(name, call)
        assert torch.equal(parts, whole)

    check()


@pytest.mark.parametrize("space", [(7,), (3, 5), (2, 3, 2)])
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 64, 100])
def test_fast_batch_norm_is_the_reference(channels: int, space: tuple[int, ...]) -> None:
    """Whole vector registers of channels, and what is left over."""
    torch.manual_seed(channels)
    for power in (False, True):
        x = torch.randint(0, 256, (2, channels, *space), dtype=torch.uint8)
        weight, bias, mean = (torch.randn(channels).mul(8).round() / 8 for _ in range(3))
        var = torch.full((channels,), 4.0) if power else torch.rand(channels)
        scale = 0.125 if power else 0.03
        for affine in ((weight, bias), (None, None)):
            for low in (0, 131):
                arguments = (x, 0.25, 120, *affine, mean, var, 0.0, scale, 131, torch.uint8, low, 255)
                fast, slow = kernels.batch_norm(*arguments), kernels.batch_norm.reference(*arguments)
                assert torch.equal(fast, slow)
                assert fast.stride() == slow.stride()


@pytest.mark.parametrize("seed", [4, 5])
def test_fast_batch_norm_is_the_reference_in_the_last_bit(seed: int) -> None:
    """With these seeds a square root that is off in its last bit shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (1000, 1000), dtype=torch.uint8, generator=generator).reshape(10, 1000, 10, 10)
    weight, bias, mean = (torch.randn(1000, generator=generator) for _ in range(3))
    var = torch.rand(1000, generator=generator) * 4 + 0.01
    arguments = (x, 0.03, 120, weight, bias, mean, var, 1e-5, 0.015, 120, torch.uint8, 0, 255)
    assert torch.equal(kernels.batch_norm(*arguments), kernels.batch_norm.reference(*arguments))


@names
@pytest.mark.parametrize("batch", [0, 2])
def test_operators_pass_torchs_own_checks(name: str, batch: int) -> None:
    x = torch.randint(0, 256, (batch, 4, 3, 3), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    shape = (4, 3, 3) if name == "layer_norm" else (4,)
    how: tuple[Any, ...] = {"layer_norm": ([4, 3, 3],), "group_norm": (2,), "batch_norm": ()}[name]
    statistics = (torch.zeros(4), torch.ones(4)) if name == "batch_norm" else ()
    weights = (torch.randn(shape), torch.randn(shape))
    operator = getattr(torch.ops.eagerq, name).default
    arguments = (x, 0.1, 3, *how, *weights, *statistics, 1e-5, 0.1, 3, torch.uint8, 0, 255)
    torch.library.opcheck(operator, arguments)
    assert operator(*arguments).shape == x.shape


@pytest.mark.parametrize("name", ["layer_norm", "group_norm"])
@pytest.mark.parametrize("value", [0, 3, 255])
def test_constant_groups_are_the_bias(name: str, value: int) -> None:
    """Variance zero, in groups of one value and of many."""
    for count in (1, 3, 500):
        x = torch.full((2, 3, count), value, dtype=torch.uint8)
        how: Any = [3, count] if name == "layer_norm" else 3
        bias = torch.tensor([-1.0, 0.25, 2.0])
        weight = torch.tensor([5.0, 6.0, 7.0])
        if name == "layer_norm":
            weight, bias = (one[:, None].repeat(1, count) for one in (weight, bias))
        y = KERNELS[name](x, 0.1, 3, how, weight, bias, 1e-5, 0.25, 10, torch.uint8, 0, 255)
        assert torch.equal(y, torch.tensor([6, 11, 18], dtype=torch.uint8)[:, None].expand(2, 3, count))
