"""A converted model that repeats its forward for the shapes seen."""

from __future__ import annotations

import threading
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global
from torch.utils import _pytree as pytree

from eagerq import native
from eagerq.errors import InvalidArgumentError, UnsupportedError
from eagerq.freeze.plan import Plan, Tape, Unplannable
from eagerq.freeze.weights import give_up_weights, take_back_weights
from eagerq.qtensor import QTensor
from eagerq.quantize.converting import RunWarnings

__all__ = ["Frozen", "freeze"]

_PLAIN = (bool, int, float, str, type(None))
_GLOBAL_HOOKS = (_global._global_forward_hooks, _global._global_forward_pre_hooks)


class _Guard:
    """Tells whether a model is as it was: its parts, its tensors, its outputs' parameters, no hooks."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        # what dict itself tells: a look at the buffers' own methods would bring back weights given up
        tables: list[dict[str, Any]] = [table for m in modules for table in (m._parameters, m._buffers, m._modules)]
        self._tables = [table for table in tables if dict.__len__(table)]
        self._owners = [m for m in modules if "_output" in m.__dict__]
        hooks = [*_GLOBAL_HOOKS, *(h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks))]
        self._warned = [h for h in hooks if len(h) == 1 and isinstance(next(iter(h.values())), RunWarnings)]
        self._hooks = [h for h in hooks if not any(h is one for one in self._warned)]
        values = chain.from_iterable(map(dict.values, self._tables))
        self._tensors = [x for x in values if isinstance(x, Tensor) and not x.is_inference()]
        self._known = self._look()

    def _look(self) -> tuple[Any, ...]:
        return (
            list(map(id, chain.from_iterable(map(dict.values, self._tables)))),
            list(map(attrgetter("_version"), self._tensors)),
            list(map(attrgetter("_output"), self._owners)),
        )

    def holds(self) -> bool:
        alone = not any(self._hooks) and all(len(h) == 1 for h in self._warned)
        return alone and self._look() == self._known


class Frozen(nn.Module):
    """A converted model that repeats planned forwards; :func:`freeze` makes it.

    Attributes:
        model: the converted model, which computes whatever is not planned.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._wanted: set[Any] = set()
        self._start()
        self.training = False

    def _start(self) -> None:
        self._plans: dict[Any, tuple[_Guard, Plan] | None] = {}
        self._pieces: list[Tensor] = []  # memory of all plans
        self._to_pack = False
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_plans"], state["_pieces"], state["_to_pack"], state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        key = None if kwargs or torch.compiler.is_compiling() or self.model.training else _key(args)
        if key not in self._wanted or not self._lock.acquire(blocking=False):
            return self.model(*args, **kwargs)
        try:
            plan = self._plan(key, args)
            if plan is None:
                return self.model(*args)
            return plan.run(_tensors(args))
        finally:
            self._lock.release()

    def _plan(self, key: Any, args: tuple[Any, ...]) -> Plan | None:
        """The plan for such arguments, made anew where the model has changed; None where there can be none."""
        known = self._plans.get(key)
        if known is not None and known[0].holds():
            return known[1]
        if key in self._plans and known is None:
            return None
        del known  # guards hold weights
        plan = self._planned_anew(key, args)
        if self._to_pack and not self._awaited():
            self._pack()
        return plan

    def _planned_anew(self, key: Any, args: tuple[Any, ...]) -> Plan | None:
        take_back_weights(self.model)  # planning looks at them, and the guard is to hold after it
        guard = _Guard(self.model)
        if not guard.holds():
            return None
        try:
            plan = _planned(self.model, args, self._pieces)
        except Unplannable:
            self._plans[key] = None
            return None
        self._plans[key] = guard, plan
        return plan

    def add(self, example_inputs: tuple[Any, ...]) -> None:
        """Plan the forward for one more form of its arguments.

        Raises:
            InvalidArgumentError: for arguments that are neither tensors nor plain values.
            UnsupportedError: where the forward cannot be repeated step by step.
        """
        key = _key(example_inputs)
        if key is None:
            raise InvalidArgumentError(
                "example_inputs holds something else than tensors on the CPU, numbers, strings and None",
                module=self.model,
                remedy="pass a tuple of what the model is called with, by position",
            )
        try:
            with self._lock:
                take_back_weights(self.model)
                self._plans[key] = _Guard(self.model), _planned(self.model, example_inputs, self._pieces)
        except Unplannable as error:
            raise UnsupportedError(
                f"its forward cannot be planned: {error}",
                module=self.model,
                remedy="freeze the parts of it that can be, or use the converted model itself",
            ) from error
        self._wanted.add(key)

    def pack_weights(self) -> int:
        """Keep of each int8 weight only the packed form that the plans read, and give up the plain one.

        Whoever looks at the weights of ``model``, by its ``state_dict`` or buffers, by copying, moving, compiling or
        calling it, has them made again, bit for bit, and they stay; so does a call that no plan serves, and
        :meth:`add`. A weight that anybody else holds is not given up.

        Plans made before a change of the model, such as ``load_state_dict``, read what is there no more: where there
        are such, the weights are given up (again) as soon as calls have made all plans anew.

        Returns:
            The bytes given up now.

        Example:
            >>> import eagerq
            >>> model = eagerq.QuantWrapper(nn.Conv2d(3, 8, 3)).eval()
            >>> model.qconfig = eagerq.get_default_qconfig("onednn")
            >>> x = torch.randn(1, 3, 16, 16)
            >>> prepared = eagerq.prepare(model)
            >>> _ = prepared(x)
            >>> frozen = freeze(eagerq.convert(prepared), (x,))
            >>> before = frozen(x)
            >>> _ = frozen.pack_weights()
            >>> torch.equal(frozen(x), before)
            True
        """
        with self._lock:
            return self._pack()

    def _awaited(self) -> set[Any]:
        """The forms of arguments whose plans are to be made anew."""
        return {key for key in self._wanted if key not in self._plans or not _stands(self._plans[key])}

    def _pack(self) -> int:
        awaited = self._awaited()
        holding = {key: known[1] for key, known in self._plans.items() if known is not None and key not in awaited}
        self._plans = {key: None for key, known in self._plans.items() if known is None}  # guards hold weights
        self._to_pack = bool(awaited)
        given_up = give_up_weights(self.model) if holding else 0
        self._plans |= {key: (_Guard(self.model), plan) for key, plan in holding.items()}
        return given_up


def _stands(known: tuple[_Guard, Plan] | None) -> bool:
    """Whether a plan serves yet, or there can be none."""
    return known is None or known[0].holds()


def _look(x: Any) -> Any:
    """What a plan depends on in an argument."""
    if type(x) is QTensor and x.axis is None:
        return (x.scale, x.zero_point, _look(x.integers))
    if (
        type(x) is Tensor
        and x.layout is torch.strided
        and x.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    ):
        return (x.dtype, x.shape, x.stride(), x.requires_grad and torch.is_grad_enabled())
    return (type(x), x) if isinstance(x, _PLAIN) else None


def _key(args: tuple[Any, ...]) -> Any:
    looks = tuple(map(_look, args))
    return None if None in looks else looks


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [x.integers if isinstance(x, QTensor) else x for x in args if isinstance(x, Tensor)]


def _planned(model: nn.Module, args: tuple[Any, ...], pieces: list[Tensor]) -> Plan:
    inputs = _tensors(args)
    if len(set(map(id, inputs))) < len(inputs):
        raise Unplannable("it is given the same tensor twice")
    with torch.inference_mode(False), torch.no_grad():
        model(*args)  # so that weights are packed
        tape = Tape()
        with native.recording(tape.native), tape:
            outputs = model(*args)
        plan = Plan(tape.steps, inputs, outputs, pieces)
        for others in (args, tuple(map(_changed, args))):  # what the tape did not see comes out here
            if not _equal(plan.run(_tensors(others)), model(*others)):
                raise Unplannable("repeated step by step, it gives something else; it may do more than torch can see")
    return plan


def _changed(x: Any) -> Any:
    """Other values of the same kind."""
    if isinstance(x, QTensor):
        return x.like(_changed(x.integers))
    if not isinstance(x, Tensor):
        return x
    other = x.flip(tuple(range(x.dim())))
    if x.is_floating_point():
        other = other * -0.75
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(other)


def _equal(a: Any, b: Any) -> bool:
    some, others = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(some) == len(others) and all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) if type(x) is type(y) is Tensor else _same(x, y)
        for x, y in zip(some, others, strict=True)
    )


def _same(x: Any, y: Any) -> bool:
    return torch.equal(x, y) if isinstance(x, QTensor) and isinstance(y, QTensor) else bool(x == y)


def freeze(model: nn.Module, example_inputs: tuple[Any, ...]) -> Frozen:
    """A converted model that repeats its forward, for inputs such as these, without the Python between the steps.

    The forward runs once, and what torch and eagerq's kernels do in it is kept as a plan: a list of calls on memory
    that is laid out beforehand.  The plan gives the very numbers of ``model``.  Other shapes, dtypes and
    devices, models with hooks, ``torch.compile`` and ``torch.export`` go through ``model`` as ever; after
    ``load_state_dict`` and the like the plan is made anew.  What a forward does in Python (printing, counting) is
    not repeated: debug ``model`` itself.

    Args:
        model: of int8 modules, in eval mode; not copied.
        example_inputs: a tuple of what ``model`` is called with, by position.

    Returns:
        A module with ``model`` in it.

    Raises:
        InvalidArgumentError: for a model in training mode, or arguments that are not tensors or plain values.
        UnsupportedError: where the forward depends on its tensors' values, or does more than can be repeated.

    Example:
        >>> import eagerq
        >>> model = eagerq.QuantWrapper(nn.Conv2d(3, 8, 3)).eval()
        >>> model.qconfig = eagerq.get_default_qconfig("onednn")
        >>> x = torch.randn(1, 3, 16, 16)
        >>> prepared = eagerq.prepare(model)
        >>> _ = prepared(x)
        >>> converted = eagerq.convert(prepared)
        >>> frozen = freeze(converted, (x,))
        >>> torch.equal(frozen(x), converted(x))
        True
    """
    if model.training:
        raise InvalidArgumentError(
            "the model is in training mode", module=model, remedy="call model.eval(), and convert it first"
        )
    frozen = Frozen(model)
    frozen.add(tuple(example_inputs))
    return frozen
