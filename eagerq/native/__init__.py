"""Work in C, where a compiler was at hand when eagerq was installed."""

from eagerq.native.embedding import embedding, embedding_bag
from eagerq.native.library import available
from eagerq.native.pointwise import add, fake_quantize, masked, max_pool, quantize, serves

__all__ = [
    "add",
    "available",
    "embedding",
    "embedding_bag",
    "fake_quantize",
    "masked",
    "max_pool",
    "quantize",
    "serves",
]
