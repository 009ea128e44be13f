"""Batch norms folded into the layers before them: the numbers stay, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pt2e.graphs import calls, exported
from torch import Tensor, nn
from torch.fx import GraphModule

from eagerq.pt2e.conv_bn import fold_batch_norms

aten: Any = torch.ops.aten
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def random_norm(norm: Any) -> Any:
    """Statistics that a forgotten term of the formula would show in."""
    for tensor in (norm.running_mean, norm.bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    for tensor in (norm.running_var, norm.weight):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 2)
    return norm


def check(model: nn.Module, x: Tensor, left: list[Any]) -> GraphModule:
    """Fold, and see that the outputs are the model's at another batch size and the operators ``left``."""
    graph = exported(model.eval(), x, dynamic=True)
    folded = fold_batch_norms(graph)
    assert folded is graph
    assert calls(graph) == left
    x = torch.cat([x, torch.randn_like(x)])
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-6)
    graph.graph.lint()
    return graph


CASES = [
    (kind, dims, bias) for kind in ("conv", "grouped", "transposed") for dims in (1, 2, 3) for bias in (True, False)
]


@pytest.mark.parametrize(("kind", "dims", "bias"), CASES)
def test_convolutions(kind: str, dims: int, bias: bool) -> None:
    transposed, groups = kind == "transposed", 1 if kind == "conv" else 2
    layers = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    conv = layers[dims - 1](4, 6, 3, padding=1, stride=2, groups=groups, bias=bias)  # type: ignore[operator]
    model = nn.Sequential(conv, random_norm(NORMS[dims - 1](6, eps=0.1)))
    target = conv.__class__.__name__
    operator = {
        "ConvTranspose1d": aten.conv_transpose1d.default,
        "ConvTranspose2d": aten.conv_transpose2d.input,
        "ConvTranspose3d": aten.conv_transpose3d.input,
    }.get(target, getattr(aten, f"conv{dims}d").default)
    graph = check(model, torch.randn(3, 4, *[5] * dims), [operator])
    # strides and all, and the weight under its name
    (node,) = [node for node in graph.graph.nodes if node.target is operator]
    assert node.args[1].target == "0.weight"
    assert node.args[2].target == "0.bias"


@pytest.mark.parametrize("affine", [True, False])
def test_same_padding_and_no_affine(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"), random_norm(nn.BatchNorm2d(3, affine=affine)), nn.ReLU())
    check(model, torch.randn(3, 2, 5, 5), [aten.conv2d.padding, aten.relu.default])


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=bias), random_norm(nn.BatchNorm1d(3)))
    check(model, torch.randn(3, 4), [aten.linear.default])


def test_linear_whose_features_are_not_the_channels() -> None:
    model = nn.Sequential(nn.Linear(4, 3), random_norm(nn.BatchNorm1d(3)))
    check(model, torch.randn(2, 3, 4), [aten.linear.default, aten.batch_norm.default])


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("table", [None, {}])
def test_decomposed_forms(layer: Any, table: Any) -> None:
    model = nn.Sequential(layer(2, 4, 2, groups=2), random_norm(nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 2, 4, 4)
    graph: Any = torch.export.export(model, (x,)).run_decompositions(table).module()
    assert aten._native_batch_norm_legit_no_training.default in calls(graph)
    conv, *_ = calls(graph)
    assert (conv is aten.convolution.default) is (table is None)
    assert calls(fold_batch_norms(graph)) == [conv]
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """One convolution called twice, with one batch norm or with two."""

    def __init__(self, norms: int, other_user: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norms = nn.ModuleList(random_norm(nn.BatchNorm2d(2)) for _ in range(norms))
        self.other_user = other_user

    def forward(self, x: Tensor) -> Any:
        y = self.norms[0](self.conv(x))
        z = self.norms[-1](self.conv(y))
        return z + self.conv.weight.sum() + self.conv(x) if self.other_user else z


@pytest.mark.parametrize(("norms", "other_user", "weights"), [(1, False, 1), (2, False, 2), (1, True, 2), (2, True, 3)])
def test_shared_weights(norms: int, other_user: bool, weights: int) -> None:
    """Folded for each batch norm, never twice; those that others read stay."""
    rest = [aten.sum.default, aten.add.Tensor, aten.conv2d.default, aten.add.Tensor] if other_user else []
    graph = check(Twice(norms, other_user), torch.randn(2, 2, 3, 3), [aten.conv2d.default] * 2 + rest)
    read = [node.args[1].target for node in graph.graph.nodes if node.target is aten.conv2d.default]
    assert len(set(read)) == weights
    assert "conv.weight" in read


class Branching(nn.Module):
    """A convolution whose result something else uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 1), random_norm(nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y) + y


class Computed(nn.Module):
    """A convolution whose weight is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bn = nn.Parameter(torch.randn(2, 2, 1, 1)), random_norm(nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Any:
        return self.bn(nn.functional.conv2d(x, self.weight * 2))


def test_what_is_left_alone() -> None:
    x = torch.randn(2, 2, 3, 3)
    check(Branching(), x, [aten.conv2d.default, aten.batch_norm.default, aten.add.Tensor])
    check(Computed(), x, [aten.mul.Tensor, aten.conv2d.default, aten.batch_norm.default])
    batch = nn.BatchNorm2d(2, track_running_stats=False)
    check(nn.Sequential(nn.Conv2d(2, 2, 1), batch), x, [aten.conv2d.default, aten.batch_norm.default])


def test_training_batch_norms_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    x = torch.randn(2, 2, 3, 3)
    graph = exported(copy.deepcopy(model), x)
    before = calls(graph)
    assert calls(fold_batch_norms(graph)) == before
    torch.testing.assert_close(graph(x), model(x))


def test_metadata_and_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), random_norm(nn.BatchNorm2d(2))).eval()
    graph = exported(model, torch.randn(2, 2, 3, 3))
    nodes = {node.target: node for node in graph.graph.nodes}
    nodes[aten.conv2d.default].meta["quantization_tag"] = "mine"
    before = dict(nodes[aten.conv2d.default].meta)
    fold_batch_norms(graph)
    assert nodes[aten.conv2d.default].meta == before
    weight, bias = nodes[aten.conv2d.default].args[1:3]
    assert weight.meta["val"].shape == (2, 2, 1, 1)
    assert bias.meta["val"].shape == (2,)
    parameters = dict(graph.named_parameters())
    assert parameters[weight.target].requires_grad
    assert parameters[bias.target].requires_grad
