"""Small networks for the quantizers: exported once each, with every pattern that one of them knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

__all__ = ["MODELS", "exported"]


class Linears(nn.Module):
    """Linear alone, with ReLU in place and not, with ReLU and another user, of one weight twice, after dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        y = self.third(self.dropout(torch.relu_(self.second(x))))
        return self.first(torch.relu(y) + y).flatten(1).mean(1)


class Convs(nn.Module):
    """Convolutions of each dimension, in groups and depthwise, padded by word, with ReLU or without."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 3, padding="same", groups=4)
        self.thin = nn.Conv1d(4, 4, 1)
        self.deep = nn.Conv3d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.depthwise(torch.relu(self.plain(x)))
        x = torch.nn.functional.max_pool2d(self.grouped(x), 2)
        flat = x.flatten(2)
        return self.plain(x), torch.relu(self.thin(flat)), self.deep(x[..., None])


class Transposed(nn.Module):
    """Transposed convolutions, whose groups decide; and one whose result has two users."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.relu = nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.thin = nn.ConvTranspose1d(4, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plain(torch.relu(self.relu(x)))
        y = self.grouped(x)
        return self.thin((torch.relu(y) * y).flatten(2))


class Residual(nn.Module):
    """Sums and products of tensors and numbers, with ReLU or without, of integers, of huge numbers; cat, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left, right = self.left(x), torch.relu(self.right(x))
        total = torch.relu(left + right)
        product = torch.relu(total * left) * 2
        product += x
        both = torch.cat([x.permute(0, 1, 3, 2), product, total, x], dim=1)
        huge = x * 1e20 + x
        counted = (x > 0).long() + (x > 1).long()
        pooled = self.pool(both)
        return torch.nn.functional.adaptive_avg_pool2d(x, 2), pooled.view(pooled.size(0), -1) + x.amax(), huge, counted


class ConvBn(nn.Module):
    """Convolutions, transposed ones too, that BatchNorm and perhaps ReLU follow, with bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bare = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, bias=False)
        self.thin, self.deep = nn.Conv1d(4, 4, 1), nn.Conv3d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.norm1d, self.norm3d = nn.BatchNorm1d(4), nn.BatchNorm3d(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = torch.relu(self.norms[0](self.conv(x)))
        x = self.norms[1](self.bare(x))
        twice = self.conv(x)
        return (
            torch.relu_(self.norm1d(self.thin(x.flatten(2)))),
            self.norms[2](twice) + twice,
            self.norm3d(self.deep(x[..., None])),
        )


class TransposedBn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose1d(4, 4, 2, bias=False)
        self.norm, self.norm1d = nn.BatchNorm2d(4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm1d(self.second(torch.relu(self.norm(self.first(x))).flatten(2)))


MODELS: dict[str, type[nn.Module]] = {
    model.__name__: model for model in (Linears, Convs, Transposed, Residual, ConvBn, TransposedBn)
}


def exported(model: nn.Module, *inputs: Any, train: bool = False) -> GraphModule:
    inputs = inputs or (torch.randn(2, 4, 8, 8) if not isinstance(model, Linears) else torch.randn(2, 4, 4),)
    return torch.export.export(model.train(train), inputs).module()
