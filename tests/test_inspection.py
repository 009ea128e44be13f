"""Questions about qconfigs and ranges, answered as torch.ao answers them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Oracle
from hypothesis import given
from hypothesis import strategies as st

import eagerq
from eagerq import inspection, utils
from eagerq.errors import InvalidConfigError

QCONFIGS = [name for name in eagerq.__all__ if name.endswith(("qconfig", "qconfig_4bit", "_v2")) and name[:3] != "get"]
QUESTIONS = [
    name
    for name in inspection.__all__
    if name in utils.__all__ and name not in ("QuantType", "get_qparam_dict", "get_qconfig_dtypes")
]
# qconfigs that torch.ao's questions choke on: their factories make modules without a dtype
NO_DTYPE = ("default_weight_only_qconfig", "default_activation_only_qconfig")


def meant(answer: Any) -> Any:
    return eagerq.scheme.integer_dtype(answer) if isinstance(answer, torch.dtype) else getattr(answer, "name", answer)


def test_there_are_qconfigs_to_ask_about() -> None:
    assert len(QCONFIGS) > 15
    assert len(QUESTIONS) > 8


@pytest.mark.parametrize("name", [name for name in QCONFIGS if name not in NO_DTYPE])
def test_answers_are_torchs(ao: Oracle, name: str) -> None:
    theirs = getattr(ao.quantization, name, None) or getattr(ao.quantization.qconfig, name)
    for question in QUESTIONS:
        try:
            wanted = getattr(ao.quantization.utils, question)(theirs)
        except Exception:
            with pytest.raises(InvalidConfigError):
                getattr(utils, question)(getattr(eagerq, name))
        else:
            assert meant(getattr(utils, question)(getattr(eagerq, name))) == meant(wanted), question


@pytest.mark.parametrize("name", NO_DTYPE)
def test_what_has_no_dtype_stays_float(name: str) -> None:
    assert torch.float32 in inspection.get_qconfig_dtypes(getattr(eagerq, name))


def test_none_is_refused() -> None:
    for question in (*QUESTIONS, "get_qconfig_dtypes"):
        with pytest.raises(InvalidConfigError, match="qconfig must be provided"):
            getattr(utils, question)(None)


@pytest.mark.parametrize("kind", ["MinMaxObserver", "PerChannelMinMaxObserver", "PlaceholderObserver", "FakeQuantize"])
def test_qparam_dict_is_torchs(ao: Oracle, kind: str) -> None:
    ours, theirs = getattr(eagerq, kind)(), getattr(ao.quantization, kind)()
    x = torch.randn(3, 5)
    ours(x), theirs(x)
    told, wanted = utils.get_qparam_dict(ours), ao.quantization.utils.get_qparam_dict(theirs)
    assert told.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(told[key].double(), value.double())
        else:
            assert meant(told[key]) == meant(value)


# --- ranges -----------------------------------------------------------------------------------------


@given(
    st.sampled_from(["per_tensor_affine", "per_tensor_symmetric", "per_channel_symmetric", "per_channel_affine"]),
    st.sampled_from([torch.uint8, torch.int8]),
    st.booleans(),
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4),
)
def test_qparams_are_torchs(qscheme: str, dtype: torch.dtype, reduce: bool, values: list[float]) -> None:
    theirs = pytest.importorskip("torch.ao.quantization.utils")
    low, high = torch.tensor(values), torch.tensor(values) + torch.tensor(values).abs()
    if "tensor" in qscheme:
        low, high = low[0], high[0]
    range_ = utils.calculate_qmin_qmax(None, None, False, dtype, reduce)
    assert range_ == theirs.calculate_qmin_qmax(None, None, False, dtype, reduce)
    arguments = (low, high, *range_, dtype, torch.tensor([1e-6]), False, getattr(torch, qscheme))
    scale, zero_point = utils.determine_qparams(*arguments)
    their_scale, their_zero_point = theirs.determine_qparams(*arguments)
    assert torch.equal(scale, their_scale)
    assert torch.equal(zero_point, their_zero_point)


def test_ranges_are_checked() -> None:
    utils.validate_qmin_qmax(-8, 7)
    for low, high in ((1, 5), (0, 0), (5, -5)):
        with pytest.raises(InvalidConfigError):
            utils.validate_qmin_qmax(low, high)
    assert utils.check_min_max_valid(torch.tensor(-1.0), torch.tensor(1.0))
    with pytest.raises(InvalidConfigError, match="should be less than"):
        utils.check_min_max_valid(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
    for unseen in (torch.tensor([]), torch.tensor(torch.inf)):
        with pytest.warns(UserWarning, match="has seen no data"):
            assert not utils.check_min_max_valid(unseen, -unseen)
    with pytest.warns(UserWarning, match="has seen no data"):
        scale, zero_point = utils.determine_qparams(
            torch.tensor([]), torch.tensor([]), 0, 255, torch.uint8, torch.tensor([1e-6]), False
        )
    assert (scale.item(), zero_point.item()) == (1.0, 0)


def test_schemes_and_dtypes() -> None:
    assert utils.is_per_tensor(torch.per_tensor_symmetric)
    assert not utils.is_per_tensor(torch.per_channel_affine)
    assert utils.is_per_channel(torch.per_channel_affine_float_qparams)
    assert not utils.is_per_channel(None)
    assert utils.to_underlying_dtype(torch.int8) is torch.int8
    assert utils.to_underlying_dtype(torch.float8_e5m2) is torch.float8_e5m2
    with pytest.raises(InvalidConfigError):
        utils.to_underlying_dtype(torch.float32)
