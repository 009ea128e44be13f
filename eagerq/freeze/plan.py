"""A recorded forward, and the same steps again without the Python between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from eagerq.qtensor import QTensor

__all__ = ["Plan", "Tape", "Unplannable"]

# they give numbers to Python, where they may decide which way a forward goes
_READING = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")


class Unplannable(Exception):
    """Why a forward cannot be repeated step by step."""


# --- what was done ------------------------------------------------------------------------------------


class _Step:
    """A call, and which of its arguments and results are tensors of the forward."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        self.function = function
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.results = pytree.tree_leaves(result)
        self.flat = (
            not kwargs
            and all(a is b for a, b in zip(args, self.leaves, strict=False))
            and (len(args) == len(self.leaves))
        )


class Tape(TorchDispatchMode):
    """Notes what torch's dispatcher and the C library are asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._within = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: what would keep torch's compiler off, which never meets a tape, loads it whole at the first step."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._within and func.name() in _READING:
            raise Unplannable(f"it reads a tensor's value ({func.name()}), on which what it does may depend")
        result = func(*args, **kwargs)
        if not self._within:
            self.steps.append(_Step(func, args, kwargs, result))
        return result

    def native(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A call of the C library."""
        self._within = True
        try:
            result = function.unrecorded(*args)  # type: ignore[attr-defined]
        finally:
            self._within = False
        if result is NotImplemented or result is None:
            return result
        if not isinstance(result, Tensor):
            raise Unplannable(f"what {function.__name__} gives depends on the values")
        self.steps.append(_Step(function, args, {}, result))
        return result


# --- how it is done again -----------------------------------------------------------------------------


class Plan:
    """The steps of a forward, bound to buffers of their own wherever C does the work."""

    def __init__(self, steps: list[_Step], inputs: list[Tensor], outputs: Any) -> None:
        leaves, self._form = pytree.tree_flatten(outputs)
        made = [*inputs, *(x for step in steps for x in step.results if isinstance(x, Tensor))]
        slots: dict[int, int] = {}
        for x in made:
            slots.setdefault(id(x), len(slots))
        self._inputs = [slots[id(x)] for x in inputs]
        # of a recorded tensor, by its id, as soon as it is there: before, it is a constant
        self._slots = {id(x): slots[id(x)] for x in inputs}
        self._all_slots = slots
        self._values: list[Any] = [None] * len(slots)
        self._buffers: dict[int, Tensor] = {}  # of slots that always lie in the same place
        self._alive: list[Any] = []  # what C reads by its address, and nothing that the forward made
        self._calls = list(self._bind(steps, leaves))
        self._fresh = list(self._values)
        reused = {_storage(step.results[0]) for step in steps if _binding(step)}
        self._leaves = [self._leaf(leaf, reused) for leaf in leaves]
        del self._slots, self._all_slots  # ids mean nothing any more

    def _leaf(self, leaf: Any, reused: set[int]) -> tuple[int | None, Any]:
        """The slot of an output, and what makes it of the tensor there; or None and the output itself."""
        integers = leaf.integers if isinstance(leaf, QTensor) else leaf
        slot = self._slots.get(id(integers)) if isinstance(integers, Tensor) else None
        if slot is None:
            return None, leaf
        own = torch.clone if _storage(integers) in reused else _itself  # the next forward writes there
        if isinstance(leaf, QTensor):
            scale, zero_point, axis = leaf.scale, leaf.zero_point, leaf.axis
            return slot, lambda x: QTensor(own(x), scale, zero_point, axis)
        return slot, own

    def _bind(self, steps: list[_Step], outputs: list[Any]) -> Iterator[Callable[[], Any]]:
        last = self._last_uses(steps, outputs)
        free: list[Tensor] = []
        held: dict[int, Tensor] = {}
        for number, step in enumerate(steps):
            binding = _binding(step)
            if binding is None:
                yield self._repeat(step)
            else:
                (result,) = step.results
                place = _storage(result)
                held[place] = _room(result, free)
                slot = self._all_slots[id(result)]
                self._values[slot] = self._buffers[slot] = _laid_out_as(result, held[place])
                yield self._call(step, binding, self._values[slot])
            self._slots.update((id(x), self._all_slots[id(x)]) for x in step.results if isinstance(x, Tensor))
            for place in [place for place in held if last.get(place, number) <= number]:
                free.append(held.pop(place))

    def _last_uses(self, steps: list[_Step], outputs: list[Any]) -> dict[int, int]:
        """For each piece of memory, the last step that touches it; what is given out is never reused."""
        last: dict[int, int] = {}
        for number, step in enumerate(steps):
            for x in chain(step.leaves, step.results):
                if isinstance(x, Tensor):
                    last[_storage(x)] = number
        for leaf in outputs:
            if isinstance(leaf, Tensor):
                last[_storage(leaf.integers if isinstance(leaf, QTensor) else leaf)] = len(steps)
        return last

    def _call(self, step: _Step, binding: Callable[..., Any], out: Tensor) -> Callable[[], Any]:
        """The C function itself on addresses, which are known beforehand but for tensors that torch makes anew."""
        read, function, rest = binding(*pytree.tree_unflatten(step.leaves, step.spec)[0])
        rest = (out.data_ptr(), *rest)
        self._alive += [leaf for leaf in step.leaves if id(leaf) not in self._slots]
        slots = [self._slots.get(id(x), -1) for x in read]
        # a tensor of the model's own has no slot
        fixed = [x if slot < 0 else self._buffers.get(slot) for x, slot in zip(read, slots, strict=True)]
        known = [x.data_ptr() for x in fixed if x is not None]
        if len(known) == len(fixed):
            return partial(function, *known, *rest)
        values = self._values

        def call() -> None:
            here = (values[slot] if x is None else x for x, slot in zip(fixed, slots, strict=True))
            function(*(x.data_ptr() for x in here), *rest)

        return call

    def _repeat(self, step: _Step) -> Callable[[], Any]:
        """The step's own function on what is there then."""
        taken = [(i, self._slots[id(x)]) for i, x in enumerate(step.leaves) if id(x) in self._slots]
        given = [(i, self._all_slots[id(x)]) for i, x in enumerate(step.results) if isinstance(x, Tensor)]
        function, spec, values, leaves, flat = step.function, step.spec, self._values, list(step.leaves), step.flat
        for i, _ in taken:
            leaves[i] = None

        def call() -> None:
            here = list(leaves)
            for i, slot in taken:
                here[i] = values[slot]
            if flat:
                result = function(*here)
            else:
                args, kwargs = pytree.tree_unflatten(here, spec)
                result = function(*args, **kwargs)
            if isinstance(result, Tensor):
                values[given[0][1]] = result
                return
            results = pytree.tree_leaves(result)
            for i, slot in given:
                values[slot] = results[i]

        return call

    def run(self, inputs: list[Tensor]) -> Any:
        """What the forward gives for inputs of the shapes that it was recorded with."""
        values = self._values
        try:
            for slot, x in zip(self._inputs, inputs, strict=True):
                values[slot] = x
            for call in self._calls:
                call()
            given = [make if slot is None else make(values[slot]) for slot, make in self._leaves]
        finally:
            values[:] = self._fresh
        return pytree.tree_unflatten(given, self._form)


def _itself(x: Tensor) -> Tensor:
    return x


def _binding(step: _Step) -> Callable[..., Any] | None:
    found: Callable[..., Any] | None = getattr(step.function, "binding", None)
    return found


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else -id(x)  # a packed weight has none


def _room(x: Tensor, free: list[Tensor]) -> Tensor:
    """The least of the free pieces of memory that has room for ``x``, or a new one."""
    size = max(x.numel() * x.element_size(), 1)
    fitting = [number for number, piece in enumerate(free) if piece.numel() >= size]
    if fitting:
        return free.pop(min(fitting, key=lambda number: free[number].numel()))
    return torch.empty(size + -size % 64, dtype=torch.uint8)  # of whole elements, whatever they are


def _laid_out_as(x: Tensor, memory: Tensor) -> Tensor:
    return memory.view(x.dtype).as_strided(x.shape, x.stride())
