"""The quickstart's int8 network, taken to three graph compilers: Inductor, ONNX Runtime and ExecuTorch.

The network of ``quickstart.py`` is trained and converted; then ``eagerq.pt2e.export`` states it as a graph of
float operators between quantize (Q) and dequantize (DQ) nodes, the form in which these compilers find int8 layers:

    convert → export → torch.compile
                     → torch.onnx.export → onnxruntime
                     → executorch's XNNPACK lowering → .pte → executorch's runtime

At the end stand one table (do they say what the eager int8 model says, how large are the files, how fast are they)
and a drawing of the graph. A backend that is not installed is left out. Run it with ``python tutorials/export.py``;
``--quick`` trains for a few epochs only.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import quickstart
import torch
from draw_graph import draw_graph
from quickstart import BATCH, SEED, digits, share
from torch import Tensor, nn

from eagerq.errors import MissingExtraError
from eagerq.pt2e import export
from eagerq.pt2e.inductor import load_patterns
from eagerq.pt2e.onnx import translations

Run = Callable[[Tensor], Tensor]

# Any number of images from 1 to 64. The example has 64: ExecuTorch plans its memory for that many.
SHAPES = ({0: torch.export.Dim("batch", min=1, max=BATCH)},)


# --- 1. The model ------------------------------------------------------------------------------------


def trained(quick: bool, batches: Any, images: Tensor, labels: Tensor) -> tuple[nn.Module, nn.Module]:
    """The float network of the quickstart and its int8 model."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": share(model(images).argmax(1) == labels)}

    epochs, fine_epochs = (3, 3) if quick else (12, 6)
    model = quickstart.DigitNet()
    quickstart.train(model, batches, evaluate, epochs, rate=0.05)
    fake_quant, _ = quickstart.train_quantized(model.eval(), batches, evaluate, fine_epochs)
    return model, quickstart.convert(fake_quant)


# --- 2. The roads ------------------------------------------------------------------------------------
# Each writes the file that one would ship, reads it back, and returns a function that runs it.


def graph(int8: nn.Module, example: Tensor, file: Path) -> Run:
    """The program itself, operator by operator. Nothing is fused, so it is slow: it is what the others start from."""
    torch.export.save(export(int8, (example,), SHAPES), file)
    return torch.export.load(file).module()


def inductor(int8: nn.Module, example: Tensor, file: Path) -> Run:
    """``torch.compile``. Its int8 layers take uint8 activations; freezing lets it pack the weights.

    It compiles anew for each batch size: with one input channel and a batch of any size it mistakes the layout.
    """
    torch.export.save(export(int8, (example,), SHAPES, activation_dtype=torch.uint8), file)
    load_patterns()
    torch._inductor.config.freezing = True
    return torch.compile(torch.export.load(file).module(), dynamic=False)


def onnx(int8: nn.Module, example: Tensor, file: Path) -> Run:
    """ONNX in QDQ form; onnxruntime fuses it to integer layers when it loads the file."""
    import onnxruntime

    how = {"dynamo": True, "verbose": False, "external_data": False, "custom_translation_table": translations()}
    torch.onnx.export(export(int8, (example,), SHAPES), (), file, **how)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def executorch(int8: nn.Module, example: Tensor, file: Path) -> Run:
    """A program for phones; XNNPACK takes the whole of it, with int8 activations."""
    import executorch.kernels.quantized  # noqa: F401  the Q and DQ that XNNPACK leaves over
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    program = export(int8, (example,), SHAPES, activation_dtype=torch.int8)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    file.write_bytes(lowered.to_executorch().buffer)
    _unsafe_reset_threadpool(torch.get_num_threads())
    method = Runtime.get().load_program(file).load_method("forward")
    return lambda images: method.execute([images])[0]


@dataclass(frozen=True)
class Backend:
    """A road, the file at its end, and what has to be there to go it."""

    build: Callable[[nn.Module, Tensor, Path], Run]
    file: str
    modules: tuple[str, ...] = ()
    compiler: bool = False
    since: tuple[int, int] = (0, 0)  # of torch
    remedy: str = ""

    def is_there(self) -> bool:
        if torch.torch_version.TorchVersion(torch.__version__) < self.since:
            return False
        compiled = not self.compiler or any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
        return compiled and all(find_spec(module) for module in self.modules)


BACKENDS = {
    "graph": Backend(graph, "graph.pt2"),
    "Inductor": Backend(inductor, "inductor.pt2", compiler=True, remedy="install a C++ compiler, such as g++"),
    "ONNX Runtime": Backend(
        onnx, "model.onnx", ("onnx", "onnxscript", "onnxruntime"), remedy="pip install 'eagerq[onnx]'"
    ),
    "ExecuTorch": Backend(
        executorch, "model.pte", ("executorch",), since=(2, 13), remedy="pip install 'eagerq[executorch]' 'torch>=2.13'"
    ),
}


@contextmanager
def only_our_words() -> Iterator[None]:
    """The compilers warn about each other's deprecated parts, and of optional packages; none of it matters here."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


# --- 3. Measuring ------------------------------------------------------------------------------------


@torch.inference_mode()
def scores(run: Run, images: Tensor) -> Tensor:
    return torch.cat([run(part) for part in images.split(BATCH)])


def compare(found: Tensor, int8: Tensor, step: float) -> dict[str, Any]:
    """How many predictions are the same, and by how many int8 steps each score differs: none, 1, 2, more."""
    steps = ((found - int8) / step).abs().round().clamp(max=3).int().flatten()
    return {
        "agreement": share(found.argmax(1) == int8.argmax(1)),
        "steps": (torch.bincount(steps, minlength=4) / steps.numel()).tolist(),
    }


def measure(
    runs: dict[str, Run], int8: nn.Module, images: Tensor, labels: Tensor, repeats: int
) -> dict[str, dict[str, Any]]:
    """For each contender its accuracy, its agreement with ``int8`` and its latencies; they take turns."""
    expected = scores(int8, images)
    figures: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        found = scores(run, images)
        figures[name] = {"accuracy": share(found.argmax(1) == labels)}
        figures[name] |= compare(found, expected, int8.classify.scale)
    for key, batch in (("single_ms", images[:1]), ("batch_ms", images[:BATCH])):
        for name, milliseconds in quickstart.latencies(runs, batch, repeats).items():
            figures[name][key] = milliseconds
    return figures


# --- 4. Telling --------------------------------------------------------------------------------------


def table(figures: dict[str, dict[str, Any]]) -> str:
    row = "{:<14}{:>10}{:>12}{:>9}{:>8}{:>8}{:>8}{:>13}{:>10}{:>11}".format
    lines = [
        row("", "accuracy", "same as", "scores", "1 step", "2", "more", "file,", "1 image,", f"{BATCH} images,"),
        row("", "", "eager int8", "equal", "off", "", "", "bytes", "ms", "ms"),
    ]
    for name, found in figures.items():
        steps = ["" if name == "float" else f"{part:.1%}" for part in found["steps"]]
        agreement, size = f"{found['agreement']:.2%}", f"{found['bytes']:,}"
        times = (f"{found['single_ms']:.2f}", f"{found['batch_ms']:.2f}")
        lines.append(row(name, f"{found['accuracy']:.2%}", agreement, *steps, size, *times))
    return "\n".join(line.rstrip() for line in lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a small int8 network to three graph compilers.")
    parser.add_argument("--quick", action="store_true", help="a few epochs only: less accurate")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    parser.add_argument("--picture", type=Path, metavar="PATH", default=Path("export.png"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    batches, images, labels = digits()
    print("training, in float and with fake quantization")
    model, int8 = trained(options.quick, batches, images, labels)

    runs: dict[str, Run] = {"float": quickstart.fused_float(model), "eager int8": int8}
    with tempfile.TemporaryDirectory() as folder, only_our_words():
        files = {name: Path(folder, f"{name}.pt") for name in runs}
        for file, network in zip(files.values(), (model, int8), strict=True):
            torch.save(network.state_dict(), file)
        for name, backend in BACKENDS.items():
            if backend.is_there():
                print(f"{name}: export and compile")
                file = Path(folder, backend.file)
                try:
                    runs[name], files[name] = backend.build(int8, images[:BATCH], file), file
                except MissingExtraError as error:
                    print(f"{name}: left out; {error}")
            else:
                print(f"{name}: left out; {backend.remedy}")
        figures = measure(runs, int8, images, labels, repeats=20 if options.quick else 200)
        for name, file in files.items():
            figures[name]["bytes"] = file.stat().st_size

    print(f"\n{table(figures)}\n")
    print("scores: the ten outputs of each test image, in steps of the int8 output's scale")
    print("latency: median on one thread, the contenders taking turns")
    draw_graph(export(int8, (images[:1],)), options.picture, "The digits network as a Q/DQ graph")
    print(f"picture: {options.picture}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
