"""Modes of exported graphs: what eval() and train() would have done to the model, done to its graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pt2e.graphs import call, calls, exported
from torch import Tensor, nn

from eagerq.errors import InvalidArgumentError, UnsupportedError
from eagerq.pt2e import (
    allow_exported_model_train_eval,
    disallow_exported_model_train_eval,
    model_is_exported,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from eagerq.pt2e.export_utils import WrapperModule

aten: Any = torch.ops.aten
X = torch.linspace(-2, 3, 2 * 3 * 4).reshape(2, 3, 4)


def f(function: Callable[..., Any], **options: Any) -> WrapperModule:
    return WrapperModule(lambda x: function(x, **options))


LAYERS = {
    "dropout": lambda: nn.Dropout(0.3),
    "dropout1d": lambda: nn.Dropout1d(0.3),
    "alpha_dropout": lambda: nn.AlphaDropout(0.3),
    "feature_alpha_dropout": lambda: nn.FeatureAlphaDropout(0.3),
    "rrelu": nn.RReLU,
    "batch_norm": lambda: nn.BatchNorm1d(3, eps=0.1, momentum=0.3),
    "batch_norm of the batch": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "instance_norm": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    "instance_norm of the batch": lambda: nn.InstanceNorm1d(3),
    "recurrent": lambda: nn.GRU(4, 4, num_layers=2, dropout=0.5),
}


def run(model: nn.Module) -> Tensor:
    torch.manual_seed(3)
    y = model(X.clone())
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights:UserWarning")  # of torch's export
@pytest.mark.parametrize("traced_in_training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_in_a_mode_is_the_model_in_that_mode(name: str, traced_in_training: bool) -> None:
    model = LAYERS[name]().train(traced_in_training)
    graph = exported(copy.deepcopy(model), X)
    for training in (True, False, True):
        move = move_exported_model_to_train if training else move_exported_model_to_eval
        assert move(graph) is graph
        model.train(training)
        torch.testing.assert_close(run(graph), run(model))
        assert graph.training is training
    state, wanted = graph.state_dict(), model.state_dict()
    for key in ("running_mean", "running_var"):
        if key in wanted:
            torch.testing.assert_close(state[key], wanted[key])


def test_evaluation_does_not_count_batches() -> None:
    model = nn.BatchNorm1d(3)
    graph = exported(model, X)
    run(graph)
    run(move_exported_model_to_eval(graph))
    assert graph.state_dict()["num_batches_tracked"] == 1
    run(move_exported_model_to_train(graph))
    assert graph.state_dict()["num_batches_tracked"] == 2


def test_decomposed_batch_norm() -> None:
    """Another form of the operator, with three results and, in evaluation, a name of its own."""
    model = nn.BatchNorm1d(3, eps=0.1, momentum=0.3).eval()
    graph = torch.export.export(copy.deepcopy(model), (X,)).run_decompositions({}).module()
    assert aten._native_batch_norm_legit_no_training.default in calls(graph)  # type: ignore[arg-type]
    torch.testing.assert_close(run(move_exported_model_to_train(graph)), run(model.train()))  # type: ignore[arg-type]
    torch.testing.assert_close(graph.state_dict()["running_var"], model.running_var)
    torch.testing.assert_close(run(move_exported_model_to_eval(graph)), run(model.eval()))  # type: ignore[arg-type]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.dropout(x), lambda x: -self.dropout(x), (x,))


def test_branches_of_a_condition() -> None:
    graph = exported(Branches(), X)
    assert torch.equal(run(move_exported_model_to_eval(graph)), X)
    assert (run(move_exported_model_to_train(graph)) == 0).any()


def test_the_rest_of_an_operator_stays() -> None:
    graph = exported(nn.Sequential(nn.BatchNorm1d(3, eps=0.5, momentum=0.25), nn.Dropout(0.125)), X)
    before = [node.args for node in graph.graph.nodes if node.op == "call_function"]
    move_exported_model_to_eval(graph)
    assert call(graph, aten.batch_norm.default).args[5:] == (False, 0.25, 0.5, *before[1][8:])
    assert call(graph, aten.dropout.default).args[1:] == (0.125, False)
    move_exported_model_to_train(graph)
    assert [node.args for node in graph.graph.nodes if node.op == "call_function"] == before


@pytest.mark.parametrize("function", [move_exported_model_to_eval, allow_exported_model_train_eval])
def test_a_model_that_is_no_graph(function: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"torch.nn.Linear: expected an exported graph"):
        function(nn.Linear(1, 1))


def test_what_is_refused_and_what_to_do_instead() -> None:
    graph = disallow_exported_model_train_eval(exported(nn.Dropout(), X))
    for same in (graph, copy.deepcopy(graph)):
        with pytest.raises(UnsupportedError, match=r"move_exported_model_to_train"):
            same.train()
        with pytest.raises(UnsupportedError, match=r"move_exported_model_to_eval"):
            same.train(False)
        with pytest.raises(UnsupportedError, match=r"move_exported_model_to_eval"):
            same.eval()


def test_allowing_lasts_in_copies_until_it_is_revoked() -> None:
    graph = allow_exported_model_train_eval(exported(nn.Dropout(), X))
    twin = copy.deepcopy(graph)
    assert twin.eval() is twin
    assert torch.equal(run(twin), X)
    assert (run(graph) == 0).any()
    assert torch.equal(run(graph.train(False)), X)
    assert (run(graph.train()) == 0).any()
    with pytest.raises(UnsupportedError):
        copy.deepcopy(disallow_exported_model_train_eval(graph)).eval()


def test_whether_a_model_was_exported() -> None:
    model = nn.Linear(4, 2)
    assert model_is_exported(exported(model, X))
    assert not model_is_exported(torch.fx.symbolic_trace(model))
    assert not model_is_exported(model)
