"""Checkpoints: saved, loaded, continued from; refused as a whole when they do not fit."""

from __future__ import annotations

import collections
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Oracle
from quantize.models import QAT, batch, converted, fused, prepared, same_state, state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint

import eagerq
from eagerq.errors import CheckpointError

Make = Callable[..., nn.Module]
BOTH: list[Any] = [pytest.param(prepared, id="prepared"), pytest.param(converted, id="converted")]
both = pytest.mark.parametrize("make", BOTH)


def through_a_file(values: Any, path: Path) -> Any:
    torch.save(values, path)
    return torch.load(path, weights_only=True)


# --- loading ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("assign", [False, True])
def test_a_file_makes_another_model_the_same(make: Make, assign: bool, tmp_path: Path) -> None:
    source, target = make(seed=1), make(seed=2)
    target.load_state_dict(through_a_file(source.state_dict(), tmp_path / "model.pt"), assign=assign)
    assert same_state(state(target), state(source))
    x = batch(9)
    assert torch.equal(target.eval()(x), source.eval()(x))


def test_a_fresh_preparation_takes_one_that_has_seen_data() -> None:
    source = prepared(seed=1)
    target = eagerq.prepare_qat(fused(), inplace=True)  # its per-channel observers have no shape yet
    target.load_state_dict(source.state_dict())
    assert same_state(state(target), state(source))
    fresh = eagerq.prepare_qat(fused(), inplace=True).state_dict()
    source.load_state_dict(fresh)  # and the other way round
    assert same_state(state(source), fresh)


def test_training_continues_from_a_checkpoint_as_if_never_interrupted(tmp_path: Path) -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(batch(seed, size=4)).square().mean().backward()
            optimizer.step()

    def trainee() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(4)
        model = eagerq.prepare_qat(fused(), inplace=True)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    whole, optimizer = trainee()
    steps(whole, optimizer, range(3))
    file = {"model": whole.state_dict(), "optimizer": optimizer.state_dict()}
    loaded = through_a_file(file, tmp_path / "checkpoint.pt")
    steps(whole, optimizer, range(3, 6))

    resumed, optimizer = trainee()
    resumed.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    steps(resumed, optimizer, range(3, 6))
    assert same_state(state(resumed), state(whole))
    assert torch.equal(eagerq.convert(resumed.eval())(batch()), eagerq.convert(whole.eval())(batch()))


def test_switches_are_loaded_too() -> None:
    source = prepared(seed=1).apply(eagerq.disable_observer)
    target = prepared(seed=2)
    target.load_state_dict(source.state_dict())
    before = state(target)
    target.eval()(batch(5) * 100)
    assert same_state(state(target), before)  # its observers are off


def test_int8_state_is_plain_tensors() -> None:
    values = converted().state_dict()
    assert {type(value) for value in values.values()} == {Tensor}
    dtypes = collections.Counter(value.dtype for value in values.values())
    assert set(dtypes) <= {torch.int8, torch.uint8, torch.int32, torch.float32}
    assert values["module.4.weight"].dtype is torch.int8
    assert {name.rpartition(".")[2] for name in values} == {
        "weight",
        "weight_scale",
        "weight_zero_point",
        "bias",
        "scale",
        "zero_point",
    }


@both
def test_safetensors(make: Make, tmp_path: Path) -> None:
    source, target = make(seed=1), make(seed=2)
    save_file({name: value.contiguous() for name, value in source.state_dict().items()}, tmp_path / "model.safetensors")
    target.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same_state(state(target), state(source))


@both
@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_distributed_checkpoint(make: Make, tmp_path: Path) -> None:
    source, target = make(seed=1), make(seed=2)
    checkpoint.save(source.state_dict(), checkpoint_id=tmp_path / "model", no_dist=True)
    values = target.state_dict()
    checkpoint.load(values, checkpoint_id=tmp_path / "model", no_dist=True)
    target.load_state_dict(values)
    assert same_state(state(target), state(source))


@both
def test_whole_models_can_be_pickled(make: Make) -> None:
    model = make(seed=1).eval()
    x = batch(9)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = model(x)
    for twin in twins:
        assert torch.equal(twin(x), expected)
        with pytest.raises(CheckpointError):
            twin.load_state_dict({})


@both
def test_other_float_widths_are_cast(make: Make) -> None:
    values = {name: v.double() if v.is_floating_point() else v for name, v in make(seed=1).state_dict().items()}
    target = make(seed=2)
    target.load_state_dict(values)
    assert same_state(state(target), state(make(seed=1)))


@both
def test_wider_integers_are_taken_when_their_values_fit(make: Make) -> None:
    source = make(seed=1).state_dict()
    points = {name: v.long() for name, v in source.items() if name.endswith("zero_point")}
    target = make(seed=2)
    target.load_state_dict({**source, **points})
    assert same_state(state(target), dict(source))
    name = next(iter(points))
    refused(target, {**source, name: torch.full_like(points[name], 2**40)}, rf"{name} is of torch.int64")


def test_loading_across_devices(device: torch.device) -> None:
    target = converted(seed=2).to(device)
    target.load_state_dict(converted(seed=1).state_dict())
    assert {value.device.type for value in target.buffers()} == {device.type}
    assert torch.equal(target(batch().to(device)).cpu(), converted(seed=1)(batch()))


# --- refusing -------------------------------------------------------------------------------------------------


def refused(target: nn.Module, values: Any, match: str, **options: Any) -> None:
    """The load raises, and the model computes what it did."""
    was_training = target.training
    before = state(target)
    with pytest.raises(CheckpointError, match=match):
        target.load_state_dict(values, **options)
    assert same_state(state(target), before)
    assert target.training is was_training


def change(values: dict[str, Tensor], suffix: str, make: Callable[[Tensor], Any]) -> dict[str, Any]:
    name = next(name for name in reversed(list(values)) if name.endswith(suffix))
    return {**values, name: make(values[name])}


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "empty": (lambda d: {}, "it lacks "),
    "missing": (lambda d: {k: v for k, v in d.items() if k != "module.4.bias"}, r"it lacks module\.4\.bias"),
    "unexpected": (
        lambda d: {**d, "module.4.bais": torch.ones(5)},
        r"module\.4\.bais besides \(nearest.*module\.4\.bias",
    ),
    "another shape": (lambda d: change(d, "4.bias", lambda v: v[:3]), r"bias has shape \(3,\), the model's \(5,\)"),
    "not a tensor": (lambda d: change(d, "4.bias", lambda v: v.tolist()), r"bias is a list, not a tensor"),
    "None": (lambda d: change(d, "4.bias", lambda v: None), r"bias is a NoneType"),
    "integers for floats": (lambda d: change(d, "4.bias", lambda v: v.int()), r"bias is of torch\.int32"),
    "a key that is no name": (lambda d: {**d, 5: torch.ones(1)}, "it has 5 besides"),
}


@both
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("assign", [False, True])
def test_what_does_not_fit_is_refused_as_a_whole(make: Make, misfit: str, assign: bool) -> None:
    values, match = MISFITS[misfit]
    refused(make(seed=2), values(dict(make(seed=1).state_dict())), match, assign=assign)


@both
def test_another_width_is_refused(make: Make) -> None:
    refused(
        make(), make(width=6).state_dict(), r"module\.0\.weight has shape \(6, 3, 3, 3\), the model's \(4, 3, 3, 3\)"
    )


@both
def test_the_message_tells_what_to_do(make: Make) -> None:
    with pytest.raises(CheckpointError) as caught:
        make().load_state_dict({})
    for part in ("does not fit the model", "and ", " more", "same fuse list, qconfig and mapping"):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_another_bit_width_is_refused() -> None:
    wide = change(dict(converted(seed=1).state_dict()), "4.weight", lambda v: v.short())
    refused(converted(), wide, r"module\.4\.weight is of torch\.int16, the model's of torch\.int8: another bit width")
    signed = eagerq.QConfig(
        activation=eagerq.FakeQuantize.with_args(dtype=torch.int8, quant_min=-128, quant_max=127), weight=QAT.weight
    )
    refused(
        converted(),
        converted(qconfig=signed).state_dict(),
        r"zero_point is of torch\.int8, the model's of torch\.uint8",
    )


def test_prepared_and_converted_files_are_not_taken_for_each_other() -> None:
    refused(converted(), prepared().state_dict(), r"it lacks .*weight_scale.*it has .*fake_quant_enabled")
    refused(prepared(), converted().state_dict(), r"it lacks .*fake_quant_enabled.*it has ")


def test_a_file_of_the_float_model_is_refused() -> None:
    refused(prepared(), fused().state_dict(), "it lacks quant")
    refused(converted(), fused().state_dict(), "it lacks quant")


def test_channels_that_do_not_match_are_refused_even_where_shapes_may_change() -> None:
    values = change(dict(prepared(seed=1).state_dict()), "0.weight_fake_quant.scale", lambda v: v[:3])
    refused(prepared(), values, r"weight_fake_quant\.scale has shape \(3,\), the model's \(4,\)")


def test_a_converted_file_of_the_oracle_does_no_harm(ao: Oracle) -> None:
    layers = nn.Sequential(nn.Linear(4, 4))
    model = ao.quantization.QuantWrapper(layers).train()
    model.qconfig = ao.quantization.get_default_qat_qconfig("onednn")
    model = ao.quantization.prepare_qat(model)
    model(torch.randn(2, 4))
    theirs = ao.quantization.convert(model.eval()).state_dict()
    ours = eagerq.QuantWrapper(nn.Sequential(nn.Linear(4, 4))).train()
    ours.qconfig = QAT
    ours = eagerq.prepare_qat(ours)
    ours(torch.randn(2, 4))
    before = state(int8 := eagerq.convert(ours.eval()))
    try:
        int8.load_state_dict(theirs)
    except CheckpointError:
        assert same_state(state(int8), before)


@both
def test_not_strict_takes_what_fits_by_name_but_no_other_shapes(make: Make) -> None:
    target, values = make(seed=2), dict(make(seed=1).state_dict())
    missing = values.pop("module.4.bias")
    result = target.load_state_dict({**values, "other": torch.ones(1)}, strict=False)
    assert result.missing_keys == ["module.4.bias"]
    assert result.unexpected_keys == ["other"]
    assert same_state({k: v for k, v in state(target).items() if k in values}, values)
    assert not torch.equal(target.state_dict()["module.4.bias"], missing)
    refused(target, {**values, "module.4.bias": missing[:2]}, "shape", strict=False)
    refused(target, {**values, "module.4.bias": 3.0}, "not a tensor", strict=False)


@both
@pytest.mark.parametrize("strict", [True, False])
def test_inside_a_larger_model(make: Make, strict: bool) -> None:
    def larger(seed: int) -> nn.ModuleDict:
        return nn.ModuleDict({"quantized": make(seed=seed), "head": nn.Linear(5, 2)})

    source, target = larger(1), larger(2)
    target.load_state_dict(source.state_dict(), strict=strict)
    assert same_state(state(target), state(source))
    inner = target["quantized"]
    before = state(inner)
    values = dict(larger(3).state_dict())
    values["quantized.module.4.bias"] = torch.ones(9)
    with pytest.raises(CheckpointError, match=r"quantized\.module\.4\.bias has shape \(9,\)"):
        target.load_state_dict(values, strict=strict)
    assert same_state(state(inner), before)
    del values["quantized.module.4.bias"]
    if strict:
        with pytest.raises(CheckpointError, match=r"it lacks quantized\.module\.4\.bias"):
            target.load_state_dict(values)
        assert same_state(state(inner), before)
    else:
        assert target.load_state_dict(values, strict=False).missing_keys == ["quantized.module.4.bias"]


@both
def test_a_subclass_may_override_load_state_dict(make: Make) -> None:
    class Lenient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make(seed=2)

        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state_dict, strict=False)

    model = Lenient()
    model.load_state_dict({"inner.module.4.bias": torch.ones(5)})
    assert model.state_dict()["inner.module.4.bias"].tolist() == [1.0] * 5


@both
def test_a_subclass_may_override_state_dict(make: Make) -> None:
    class Own(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.inner = make(seed=seed)

        def state_dict(self) -> Any:  # type: ignore[override]
            return super().state_dict()

    model, other = Own(2), Own(3)
    wrong = {name: value for name, value in other.state_dict().items() if not name.endswith("4.bias")}
    with pytest.raises(CheckpointError, match=r"it lacks inner\.module\.4\.bias"):
        model.load_state_dict(wrong)
    model.load_state_dict(other.state_dict())
    assert same_state(state(model.inner), state(other.inner))


def test_no_dict_at_all() -> None:
    with pytest.raises(TypeError, match="dict-like"):
        converted().load_state_dict([1, 2])


# --- files that are damaged, or worse -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("part", [0.05, 0.5, 0.95])
def test_a_truncated_file_does_not_load(make: Make, part: float, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(make(seed=1).state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises((RuntimeError, ValueError, EOFError, OSError)):
        torch.load(path, weights_only=True)


class Hostile:
    """Runs code when it is unpickled by a reader that lets it."""

    opened: list[str] = []

    def __reduce__(self) -> Any:
        return Hostile.opened.append, ("executed",)


def test_a_hostile_file_runs_nothing() -> None:
    values = dict(converted(seed=1).state_dict())
    buffer = io.BytesIO()
    torch.save({**values, "module.4.bias": Hostile()}, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights only"):
        torch.load(buffer, weights_only=True)
    assert not Hostile.opened
