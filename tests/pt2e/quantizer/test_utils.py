"""What quantizers are written with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pt2e.flows import quiet
from pt2e.graphs import call, exported
from torch import nn

import eagerq.pt2e.quantizer
import eagerq.pt2e.quantizer.utils
from eagerq.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationConfig,
    annotate_input_qspec_map,
    annotate_output_qspec,
    get_bias_qspec,
    get_input_act_qspec,
    get_output_act_qspec,
    get_symmetric_quantization_config,
    get_weight_qspec,
    is_valid_annotation,
)

CONFIG: Any = get_symmetric_quantization_config()
GETTERS = {
    "input_activation": get_input_act_qspec,
    "output_activation": get_output_act_qspec,
    "weight": get_weight_qspec,
    "bias": get_bias_qspec,
}


@pytest.mark.parametrize("field", GETTERS)
def test_specifications_of_a_configuration(field: str) -> None:
    assert GETTERS[field](CONFIG) is getattr(CONFIG, field)
    assert GETTERS[field](QuantizationConfig(None, None, None, None)) is None
    assert GETTERS[field](None) is None


@pytest.mark.parametrize(
    ("field", "wrong", "error", "message"),
    [
        (
            "input_activation",
            {"qscheme": torch.per_channel_affine},
            AssertionError,
            "give .* torch.per_tensor_affine or",
        ),
        (
            "output_activation",
            {"qscheme": torch.per_channel_symmetric},
            AssertionError,
            "output_activation has qscheme",
        ),
        ("weight", {"qscheme": torch.per_tensor_affine}, ValueError, "weight has qscheme torch.per_tensor_affine"),
        ("bias", {"dtype": torch.int32}, AssertionError, "bias has dtype torch.int32.*torch.float32"),
    ],
)
def test_what_does_not_fit(field: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    config = replace(CONFIG, **{field: replace(CONFIG.weight, **wrong)})
    with pytest.raises(error, match=message):
        GETTERS[field](config)


def test_annotations_are_added_to() -> None:
    linear = call(exported(nn.Linear(2, 2), torch.ones(1, 2)), torch.ops.aten.linear.default)
    x, weight, _ = linear.all_input_nodes
    annotate_output_qspec(linear, CONFIG.output_activation)
    annotate_input_qspec_map(linear, x, CONFIG.input_activation)
    annotate_input_qspec_map(linear, weight, None)
    annotation = linear.meta["quantization_annotation"]
    assert annotation.input_qspec_map == {x: CONFIG.input_activation, weight: None}
    assert annotation.output_qspec is CONFIG.output_activation
    assert not annotation._annotated


def test_valid_annotations() -> None:
    spec = CONFIG.weight
    node: Any = object()
    assert not is_valid_annotation(None)
    assert not is_valid_annotation(QuantizationAnnotation())
    assert is_valid_annotation(QuantizationAnnotation(output_qspec=spec))
    assert is_valid_annotation(QuantizationAnnotation({node: None}))


def test_public_names() -> None:
    """torchao's are here too."""
    with quiet():
        theirs = pytest.importorskip("torchao.quantization.pt2e.quantizer")
        import torchao.quantization.pt2e.quantizer.utils as their_utils
    assert set(theirs.__all__) <= set(eagerq.pt2e.quantizer.__all__)
    names = [
        name for name, value in vars(their_utils).items() if getattr(value, "__module__", "") == their_utils.__name__
    ]
    assert [name for name in names if not hasattr(eagerq.pt2e.quantizer.utils, name)] == []
