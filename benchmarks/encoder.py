"""A transformer's encoder layer of BERT-base's size, written once for every contender, and embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import Parts

WIDTH, HEADS, INNER, LENGTH = 768, 12, 3072, 128


class EncoderLayer(nn.Module):
    """Attention and two linear layers (Devlin et al., 2018); linear layers between stubs, all else in float."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.attended, self.wider, self.narrower = (
            nn.Linear(*sizes) for sizes in ((WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH))
        )
        self.first_norm, self.second_norm = (self._in_float(nn.LayerNorm(WIDTH)) for _ in range(2))
        self.quants = nn.ModuleList(parts.QuantStub() for _ in range(4))
        self.dequants = nn.ModuleList(parts.DeQuantStub() for _ in range(6))

    @staticmethod
    def _in_float(module: nn.Module) -> nn.Module:
        module.qconfig = None  # type: ignore[assignment]
        return module

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, LENGTH, WIDTH]``, of the same shape."""
        inputs = self.quants[0](x)
        layers = zip((self.query, self.key, self.value), list(self.dequants), strict=False)
        heads = [out(layer(inputs)).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer, out in layers]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = self.first_norm(x + self.dequants[3](self.attended(self.quants[1](y))))
        y = F.gelu(self.dequants[4](self.wider(self.quants[2](x))))
        return self.second_norm(x + self.dequants[5](self.narrower(self.quants[3](y))))


def example(batch: int) -> Tensor:
    """Something to put in."""
    return torch.randn(batch, LENGTH, WIDTH)
