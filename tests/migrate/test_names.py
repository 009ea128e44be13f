"""The table of modules leads to modules that exist, and finds what torch.ao makes public."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
from conftest import Oracle

from eagerq.migrate.names import _ROOTS, Found, Refused, lookup

PENDING = "eagerq.pt2e"
QUANTIZATION = ("torch", "ao", "quantization")


@pytest.mark.parametrize("old", _ROOTS)
def test_every_old_package_has_a_new_place(old: str) -> None:
    first = _ROOTS[old][0]
    if first.split(".")[:2] == PENDING.split(".") and importlib.util.find_spec(PENDING) is None:
        assert isinstance(lookup(old.split(".")), Refused)
    else:
        assert importlib.import_module(first)


@pytest.mark.parametrize(
    "inner",
    [
        *("quantization.fake_quantize", "quantization.qconfig", "quantization.qconfig_mapping", "quantization.stubs"),
        *("quantization.quantize", "quantization.fuse_modules", "nn.qat", "nn.qat.dynamic", "nn.quantizable"),
        *("nn.intrinsic.qat", "nn.intrinsic.quantized.dynamic"),
    ],
)
def test_all_that_they_export_is_found(ao: Oracle, inner: str) -> None:
    path = f"torch.ao.{inner}"
    package = importlib.import_module(path)
    for name in getattr(package, "__all__", [name for name in vars(package) if name[:2].istitle()]):
        found = lookup([*path.split("."), name], imported=path.count(".") + 1)
        assert isinstance(found, Found), found
        assert hasattr(importlib.import_module(found.module), found.name.rpartition(".")[2])


def test_a_name_that_two_modules_could_have_is_the_first_ones() -> None:
    found = lookup([*QUANTIZATION, "observer", "MinMaxObserver", "with_args"])
    assert found == Found("eagerq.observer.MinMaxObserver", "eagerq.observer", 5)


def test_a_function_hides_the_module_of_its_name() -> None:
    as_attribute = lookup([*QUANTIZATION, "quantize", "prepare"])
    assert as_attribute == Found("eagerq.quantize", "eagerq", 4)
    imported = lookup([*QUANTIZATION, "quantize", "prepare"], imported=4)
    assert imported == Found("eagerq.quantize.prepare", "eagerq.quantize", 5)
