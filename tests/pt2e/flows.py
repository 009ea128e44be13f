"""The same quantization by eagerq's graph flow and by torchao's, from one description."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from types import ModuleType
from typing import Any

import pytest
import torch
from pt2e.graphs import peer
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import eagerq.pt2e.quantize_pt2e
import eagerq.pt2e.quantizer

aten = torch.ops.aten
ops = torch.ops.quantized_decomposed


@dataclass(frozen=True)
class Flow:
    """A library's classes of annotations, its observers, and its two steps."""

    quantizer: ModuleType
    observers: ModuleType
    steps: ModuleType

    def spec(self, dtype: torch.dtype, observer: str, low: int, high: int, scheme: Any, /, **more: Any) -> Any:
        """A specification with one of the library's own observers; ``eps`` and the like go to the observer."""
        fields = {name: more.pop(name) for name in ("ch_axis", "is_dynamic") if name in more}
        constructor = getattr(self.observers, observer)
        constructor = constructor.with_args(**more) if more else constructor
        return self.quantizer.QuantizationSpec(dtype, constructor, low, high, scheme, **fields)

    def annotate(self, node: Node, inputs: dict[Any, Any], output: Any = None, **more: Any) -> None:
        annotation = self.quantizer.QuantizationAnnotation(input_qspec_map=inputs, output_qspec=output, **more)
        node.meta["quantization_annotation"] = annotation

    def shared(self, place: Any) -> Any:
        return self.quantizer.SharedQuantizationSpec(place)

    def made(self, annotate: Callable[[Flow, GraphModule], None], transform: Any = None) -> Any:
        """A quantizer that annotates so."""
        flow = self

        class Made(flow.quantizer.Quantizer):  # type: ignore[name-defined, misc]
            def transform_for_annotation(self, model: GraphModule) -> GraphModule:
                return transform(model) if transform is not None else model  # type: ignore[no-any-return]

            def annotate(self, model: GraphModule) -> GraphModule:
                annotate(flow, model)
                return model

            def validate(self, model: GraphModule) -> None:
                pass

        return Made()


EAGERQ = Flow(eagerq.pt2e.quantizer, eagerq.pt2e, eagerq.pt2e.quantize_pt2e)


@contextmanager
def quiet() -> Iterator[None]:
    """torchao says things about torch, and torch about torchao."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def torchao_flow() -> Flow:
    with quiet():
        peer("torchao.quantization.pt2e")
        import torchao.quantization.pt2e as pt2e
        from torchao.quantization.pt2e import quantize_pt2e, quantizer
    return Flow(quantizer, pt2e, quantize_pt2e)


def exported(net: nn.Module, *inputs: Tensor, **more: Any) -> GraphModule:
    return torch.export.export(net.eval(), inputs, **more).module()  # type: ignore[no-any-return]


def listing(model: GraphModule) -> list[Any]:
    """Every node in order: what it does, its arguments by position, and tensors that it reads by value."""
    number = {node: index for index, node in enumerate(model.graph.nodes)}
    lines = []
    for node in model.graph.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: f"%{number[source]}")
        line: list[Any] = [node.op, str(args)]
        if node.op == "get_attr":
            value = attrgetter(node.target)(model)
            line.append((value.dtype, value.tolist()))
        elif node.op == "call_function" or node.op == "call_module":
            line.append(node.target)
        lines.append(line)
    return lines
