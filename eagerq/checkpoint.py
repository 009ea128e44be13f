"""State dicts written by torch.ao's converted models, restated in plain tensors; and older forms of ours.

torch.ao saves quantized tensors, tuples of them and, for dynamic recurrent layers, script objects.
Here they are only asked what they hold (``int_repr()``, ``q_scale()`` …), so that the file names nothing
that torch is about to delete: where quantized tensors are gone, there is none to meet either.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from eagerq import kernels
from eagerq.bundles import Unit
from eagerq.errors import CheckpointError
from eagerq.scheme import IntegerType, integer_dtype, integer_type, sharing, uint4

__all__ = [
    "UpgradingModule",
    "bad_qparams",
    "bad_range",
    "bad_scale",
    "from_torch_ao",
    "misfit",
    "rename",
    "restate",
]

_PACKED = "_packed_params"
_MARK = "_packed"  # in each name that only torch.ao has, but for those of values that are no plain tensors
_DYNAMIC_LINEAR = 4  # the version of its format, which no other layer with packed parameters has
_ScriptObject: Any = getattr(torch, "ScriptObject", ())


def from_torch_ao(state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A torch.ao converted model's state_dict, in the plain tensors that eagerq's models save.

    Loading does this by itself.  Do it once and save the result to be rid of quantized tensors for good:
    ``torch.save`` with ``weights_only`` loading, safetensors and the like all take it.

    Args:
        state_dict: of a model converted by torch.ao (or of a part of one); left as it is.  Entries that are
            plain already are passed on, so that a prepared model's comes back the same.

    Returns:
        A new dict with the same keys but for these: a quantized tensor ``x.weight`` becomes ``x.weight``
        (integers), ``x.weight_scale`` (float32) and ``x.weight_zero_point`` (int32; float32 for embeddings);
        ``x._packed_params`` and what lies below it become the weight and the bias of ``x``.

    Raises:
        CheckpointError: for a quantized tensor whose parameters eagerq has no place for.

    Example:
        >>> import warnings, torch
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # torch deprecates its quantized tensors
        ...     theirs = torch.quantize_per_tensor(torch.tensor([[1.0, -1.0]]), 0.5, 0, torch.qint8)
        >>> for key, value in from_torch_ao({"fc.weight": theirs, "fc.bias": torch.zeros(1)}).items():
        ...     print(key, value)
        fc.weight tensor([[ 2, -2]], dtype=torch.int8)
        fc.weight_scale tensor([0.5000])
        fc.weight_zero_point tensor([0], dtype=torch.int32)
        fc.bias tensor([0.])
    """
    plain = OrderedDict(state_dict)
    if hasattr(state_dict, "_metadata"):
        plain._metadata = state_dict._metadata  # type: ignore[attr-defined]
    restate(plain)
    for path, told in getattr(plain, "_metadata", {}).items():
        here = f"{path}." if path else ""
        if f"{here}{_PACKED}.{_PACKED}" in state_dict and told.get("version", 0) >= _DYNAMIC_LINEAR:
            # an output's parameters, of no meaning there; without versions they are the mark of an older format
            plain.pop(f"{here}scale", None)
            plain.pop(f"{here}zero_point", None)
    return plain


def restate(state: MutableMapping[str, Any], prefix: str = "") -> bool:
    """Put torch.ao's entries under ``prefix`` into the plain form, in place; whether there were any.

    Raises:
        CheckpointError: as :func:`from_torch_ao`; ``state`` is then in between.
    """
    found = False
    for key in [key for key, value in state.items() if isinstance(key, str) and _may_be_restated(key, value)]:
        if key.startswith(prefix) and key in state:
            plain = _restated(key, state)
            if plain is not None:
                del state[key]
                state.update(plain)
                found = True
    return found


def _may_be_restated(key: str, value: Any) -> bool:
    """Whether an entry deserves a second look: in most files none does."""
    return type(value) is not Tensor or value.is_quantized or _MARK in key


def _restated(key: str, state: MutableMapping[str, Any]) -> dict[str, Any] | None:
    """What stands for one entry, or None when that is itself."""
    value = state[key]
    path, _, name = key.rpartition(".")
    owner, _, inner = path.rpartition(".")
    place, here = f"{owner}." if owner else "", f"{path}." if path else ""
    pair = _weight_and_bias(value)
    if inner == _PACKED:
        if name == "dtype" and isinstance(value, torch.dtype):
            return {}
        if name == _PACKED and pair is not None:
            return _named(place, "", *pair)
        if name in ("weight", "bias", "_packed_weight"):
            return _tensors(f"{place}{name.removeprefix('_packed_')}", value)
    if name in ("_packed_weight_ih", "_packed_weight_hh") and pair is not None:
        return _named(here, name.removeprefix("_packed_weight"), *pair)
    if name == "param" and isinstance(value, _ScriptObject):
        return _recurrent(here, value)
    if not _is_quantized(value):
        return None
    plain = _tensors(key, value)
    if name == "weight" and f"{here}bias" in state:
        plain |= _tensors(f"{here}bias", state.pop(f"{here}bias"))
    return plain


def _named(place: str, end: str, weight: Any, bias: Any) -> dict[str, Any]:
    return {**_tensors(f"{place}weight{end}", weight), **_tensors(f"{place}bias{end}", bias)}


def _weight_and_bias(value: Any) -> tuple[Any, Any] | None:
    """What packed parameters hold, as a pair or as a script object."""
    if isinstance(value, _ScriptObject):
        value = value.__getstate__()[0]
    return value if isinstance(value, tuple) and len(value) == 2 else None


def _recurrent(here: str, value: Any) -> dict[str, Any] | None:
    """One direction of one layer: its two weights and biases, and whether they quantize to 7 bits."""
    told = value.__getstate__()[0]
    if not isinstance(told, tuple) or len(told) != 5 or told[0] not in ("quantized_dynamic", "quantized_fp16"):
        return None
    kind, biases, _, options, packed = told
    plain: dict[str, Any] = {}
    for end, one in zip(("_ih", "_hh"), packed, strict=True):
        plain |= _named(here, end, *(_weight_and_bias(one) or ()))
    for end, bias in zip(("_ih", "_hh"), biases, strict=False):
        plain[f"{here}bias{end}"] = bias.detach()
    if kind == "quantized_dynamic" and not any(options):
        plain[f"{here}reduce_range"] = torch.tensor(False)
    return plain


def _is_quantized(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, "is_quantized", False)


def _tensors(key: str, value: Any) -> dict[str, Any]:
    """``value`` under ``key``; a quantized tensor with its parameters beside it; nothing for None."""
    if value is None:
        return {}
    value = value.detach() if isinstance(value, Tensor) else value
    if not _is_quantized(value):
        return {key: value}
    shared = sharing(value.qscheme())
    if not shared.per_channel:
        scale, zero_point = torch.tensor([value.q_scale()]), torch.tensor([value.q_zero_point()])
    else:
        if value.q_per_channel_axis() != 0:
            raise CheckpointError(
                f"{key} has a scale for each index of axis {value.q_per_channel_axis()}; only axis 0 is known",
                remedy="quantize it per tensor, or along axis 0, before it is saved",
            )
        scale, zero_point = value.q_per_channel_scales(), value.q_per_channel_zero_points()
    integers = value.int_repr().contiguous()
    if integer_dtype(value.dtype) is uint4:  # its halves run on from one row to the next; ours begin each row anew
        integers = kernels.pack_halves(kernels.unpack_halves(integers[None], value.numel()).reshape(value.shape))
    return {
        key: integers,
        f"{key}_scale": scale.float(),
        f"{key}_zero_point": zero_point.to(torch.float32 if shared.float_zero_point else torch.int32),
    }


class UpgradingModule(Unit):
    """Base of the modules whose entries may come in another form, or hold what they cannot use.

    A check of the whole file (``eagerq.quantize.state``) asks both methods of every such module before
    any of them loads; a module that is loaded without one asks itself.

    Attributes:
        _optional_state: names that a file may have or not, beside those of the module's own state.
        _kept_state: names that files of torch.ao lack; the module keeps its values, and the check warns.
        _resizable: names whose one element, or none, may become many and the reverse.
    """

    _optional_state: ClassVar[tuple[str, ...]] = ()
    _kept_state: ClassVar[tuple[str, ...]] = ()
    _resizable: ClassVar[tuple[str, ...]] = ()

    def _upgrade_state(self, state: MutableMapping[str, Any], prefix: str, version: int | None) -> None:
        """Bring the module's own entries under ``prefix`` to today's form, in place; a second time is no harm.

        Args:
            version: the format of the module's class, as the file tells it.
        """

    def _state_problems(self, state: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """What the module cannot use of its entries under ``prefix``, in words, shapes and dtypes apart."""
        yield from ()

    def _before_loading(
        self, state: MutableMapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], checked: bool
    ) -> None:
        if not checked:
            self._upgrade_state(state, prefix, local_metadata.get("version"))
        for name in self._resizable:
            value, buffer = state.get(prefix + name), self._buffers.get(name)
            if isinstance(value, Tensor) and buffer is not None and value.shape != buffer.shape:
                self._buffers[name] = buffer.new_empty(value.shape)


def rename(state: MutableMapping[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Move entries to new names (given by the old), where those are free."""
    for old, new in names.items():
        if prefix + old in state and prefix + new not in state:
            state[prefix + new] = state.pop(prefix + old)


# --- what fits ----------------------------------------------------------------------------------------


def misfit(key: str, value: Any, own: Tensor, resizable: bool = False) -> str | None:
    """What is wrong with one entry, in words, or None.

    Args:
        own: the model's value, whose shape and dtype are wanted.
        resizable: one element, or none, may become many and the reverse.
    """
    if not isinstance(value, Tensor):
        return f"{key} is a {type(value).__name__}, not a tensor"
    single = value.numel() == own.numel() == 1 and max(value.dim(), own.dim()) <= 1
    if value.shape != own.shape and not single and not (resizable and min(value.numel(), own.numel()) <= 1):
        return f"{key} has shape {tuple(value.shape)}, the model's {tuple(own.shape)}"
    if own.dtype == value.dtype or (own.is_floating_point() and value.is_floating_point()):
        return None
    if own.is_floating_point() != value.is_floating_point():
        return f"{key} is of {value.dtype}, the model's of {own.dtype}"
    # torch.ao keeps zero points as int32 or int64, whatever integers they are for
    if key.endswith("zero_point") and value.dtype in (torch.int32, torch.int64):
        kind = integer_type(own.dtype)
        if bool(((value >= kind.minimum) & (value <= kind.maximum)).all()):
            return None
    return f"{key} is of {value.dtype}, the model's of {own.dtype}: another bit width"


def _shown(value: Tensor) -> str:
    values = value.flatten()[:3].tolist()
    return ", ".join(map(str, values)) + (" …" if value.numel() > len(values) else "")


_COMPARABLE = (torch.float32, torch.float64, torch.int32, torch.int64)


def _ends(value: Tensor) -> tuple[float, float]:
    """The least and the greatest, to tell in one look that all is well; NaN where that cannot be told."""
    if value.numel() == 1:
        one = value.item()
        return one, one
    if value.dtype not in _COMPARABLE or value.numel() == 0:
        return torch.nan, torch.nan
    least, most = value.aminmax()
    return least.item(), most.item()


def bad_scale(key: str, state: Mapping[str, Any]) -> Iterator[str]:
    """Says so when the scales under ``key`` are not positive numbers."""
    value = state.get(key)
    if isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta:
        least, most = _ends(value)
        if 0 < least <= most < torch.inf:
            return
        proper = value.isfinite() & (value > 0)
        if not bool(proper.all()):
            yield f"{key} holds {_shown(value[~proper])}, but a scale is a positive number"


def bad_range(key: str, state: Mapping[str, Any], kind: IntegerType) -> Iterator[str]:
    """Says so when what is under ``key`` are not the least and the greatest of some integers of ``kind``."""
    value = state.get(key)
    if isinstance(value, Tensor) and not value.is_meta:
        ends = value.tolist() if value.shape == (2,) and not value.is_floating_point() else None
        if ends is None or not kind.minimum <= ends[0] <= ends[1] <= kind.maximum:
            yield f"{key} holds {_shown(value)}, but two integers in order were expected, of those of {kind.dtype}"


def bad_qparams(
    path: str, state: Mapping[str, Any], counts: tuple[int, ...] | None, kind: IntegerType | None
) -> Iterator[str]:
    """Says so when ``…scale`` and ``…zero_point`` cannot be those of one quantized tensor.

    Args:
        path: what stands before these names.
        counts: how many there may be; None for any number.
        kind: the integers that zero points are of; None when they are floats.
    """
    yield from bad_scale(f"{path}scale", state)
    scale, zero_point = state.get(f"{path}scale"), state.get(f"{path}zero_point")
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if isinstance(value, Tensor) and counts and value.numel() not in counts:
            yield f"{path}{name} has {value.numel()} elements, not {' or '.join(map(str, sorted({*counts})))}"
    if not isinstance(scale, Tensor) or not isinstance(zero_point, Tensor):
        return
    if scale.numel() != zero_point.numel():
        yield f"{path}scale has {scale.numel()} elements, but {path}zero_point {zero_point.numel()}"
    if not zero_point.is_meta:
        low, high = (kind.minimum, kind.maximum) if kind else (-torch.inf, torch.inf)
        least, most = _ends(zero_point)
        if low <= least <= most <= high and abs(least) + abs(most) < torch.inf:
            return
        proper = zero_point.isfinite() & (zero_point >= low) & (zero_point <= high)
        if not bool(proper.all()):
            wanted = f"one of {low} to {high}" if kind else "a number"
            yield f"{path}zero_point holds {_shown(zero_point[~proper])}, but a zero point is {wanted}"
