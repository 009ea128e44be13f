"""A recorded forward, and the same steps again without the Python between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from eagerq import native
from eagerq.freeze.program import Group, Memory, Program, groups, storage
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

    def bound(self) -> native.Bound | None:
        """The call of the C library that this step is, if it is one."""
        binding = getattr(self.function, "binding", None)
        told: native.Bound | None = None
        if binding is not None:
            told = binding(*pytree.tree_unflatten(self.leaves, self.spec)[0])
        return told


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
    """The steps of a forward, bound to buffers wherever C does the work.

    Args:
        steps, inputs, outputs: as recorded.
        pieces: memory for buffers, shared with plans that never run at the same time; missing pieces are added.
    """

    def __init__(self, steps: list[_Step], inputs: list[Tensor], outputs: Any, pieces: list[Tensor]) -> None:
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
        self._pieces = pieces
        self._alive: list[Any] = []  # what C reads by its address, and nothing that the forward made
        self._calls = list(self._bind(steps, leaves))
        self._fresh = list(self._values)
        results = (x for step in steps for x in step.results if isinstance(x, Tensor))
        reused = {storage(x) for x in results if slots[id(x)] in self._buffers}
        self._leaves = [self._leaf(leaf, reused) for leaf in leaves]
        del self._slots, self._all_slots  # ids mean nothing any more

    def _leaf(self, leaf: Any, reused: set[int]) -> tuple[int | None, Any]:
        """The slot of an output, and what makes it of the tensor there; or None and the output itself."""
        integers = leaf.integers if isinstance(leaf, QTensor) else leaf
        slot = self._slots.get(id(integers)) if isinstance(integers, Tensor) else None
        if slot is None:
            return None, leaf
        own = torch.clone if storage(integers) in reused else _itself  # the next forward writes there
        if isinstance(leaf, QTensor):
            scale, zero_point, axis = leaf.scale, leaf.zero_point, leaf.axis
            return slot, lambda x: QTensor(own(x), scale, zero_point, axis)
        return slot, own

    def _bind(self, steps: list[_Step], outputs: list[Any]) -> Iterator[Callable[[], Any]]:
        calls = [step.bound() for step in steps]
        together = groups(calls, [step.results[0] if step.results else None for step in steps])
        uses, threads = _uses(steps, outputs), torch.get_num_threads()
        memory = Memory({place: numbers[-1] for place, numbers in uses.items()}, threads, self._pieces)
        program = Program(self._values, threads)
        for number, (step, call, group) in enumerate(zip(steps, calls, together, strict=True)):
            memory.enter(group)
            if call is not None:
                (result,) = step.results
                touching = uses[storage(result)]
                read = [self._place(x) for x in call.read]
                if touching == [number, len(steps)]:
                    program.add(call, group, read, None)
                    program.give(self._all_slots[id(result)], result)
                else:
                    inside = all(use < len(steps) and together[use] is group for use in touching)
                    program.add(call, group, read, self._room(result, group if inside else None, memory))
                self._alive += [leaf for leaf in step.leaves if id(leaf) not in self._slots]
            elif self._is_view(step):
                self._view(step)
            else:
                yield from program.calls()
                yield self._repeat(step)
            self._slots.update((id(x), self._all_slots[id(x)]) for x in step.results if isinstance(x, Tensor))
            memory.release(number)
        yield from program.calls()

    def _room(self, result: Tensor, group: Group | None, memory: Memory) -> Tensor:
        """Memory for a result, or where only a group touches it, that of an image for each thread."""
        slot = self._all_slots[id(result)]
        if group is not None:
            out = memory.own(result, group.images)
        else:
            out = self._values[slot] = memory.whole(result)
        self._buffers[slot] = out
        return out

    def _place(self, x: Tensor) -> Tensor | int:
        """Where a recorded tensor lies, if that is known beforehand, else its slot; the model's own have none."""
        slot = self._slots.get(id(x))
        return x if slot is None else self._buffers.get(slot, slot)

    def _is_view(self, step: _Step) -> bool:
        """Whether the step does no more than look at a buffer."""
        first = step.leaves[0] if step.leaves else None
        return bool(getattr(step.function, "is_view", False)) and self._slots.get(id(first)) in self._buffers

    def _view(self, step: _Step) -> None:
        """Look at the buffer, once and for all."""
        leaves = [self._buffers[self._slots[id(x)]] if id(x) in self._slots else x for x in step.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, step.spec)
        for x, result in zip(step.results, pytree.tree_leaves(step.function(*args, **kwargs)), strict=True):
            slot = self._all_slots[id(x)]
            self._values[slot] = self._buffers[slot] = result

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


def _uses(steps: list[_Step], outputs: list[Any]) -> dict[int, list[int]]:
    """For each piece of memory, the steps that touch it, and their number where it is given out."""
    uses: dict[int, list[int]] = {}
    for number, step in enumerate(steps):
        for x in chain(step.leaves, step.results):
            if isinstance(x, Tensor):
                uses.setdefault(storage(x), []).append(number)
    for leaf in outputs:
        if isinstance(leaf, Tensor):
            uses.setdefault(storage(leaf.integers if isinstance(leaf, QTensor) else leaf), []).append(len(steps))
    return uses
