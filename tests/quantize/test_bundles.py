"""Loading hands each layer its entries as one; nobody who looks at a state_dict sees that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eagerq
from eagerq.bundles import bundle, unbundle
from eagerq.quantize.state import _units


class Seen(nn.Module):
    """Keeps the names that it was given to load."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.names: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


class Looking(Seen):
    def _load_from_state_dict(self, state_dict: Any, *args: Any) -> None:
        self.names = sorted(state_dict)
        super()._load_from_state_dict(state_dict, *args)


class LookingLinear(eagerq.nn.qat.Linear):
    names: tuple[str, ...] = ()

    def _load_from_state_dict(self, state_dict: Any, *args: Any) -> None:
        self.names = tuple(sorted(state_dict))
        super()._load_from_state_dict(state_dict, *args)


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def prepared(make: Callable[[nn.Module], nn.Module] = Seen) -> nn.Module:
    model = nn.Sequential(eagerq.QuantStub(), make(block()), eagerq.DeQuantStub()).train()
    eagerq.fuse_modules_qat(model, [["1.inner.0", "1.inner.1", "1.inner.2"]], inplace=True)
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    model = eagerq.prepare_qat(model)
    model(torch.randn(4, 3, 2, 2))
    return model


def converted(make: Callable[[nn.Module], nn.Module] = Seen) -> nn.Module:
    return eagerq.convert(prepared(make).eval(), as_trained=True)


@pytest.mark.parametrize("make", [prepared, converted])
def test_what_is_loaded_is_what_was_saved(make: Callable[[], nn.Module]) -> None:
    saved, model = make().state_dict(), make()
    kept = copy.deepcopy(saved)
    assert model.load_state_dict(saved).missing_keys == []
    assert list(saved) == list(kept), "the caller's dict has changed"
    loaded = model.state_dict()
    assert list(loaded) == list(kept)
    assert all(torch.equal(loaded[key], kept[key]) for key in kept)


def test_a_layer_comes_as_one_entry() -> None:
    model = prepared()
    state = dict(model.state_dict())
    bundle(state, set(_units(model, "")))
    assert sorted(state) == ["0.activation_post_process.(all)", "1.inner.0.(all)", "1.inner.4.(all)"]
    for name in ("0.activation_post_process.", "1.inner.0.", "1.inner.4."):
        unbundle(state, name)
    assert sorted(state) == sorted(model.state_dict())


@pytest.mark.parametrize("make", [prepared, converted])
def test_a_parent_that_looks_sees_the_entries_themselves(make: Callable[..., nn.Module]) -> None:
    model = make(Looking)
    model.load_state_dict(model.state_dict())
    assert model[1].names == sorted(key for key in model.state_dict() if key.startswith("1."))


def test_a_root_that_looks_sees_the_entries_themselves() -> None:
    model = Looking(block()).train()
    model.qconfig = eagerq.get_default_qat_qconfig("onednn")
    model = eagerq.prepare_qat(model)
    model.load_state_dict(model.state_dict())
    assert model.names == sorted(model.state_dict())


def test_a_layer_that_looks_sees_the_entries_themselves() -> None:
    model = prepared()
    linear = model[1].inner[4]
    linear.__class__ = LookingLinear
    model.load_state_dict(model.state_dict())
    assert linear.names == tuple(sorted(key for key in model.state_dict() if key.startswith("1.inner.4.")))


@pytest.mark.parametrize("where", ["", "1", "1.inner", "1.inner.0"])
@pytest.mark.parametrize("make", [prepared, converted])
def test_hooks_see_the_entries_themselves(make: Callable[[], nn.Module], where: str) -> None:
    model = make()
    seen: list[str] = []

    def look(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
        seen.extend(key for key in state_dict if key.startswith(prefix))

    model.get_submodule(where).register_load_state_dict_pre_hook(look)
    model.load_state_dict(model.state_dict())
    assert sorted(seen) == sorted(key for key in model.state_dict() if key.startswith(where))


@pytest.mark.parametrize("make", [prepared, converted])
def test_what_is_missing_or_strange_is_told_by_its_name(make: Callable[[], nn.Module]) -> None:
    model = make()
    state = dict(model.state_dict())
    del state["1.inner.4.bias"]
    state["1.inner.0.strange"] = torch.zeros(1)
    told = model.load_state_dict(state, strict=False)
    assert (told.missing_keys, told.unexpected_keys) == (["1.inner.4.bias"], ["1.inner.0.strange"])


@pytest.mark.parametrize("make", [prepared, converted])
def test_as_part_of_a_larger_model(make: Callable[[], nn.Module]) -> None:
    larger, other = nn.ModuleDict({"part": make()}), nn.ModuleDict({"part": make()})
    larger.load_state_dict(other.state_dict())
    mine, theirs = larger.state_dict(), other.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
