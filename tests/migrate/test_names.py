"""The table of modules leads to modules that exist, and finds what torch.ao makes public."""

from __future__ import annotations

import importlib

import pytest
from conftest import Oracle

from eagerq.migrate.names import _ROOTS, Found, lookup

QUANTIZATION = ("torch", "ao", "quantization")


@pytest.mark.parametrize("old", _ROOTS)
def test_every_old_package_has_a_new_place(old: str) -> None:
    for place in _ROOTS[old]:
        assert importlib.import_module(place)


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


PT2E = {
    "torch.ao.quantization": (
        *("allow_exported_model_train_eval", "move_exported_model_to_eval", "move_exported_model_to_train"),
        *("ObserverOrFakeQuantize", "ObserverOrFakeQuantizeConstructor"),
    ),
    "torch.ao.quantization.quantize_pt2e": ("convert_pt2e", "prepare_pt2e"),
    "torch.ao.quantization.quantizer": (
        *("DerivedQuantizationSpec", "EdgeOrNode", "FixedQParamsQuantizationSpec", "QuantizationAnnotation"),
        *("QuantizationSpec", "QuantizationSpecBase", "Quantizer", "SharedQuantizationSpec"),
    ),
    "torch.ao.quantization.quantizer.quantizer": ("Q_ANNOTATION_KEY", "Quantizer"),
    "torch.ao.quantization.quantizer.composable_quantizer": ("ComposableQuantizer",),
    "torch.ao.quantization.quantizer.embedding_quantizer": ("EmbeddingQuantizer",),
    "torch.ao.quantization.quantizer.utils": ("_get_module_name_filter",),
    "torch.ao.quantization.quantizer.xnnpack_quantizer": ("XNNPACKQuantizer", "get_symmetric_quantization_config"),
    "torch.ao.quantization.quantizer.xnnpack_quantizer_utils": ("OP_TO_ANNOTATOR", "QuantizationConfig"),
    "torch.ao.quantization.pt2e.duplicate_dq_pass": ("DuplicateDQPass",),
    "torch.ao.quantization.pt2e.export_utils": ("model_is_exported",),
    "torch.ao.quantization.pt2e.port_metadata_pass": ("PortNodeMetaForQDQ",),
    "torchao.quantization.pt2e": ("FusedMovingAvgObsFakeQuantize", "MinMaxObserver", "enable_observer"),
    "torchao.quantization.pt2e.fake_quantize": ("FakeQuantize", "default_weight_fake_quant"),
    "torchao.quantization.pt2e.observer": ("MinMaxObserver", "default_weight_observer"),
    "torchao.quantization.pt2e.quantize_pt2e": ("convert_pt2e", "prepare_pt2e"),
    "torchao.quantization.pt2e.quantizer": ("DuplicateDQPass", "PortNodeMetaForQDQ", "Quantizer"),
}


@pytest.mark.parametrize("old", PT2E)
def test_the_graph_side_is_found(old: str) -> None:
    """Much of this is gone from torch already, so the names are written down."""
    for name in PT2E[old]:
        found = lookup([*old.split("."), name], imported=old.count(".") + 1)
        assert isinstance(found, Found), found
        assert found.module.startswith("eagerq.")
        assert hasattr(importlib.import_module(found.module), found.name.rpartition(".")[2])


def test_a_name_that_two_modules_could_have_is_the_first_ones() -> None:
    found = lookup([*QUANTIZATION, "observer", "MinMaxObserver", "with_args"])
    assert found == Found("eagerq.observer.MinMaxObserver", "eagerq.observer", 5)


def test_a_function_hides_the_module_of_its_name() -> None:
    as_attribute = lookup([*QUANTIZATION, "quantize", "prepare"])
    assert as_attribute == Found("eagerq.quantize", "eagerq", 4)
    imported = lookup([*QUANTIZATION, "quantize", "prepare"], imported=4)
    assert imported == Found("eagerq.quantize.prepare", "eagerq.quantize", 5)
