"""Modules for quantization-aware training."""

from eagerq.nn.qat.conv import Conv1d, Conv2d, Conv3d
from eagerq.nn.qat.embedding import Embedding, EmbeddingBag
from eagerq.nn.qat.linear import Linear

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "EmbeddingBag", "Linear"]
