"""Where each name of the old packages went: a table of modules, the rest looked up in eagerq itself."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import ModuleType

__all__ = ["Found", "Namespace", "Outcome", "Refused", "lookup", "public_names"]


@dataclass(frozen=True)
class Found:
    """The new name of ``taken`` leading parts of an old one, and the module that has to be imported for it."""

    name: str
    module: str
    taken: int

    @property
    def is_module(self) -> bool:
        return self.name == self.module


@dataclass(frozen=True)
class Refused:
    """``taken`` leading parts name something that has no counterpart."""

    reason: str
    remedy: str
    taken: int


@dataclass(frozen=True)
class Namespace:
    """A package that stays, but holds some that go, such as ``torch.ao.nn``."""


Outcome = Found | Refused | Namespace | None  # None: no concern of ours

_PT2E = ("quantize_pt2e", "quantizer", "pt2e")

# Old package -> the modules whose names it has, searched in this order. Deeper modules follow by name.
_ROOTS: dict[str, tuple[str, ...]] = {
    "torchao.quantization.pt2e": ("eagerq.pt2e",),
    "torch.ao.quantization.pt2e": ("eagerq.pt2e",),
    "torch.ao.quantization.quantize_pt2e": ("eagerq.pt2e.quantize_pt2e", "eagerq.pt2e"),
    "torch.ao.quantization.quantizer": ("eagerq.pt2e.quantizer",),
    **{
        f"{old}.{part}": (f"eagerq.pt2e.quantizer.{part}",)
        for old in ("torch.ao.quantization.pt2e", "torchao.quantization.pt2e")
        for part in ("duplicate_dq_pass", "port_metadata_pass")
    },
    "torchao.quantization.pt2e.observer": ("eagerq.observer", "eagerq.pt2e"),
    "torchao.quantization.pt2e.fake_quantize": ("eagerq.fake_quantize",),
    "torchao.quantization.pt2e.learnable_fake_quantize": ("eagerq.fake_quantize",),
    "torch.ao.ns._numeric_suite": ("eagerq.numeric_suite",),
    "torch.quantization._numeric_suite": ("eagerq.numeric_suite",),
}
for _old in ("torch.ao.quantization", "torch.quantization"):
    _ROOTS[_old] = ("eagerq", "eagerq.pt2e")
    for _part in (
        *("observer", "fake_quantize", "qconfig", "qconfig_mapping", "stubs", "utils"),
        *("fuse_modules", "fuser_method_mappings", "quantization_mappings", "quantize"),
    ):
        _ROOTS[f"{_old}.{_part}"] = (f"eagerq.{_part}", "eagerq")
    _ROOTS[f"{_old}.quant_type"] = ("eagerq",)
    _ROOTS[f"{_old}._equalize"] = ("eagerq.equalization",)
    _ROOTS[f"{_old}._correct_bias"] = ("eagerq.bias_correction",)
    _ROOTS[f"{_old}._learnable_fake_quantize"] = ("eagerq.fake_quantize",)
for _old in ("torch.ao.nn", "torch.nn"):
    for _part in ("qat", "qat.dynamic", "quantizable", "quantized", "quantized.dynamic"):
        _ROOTS[f"{_old}.{_part}"] = (f"eagerq.nn.{_part}",)
    for _part in ("intrinsic", "intrinsic.qat", "intrinsic.quantized", "intrinsic.quantized.dynamic"):
        _ROOTS[f"{_old}.{_part}"] = (f"eagerq.{_part}",)

# Their files inside a package's ``modules`` are no public places: names are the package's.
_INNER = re.compile(
    r"(torch\.(?:ao\.)?nn\.(?:qat|quantizable|quantized|intrinsic)(?:\.\w+)*?)\.modules(?:\.([a-z_]+))?"
)

_NAMESPACES = frozenset(
    (*("torch", "torch.nn", "torch.ao", "torch.ao.nn", "torch.ao.ns"), "torchao", "torchao.quantization")
)

_RENAMED = {
    "_LearnableFakeQuantize": "LearnableFakeQuantize",
    "_get_module_name_filter": "get_module_name_filter",
    "Q_ANNOTATION_KEY": "ANNOTATION",
}

_OBJECTS = {
    "torch.quint8": ("torch", "uint8"),
    "torch.qint8": ("torch", "int8"),
    "torch.qint32": ("torch", "int32"),
    "torch.quint4x2": ("eagerq.scheme", "uint4"),
    "torch.quantize_per_tensor": ("eagerq", "quantize_per_tensor"),
    "torch.quantize_per_channel": ("eagerq", "quantize_per_channel"),
}

_FX = ("FX graph mode is left out", "prepare and convert in eager mode: fuse_modules_qat, prepare_qat, convert")
_SCRIPT = ("TorchScript is left out", "use torch.compile or torch.export, which take eagerq's models")
_SPARSE = ("sparse quantization is left out", "keep it apart, or drop it")
_REFERENCE = ("reference modules are left out", "use the int8 modules, which run on any device")
_OPERATORS = ("these operators take torch's quantized tensors", "call the module or function of eagerq.nn.quantized")
_METHOD = ("it takes torch's quantized tensors", "call the method of the tensor that has this name")
_TENSORS = ("it makes torch's quantized tensors", "use eagerq.quantize_per_tensor, or eagerq.QTensor(integers, …)")

# Full names that stay, with the reason. The first that matches counts, so longer ones come first.
_REFUSED: tuple[tuple[re.Pattern[str], tuple[str, str]], ...] = tuple(
    (re.compile(pattern), why)
    for pattern, why in (
        (r"torch\.(ao\.)?quantization\.(fx|quantize_fx|backend_config|_numeric_suite_fx)\b", _FX),
        (r"torch\.ao\.ns\.(fx|_numeric_suite_fx)\b", _FX),
        (r"torch\.(ao\.)?quantization\.quantize_jit\b", _SCRIPT),
        (r"torch\.(ao\.)?quantization\.(\w+\.)*(\w*_fx|\w*FX\w*)$", _FX),
        (r"torch\.(ao\.)?quantization\.(\w+\.)*(\w+_jit|script_qconfig\w*)$", _SCRIPT),
        (r"torch\.(ao\.)?quantization\.(\w+\.)*(\w*_(?i:sparse)_\w*)$", _SPARSE),
        (r"torch\.(ao\.)?quantization\.(\w+\.)*\w*reference_module\w*$", _REFERENCE),
        (r"torch\.ao\.(nn\.sparse|pruning)\b", _SPARSE),
        (r"torch\.(ao\.)?nn\.quantized\._?reference\b", _REFERENCE),
        (r"torch\.(ops|classes)\.quantized\b", _OPERATORS),
        (
            r"torch\.backends\.quantized\b",
            (
                "eagerq picks its kernels by device and needs no engine",
                "delete it, and give the engine's name to get_default_qat_qconfig or get_default_qconfig",
            ),
        ),
        (r"torch\.(q_\w+|int_repr|dequantize)$", _METHOD),
        (
            r"torch\.(quantize_per_tensor_dynamic|_empty_(per_channel_)?affine_quantized|_make_per_\w+_quantized_tensor)$",
            _TENSORS,
        ),
        (r"torch\.quantized_\w+$", _OPERATORS),
        (r"torch\.quint2x4$", ("2-bit types are left out", "use 4 bits, eagerq.scheme.uint4, or 8")),
    )
)


@cache
def _module(path: str) -> ModuleType | None:
    """A module of eagerq, or None where there is none."""
    try:
        if importlib.util.find_spec(path) is None:
            return None
    except ModuleNotFoundError:  # of a parent
        return None
    return importlib.import_module(path)


def _has(path: str, name: str) -> bool:
    module = _module(path)
    return module is not None and (hasattr(module, name) or _module(f"{path}.{name}") is not None)


def _child(path: str, name: str) -> str | None:
    """The module ``path.name``, unless that attribute is something else."""
    inside = f"{path}.{name}"
    held = getattr(_module(path), name, None)
    if held is None:
        return inside if _module(inside) else None
    return inside if isinstance(held, ModuleType) and held.__name__ == inside else None


def public_names(path: str) -> frozenset[str]:
    """What a star import of a module of eagerq binds."""
    module = _module(path)
    return frozenset(name for name in getattr(module, "__all__", ()) if not name.startswith("_"))


def _refusal(parts: Sequence[str]) -> Refused | None:
    for end in range(len(parts), 1, -1):
        name = ".".join(parts[:end])
        for pattern, (reason, remedy) in _REFUSED:
            found = pattern.match(name)
            if found and found.end() == len(name):
                return Refused(f"{name}: {reason}", remedy, end)
    return None


def _places(path: str) -> tuple[str, ...]:
    """The modules of eagerq that have the names of an old module."""
    inner = _INNER.fullmatch(path)
    return _ROOTS.get(inner[1] if inner else path, ())


def _starts(parts: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for end in range(len(parts), 1, -1):
        if places := _places(".".join(parts[:end])):
            yield end, places


def _shadowed(parts: Sequence[str], imported: int) -> bool:
    """``torch.ao.quantization.quantize``, read as an attribute, is the function and not the module."""
    return len(parts) > imported and parts[-1] in ("quantize", "fuse_modules") and parts[-2] == "quantization"


def lookup(parts: Sequence[str], imported: int = 0) -> Outcome:
    """Where a full dotted name of the old packages went.

    Args:
        parts: the name's parts, attributes of objects at the end included.
        imported: how many of them are the path of a module that an import statement names.

    Example:
        >>> lookup(["torch", "ao", "quantization", "observer", "MinMaxObserver", "with_args"])
        Found(name='eagerq.observer.MinMaxObserver', module='eagerq.observer', taken=5)
        >>> lookup(["torch", "nn", "Linear"]) is None
        True
    """
    refused = _refusal(parts)
    if refused:
        return refused
    if (taken := _OBJECTS.get(".".join(parts[:2]))) is not None:
        module, name = taken
        return Found(f"{module}.{name}", module, 2)
    for end, places in _starts(parts):
        if not _shadowed(parts[:end], imported):
            return _within(parts, end, places)
    return Namespace() if ".".join(parts) in _NAMESPACES else None


def _within(parts: Sequence[str], end: int, places: tuple[str, ...]) -> Found | Refused:
    existing = [place for place in places if _module(place) is not None]
    old = ".".join(parts[:end])
    if not existing:
        return Refused(f"{old}: this eagerq has no {places[0]}", "leave it for now, or write it anew", end)
    while end < len(parts) and (deeper := _child(existing[0], parts[end])):
        existing, end = [deeper], end + 1
    if end == len(parts):
        return Found(existing[0], existing[0], end)
    name = _RENAMED.get(parts[end], parts[end])
    for place in existing:
        if _has(place, name):
            return Found(f"{place}.{name}", place, end + 1)
    near = get_close_matches(name, public_names(existing[0]), cutoff=0.7)
    return Refused(
        f"{'.'.join(parts[: end + 1])}: {existing[0]} has no {name}",
        f"it has {', '.join(near)}" if near else "do without it, or write it anew",
        end + 1,
    )
