"""torch.ao's public names, package by package: each has a twin, or stands in the README's list with its reason."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Oracle
from torch import nn

import eagerq

README = Path(__file__).resolve().parent.parent / "README.md"
PACKAGES = {
    "torch.ao.quantization": "eagerq",
    "torch.ao.nn.qat": "eagerq.nn.qat",
    "torch.ao.nn.qat.dynamic": "eagerq.nn.qat.dynamic",
    "torch.ao.nn.quantizable": "eagerq.nn.quantizable",
    "torch.ao.nn.quantized": "eagerq.nn.quantized",
    "torch.ao.nn.quantized.dynamic": "eagerq.nn.quantized.dynamic",
    "torch.ao.nn.quantized.functional": "eagerq.nn.quantized.functional",
    "torch.ao.nn.intrinsic": "eagerq.intrinsic",
    "torch.ao.nn.intrinsic.qat": "eagerq.intrinsic.qat",
    "torch.ao.nn.intrinsic.quantized": "eagerq.intrinsic.quantized",
    "torch.ao.nn.intrinsic.quantized.dynamic": "eagerq.intrinsic.quantized.dynamic",
    "torch.ao.ns._numeric_suite": "eagerq.numeric_suite",
    **{
        f"torch.ao.quantization.{name}": f"eagerq.{name}"
        for name in (
            *("observer", "fake_quantize", "qconfig", "qconfig_mapping", "stubs", "fuse_modules"),
            *("fuser_method_mappings", "quantization_mappings", "quantize", "utils"),
        )
    },
}
# the first argument of forward methods and the like may have another name: nobody passes it by name
RENAMED = {"input", "X", "x_orig", "mod", "module", "model"}


def left_out() -> dict[str, str]:
    """Name -> reason, from the README."""
    _, _, table = README.read_text(encoding="utf-8").partition("<!-- left out -->")
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|$", table.partition("\n\n")[0], re.MULTILINE)
    return {name: reason for names, reason in rows for name in re.findall(r"`(\w+)`", names)}


def public_names(module: Any) -> list[str]:
    """What a module exports: its ``__all__``, or what it and its files define."""
    named = getattr(module, "__all__", None)
    if named:
        return [name for name in named if hasattr(module, name)]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith(module.__name__)
    ]


def twins() -> Iterator[tuple[str, Any, Any]]:
    """Qualified name, torch.ao's object, eagerq's (or None)."""
    for theirs, ours in PACKAGES.items():
        package, twin = importlib.import_module(theirs), importlib.import_module(ours)
        for name in public_names(package):
            # a name of a submodule may have moved to another: it is at the top level, as there
            elsewhere = getattr(eagerq, name, None) if theirs.startswith("torch.ao.quantization") else None
            yield f"{ours}.{name}", getattr(package, name), getattr(twin, name, elsewhere)


def methods(kind: type) -> set[str]:
    inherited = {*dir(nn.Module), *dir(nn.Sequential)}
    return {name for name in dir(kind) if not name.startswith("_") and name not in inherited}


def takes(ours: Any, theirs: Any) -> bool:
    """Whether every argument of theirs can be given to ours: by name, and in the same place."""
    try:
        wanted = inspect.signature(theirs).parameters.values()
        given = inspect.signature(ours).parameters
    except (TypeError, ValueError):
        return True
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if {one.kind for one in given.values()} >= set(variable):
        return True
    named = [one.name for one in wanted if one.kind not in variable]
    mine = [one.name for one in given.values() if one.kind not in variable]
    return len(mine) >= len(named) and all(
        a == b or (a in RENAMED and place < 2) for place, (a, b) in enumerate(zip(named, mine, strict=False))
    )


def test_every_package_has_names(ao: Oracle) -> None:
    assert [theirs for theirs in PACKAGES if not public_names(importlib.import_module(theirs))] == []


def test_every_name_has_a_twin_or_a_reason(ao: Oracle) -> None:
    reasons = left_out()
    missing = {name for name, _, ours in twins() if ours is None}
    unexplained = {name for name in missing if name.rpartition(".")[2] not in reasons}
    assert not unexplained


def test_every_method_has_a_twin_or_a_reason(ao: Oracle) -> None:
    reasons = left_out()
    missing = {
        f"{name}.{method}"
        for name, theirs, ours in twins()
        if inspect.isclass(theirs) and inspect.isclass(ours)
        for method in methods(theirs) - methods(ours)
        if not hasattr(ours, method)
    }
    assert not {name for name in missing if name.rpartition(".")[2] not in reasons}


def test_reasons_are_for_names_that_are_missing(ao: Oracle) -> None:
    """The list cannot rot: what it excuses is missing, and was there to be had."""
    absent = {name.rpartition(".")[2] for name, _, ours in twins() if ours is None}
    for _, theirs, ours in twins():
        if inspect.isclass(theirs) and inspect.isclass(ours):
            absent |= {method for method in methods(theirs) if not hasattr(ours, method)}
    assert set(left_out()) == absent
    assert all(len(reason) > 10 for reason in left_out().values())


def test_arguments_have_their_names_and_places(ao: Oracle) -> None:
    different = []
    for name, theirs, ours in twins():
        if ours is None or not callable(theirs):
            continue
        if not takes(ours, theirs):
            different.append(name)
        if inspect.isclass(theirs) and inspect.isclass(ours):
            different += [
                f"{name}.{method}"
                for method in methods(theirs)
                if inspect.isfunction(getattr(theirs, method)) and hasattr(ours, method)
                if not takes(getattr(ours, method), getattr(theirs, method))
            ]
    assert not different


@pytest.mark.parametrize("package", sorted(set(PACKAGES.values())))
def test_exports_are_declared(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__, package
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
