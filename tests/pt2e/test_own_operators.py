"""Our definitions of the Q/DQ operators against torch's own, in a process where torch.ao cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    *("quantize_per_tensor", "dequantize_per_tensor", "quantize_per_channel", "dequantize_per_channel"),
    *("choose_qparams", "choose_qparams_symmetric", "convert_element_type"),
)
RANGES = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-32768, 32767),
    torch.int32: (-(2**24), 2**24),
    torch.float8_e4m3fn: (-448, 448),
    torch.float8_e5m2: (-57344, 57344),
}
Case = tuple[str, tuple[Any, ...], dict[str, Any]]


# --- in the other process -----------------------------------------------------------------------------------


def without_torch_ao() -> None:
    """Make torch.ao as absent as it will be."""
    for name in ["torch.ao", *sys.modules]:
        if name == "torch.ao" or name.startswith("torch.ao."):
            sys.modules[name] = None  # type: ignore[assignment]
    vars(torch).pop("ao", None)


def answers(cases: list[Case]) -> list[Any]:
    return [operator_of(name)(*args, **kwargs) for name, args, kwargs in cases]


def operator_of(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.quantized_decomposed, packet), overload or "default")


def schemas() -> dict[str, str]:
    packets = {name: getattr(torch.ops.quantized_decomposed, name) for name in NAMES}
    return {
        f"{name}.{overload}": str(getattr(packet, overload)._schema)
        for name, packet in packets.items()
        for overload in sorted(packet.overloads())
    }


class Traced(torch.nn.Module):
    """Every operator once or more, as tracers meet them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scales", torch.rand(4) + 0.1)
        self.register_buffer("zero_points", torch.arange(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ops, full = torch.ops.quantized_decomposed, (-128, 127, torch.int8)
        x = ops.convert_element_type(x, torch.float32)
        found = [ops.dequantize_per_tensor(ops.quantize_per_tensor(x, 0.1, 3, *full), 0.1, 3, *full)]
        channels = (self.scales, self.zero_points, 1, *full)
        found.append(ops.dequantize_per_channel(ops.quantize_per_channel(x, *channels), *channels))
        for choose in (ops.choose_qparams, ops.choose_qparams_symmetric):
            scale, zero_point = choose(x, -128, 127, 1e-5, torch.int8)
            integers = ops.quantize_per_tensor(x, scale, zero_point, *full)
            found.append(ops.dequantize_per_tensor(integers, scale, zero_point, *full, out_dtype=torch.float16))
        return tuple(found)


def trace(x: Tensor) -> None:
    model, batch = Traced(), torch.export.Dim("batch", min=2, max=64)
    wanted = model(x)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for traced in (exported.module(), exported.run_decompositions().module(), compiled):
        for one, other in zip(traced(x), wanted, strict=True):
            assert torch.equal(one, other)
        assert traced(torch.cat([x, x]))[0].shape[0] == 2 * len(x)
    symbolic = [node.meta["val"] for node in exported.graph.output_node().all_input_nodes]
    assert [value.dtype for value in symbolic] == [value.dtype for value in wanted]
    assert all(isinstance(value.shape[0], torch.SymInt) for value in symbolic)


def refuse() -> None:
    ops, x = torch.ops.quantized_decomposed, torch.zeros(2, 2)
    full = (-128, 127, torch.int8)
    for name, arguments, message in (
        ("quantize_per_tensor", (x.double(), 1.0, 0, *full), "but got dtype: torch.float64"),
        ("quantize_per_tensor", (x, 1.0, 0, -129, 127, torch.int8), "out of bounds"),
        ("quantize_per_tensor", (x, 1.0, 0, 0, 1, torch.int64), "Unsupported dtype"),
        ("quantize_per_tensor", (x, torch.ones(2), torch.zeros(1), *full), "one element"),
        ("quantize_per_channel", (x, torch.ones(2), torch.zeros(2), 2, *full), "axis to be < 2"),
        ("dequantize_per_tensor", (x, 1.0, 0, *full), "to have dtype: torch.int8"),
        ("dequantize_per_channel", (x, torch.ones(2), None, 0, *full), "to have dtype: torch.int8"),
        ("choose_qparams", (x, 1, 127, 1e-5, torch.int8), "include 0"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            getattr(ops, name)(*arguments)


def in_the_other_process(cases: str, results: str) -> None:
    warnings.filterwarnings("error", module="eagerq")  # torch's tracers warn about torch
    without_torch_ao()
    import eagerq.pt2e.operators

    assert eagerq.pt2e.operators.QUANTIZE_PER_TENSOR is operator_of("quantize_per_tensor")
    assert "eagerq.pt2e.own_operators" in sys.modules
    torch.save((answers(torch.load(cases)), schemas()), results)
    refuse()
    trace(torch.randn(3, 4))


# --- in this one --------------------------------------------------------------------------------------------


def drawn() -> Iterator[Case]:
    for seed, (dtype, (low, high)) in enumerate(RANGES.items()):
        torch.manual_seed(seed)
        for source in (torch.float32, torch.float16, torch.bfloat16):
            x = (torch.randn(5, 4, 3, 3) * 10 ** torch.randint(-3, 3, ()).item()).to(source)
            yield from _per_tensor(x, dtype, low, high)
            yield from _per_channel(x, dtype, low, high)
            yield "convert_element_type.no_fuse", (x, torch.float32), {}
            if dtype in (torch.int8, torch.uint8, torch.int16):
                for choice in (x, x.abs(), -x.abs(), torch.zeros_like(x), x[:1, :1, 0, 0]):
                    for name in ("choose_qparams.tensor", "choose_qparams_symmetric.tensor"):
                        yield name, (choice, low, high, 1e-7, dtype), {}


def _per_tensor(x: Tensor, dtype: torch.dtype, low: int, high: int) -> Iterator[Case]:
    # powers of two, for ties, and others
    for scale in (0.25, 0.0371 * float(torch.rand(())) + 1e-3):
        zero_point = int(torch.randint(max(low, -50), min(high, 50), ()))
        numbers: tuple[Any, ...] = (scale, zero_point, low, high)
        tensors = (torch.tensor([scale], dtype=torch.float64), torch.tensor([zero_point]), low, high)
        all_tensors = (*tensors[:2], torch.tensor(low), torch.tensor(high))
        halves = (torch.arange(-60, 60) + 0.5) * scale
        for overload, given in (("", numbers), (".tensor", tensors), (".tensor2", all_tensors)):
            yield f"quantize_per_tensor{overload}", (x, *given, dtype), {}
            yield f"quantize_per_tensor{overload}", (halves, *given, dtype), {}
            for out in (None, torch.float16, torch.bfloat16):
                kwargs = {} if out is None else {"out_dtype": out}
                yield f"dequantize_per_tensor{overload}", (_stored(x, dtype), *given, dtype), kwargs


def _per_channel(x: Tensor, dtype: torch.dtype, low: int, high: int) -> Iterator[Case]:
    for axis in (0, 1, -2):
        channels = x.shape[axis]
        for kind in (torch.float32, torch.float64):
            scales = torch.rand(channels, dtype=kind) * 0.1 + 1e-3
            for zero_points in (
                torch.randint(0, 5, (channels,)),
                torch.rand(channels) * 5,
                torch.zeros(channels).int(),
            ):
                given = (scales, zero_points, axis, low, high, dtype)
                yield "quantize_per_channel", (x, *given), {}
                if not dtype.is_floating_point:  # torch cannot subtract from float8
                    yield "dequantize_per_channel", (_stored(x, dtype), *given), {}
            if not dtype.is_floating_point:
                given = (scales, None, axis, low, high, dtype)
                yield "dequantize_per_channel", (_stored(x, dtype), *given), {"out_dtype": torch.float16}


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    low, high = RANGES[dtype]
    return torch.linspace(low, high, x.numel()).reshape(x.shape).to(dtype)


def test_same_schemas_and_same_answers_as_torch(tmp_path: Path) -> None:
    pytest.importorskip("torch.ao.quantization.fx._decomposed")
    cases = list(drawn())
    torch.save(cases, tmp_path / "cases.pt")
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "cases.pt"), str(tmp_path / "results.pt")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ours, our_schemas = torch.load(tmp_path / "results.pt")
    assert our_schemas == schemas()
    assert len(our_schemas) == 11
    for case, got, wanted in zip(cases, ours, answers(cases), strict=True):
        for one, other in zip(_tensors(got), _tensors(wanted), strict=True):
            assert one.dtype == other.dtype, case
            assert one.shape == other.shape, case
            assert torch.equal(one.double(), other.double()), case


def _tensors(answer: Any) -> tuple[Tensor, ...]:
    return tuple(answer) if isinstance(answer, tuple | list) else (answer,)


if __name__ == "__main__":
    in_the_other_process(*sys.argv[1:])
