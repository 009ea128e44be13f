"""QConfigs: the modules that torch.ao's make, told apart, and errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import eagerq
from eagerq import qconfig
from eagerq.errors import EagerqError
from eagerq.fake_quantize import FakeQuantize
from eagerq.observer import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from eagerq.qconfig import QConfig, get_default_qat_qconfig, get_default_qconfig, qconfig_equals

BACKENDS = ("x86", "fbgemm", "qnnpack", "onednn")
READY_MADE = tuple(name for name in qconfig.__all__ if name.endswith(("qconfig", "_4bit", "_v2")) and name[0] != "g")


@pytest.fixture(autouse=True)
def _vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """The onednn qconfig warns on old processors; tests that want that say so."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)


# --- what they make -----------------------------------------------------------------------------

# what a checkpoint or a number could depend on
ATTRIBUTES = (
    "quant_min",
    "quant_max",
    "qscheme",
    "ch_axis",
    "is_dynamic",
    "is_per_channel",
    "is_symmetric_quant",
    "reduce_range",
    "has_customized_qrange",
    "averaging_constant",
    "bins",
)


def assert_same_module(ours: Any, theirs: Any) -> None:
    assert type(ours).__name__ == type(theirs).__name__
    for name in ATTRIBUTES:
        if hasattr(theirs, name):
            assert getattr(ours, name) == getattr(theirs, name), name
    if hasattr(theirs, "dtype"):
        meant = str(theirs.dtype).replace("quint4x2", "uint4").replace(".qu", ".u").replace(".qi", ".i")
        assert str(ours.dtype) == meant
    mine, expected = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(expected)
    for name, value in expected.items():  # eps, the switches and the first parameters are among them
        assert mine[name].dtype == value.dtype, name
        assert torch.equal(mine[name], value), name
    if hasattr(theirs, "activation_post_process"):
        assert_same_module(ours.activation_post_process, theirs.activation_post_process)


def assert_same_qconfig(ours: QConfig, theirs: Any) -> None:
    assert_same_module(ours.activation(), theirs.activation())
    assert_same_module(ours.weight(), theirs.weight())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("version", [0, 1])
def test_training_defaults_equal_torch_aos(ao: Any, backend: str, version: int) -> None:
    theirs = ao.quantization.get_default_qat_qconfig(backend, version)
    assert_same_qconfig(get_default_qat_qconfig(backend, version), theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_post_training_defaults_equal_torch_aos(ao: Any, backend: str) -> None:
    assert_same_qconfig(get_default_qconfig(backend), ao.quantization.get_default_qconfig(backend))


@pytest.mark.parametrize("name", READY_MADE)
def test_ready_made_ones_equal_torch_aos(ao: Any, name: str) -> None:
    assert_same_qconfig(getattr(qconfig, name), getattr(ao.quantization.qconfig, name))


def test_none_is_missing(ao: Any) -> None:
    left_out = {
        "QConfigDynamic",  # replaced by QConfig long ago
        "get_default_qconfig_dict",  # for graph mode
        "get_default_qat_qconfig_dict",
    }
    theirs = set(ao.quantization.qconfig.__all__) - left_out
    assert theirs <= {*qconfig.__all__, "QConfigAny"}
    assert all(getattr(eagerq, name) is getattr(qconfig, name) for name in qconfig.__all__)


def test_arguments_left_out() -> None:
    assert qconfig_equals(get_default_qconfig(), get_default_qconfig("x86", 0))
    assert qconfig_equals(get_default_qat_qconfig(), get_default_qat_qconfig("x86", 1))
    assert qconfig_equals(get_default_qat_qconfig(version=None), get_default_qat_qconfig("x86", 1))


def test_every_call_makes_a_new_module() -> None:
    config = get_default_qat_qconfig("onednn")
    assert config.weight() is not config.weight()
    assert config.activation() is not config.activation()


def test_without_vnni_the_full_range_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.warns(UserWarning, match="lacks VNNI.*'x86' qconfig keeps them in 7 bits"):
        get_default_qconfig("onednn")
    get_default_qconfig("x86")


# --- whether two are the same -------------------------------------------------------------------


def all_of_them() -> dict[str, QConfig | None]:
    named: dict[str, QConfig | None] = {name: getattr(qconfig, name) for name in READY_MADE}
    for backend in BACKENDS:
        named[f"{backend}"] = get_default_qconfig(backend)
        named |= {f"{backend}-{version}": get_default_qat_qconfig(backend, version) for version in (0, 1)}
    return {**named, "none": None}


def test_equality_agrees_with_torch_ao(ao: Any) -> None:
    ours = all_of_them()
    theirs = {name: getattr(ao.quantization.qconfig, name) for name in READY_MADE}
    for backend in BACKENDS:
        theirs[f"{backend}"] = ao.quantization.get_default_qconfig(backend)
        theirs |= {
            f"{backend}-{version}": ao.quantization.get_default_qat_qconfig(backend, version) for version in (0, 1)
        }
    theirs["none"] = None
    for first in ours:
        for second in ours:
            expected = ao.quantization.qconfig.qconfig_equals(theirs[first], theirs[second])
            assert qconfig_equals(ours[first], ours[second]) is expected, (first, second)


def test_equality_is_about_what_is_made() -> None:
    base = QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.int8))
    same = QConfig(MinMaxObserver.with_args(), MinMaxObserver.with_args(dtype=torch.uint8).with_args(dtype=torch.int8))
    assert base.weight().dtype == same.weight().dtype
    assert qconfig_equals(base, same)
    nested = [
        QConfig(FakeQuantize.with_args(observer=MinMaxObserver.with_args(quant_max=most, quant_min=0)), None)
        for most in (127, 127, 255)
    ]
    assert qconfig_equals(nested[0], nested[1])
    assert not qconfig_equals(nested[0], nested[2])


@pytest.mark.parametrize(
    "other",
    [
        QConfig(HistogramObserver, MinMaxObserver.with_args(dtype=torch.int8)),
        QConfig(MinMaxObserver, MinMaxObserver),
        QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.int8, reduce_range=True)),
        QConfig(MinMaxObserver, PerChannelMinMaxObserver.with_args(dtype=torch.int8)),
        QConfig(MinMaxObserver, None),
        QConfig(MinMaxObserver, partial(MinMaxObserver, torch.int16)),
        QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.int8).with_callable_args(eps=lambda: 0.1)),
        None,
    ],
)
def test_what_differs(other: QConfig | None) -> None:
    base = QConfig(MinMaxObserver, MinMaxObserver.with_args(dtype=torch.int8))
    assert not qconfig_equals(base, other)
    assert not qconfig_equals(other, base)
    assert qconfig_equals(other, other)


def test_positional_arguments_count() -> None:
    wide, narrow = (QConfig(partial(MinMaxObserver, dtype), MinMaxObserver) for dtype in (torch.int16, torch.int8))
    assert wide.activation().dtype is torch.int16
    assert not qconfig_equals(wide, narrow)


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["activation", "weight"])
@pytest.mark.parametrize("instance", [MinMaxObserver(), FakeQuantize(), nn.ReLU()], ids=lambda it: type(it).__name__)
def test_an_instance_is_refused(role: str, instance: nn.Module) -> None:
    given: dict[str, Any] = {"activation": MinMaxObserver, "weight": MinMaxObserver, role: instance}
    message = f"QConfig received observer instance for {role} .*please pass observer class instead"
    with pytest.raises(ValueError, match=message) as caught:
        QConfig(**given)
    assert isinstance(caught.value, EagerqError)


@pytest.mark.parametrize("make", [get_default_qconfig, get_default_qat_qconfig])
def test_an_unknown_backend_is_refused(make: Any) -> None:
    with pytest.raises(AssertionError, match=r"backend: cuda not supported.*'x86', 'fbgemm', 'qnnpack', 'onednn'"):
        make("cuda")


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(AssertionError, match="Version number: 1 is not supported"):
        get_default_qconfig("x86", 1)
    with pytest.raises(AssertionError, match=r"Version number: 2 is not supported.*\(0, 1\)"):
        get_default_qat_qconfig("x86", 2)


def test_it_is_a_tuple() -> None:
    config = QConfig(MinMaxObserver, HistogramObserver)
    assert tuple(config) == (MinMaxObserver, HistogramObserver)
    assert config._replace(weight=None).weight is None
