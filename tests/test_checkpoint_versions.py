"""Prepared models' files in the forms of older programs: torch.ao reads the same ones beside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Oracle
from quantize.models import same_state, state
from quantize.networks import (
    Network,
    Residual,
    Speech,
    Video,
    images,
    oracle,
    prepared,
    prepared_oracle,
    to_fuse,
    train,
)
from torch import Tensor, nn

import eagerq
from eagerq.errors import CheckpointError

BATCH_NORM = {"bn.weight": "gamma", "bn.bias": "beta"} | {
    f"bn.{name}": name for name in ("running_mean", "running_var", "num_batches_tracked")
}


def trained_file(ao: Oracle, kind: type[Network] = Residual) -> Any:
    """What torch.ao saves of a network in training today."""
    model = prepared_oracle(ao, kind)
    train(model, kind)
    return model.state_dict()


def restamp(values: Any, version: int | None, chosen: Callable[[str, dict[str, Any]], bool]) -> Any:
    """Say that modules of some formats are of another version; None takes all versions away."""
    metadata = copy.deepcopy(values._metadata)
    for path, told in metadata.items():
        if chosen(path, told):
            told["version"] = version
    values._metadata = metadata
    if version is None:
        del values._metadata
    return values


def renamed(values: Any, name: Callable[[str], str]) -> Any:
    new = type(values)((name(key), value) for key, value in values.items())
    new._metadata = values._metadata
    return new


def is_fused_with_batch_norm(values: Any) -> Callable[[str, Any], bool]:
    return lambda path, told: f"{path}.bn" in values._metadata


def is_observer(path: str, told: dict[str, Any]) -> bool:
    return path.endswith("activation_post_process") and told.get("version") == 3


def assert_both_take(ao: Oracle, kind: type[Network], values: Any) -> dict[str, Tensor]:
    """Load the file into a model of ours and one of torch.ao, and compare them; the state they now have."""
    ours, theirs = prepared(kind, seed=5), prepared_oracle(ao, kind, seed=6)
    theirs.load_state_dict(values)
    ours.load_state_dict(values)
    loaded = state(ours)
    assert same_state(loaded, state(theirs))
    for model in (ours, theirs):
        model.eval().apply(eagerq.disable_observer).apply(ao.quantization.disable_observer)
    torch.testing.assert_close(ours(images(kind)), theirs(images(kind)), rtol=1e-5, atol=1e-6)
    return loaded


@pytest.mark.parametrize("kind", [Residual, Speech, Video], ids=lambda kind: kind.__name__)
def test_batch_norms_that_were_not_modules_yet(ao: Oracle, kind: type[Network]) -> None:
    """Convolutions fused with one kept its parameters themselves in their first format."""
    values = trained_file(ao, kind)

    def old(key: str) -> str:
        for new, name in BATCH_NORM.items():
            if key.endswith(f".{new}"):
                return f"{key.removesuffix(new)}{name}"
        return key

    old_values = restamp(renamed(values, old), 1, is_fused_with_batch_norm(values))
    assert not any(".bn." in key for key in old_values)
    assert same_state(assert_both_take(ao, kind, old_values), dict(values))
    # for a while, files said that they were of the first format and were not
    assert_both_take(ao, kind, restamp(values, 1, is_fused_with_batch_norm(values)))


def test_least_scales_that_were_constants(ao: Oracle) -> None:
    values = trained_file(ao)
    old = renamed(values, str)
    for key in values:
        if key.endswith(".eps"):
            del old[key]
    # torch.ao reads per-channel observers of versions 1 and 2 into memory it never writes
    old = restamp(old, 1, lambda path, told: is_observer(path, told) and "weight_fake_quant" not in path)
    for path in values._metadata:
        if is_observer(path, values._metadata[path]) and "weight_fake_quant" in path:
            old[f"{path}.eps"] = values[f"{path}.eps"]
    assert same_state(assert_both_take(ao, Residual, old), dict(values))


@pytest.mark.parametrize("version", [1, 2])
def test_per_channel_ranges_of_other_names(ao: Oracle, version: int) -> None:
    """No oracle: torch.ao resizes its ranges to those of such a file, and leaves them uninitialized."""
    values = trained_file(ao)
    channels = {key for key in values if "weight_fake_quant" in key and key.endswith(("min_val", "max_val"))}
    old = renamed(values, lambda key: f"{key}s" if key in channels else key)
    old = restamp(old, version, is_observer)
    if version == 1:
        for key in values:
            if key.endswith(".eps"):
                del old[key]
    ours = prepared(Residual, seed=5)
    ours.load_state_dict(old)
    assert same_state(state(ours), dict(values))


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("seen", [False, True])
def test_histograms_before_any_data(ao: Oracle, version: int, seen: bool) -> None:
    ours, theirs = (api.HistogramObserver() for api in (eagerq, ao.quantization))
    source = ao.quantization.HistogramObserver()
    if seen:
        source(torch.randn(100))
    values = source.state_dict()
    if version < 3 and not seen:
        values.update(min_val=torch.tensor([]), max_val=torch.tensor([]))
    if version < 2:
        del values["eps"]
    restamp(values, version, lambda path, told: True)
    for observer in (ours, theirs):
        observer.load_state_dict(values)
    assert same_state(ours.state_dict(), theirs.state_dict())
    batch = torch.randn(50)
    assert torch.equal(ours(batch), theirs(batch))
    assert ours.calculate_qparams() == theirs.calculate_qparams()


def test_ranges_before_any_data() -> None:
    """An observer for the whole tensor kept them empty, too; torch.ao's has forgotten that."""
    for kind in (eagerq.MinMaxObserver, eagerq.MovingAverageMinMaxObserver):
        source, target = kind(), kind()
        target(torch.randn(5))
        values = source.state_dict()
        values.update(min_val=torch.tensor([]), max_val=torch.tensor([]))
        target.load_state_dict(values)
        assert same_state(target.state_dict(), source.state_dict())


def test_fixed_parameters_before_they_had_an_observer(ao: Oracle) -> None:
    name = "default_symmetric_fixed_qparams_fake_quant"
    values = getattr(ao.quantization, name)().state_dict()
    old = {key: value for key, value in values.items() if "activation_post_process" not in key}
    old["scale"] = torch.tensor([0.125])
    ours = getattr(eagerq, name)()
    ours.load_state_dict(old)
    assert ours.state_dict()["activation_post_process.scale"] == ours.scale == 0.125


def test_fake_quantizers_that_were_not_fused_yet(ao: Oracle) -> None:
    """Their switches were bytes; the default has been the fused kind since torch 1.12."""
    plain = ao.quantization.QConfig(
        ao.quantization.default_fake_quant,
        ao.quantization.default_per_channel_weight_fake_quant.with_args(
            observer=ao.quantization.MovingAveragePerChannelMinMaxObserver
        ),
    )
    source = Residual(oracle(ao)).train()
    source.qconfig = plain
    ao.quantization.fuse_modules_qat(source, to_fuse(source), inplace=True)
    source = ao.quantization.prepare_qat(source)
    train(source, Residual)
    values = source.state_dict()
    assert values["fc.weight_fake_quant.fake_quant_enabled"].dtype is torch.uint8
    values["fc.weight_fake_quant.observer_enabled"] = torch.zeros(1, dtype=torch.uint8)
    ours, theirs = prepared(Residual, seed=5), prepared_oracle(ao, Residual, seed=6)
    for model in (ours, theirs):
        model.load_state_dict(values)
        model.eval().apply(eagerq.disable_observer).apply(ao.quantization.disable_observer)
    torch.testing.assert_close(ours(images(Residual)), theirs(images(Residual)), rtol=1e-5, atol=1e-6)
    assert same_state(state(ours), state(theirs))  # torch.ao computes scales anew, but only when it runs
    assert torch.equal(eagerq.convert(ours)(images(Residual)), ao.quantization.convert(theirs)(images(Residual)))


def test_files_without_versions(ao: Oracle) -> None:
    """As after ``dict(model.state_dict())`` or safetensors."""
    assert_both_take(ao, Residual, restamp(trained_file(ao), None, lambda *_: True))


@pytest.mark.parametrize("kind", [Residual, Speech], ids=lambda kind: kind.__name__)
def test_ours_loads_there(ao: Oracle, kind: type[Network]) -> None:
    ours, theirs = prepared(kind), prepared_oracle(ao, kind, seed=5)
    train(ours, kind)
    theirs.load_state_dict(ours.state_dict())
    assert same_state(state(theirs), state(ours))
    told = {path: values.get("version") for path, values in ours.state_dict()._metadata.items()}
    assert told == {path: values.get("version") for path, values in theirs.state_dict()._metadata.items()}


# --- what does not fit ----------------------------------------------------------------------------------------


SPOILED: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "NaN": ("fc.weight_fake_quant.scale", lambda v: v * torch.nan, r"holds nan, .*but a scale is a positive number"),
    "zero": ("quant.activation_post_process.scale", torch.zeros_like, r"holds 0\.0, but a scale is a positive number"),
    "negative": ("quant.activation_post_process.scale", torch.neg, r"holds -.*, but a scale is a positive number"),
    "zero point": (
        "quant.activation_post_process.zero_point",
        lambda v: v + 300,
        r"holds \d+, but a zero point is one of 0 to 255",
    ),
    "zero point of a weight": (
        "fc.weight_fake_quant.zero_point",
        lambda v: v - 200,
        r"holds -200, -200, -200 …, but a zero point is one of -128 to 127",
    ),
    "one range for all": (
        "fc.weight_fake_quant.activation_post_process.min_val",
        lambda v: v.min(),
        r"have shapes \[\(\), \(10,\)\], but a value for each channel was expected",
    ),
    "a scale for each": (
        "quant.activation_post_process.scale",
        lambda v: v.repeat(3),
        r"quant\.activation_post_process\.scale has 3 elements, not 1",
    ),
    "other channels": ("fc.weight_fake_quant.scale", lambda v: v[:4], r"scale has shape \(4,\), the model's \(10,\)"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_files_are_refused(name: str) -> None:
    key, spoil, match = SPOILED[name]
    source, target = prepared(Residual), prepared(Residual, seed=5)
    for model in (source, target):
        model(images(Residual))
    before = state(target)
    values = source.state_dict()
    values[key] = spoil(values[key])
    with pytest.raises(CheckpointError, match=match):
        target.load_state_dict(values)
    assert same_state(state(target), before)


@pytest.mark.parametrize("per_channel", [False, True])
def test_other_schemes_are_refused(per_channel: bool) -> None:
    """Weights' ranges for each channel do not load where there is one, nor the reverse."""

    def model(one_for_each: bool) -> nn.Module:
        weight = eagerq.default_per_channel_weight_fake_quant if one_for_each else eagerq.default_weight_fake_quant
        net: Any = eagerq.QuantWrapper(nn.Linear(3, 4)).train()
        net.qconfig = eagerq.QConfig(eagerq.default_fake_quant, weight)
        net = eagerq.prepare_qat(net)
        net(torch.randn(2, 3))
        return net

    target = model(per_channel)
    before = state(target)
    with pytest.raises(CheckpointError, match=r"module\.weight_fake_quant\.(scale|activation_post_process\.min_val)"):
        target.load_state_dict(model(not per_channel).state_dict())
    assert same_state(state(target), before)
