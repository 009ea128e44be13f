"""Quantizers of exported graphs: what they are made of, and those that come with eagerq."""

from eagerq.pt2e.quantizer.duplicate_dq_pass import DuplicateDQPass
from eagerq.pt2e.quantizer.port_metadata_pass import PortNodeMetaForQDQ
from eagerq.pt2e.quantizer.quantizer import (
    DerivedQuantizationSpec,
    EdgeOrNode,
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

__all__ = [
    "DuplicateDQPass",
    "DerivedQuantizationSpec",
    "EdgeOrNode",
    "FixedQParamsQuantizationSpec",
    "PortNodeMetaForQDQ",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "QuantizationSpecBase",
    "Quantizer",
    "SharedQuantizationSpec",
]
