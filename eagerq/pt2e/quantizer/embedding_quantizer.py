"""The quantizer of embedding tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from eagerq.observer import PerChannelMinMaxObserver
from eagerq.pt2e.quantizer.annotation import annotate_chain, chains, is_annotated
from eagerq.pt2e.quantizer.quantizer import QuantizationSpec, Quantizer
from eagerq.pt2e.quantizer.utils import OperatorConfig, OperatorPatternType, QuantizationConfig

__all__ = ["EmbeddingQuantizer", "get_embedding_operators_config"]


def get_embedding_operators_config() -> OperatorConfig:
    """Tables in uint8, each row with a scale and a zero point of its own; what is looked up is float.

    Example:
        >>> get_embedding_operators_config().config.weight.dtype
        torch.uint8
    """
    weight = QuantizationSpec(
        dtype=torch.uint8,
        qscheme=torch.per_channel_affine_float_qparams,
        ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-12),
    )
    return OperatorConfig(QuantizationConfig(None, None, weight, None), [[nn.Embedding], [F.embedding]])


class EmbeddingQuantizer(Quantizer):
    """Annotates the table of each embedding as :func:`get_embedding_operators_config` says.

    Example:
        >>> model = torch.export.export(nn.Embedding(4, 2), (torch.tensor([1]),)).module()
        >>> for node in EmbeddingQuantizer().annotate(model).graph.nodes:
        ...     if "quantization_annotation" in node.meta:
        ...         print(node, list(node.meta["quantization_annotation"].input_qspec_map))
        embedding [weight]
    """

    _supported = get_embedding_operators_config()

    @classmethod
    def get_supported_operators(cls) -> list[OperatorConfig]:
        """The one configuration, and its operators."""
        return [cls._supported]

    @classmethod
    def get_supported_quantization_configs(cls) -> list[QuantizationConfig]:
        """The one configuration."""
        return [cls._supported.config]

    @classmethod
    def get_supported_operator_for_quantization_config(
        cls, quantization_config: QuantizationConfig
    ) -> list[OperatorPatternType]:
        """The operators that go with a configuration."""
        return cls._supported.operators if quantization_config == cls._supported.config else []

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate each embedding that no other quantizer has."""
        for (embedding,) in chains(model.graph, {torch.ops.aten.embedding.default}, (), None):
            if not is_annotated([embedding]):
                annotate_chain([embedding], {embedding.args[0]: self._supported.config.weight}, None)  # type: ignore[dict-item]
        return model

    def validate(self, model: GraphModule) -> None:
        """All that this quantizer annotates is supported."""
