"""From annotations to observers: what a quantizer said of a graph is put into it as modules that look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from eagerq.errors import EagerqError, InvalidConfigError
from eagerq.fake_quantize import FixedQParamsFakeQuantize
from eagerq.observer import FixedQParamsObserver
from eagerq.pt2e.derived import DerivedObserverOrFakeQuantize
from eagerq.pt2e.graph import writes_buffer
from eagerq.pt2e.quantizer.quantizer import ANNOTATION, EdgeOrNode
from eagerq.pt2e.rewriting import Names
from eagerq.pt2e.sharing import Specs, describe_place, groups_of, own_specs, specs_of
from eagerq.scheme import is_per_channel

__all__ = ["insert_observers", "observers_of"]

Observers = dict[EdgeOrNode, Any]


def insert_observers(
    model: GraphModule, is_qat: bool, callback: Callable[[GraphModule, Observers], None] | None = None
) -> None:
    """Put an observer or fake quantizer wherever the graph's annotations want one; changes ``model``.

    Args:
        model: annotated; its nodes call ``activation_post_process_0`` and so on afterwards.
        is_qat: make fake quantizers of fixed parameters instead of observers.
        callback: gets the model and each annotated place's observer before any is put in.

    Raises:
        InvalidConfigError: for an annotation that cannot be followed; nothing has been changed then.
    """
    observers = observers_of(model, is_qat)
    if callback is not None:
        callback(model, observers)
    _Insertion(model, observers).run()
    model.recompile()


def observers_of(model: GraphModule, is_qat: bool) -> Observers:
    """The observer of each annotated place, or None where it stays float; places of a group have the same."""
    specs = specs_of(model.graph)
    making = _Making(specs, is_qat)
    return {place: making.observer(place) for place in specs}


class _Making:
    """Makes one observer for each group, those that others derive from first."""

    def __init__(self, specs: Specs, is_qat: bool) -> None:
        self.own, self.is_qat = own_specs(specs), is_qat
        self.group_of = {place: index for index, group in enumerate(groups_of(specs, self.own)) for place in group}
        self.first = {index: place for place, index in reversed(self.group_of.items())}
        self.made: dict[int, Any] = {}
        self.under_way: set[int] = set()

    def observer(self, place: EdgeOrNode) -> Any:
        group = self.group_of[place]
        if group not in self.made:
            if group in self.under_way:
                raise InvalidConfigError(
                    f"the parameters of {describe_place(place)} are derived from themselves",
                    remedy="let derived_from name places with specifications of their own",
                )
            self.under_way.add(group)
            self.made[group] = self._make(self.first[group])
        return self.made[group]

    def _make(self, place: EdgeOrNode) -> Any:
        spec = self.own[place]
        if spec is None:
            return None
        try:
            if hasattr(spec, "derived_from"):
                return self._derived(place, spec)
            return _fixed(spec, self.is_qat) if hasattr(spec, "scale") else _own(spec)
        except (EagerqError, TypeError, AttributeError) as error:
            raise InvalidConfigError(
                f"no observer can be made for {describe_place(place)} from {spec}: {error}",
                remedy="correct the specification that the quantizer gave it",
            ) from error

    def _derived(self, place: EdgeOrNode, spec: Any) -> Any:
        sources = []
        for source in spec.derived_from:
            observer = self.observer(source) if source in self.own else None
            if observer is None:
                raise InvalidConfigError(
                    f"the parameters of {describe_place(place)} are derived from {describe_place(source)}, "
                    "which has no observer",
                    remedy="annotate that place too",
                )
            sources.append(observer)
        arguments = _arguments(spec, without=("derived_from", "is_dynamic"))
        return DerivedObserverOrFakeQuantize(obs_or_fqs=sources, **arguments)


def _arguments(spec: Any, without: tuple[str, ...]) -> dict[str, Any]:
    """What the specification says, as arguments; what it leaves open is left to the constructor."""
    names = [field.name for field in fields(spec)] if is_dataclass(spec) else list(vars(spec))
    return {name: value for name in names if name not in without and (value := getattr(spec, name)) is not None}


def _fixed(spec: Any, is_qat: bool) -> nn.Module:
    observer = FixedQParamsObserver.with_args(**_arguments(spec, without=()))
    return FixedQParamsFakeQuantize(observer=observer) if is_qat else observer()


def _own(spec: Any) -> Any:
    constructor = spec.observer_or_fake_quant_ctr
    by_channel = is_per_channel(getattr(spec, "qscheme", None)) or "PerChannel" in _class_name(constructor)
    without = ("observer_or_fake_quant_ctr", *(() if by_channel else ("ch_axis",)))
    return constructor(**_arguments(spec, without))


def _class_name(constructor: Any) -> str:
    """Of the class behind ``with_args``."""
    while (inner := getattr(constructor, "p", getattr(constructor, "func", None))) is not None:
        constructor = inner
    return getattr(constructor, "__name__", "")


class _Insertion:
    """Puts observers into a graph, node by node in its order."""

    def __init__(self, model: GraphModule, observers: Observers) -> None:
        self.model, self.observers = model, observers
        self.names = Names(model)
        self.inserted: dict[tuple[Node, int], Node] = {}  # by what is observed, and the observer
        self.observing: set[Node] = set()
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        self.device = devices.pop() if len(devices) == 1 else None

    def run(self) -> None:
        for node in list(self.model.graph.nodes):
            if node.meta.get(ANNOTATION) is not None:
                self._observe_inputs(node)
                self._observe_output(node)

    def _observe_inputs(self, node: Node) -> None:
        def observed(source: Node) -> Node:
            return self._observed(source, node)

        node.args = map_arg(node.args, observed)
        node.kwargs = map_arg(node.kwargs, observed)

    def _observed(self, source: Node, consumer: Node) -> Node:
        """What the consumer shall read instead of the source: an observer of it, or the source itself."""
        producer = source
        while producer in self.observing:
            producer = producer.all_input_nodes[0]
        observer = self.observers.get((producer, consumer))
        if observer is None or self.observers.get(producer) is observer or writes_buffer(consumer, producer):
            return source
        return self.inserted.get((source, id(observer))) or self._insert(source, producer, observer)

    def _observe_output(self, node: Node) -> None:
        observer = self.observers.get(node)
        if observer is None or not isinstance(node.meta.get("val"), Tensor):
            return
        users = list(node.users)
        inserted = self._insert(node, node, observer)
        for user in users:
            user.replace_input_with(node, inserted)

    def _insert(self, source: Node, producer: Node, observer: nn.Module) -> Node:
        # a model may have been moved since it was exported: the graph still says where it was
        value = producer.meta.get("val")
        device = value.device if self.device is None and isinstance(value, Tensor) else self.device
        if device is not None:
            observer.to(device)
        name = self.names.new("activation_post_process_")
        self.model.add_module(name, observer)
        with self.model.graph.inserting_after(source):
            inserted = self.model.graph.call_module(name, (source,))
        self.inserted[source, id(observer)] = inserted
        self.observing.add(inserted)
        return inserted
