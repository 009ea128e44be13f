"""Small networks with every pattern that the quantizers know, and what a quantizer has said of a graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

KEY = "quantization_annotation"


class Linears(nn.Module):
    """Linear alone, with ReLU in place and not, with ReLU and another user, of one weight twice, after dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
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
        self.thin, self.deep = nn.Conv1d(4, 4, 1), nn.Conv3d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.depthwise(torch.relu(self.plain(x)))
        x = F.max_pool2d(self.grouped(x), 2)
        return self.plain(x), torch.relu(self.thin(x.flatten(2))), self.deep(x[..., None])


class Transposed(nn.Module):
    """Transposed convolutions, some in groups; ReLU that something else uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.relu = nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.grouped, self.thin = nn.ConvTranspose2d(4, 4, 2, groups=2), nn.ConvTranspose1d(4, 4, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.plain(torch.relu(self.relu(x)))
        y = self.grouped(x)
        return self.thin((torch.relu(y) * y).flatten(2)), torch.relu(self.grouped(y))


class Residual(nn.Module):
    """Sums and products of tensors and numbers, with ReLU or without, of integers, of huge numbers; cat; pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.pools = nn.ModuleList(nn.AdaptiveAvgPool2d(size) for size in (4, 2, 1))

    def forward(self, x: Tensor) -> Any:
        left, right = self.left(x), torch.relu(self.right(x))
        total = torch.relu(left + right)
        product = torch.relu(total * left) * 2
        product += x
        both = torch.cat([x.permute(0, 1, 3, 2), product.reshape(2, 4, 8, 8), total, x], dim=1)
        huge = torch.relu(x * 1e20) + x
        counted = (x > 0).long() + (x > 1).long()
        pooled = self.pools[1](self.pools[0](both))
        return pooled.view(pooled.size(0), -1) + x.amax(), self.pools[2](x), huge, counted


class ConvBN(nn.Module):
    """Convolutions that BatchNorm and perhaps ReLU follow, with bias and without; one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bare = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.thin, self.deep = nn.Conv1d(4, 4, 1), nn.Conv3d(4, 4, 1)
        self.norm, self.bare_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.norm1d, self.norm3d = nn.BatchNorm1d(4), nn.BatchNorm3d(4)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.norm(self.conv(x)))
        x = self.bare_norm(self.bare(x))
        twice = self.conv(x)
        thin = torch.relu_(self.norm1d(self.thin(x.flatten(2))))
        return thin, self.norm(twice) + twice, self.norm3d(self.deep(x[..., None]))


class TransposedBN(nn.Module):
    """Transposed convolutions that BatchNorm and perhaps ReLU follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose1d(4, 4, 2, bias=False)
        self.norm, self.norm1d = nn.BatchNorm2d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        return self.norm1d(self.second(torch.relu(self.norm(self.first(x))).flatten(2)))


class All(nn.Module):
    """All of the above beside each other."""

    def __init__(self) -> None:
        super().__init__()
        kinds: tuple[type[nn.Module], ...] = (Linears, Convs, Transposed, Residual, ConvBN, TransposedBN)
        self.parts = nn.ModuleList(kind() for kind in kinds)

    def forward(self, flat: Tensor, *images: Tensor) -> Any:
        return [part(x) for part, x in zip(self.parts, (flat, *images), strict=True)]


ALL_INPUTS = (torch.zeros(2, 4, 4), *(torch.zeros(2, 4, 8, 8) for _ in range(5)))


def said(model: GraphModule) -> dict[str, tuple[Any, ...]]:
    """A quantizer's annotations in plain values: node to specifications of inputs, of the output, and the flags."""
    annotations = {node.name: node.meta[KEY] for node in model.graph.nodes if node.meta.get(KEY) is not None}
    return {
        name: (
            {source.name: plain(spec) for source, spec in annotation.input_qspec_map.items()},
            plain(annotation.output_qspec),
            annotation._annotated,
            annotation.allow_implicit_sharing,
        )
        for name, annotation in annotations.items()
    }


def plain(spec: Any) -> Any:
    """A specification by its attributes, with its observer by name and arguments; a shared one by its place."""
    if spec is None:
        return None
    if hasattr(spec, "edge_or_node"):
        return str(spec.edge_or_node)
    return {**vars(spec), "observer_or_fake_quant_ctr": _constructor(spec.observer_or_fake_quant_ctr)}


def _constructor(made: Any) -> Any:
    if isinstance(made, type):
        return made.__name__
    if not hasattr(made, "p"):
        return made
    return made.p.func.__name__, {name: _constructor(value) for name, value in made.p.keywords.items()}
