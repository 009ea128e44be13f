"""Integer types, qschemes, and the range of integers in use."""

from __future__ import annotations

import pickle
import runpy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagerq import scheme
from eagerq.errors import EagerqError, InvalidConfigError
from eagerq.scheme import IntegerType, integer_dtype, integer_type, quantization_range, sharing

KINDS = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.uint4, torch.int4]
QSCHEMES = [
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    "per_channel_affine_float_qparams",
]


@pytest.mark.parametrize(
    ("old", "plain"),
    [
        ("quint8", torch.uint8),
        ("qint8", torch.int8),
        ("qint32", torch.int32),
        ("quint4x2", torch.uint4),
    ],
)
def test_old_dtypes_mean_plain_ones(old: str, plain: torch.dtype) -> None:
    dtype = getattr(torch, old, None)
    if dtype is None:
        pytest.skip(f"torch {torch.__version__} has no {old}")
    assert integer_dtype(dtype) is plain
    assert integer_type(dtype) == integer_type(plain)


@pytest.mark.parametrize("dtype", [*KINDS, torch.float16, torch.float32, torch.int64])
def test_other_dtypes_stay(dtype: torch.dtype) -> None:
    assert integer_dtype(dtype) is dtype


@pytest.mark.parametrize("dtype", KINDS)
def test_storage_holds_the_range(dtype: torch.dtype) -> None:
    kind = integer_type(dtype)
    storage = torch.iinfo(kind.storage)
    assert kind.dtype is dtype
    assert storage.min <= kind.minimum < kind.maximum <= storage.max
    assert kind.signed == (storage.min < 0)
    if kind.storage is dtype:
        assert (kind.minimum, kind.maximum) == (storage.min, storage.max)
    else:
        assert kind.maximum - kind.minimum == 15


def test_integer_types_are_values() -> None:
    made = IntegerType(torch.int8, torch.int8, -128, 127)
    assert made == integer_type(torch.int8)
    assert hash(made) == hash(integer_type(torch.int8))
    with pytest.raises(AttributeError):
        made.minimum = 0  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.int64])
def test_a_dtype_that_is_no_target_is_named(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidConfigError, match=rf"cannot be quantized to {dtype}.*torch\.uint8") as caught:
        integer_type(dtype)
    assert isinstance(caught.value, EagerqError)
    assert isinstance(caught.value, AssertionError)  # what torch.ao raises


@pytest.mark.parametrize("name", QSCHEMES)
def test_sharing(name: str) -> None:
    found = sharing(getattr(scheme, name))
    assert found.per_channel == ("per_channel" in name)
    assert found.symmetric == ("symmetric" in name)
    assert found.float_zero_point == ("float_qparams" in name)
    if hasattr(torch, name):  # programs pass torch's own
        assert getattr(scheme, name) is getattr(torch, name)


@pytest.mark.parametrize("qscheme", ["per_tensor_affine", None, torch.uint8])
def test_an_unknown_qscheme_is_named(qscheme: Any) -> None:
    with pytest.raises(InvalidConfigError, match=r"unknown qscheme .*use one of .*per_tensor_affine"):
        sharing(qscheme)


def test_qschemes_after_torch_has_dropped_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in QSCHEMES:
        monkeypatch.delattr(torch, name, raising=False)
    alone = runpy.run_path(scheme.__file__, run_name="scheme_alone")
    made = [alone[name] for name in QSCHEMES]
    assert [repr(constant) for constant in made] == [f"eagerq.scheme.{name}" for name in QSCHEMES]
    assert len(set(made)) == len(QSCHEMES)
    assert [alone["sharing"](constant).symmetric for constant in made] == [False, True, False, True, False]


def test_stand_in_qschemes_are_values() -> None:
    stand_in = scheme.QScheme("per_tensor_affine")
    assert pickle.loads(pickle.dumps(stand_in)) == stand_in
    assert stand_in != scheme.QScheme("per_tensor_symmetric")


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("given_one", [{}, {"quant_min": 0}, {"quant_max": 5}])
def test_all_of_the_dtype_by_default(dtype: torch.dtype, given_one: dict[str, int]) -> None:
    bounds = {"quant_min": None, "quant_max": None, **given_one}  # one alone counts as none, as in torch.ao
    kind = integer_type(dtype)
    assert quantization_range(dtype, reduce_range=False, **bounds) == (kind.minimum, kind.maximum)


@given(
    dtype=st.sampled_from(KINDS[:5]),
    bounds=st.one_of(st.just((None, None)), st.tuples(st.integers(-128, 0), st.integers(1, 127)), st.just((0, 255))),
    reduce_range=st.booleans(),
)
def test_the_same_range_as_torch_ao(
    ao: Any, dtype: torch.dtype, bounds: tuple[int | None, int | None], reduce_range: bool
) -> None:
    theirs = ao.quantization.utils.calculate_qmin_qmax(
        *bounds, has_customized_qrange=bounds[0] is not None, dtype=dtype, reduce_range=reduce_range
    )
    assert quantization_range(dtype, *bounds, reduce_range) == theirs


@pytest.mark.parametrize(("dtype", "expected"), [(torch.uint4, (0, 15)), (torch.int4, (-8, 7))])
def test_four_bits_are_not_reduced(dtype: torch.dtype, expected: tuple[int, int]) -> None:
    assert quantization_range(dtype, None, None, reduce_range=True) == expected


@pytest.mark.parametrize(
    ("dtype", "low", "high", "message"),
    [
        (torch.uint8, 1, 255, r"\[1, 255\] must include 0"),
        (torch.int8, -128, -1, r"\[-128, -1\] must include 0"),
        (torch.int8, 0, 0, r"quant_min \(0\) must be less than quant_max \(0\)"),
        (torch.int8, -128, 128, r"\[-128, 128\] is wider than torch\.int8.*within 256 values"),
        (torch.uint4, 0, 16, r"\[0, 16\] is wider than torch\.uint4.*within 16 values"),
    ],
)
def test_a_range_that_cannot_be_used(dtype: torch.dtype, low: int, high: int, message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        quantization_range(dtype, low, high, reduce_range=False)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_float8_has_the_range_of_its_finite_values(dtype: torch.dtype) -> None:
    greatest = int(torch.finfo(dtype).max)
    assert quantization_range(dtype, None, None, reduce_range=False) == (-greatest, greatest)
    assert quantization_range(dtype, -greatest, greatest, reduce_range=False) == (-greatest, greatest)
    with pytest.raises(InvalidConfigError, match="wider than"):
        quantization_range(dtype, -greatest - 1, greatest, reduce_range=False)
    with pytest.raises(InvalidConfigError, match="cannot be quantized to"):  # modules are of integers
        integer_type(dtype)
