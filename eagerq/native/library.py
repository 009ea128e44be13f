"""The C library: found beside this file, or not there."""

from __future__ import annotations

import ctypes
import os
import warnings
from hashlib import sha256
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LIBRARY", "Conv", "Layer", "Pair", "Quantizer", "address", "available", "dense", "serves"]


class Pair(ctypes.Structure):
    """What the sum or product of two quantized tensors is made with."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("a_signed", "b_signed")),
        *((name, ctypes.c_float) for name in ("a_scale", "a_shift", "b_scale", "b_shift")),
        *((name, ctypes.c_float) for name in ("factor", "zero", "low", "high")),
    ]


class Conv(ctypes.Structure):
    """The sizes and numbers of a call of a convolution."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width", "outputs", "rows", "columns")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("taps", "every", "pad", "step") for axis in "yx"),
        *((name, ctypes.c_int32) for name in ("x_zero", "is_signed", "to_signed", "to_real")),
        *((name, ctypes.c_float) for name in ("x_scale", "inverse", "zero", "low", "high")),
    ]


class Layer(ctypes.Structure):
    """Where a convolution's parameters lie."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "sums", "zeros", "scale", "bias")]


class Quantizer(ctypes.Structure):
    """Where a fake quantizer's parameters are, and the running range that they follow from, if it observes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scale", "zero", "low", "high")),
        ("constant", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("quant_min", "quant_max", "symmetric")),
    ]


_POINTER, _COUNT, _FLAG, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "add": [_POINTER] * 3 + [_COUNT, ctypes.POINTER(Pair)],
    "dequantize": [_POINTER] * 2 + [_COUNT] + [_REAL] * 2 + [_FLAG],
    "embedding": [_POINTER] * 3,
    "embedding_bag": [_POINTER] * 3 + [_COUNT, _POINTER, _COUNT, _FLAG, _POINTER],
    "conv": [_POINTER] * 4,
    "depthwise": [_POINTER] * 4,
    "layer_norm": [_POINTER] * 2 + [_COUNT, _POINTER],
    "linear": [_POINTER] * 4,
    "linear_dynamic": [_POINTER] * 3 + [_FLAG] + [_POINTER] * 2,
    "lstm": [_POINTER],
    "look_up": [_POINTER] * 3 + [_COUNT],
    "batch_norm": [_POINTER] * 3 + [_FLAG, _POINTER],
    "batch_norm_backward": [_POINTER] * 8,
    "batch_norm_last": [_POINTER] * 3 + [_FLAG, _POINTER],
    "batch_norm_last_backward": [_POINTER] * 8,
    "fold": [_POINTER] * 3 + [_COUNT],
    "fold_backward": [_POINTER] * 3 + [_COUNT, _POINTER],
    "fake_quantize": [_POINTER] * 3 + [_COUNT, ctypes.POINTER(Quantizer)],
    "fake_quantize_rows": [_POINTER] * 4 + [_COUNT] * 3 + [ctypes.POINTER(Quantizer)],
    "masked": [_POINTER] * 3 + [_COUNT],
    "masked_rows": [_POINTER] * 6 + [_COUNT] * 3,
    "mul": [_POINTER] * 3 + [_COUNT] * 3 + [ctypes.POINTER(Pair)],
    "max_pool": [_POINTER] * 2 + [_COUNT] * 6 + [_POINTER, _FLAG],
    "mean": [_POINTER] * 2 + [_COUNT] * 3 + [_REAL] * 3 + [_FLAG],
    "recur_end": [_POINTER],
    "recur_gates": [_POINTER],
    "recur_middle": [_POINTER],
    "round_over": [_POINTER] * 2 + [_FLAG] + [_COUNT] * 2 + [_POINTER, ctypes.POINTER(Quantizer)],
    "sum": [_POINTER] * 4 + [_FLAG, _COUNT, _POINTER],
    "run": [_POINTER] + [_COUNT] * 2,
    "rectify": [_POINTER] * 2 + [_COUNT],
    "unpack": [_POINTER] * 2 + [_COUNT],
    "quantize": [_POINTER] * 2 + [_COUNT] + [_REAL] * 4,
    "quantize_dynamic": [_POINTER] * 2 + [_COUNT, _FLAG] + [_POINTER] * 2,
}
# those that tell whether they refused
_ANSWERING = (
    *("embedding", "embedding_bag", "fake_quantize", "fake_quantize_rows", "linear_dynamic", "quantize_dynamic"),
    *("recur_end", "recur_gates", "round_over"),
    *("batch_norm_last", "batch_norm_last_backward", "masked_rows"),
)


def _is_stale(library: Any, folder: Path) -> bool:
    """Whether the library was not made of the sources beside it; where only it was installed, there are none."""
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".c", ".h"))
    stamp = sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    try:
        made_of = (ctypes.c_char * 16).in_dll(library, "eagerq_stamp").value.decode()
    except ValueError:  # older than the stamp
        return True
    return bool(sources) and made_of != stamp


def _load() -> Any:
    """The library; None where it was not built, does not load, or ``EAGERQ_NATIVE=0`` forbids it."""
    if os.environ.get("EAGERQ_NATIVE") == "0":
        return None
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            break
    else:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # such as where torch brought no OpenMP runtime
        return None
    if _is_stale(library, path.parent):
        warnings.warn(
            f"{path} was built from other sources and is left out, which makes eagerq slower: install it again",
            stacklevel=2,
        )
        return None
    for name, signature in _SIGNATURES.items():
        function = getattr(library, f"eagerq_{name}")
        function.argtypes, function.restype = signature, _FLAG if name in _ANSWERING else None
    return library


LIBRARY: Any = _load()
available: bool = LIBRARY is not None
"""Whether the library is there; everything works without it, more slowly."""

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def dense(x: Tensor) -> bool:
    """Whether the values lie in memory without gaps, whatever their order."""
    if x.is_contiguous():
        return True
    if x.dim() in _FORMATS:
        return x.is_contiguous(memory_format=_FORMATS[x.dim()])
    return x.dim() == 3 and x.transpose(1, 2).is_contiguous()


def address(x: Tensor | None) -> int | None:
    """Where the values lie; None for none."""
    return None if x is None else x.data_ptr()


def serves(x: Tensor) -> bool:
    """Whether ``x`` can be read through its address: a plain, dense CPU tensor, seen eagerly."""
    return (
        available
        and x.is_cpu
        and type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not x.is_neg()  # its values lie there with the other sign
        and dense(x)
    )
