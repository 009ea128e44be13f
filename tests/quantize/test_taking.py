"""What fits a model as it is gets copied at once; nothing that anybody can see differs from nn.Module's own way."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantize.test_bundles import converted, prepared
from torch import nn

import eagerq
from eagerq.quantize.state import install_state_check
from eagerq.quantize.taking import Inventory

MAKES = pytest.mark.parametrize("make", [prepared, converted])
Make = Callable[[], Any]


def entries_seen(model: nn.Module, state: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many entries modules below the root are given to look through."""
    usual, seen = nn.Module._load_from_state_dict, []

    def watched(self: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix:
            seen.append(len(state_dict))
        usual(self, state_dict, prefix, *args)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "_load_from_state_dict", watched)
        model.load_state_dict(state)
    assert seen
    return sum(seen)


def same(model: nn.Module, state: Any) -> bool:
    mine = model.state_dict()
    return mine.keys() == state.keys() and all(torch.equal(mine[key], state[key]) for key in mine)


@pytest.mark.parametrize("through", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@MAKES
def test_no_module_has_anything_left_to_look_through(
    make: Make, through: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = through(make()), make().state_dict()
    batch_norm = 1 if make is prepared else 0
    assert entries_seen(model, state, monkeypatch) == 0
    assert same(model, state)
    assert entries_seen(model, dict(state), monkeypatch) == batch_norm, "what old files lack"


def test_observers_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh() -> nn.Module:
        model = nn.Sequential(eagerq.QuantStub(), nn.Conv2d(3, 4, 1), eagerq.DeQuantStub()).train()
        model.qconfig = eagerq.get_default_qat_qconfig("onednn")
        return eagerq.prepare_qat(model)

    seen = fresh()
    seen(torch.randn(2, 3, 2, 2))
    for model, other in ((fresh(), seen), (seen, fresh())):
        state = copy.deepcopy(other.state_dict())
        assert any(value.shape != state[key].shape for key, value in model.state_dict().items())
        assert entries_seen(model, state, monkeypatch) == 0
        assert same(model, state)


@MAKES
def test_switches_and_packed_weights_are_read_anew(make: Make) -> None:
    model, other = make().eval(), make().eval().apply(eagerq.disable_fake_quant)
    x = torch.randn(2, 3, 2, 2)
    assert not torch.equal(model(x), other(x))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))


# --- who may look on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "1", "1.inner.4", "0"])
@MAKES
def test_who_hears_of_missing_keys_hears_of_none(make: Make, where: str) -> None:
    model, heard = make(), []
    model.get_submodule(where).register_load_state_dict_post_hook(lambda _, keys: heard.append(list(keys.missing_keys)))
    model.load_state_dict(make().state_dict())
    assert heard == [[]]


def test_who_heard_before_preparing_hears_of_none() -> None:
    model, heard = nn.Sequential(eagerq.QuantStub(), nn.Linear(2, 2)).train(), []
    model.register_load_state_dict_post_hook(lambda _, keys: heard.append(list(keys.missing_keys)))
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    eagerq.prepare_qat(model, inplace=True)
    model.load_state_dict(model.state_dict())
    assert heard == [[]]


@MAKES
def test_without_the_hook_that_puts_missing_keys_right(make: Make) -> None:
    model, state = make(), make().state_dict()
    model._load_state_dict_post_hooks.clear()
    assert model.load_state_dict(state).missing_keys == []
    assert same(model, state)


@MAKES
def test_a_module_with_a_way_of_its_own(make: Make) -> None:
    model, seen = make(), []
    layer = model[1].inner[4]
    usual = layer._load_from_state_dict

    def looking(state_dict: Any, *args: Any) -> None:
        seen.extend(state_dict)
        usual(state_dict, *args)

    layer._load_from_state_dict = looking
    model.load_state_dict(make().state_dict())
    assert sorted(seen) == sorted(key for key in model.state_dict() if key.startswith("1.inner.4."))


@pytest.mark.parametrize("order", [("part", "other"), ("other", "part")])
@MAKES
def test_missing_keys_of_others_stay(make: Make, order: tuple[str, str]) -> None:
    def larger() -> nn.Module:
        parts = {"part": make(), "other": nn.Linear(2, 2)}
        return nn.ModuleDict({name: parts[name] for name in order})

    model, state, heard = larger(), dict(larger().state_dict()), []
    model.register_load_state_dict_post_hook(lambda _, keys: heard.append(list(keys.missing_keys)))
    model["part"].register_load_state_dict_pre_hook(lambda *args: args[5].append("made up"))  # type: ignore[index]
    hooks = model["part"]._load_state_dict_pre_hooks  # type: ignore[index]
    hooks.move_to_end(next(iter(hooks)))  # the check's own is the last again
    del state["other.bias"]
    told = model.load_state_dict(state, strict=False)
    expected = ["made up", "other.bias"]
    assert told.missing_keys == heard[0] == (expected if order[0] == "part" else expected[::-1])
    assert same(model["part"], {key[5:]: value for key, value in state.items() if key.startswith("part.")})  # type: ignore[index]


@MAKES
def test_who_goes_from_module_to_module_himself(make: Make) -> None:
    """As some trainers do, so that they hear of missing keys without nn.Module's hooks."""
    model, state = make(), make().state_dict()
    missing: list[str] = []

    def load(module: nn.Module, prefix: str) -> None:
        module._load_from_state_dict(dict(state), prefix, {}, True, missing, [], [])
        for name, child in module._modules.items():
            if child is not None:
                load(child, f"{prefix}{name}.")

    load(model, "")
    assert missing == []
    assert same(model, state)


@MAKES
def test_a_part_prepared_by_itself(make: Make) -> None:
    def nested() -> nn.Module:
        model = nn.Sequential(make(), nn.Linear(2, 2)).train()
        install_state_check(model)
        return model

    model, state = nested(), nested().state_dict()
    assert model.load_state_dict(state).missing_keys == []
    assert same(model, state)


def test_one_layer_in_two_places() -> None:
    def shared() -> nn.Module:
        layer = nn.Linear(2, 2)
        model = nn.Sequential(eagerq.QuantStub(), layer, layer).train()
        model.qconfig = eagerq.get_default_qat_qconfig("onednn")
        model = eagerq.prepare_qat(model, inplace=True)
        assert model[1] is model[2]
        return model

    model, state = shared(), dict(shared().state_dict())
    state["2.weight"] = state["1.weight"] + 1
    model.load_state_dict(state)
    assert torch.equal(model[1].weight, state["2.weight"]), "the last one counts"


# --- whatever comes -----------------------------------------------------------------------------------------

_CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "wider": lambda x: x.double() if x.is_floating_point() else x.long(),
    "an element more": lambda x: torch.cat([x.flatten(), x.flatten()[:1]]),
    "a dimension more": lambda x: x[None],
    "no dimension": lambda x: x.flatten()[0],
    "turned": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
    "a parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "no tensor": lambda x: x.tolist(),
    "without values": lambda x: x.to("meta"),
    "not finite": lambda x: x * torch.nan if x.is_floating_point() else x,
}


def outcome(model: nn.Module, state: Any, strict: bool) -> Any:
    """What a caller sees of loading, and of the model after it."""
    try:
        told: Any = tuple(map(list, model.load_state_dict(state, strict)))
    except RuntimeError as error:
        told = str(error)
    return told, {key: (value.dtype, repr(value.tolist())) for key, value in model.state_dict().items()}


@MAKES
@given(data=st.data())
def test_as_if_it_were_not(make: Make, data: st.DataObject) -> None:
    model = make()
    state = dict(make().state_dict())
    keys = st.sampled_from(sorted(state))
    for key in data.draw(st.lists(keys, max_size=2, unique=True), label="changed"):
        state[key] = _CHANGES[data.draw(st.sampled_from(sorted(_CHANGES)))](state[key])
    for key in data.draw(st.lists(keys, max_size=1), label="left out"):
        del state[key]
    for key in data.draw(st.lists(keys, max_size=1), label="besides"):
        state[f"{key}.more"] = state[f"{key}x"] = torch.zeros(1)
    strict, other = data.draw(st.booleans(), label="strict"), copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inventory, "take", lambda *_: None)
        expected = outcome(other, dict(state), strict)
    assert outcome(model, dict(state), strict) == expected
