"""The whole road without what torch is deleting.

Run in a process of its own: ``import torch`` loads torch.ao, so absence has to be made. There nobody can
import the old packages or call their functions, eagerq does not even see those, and is stopped when it
touches what torch's own internals still need (torch.jit, the quantized dtypes).
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = ("ao", "quantization", "nn.quantized", "nn.quantizable", "nn.qat", "nn.intrinsic")
GONE = (
    *("quantize_per_tensor", "quantize_per_channel", "quantize_per_tensor_dynamic"),
    *("q_scale", "q_zero_point", "q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"),
    *("dequantize", "int_repr", "quantized_max_pool2d", "quantized_batch_norm", "_empty_affine_quantized"),
    *("_make_per_tensor_quantized_tensor", "_make_per_channel_quantized_tensor"),
)
# torch uses these itself, in torch.save and in tracing: only eagerq may not
GUARDED = ("jit", "quint8", "qint8", "qint32", "quint4x2", "quint2x4")
# for the rest eagerq has equivalents; torch.load still names the constants
ARITHMETIC = ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "fused_moving_avg_obs_fake_quant")
CONSTANTS = (
    *("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"),
    *("per_channel_affine_float_qparams", "qscheme"),
)


# --- in the other process ---------------------------------------------------------------------------------


def absent(name: str) -> Any:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name}, which torch is deleting, was called")

    function.__name__ = name
    return function


def poison(torch: Any, without_arithmetic: bool) -> None:
    """Make the old packages as absent as they will be."""
    old = [f"torch.{name}" for name in PACKAGES]
    for name in [*sys.modules, *old]:
        if any(name == package or name.startswith(f"{package}.") for package in old):
            sys.modules[name] = None  # type: ignore[assignment]
    for name in PACKAGES:
        parent, _, child = f"torch.{name}".rpartition(".")
        vars(sys.modules[parent]).pop(child, None)
    functions = GONE + ARITHMETIC * without_arithmetic
    hidden = functions + CONSTANTS * without_arithmetic
    for name in functions:  # the compiler lists the names: they have to stay
        for owner in (torch, torch.Tensor):
            if hasattr(owner, name):
                setattr(owner, name, absent(name))

    class Stop:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"torch.ops.quantized.{name} was touched")

    torch.ops.quantized = Stop()

    class Guarded(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "") if name in (*GUARDED, *hidden) else ""
            if caller.startswith("eagerq"):
                kind = AttributeError if name in hidden else AssertionError
                raise kind(f"{caller} touched torch.{name}")
            return super().__getattribute__(name)

    torch.__class__ = Guarded


def check_the_poison(torch: Any) -> None:
    """It would be noticed."""
    for package in PACKAGES:
        with pytest.raises(ImportError):
            __import__(f"torch.{package}.observer")
    assert not hasattr(torch, "ao")
    for name in GONE:
        for owner in (torch, torch.ones(1)):
            with pytest.raises((AssertionError, AttributeError)):
                getattr(owner, name)()
    with pytest.raises(AssertionError, match="was touched"):
        torch.ops.quantized.linear  # noqa: B018
    for name in GUARDED:
        with pytest.raises(AssertionError, match=f"eagerq.somewhere touched torch.{name}"):
            exec(f"torch.{name}", {"__name__": "eagerq.somewhere", "torch": torch})


def walk(torch: Any, eagerq: Any, directory: Path) -> None:
    """fuse, prepare, train, convert, save, rebuild, load, export."""
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
            self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
            self.add, self.cat = eagerq.nn.quantized.FloatFunctional(), eagerq.nn.quantized.FloatFunctional()
            self.drop, self.fc = nn.Dropout(0.1), nn.Linear(16, 4)

        def forward(self, x: Any) -> Any:
            x = self.relu(self.bn(self.conv(self.quant(x))))
            x = self.add.add_relu(x, self.bn2(self.depthwise(x)))
            x = self.cat.cat([x, nn.functional.max_pool2d(x, 3, 1, 1)], 1)
            x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
            return self.dequant(self.fc(self.drop(x)))

    def prepared(engine: str) -> Any:
        model = Net().train()
        eagerq.fuse_modules_qat(model, [["conv", "bn", "relu"], ["depthwise", "bn2"]], inplace=True)
        model.qconfig = eagerq.get_default_qat_qconfig(engine)
        return eagerq.prepare_qat(model, inplace=True)

    x, labels = torch.randn(8, 3, 6, 6), torch.randint(0, 4, (8,))
    for engine, as_trained in (("onednn", True), ("x86", False), ("fbgemm", True), ("qnnpack", False)):
        model = prepared(engine)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
        model.apply(eagerq.disable_observer)
        model.apply(eagerq.intrinsic.qat.freeze_bn_stats)
        torch.save(model.state_dict(), directory / "prepared.pt")
        again = prepared(engine)
        again.load_state_dict(torch.load(directory / "prepared.pt", weights_only=True))
        again.apply(eagerq.disable_observer)
        model.eval()
        again.eval()
        assert torch.equal(again(x), model(x))

        int8 = eagerq.convert(model, as_trained=as_trained)
        assert all(type(value) is torch.Tensor for value in int8.state_dict().values())
        torch.save(int8.state_dict(), directory / "int8.pt")
        fresh = eagerq.convert(prepared(engine).eval(), as_trained=as_trained)
        fresh.load_state_dict(torch.load(directory / "int8.pt", weights_only=True))
        y = int8(x)
        assert torch.equal(fresh(x), y)
        assert (y - model(x)).abs().max() < 0.3

    # calibration, without training
    ptq = Net().eval()
    eagerq.fuse_modules(ptq, [["conv", "bn", "relu"], ["depthwise", "bn2"]], inplace=True)
    ptq.qconfig = eagerq.get_default_qconfig("onednn")
    ptq = eagerq.prepare(ptq)
    expected = ptq(x)
    assert (eagerq.convert(ptq)(x) - expected).abs().max() < 0.3

    # embeddings
    table = nn.Sequential(nn.EmbeddingBag(10, 16, mode="sum")).train()
    table.qconfig = eagerq.default_embedding_qat_qconfig
    table = eagerq.prepare_qat(table, mapping=eagerq.get_embedding_qat_module_mappings())
    indices = torch.randint(0, 10, (4, 3))
    table(indices).sum().backward()
    bags = eagerq.convert(table.eval(), mapping=eagerq.get_embedding_static_quant_module_mappings())
    assert (bags(indices) - table(indices)).abs().max() < 0.1

    # tensors
    q = eagerq.quantize_per_tensor(x, 0.05, 100, torch.uint8)
    torch.save(q, directory / "q.pt")
    q = torch.load(directory / "q.pt", weights_only=True)
    assert (torch.relu(q).dequantize() - x.relu()).abs().max() < 6
    assert "scale=0.05" in repr(q)
    rows = eagerq.quantize_per_channel(x, torch.ones(8) * 0.1, torch.zeros(8), 0, torch.int8)
    assert "axis=0" in repr(rows)
    assert rows.qscheme() != q.qscheme()

    for strict in (False, True):
        exported = torch.export.export(int8, (x,), strict=strict)
        assert torch.equal(exported.module()(x), y)
        path = directory / "program.pt2"
        torch.export.save(exported, path)
        assert torch.equal(torch.export.load(path).module()(x), y)
    assert torch.equal(torch.compile(int8, fullgraph=True, backend="eager")(x), y)


def side_roads(torch: Any, eagerq: Any) -> None:
    """Dynamic and recurrent layers, attention, norms and activations, trained scales, the numeric tools."""
    from torch import nn

    from eagerq import bias_correction, equalization, numeric_suite, utils

    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru, self.fc = nn.LSTM(6, 8, bidirectional=True), nn.GRU(16, 8), nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            return self.fc(self.gru(self.lstm(x)[0])[0])

    sequences = torch.randn(5, 2, 6)
    speech = Speech().eval()
    for dtype in (torch.int8, torch.float16):
        assert (eagerq.quantize_dynamic(speech, dtype=dtype)(sequences) - speech(sequences)).abs().max() < 0.1

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = eagerq.QuantStub(), eagerq.DeQuantStub()
            self.up, self.norm, self.act = nn.ConvTranspose2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.Hardswish()
            self.group, self.gate = nn.GroupNorm(2, 4), nn.Sigmoid()
            self.attention, self.fc = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)

        def forward(self, x: Any) -> Any:
            x = self.gate(self.group(self.act(self.norm(self.up(self.quant(x))))))
            x = x.flatten(2).permute(2, 0, 1)
            return self.dequant(self.fc(self.attention(x, x, x)[0]))

    images = torch.rand(2, 3, 4, 4)
    layers = Layers().eval()
    layers.qconfig = eagerq.QConfig(eagerq.default_observer, eagerq.default_weight_observer)
    prepared = eagerq.prepare(layers)
    expected = prepared(images)
    int8 = eagerq.convert(prepared)
    assert (int8(images) - expected).abs().max() < 0.2

    learned = eagerq.QuantWrapper(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).train()
    learned.qconfig = eagerq.QConfig(
        eagerq.LearnableFakeQuantize,
        eagerq.LearnableFakeQuantize.with_args(quant_min=-128, quant_max=127, dtype=torch.int8),
    )
    learned = eagerq.prepare_qat(learned)
    x = torch.randn(8, 4)
    learned(x)
    for module in learned.modules():
        if isinstance(module, eagerq.LearnableFakeQuantize):
            module.enable_param_learning()
    learned(x).sum().backward()
    trained = learned.eval()(x)
    assert (eagerq.convert(learned, as_trained=True)(x) - trained).abs().max() < 0.2

    plain = eagerq.QuantWrapper(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).eval()
    equalization.equalize(plain, [["module.0", "module.2"]])
    plain.qconfig = eagerq.default_qconfig
    calibrated = eagerq.prepare(plain)
    calibrated(x)
    int8 = eagerq.convert(calibrated)
    bias_correction.bias_correction(plain, int8, [(x,)])
    assert numeric_suite.compare_weights(plain.state_dict(), int8.state_dict())
    assert numeric_suite.compare_model_stub(plain, int8, {nn.Linear}, x)
    assert utils.get_quant_type(eagerq.default_dynamic_qconfig).name == "DYNAMIC"


def main(arithmetic: str, directory: str) -> None:
    import torch

    warnings.filterwarnings("error", module="eagerq")  # torch's compiler warns about torch
    without = arithmetic == "without"
    poison(torch, without)
    check_the_poison(torch)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    import eagerq

    ours = [getattr(eagerq.scheme, name) for name in CONSTANTS if name != "qscheme"]
    assert {isinstance(constant, eagerq.scheme.QScheme) for constant in ours} == {without}
    walk(torch, eagerq, Path(directory))
    side_roads(torch, eagerq)
    print("walked")


# --- in this one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["with", "without"])
def test_the_road_without_what_torch_is_deleting(arithmetic: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, __file__, arithmetic, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("walked\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
