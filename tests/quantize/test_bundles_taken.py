"""Entries that were checked are only copied; whatever is out of the ordinary goes nn.Module's own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from quantize.test_bundles import Seen, block, converted, prepared
from torch import nn

import eagerq
from eagerq.bundles import is_ours

MAKES = pytest.mark.parametrize("make", [prepared, converted])


def loads(model: nn.Module, other: nn.Module, **options: Any) -> None:
    """``model`` takes all of ``other``'s entries."""
    wanted = other.state_dict()
    assert any(not torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    model.load_state_dict(wanted, **options)
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


@MAKES
def test_our_modules_only_copy(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    usual, seen = nn.Module._load_from_state_dict, []

    def watched(self: nn.Module, *args: Any) -> None:
        seen.append(self)
        usual(self, *args)

    model, other = make(), make()
    state = other.state_dict()
    monkeypatch.setattr(nn.Module, "_load_from_state_dict", watched)
    model.load_state_dict(state)
    assert seen
    assert not [module for module in seen if is_ours(module)]


class LookingAfter(Seen):
    def _load_from_state_dict(self, state_dict: Any, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, *args)
        self.names = sorted(state_dict)


@pytest.mark.parametrize("as_root", [False, True])
def test_who_looks_afterwards_sees_the_entries_themselves(as_root: bool) -> None:
    model: Any
    if as_root:
        model = LookingAfter(block()).train()
        model.qconfig = eagerq.get_default_qat_qconfig("onednn")
        model = looking = eagerq.prepare_qat(model)
    else:
        model = prepared(LookingAfter)
        looking = model[1]
    model.load_state_dict(model.state_dict())
    assert looking.names == sorted(key for key in model.state_dict() if as_root or key.startswith("1."))


@pytest.mark.parametrize("where", ["weight_fake_quant", "weight_fake_quant.activation_post_process", "bn"])
def test_hooks_within_a_layer_see_and_change_the_entries_themselves(where: str) -> None:
    model, other = prepared(), prepared()
    path = f"1.inner.0.{where}."
    seen: list[str] = []

    def look(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
        seen.extend(key for key in state_dict if key.startswith(prefix))
        for key in seen:
            state_dict[key] = state_dict[key] * 0 + 1

    model.get_submodule(path[:-1]).register_load_state_dict_pre_hook(look)
    model.load_state_dict(other.state_dict())
    assert sorted(seen) == sorted(key for key in model.state_dict() if key.startswith(path))
    assert all(bool((value == 1).all()) for key, value in model.state_dict().items() if key.startswith(path))


@MAKES
def test_entries_that_are_assigned(make: Callable[[], nn.Module]) -> None:
    model, other = make(), make()
    loads(model, other, assign=True)
    if make is prepared:
        assert model[1].inner[4].weight.data_ptr() == other[1].inner[4].weight.data_ptr()  # type: ignore[index]


def test_entries_that_are_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = prepared(), prepared()
    swapped: list[Any] = []
    swap = torch.utils.swap_tensors
    monkeypatch.setattr(torch.utils, "swap_tensors", lambda *both: (swapped.append(both[0]), swap(*both)))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        loads(model, other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert len(swapped) == len(model.state_dict())


class Counting(eagerq.nn.qat.Linear):
    """Saves more than tensors."""

    seen = 0

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_extra_state() -> None:
    model, other = prepared(), prepared()
    for one, count in ((model, 1), (other, 5)):
        one[1].inner[4].__class__ = Counting  # type: ignore[index]
        one[1].inner[4].seen = count  # type: ignore[index]
    model.load_state_dict(other.state_dict())
    assert model[1].inner[4].seen == 5  # type: ignore[index]
    state = model.state_dict()
    del state["1.inner.4._extra_state"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["1.inner.4._extra_state"]


class Secretive(Seen):
    """Has a value that it does not save."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("secret", torch.ones(1))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict[f"{prefix}secret"] = torch.zeros(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ByHook(Secretive):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self._register_state_dict_hook(self.hide)

    @staticmethod
    def hide(module: nn.Module, state: Any, prefix: str, _: Any) -> None:
        del state[f"{prefix}secret"]


class ByMethod(Secretive):
    def state_dict(self, *args: Any, destination: Any, prefix: str, keep_vars: bool) -> Any:
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        del state[f"{prefix}secret"]
        return state


@pytest.mark.parametrize("kind", [ByHook, ByMethod])
def test_who_saves_otherwise_is_asked(kind: Any) -> None:
    model, state = prepared(kind), prepared(kind).state_dict()
    assert "1.secret" not in state
    model.load_state_dict(state)
    assert model[1].secret.item() == 0  # type: ignore[index,union-attr,operator]


def test_a_value_that_cannot_be_written_is_told_by_its_name() -> None:
    model = prepared()
    layer: Any = model[1].inner[4]  # type: ignore[index]
    state = model.state_dict()
    layer.weight.data = torch.zeros(1, 1).expand_as(layer.weight)
    with pytest.raises(RuntimeError, match=r"While copying the parameter named \"1\.inner\.4\.weight\""):
        model.load_state_dict(state)
