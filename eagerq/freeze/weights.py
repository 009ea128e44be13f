"""Plain weights given up, and made again of their packed forms as soon as anybody looks at them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from eagerq.kernels.packing import Unpacker, unpacker

__all__ = ["give_up_weights", "take_back_weights"]

_Result = TypeVar("_Result")

_lock = threading.RLock()


def _aside(make: Callable[[], _Result]) -> _Result:
    """``make()`` in a thread of its own, where no mode and no transform of the caller's holds."""
    try:
        with ThreadPoolExecutor(1) as thread:
            made = thread.submit(make)
    except RuntimeError:  # the interpreter is shutting down, and starts no thread any more
        with torch.inference_mode(False), torch.no_grad():
            return make()
    return made.result()


class _Away(dict[str, Any]):
    """A module's buffers, some of them given up: at the first look they are made, and a plain dict takes its place.

    Beneath the methods, for those who pass them by, lie the buffers that there are, and the others' unpackers.
    """

    def __init__(self, home: dict[str, Any], content: dict[str, Any]) -> None:
        super().__init__(content)
        self._home = home
        self._table: dict[str, Any] | None = None

    def _made(self) -> dict[str, Any]:
        return {name: value() if isinstance(value, Unpacker) else value for name, value in dict.items(self)}

    def _whole(self) -> dict[str, Any]:
        with _lock:
            if self._table is None:
                self._table = _aside(self._made)
                dict.clear(self)  # whoever guards this memory sees it change
                if self._home.get("_buffers") is self:
                    self._home["_buffers"] = self._table
            return self._table

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (self._whole(),)


def _looking(name: str) -> Callable[..., Any]:
    def method(self: _Away, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._whole(), name)(*args, **kwargs)

    return method


# all that a dict can do
_SPECIAL = ("contains", "delitem", "eq", "getitem", "ior", "iter", "len", "ne", "or", "repr")
for _name in (
    *(f"__{name}__" for name in (*_SPECIAL, "reversed", "ror", "setitem", "sizeof")),
    *("clear", "copy", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"),
):
    setattr(_Away, _name, _looking(_name))


def _owns_memory(x: Any) -> bool:
    return type(x) is Tensor and x.layout is torch.strided and x.untyped_storage().nbytes() == x.numel()


class _Trace:
    """Finds a tensor, or the memory that it had, as long as anybody holds them."""

    def __init__(self, x: Tensor) -> None:
        self._tensor, self._storage = weakref.ref(x), StorageWeakRef(x.untyped_storage())
        self._form = (x.storage_offset(), x.shape, x.stride())
        self._dtype = x.dtype

    def find(self) -> Tensor | None:
        tensor = self._tensor()
        if tensor is not None:
            return tensor
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return None if storage is None else torch.empty(0, dtype=self._dtype).set_(storage, *self._form)


def give_up_weights(model: nn.Module) -> int:
    """Give up, in each module, the int8 weights that a packed form gives back and that nobody else holds.

    Returns:
        How many bytes that is.
    """
    gc.collect()
    with torch.inference_mode(False), torch.no_grad():
        return sum(map(_give_up, model.modules()))


def take_back_weights(model: nn.Module) -> None:
    """Make all weights that were given up."""
    for module in model.modules():
        if type(module._buffers) is _Away:
            module._buffers._whole()


def _give_up(module: nn.Module) -> int:
    buffers: dict[str, Any] = module._buffers
    with _lock:
        if type(buffers) is not dict:
            return 0
        found = {name: unpacker(x) for name, x in buffers.items() if _owns_memory(x)}
        unpackers: dict[str, Any] = {name: unpack for name, unpack in found.items() if unpack is not None}
        if not unpackers:
            return 0
        traces = {name: _Trace(buffers[name]) for name in unpackers}
        away = module.__dict__["_buffers"] = _Away(module.__dict__, {**buffers, **unpackers})
        del buffers
        held = {name: x for name, trace in traces.items() if (x := trace.find()) is not None}
        dict.update(away, held)
        if len(held) == len(unpackers):
            away._whole()
        return sum(unpack.bytes for name, unpack in unpackers.items() if name not in held)
