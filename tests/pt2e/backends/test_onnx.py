"""Exported programs as ONNX models: onnxruntime's integer operators, and the eager model's numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pt2e.backends.nets import Classifier, Mobile, Residual, agree, int8
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import eagerq
from eagerq.pt2e import export, operators
from eagerq.pt2e.onnx import translations

INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")
FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add")


def session(program: ExportedProgram, path: Path, **options: Any) -> tuple[Any, Counter[str]]:
    """onnxruntime's session, and how many of which operators are left in the graph that it runs."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        # torch's exporter and onnxscript about themselves
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(
            program, (), path, dynamo=True, verbose=False, custom_translation_table=translations(), **options
        )
    config = onnxruntime.SessionOptions()
    config.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    config.log_severity_level = 3  # that an optimized model is for this machine
    config.intra_op_num_threads = 1
    # on x86 it restates int8 activations in uint8, but not those that several layers read, which fall back to float
    config.add_session_config_entry("session.qdqisint8allowed", "1")
    run = onnxruntime.InferenceSession(path, config)
    return run, Counter(node.op_type for node in onnx.load(config.optimized_model_filepath).graph.node)


def outputs(run: Any, x: Tensor) -> Tensor:
    return torch.from_numpy(run.run(None, {run.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize(
    ("net", "engine", "dtype", "opset"),
    [(Residual, "onednn", torch.uint8, 18), (Mobile, "onednn", torch.int8, 21), (Mobile, "x86", torch.uint8, 18)],
)
def test_every_layer_is_computed_in_integers(
    net: type[Classifier], engine: str, dtype: torch.dtype, opset: int, tmp_path: Path
) -> None:
    model, images = int8(net, engine)
    images = images if engine == "onednn" else 3 * images  # beyond the 7 bits that training has seen
    program = export(model, (images,), dynamic_shapes=({0: Dim("batch")},), activation_dtype=dtype)
    run, kinds = session(program, tmp_path / "model.onnx", opset_version=opset)
    assert sum(kinds[kind] for kind in INTEGER) == net.weighted
    assert kinds["QLinearAdd"] == net.added
    assert not {*kinds} & {*FLOAT}
    assert agree(outputs(run, images), model, images)
    assert agree(outputs(run, images[:3]), model, images[:3])


class Rounding(nn.Module):
    """All of the dialect's operators, ranges narrower than the dtype among them."""

    def forward(self, x: Tensor) -> list[Tensor]:
        scales, zeros, offsets = torch.tensor([0.1, 0.2, 0.05]), torch.tensor([0, -3, 5]), torch.tensor([0.5, 1.5, 2.5])
        narrow = operators.QUANTIZE_PER_TENSOR(x, 0.02, 60, 20, 100, torch.uint8)
        wide = operators.QUANTIZE_PER_TENSOR(x, 1e-4, -7, -30000, 30000, torch.int16)
        channels = operators.QUANTIZE_PER_CHANNEL(x, scales, zeros, 1, -20, 127, torch.int8)
        low, high = 0, 100
        found = operators.CHOOSE_QPARAMS_AFFINE(x, low, high, 1e-7, torch.uint8)
        even = operators.CHOOSE_QPARAMS_SYMMETRIC(x, -127, 127, 1e-7, torch.int8)
        by_range = operators.QUANTIZE_PER_TENSOR_DYNAMIC(x, *found, low, high, torch.uint8)
        return [
            narrow.int(),
            wide.int(),
            channels.int(),
            by_range.int(),
            *found,
            *even,
            operators.DEQUANTIZE_PER_TENSOR(narrow, 0.02, 60, 20, 100, torch.uint8),
            operators.DEQUANTIZE_PER_TENSOR(wide, 1e-4, -7, -30000, 30000, torch.int16),
            operators.DEQUANTIZE_PER_CHANNEL(channels, scales, zeros, 1, -20, 127, torch.int8),
            operators.DEQUANTIZE_PER_CHANNEL(narrow, scales, offsets, 1, 0, 255, torch.uint8),
            operators.DEQUANTIZE_PER_TENSOR_DYNAMIC(by_range, *found, low, high, torch.uint8),
        ]


def test_each_operator_computes_what_torch_does(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 5)
    run, _ = session(torch.export.export(Rounding(), (x,)), tmp_path / "model.onnx")
    results = run.run(None, {"x": x.numpy()})
    for result, expected in zip(results, Rounding()(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-6, atol=1e-6)


def test_without_onnxscript_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(eagerq.MissingExtraError, match=r"pip install 'eagerq\[onnx\]'"):
        translations()


WITHOUT_TORCH_AO = """
import sys, warnings
import torch
for name in [*sys.modules, "torch.ao"]:
    if name == "torch.ao" or name.startswith("torch.ao."):
        sys.modules[name] = None
del torch.ao
warnings.simplefilter("ignore")
from pathlib import Path
from pt2e.backends.nets import Residual, agree, int8
from pt2e.backends.test_onnx import outputs, session
from eagerq.pt2e import export
model, images = int8(Residual)
run, kinds = session(export(model, (images,)), Path(sys.argv[1]))
assert kinds["QLinearConv"] == Residual.weighted - 1, kinds
assert agree(outputs(run, images), model, images)
assert sys.modules["torch.ao"] is None
"""


def test_all_the_way_without_torch_ao(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    tests = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH_AO, str(tmp_path / "model.onnx")],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
