"""From a float network to a fine-tuned int8 one, saved and loaded again, on real images.

Handwritten digits (8×8 pixels, part of scikit-learn) are learned by a small convolutional network with
residual additions, batch norm and depthwise layers. Then its road to int8, step by step:

    fuse → prepare_qat → fine_tune → convert → save → load into a new model

At the end stand one table and one picture. Run it with ``python tutorials/quickstart.py``;
``--quick`` trains for a few epochs only.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import eagerq
from eagerq.nn.quantized import FloatFunctional
from eagerq.training import History, QATSchedule, calibrate, fine_tune

SEED = 0
BATCH = 64  # of training, and of the larger latency measurement


# --- 1. The data -------------------------------------------------------------------------------------


def digits() -> tuple[DataLoader, Tensor, Tensor]:
    """Batches to train on; images (597, 1, 8, 8) from 0 to 1 and labels to test with."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target)
    train, test = train_test_split(range(len(labels)), train_size=1200, stratify=found.target, random_state=SEED)
    batches = DataLoader(
        TensorDataset(images[train], labels[train]),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,  # batch norm has no use for a last batch of a few images
        generator=torch.Generator().manual_seed(SEED),
    )
    return batches, images[test], labels[test]


# --- 2. The network ----------------------------------------------------------------------------------
# Ordinary modules, with three concessions to quantization: stubs where int8 begins and ends, additions
# as modules (FloatFunctional), because int8 needs to learn the range of their results, and one module
# for each place where it is used, for the same reason.


class ConvBN(nn.Sequential):
    """A convolution, its batch norm and (mostly) a ReLU: what will be fused into one layer."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, relu=True):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            *([nn.ReLU()] if relu else []),
        )


class Residual(nn.Module):
    """``relu(x + body(x))``."""

    def __init__(self, *body: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.sum = FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum.add_relu(x, self.body(x))


class DigitNet(nn.Module):
    """About 450,000 parameters; images (N, 1, 8, 8) in, ten scores (N, 10) out."""

    def __init__(self):
        super().__init__()
        self.quant = eagerq.QuantStub()
        self.features = nn.Sequential(
            ConvBN(1, 32),
            Residual(ConvBN(32, 32, groups=32), ConvBN(32, 32, kernel=1, relu=False)),  # depthwise
            ConvBN(32, 64, stride=2),
            Residual(ConvBN(64, 64), ConvBN(64, 64, relu=False)),
            ConvBN(64, 64, groups=64),  # depthwise
            ConvBN(64, 128, kernel=1),
            Residual(ConvBN(128, 128), ConvBN(128, 128, relu=False)),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classify = nn.Linear(128, 10)
        self.dequant = eagerq.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.quant(x))
        return self.dequant(self.classify(x.flatten(1)))


# --- 3. The road to int8 -----------------------------------------------------------------------------


def layers_to_fuse(model: nn.Module) -> list[list[str]]:
    """The names of what each ConvBN holds, such as ``["features.0.0", "features.0.1", "features.0.2"]``."""
    return [
        [f"{name}.{number}" for number in range(len(module))]
        for name, module in model.named_modules()
        if isinstance(module, ConvBN)
    ]


def prepare(float_model: nn.Module) -> nn.Module:
    """A copy ready for quantization-aware training: fused, rounding as int8 would, still in float."""
    model = copy.deepcopy(float_model).train()
    eagerq.fuse_modules_qat(model, layers_to_fuse(model), inplace=True)
    # With VNNI instructions int8 kernels can use all 256 values of an activation. Processors without
    # them add products up in 16 bits, which overflow: "x86" gives up one bit there.
    backend = "onednn" if torch.cpu._is_vnni_supported() else "x86"
    model.qconfig = eagerq.get_default_qat_qconfig(backend)
    return eagerq.prepare_qat(model, inplace=True)


def convert(prepared: nn.Module) -> nn.Module:
    """The int8 model.

    ``as_trained`` keeps the scales and ranges that fine-tuning ended with, so that int8 is what was
    trained. Without it ``convert`` does as torch.ao does, and computes some of them anew.
    """
    return eagerq.convert(prepared.eval(), as_trained=True)


def load_int8(path: Path) -> nn.Module:
    """What another program would do: build the same structure, then load the numbers."""
    model = convert(prepare(DigitNet()))
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


# --- 4. Training -------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    batches: DataLoader,
    evaluate: Callable[[nn.Module], dict[str, float]],
    epochs: int,
    rate: float,
    schedule: QATSchedule | None = None,
) -> History:
    """The same loop for float and for int8; your own serves as well."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    return fine_tune(
        model,
        batches,
        optimizer=optimizer,
        loss_fn=cross_entropy,
        epochs=epochs,
        schedule=schedule,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs),
        evaluate=evaluate,
    )


def train_quantized(
    float_model: nn.Module,
    batches: DataLoader,
    evaluate: Callable[[nn.Module], dict[str, float]],
    epochs: int,
) -> tuple[nn.Module, History]:
    """The float model, fine-tuned so that rounding to int8 costs it nothing."""
    model = prepare(float_model)
    # Sensible ranges to start from, so that the first steps need not undo what the float model knows.
    calibrate(model, batches)
    # Once weights have adapted, the ranges are fixed, and then the batch norm statistics that are
    # folded into the weights: the last epochs train exactly what int8 will compute.
    schedule = QATSchedule(model, observer_off=epochs // 2, bn_freeze=epochs // 2 + 1)
    return model, train(model, batches, evaluate, epochs, rate=0.005, schedule=schedule)


# --- 5. Measuring ------------------------------------------------------------------------------------


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).argmax(1)


def share(equal: Tensor) -> float:
    return equal.float().mean().item()


def latencies(models: dict[str, nn.Module], images: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds of a forward pass; the models take turns, so that they share any noise."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(repeats + 5):
            for name, model in models.items():
                start = time.perf_counter()
                model(images)
                if number >= 5:  # the first few warm up
                    seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}


def frozen(model: nn.Module, *examples: Tensor) -> nn.Module:
    """The int8 model with its forward planned for inputs of the examples' shapes; the numbers stay the same."""
    first, *others = examples
    planned = eagerq.freeze(model, (first,))
    for example in others:
        planned.add((example,))
    return planned


def fused_float(model: nn.Module) -> nn.Module:
    """The float model at its fastest: batch norm folded into the convolutions, channels last."""
    fused = eagerq.fuse_modules(copy.deepcopy(model).eval(), layers_to_fuse(model))
    return fused.to(memory_format=torch.channels_last)


def outputs_by_layer(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Any]:
    """What the named modules return for some images."""
    outputs: dict[str, Any] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
        for name in names
    ]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return outputs


def layer_errors(fake_quant: nn.Module, int8: nn.Module, images: Tensor) -> dict[str, float]:
    """The mean distance between each layer's output while trained and in int8, in int8 steps.

    Both models see the same images, so a layer inherits the errors of those before it. Most outputs are
    the very same integers. The last layer stands out because its input is an average: int8 rounds it,
    and training did not, since pooling has no range of its own to learn.
    """
    names = [
        name
        for name, module in int8.named_modules()
        if isinstance(module, Residual) or (hasattr(module, "scale") and not hasattr(module, "add_relu"))
    ]
    trained = outputs_by_layer(fake_quant, names, images)
    computed = outputs_by_layer(int8, names, images)
    return {
        name: ((trained[name] - output.dequantize()).abs().mean() / output.q_scale()).item()
        for name, output in computed.items()
    }


# --- 6. Telling --------------------------------------------------------------------------------------


def table(figures: dict[str, float], single_ms: dict[str, float], batch_ms: dict[str, float]) -> str:
    def row(*cells: str) -> str:
        return "{:<18}{:>12}{:>14}{:>14}{:>16}".format(*cells).rstrip()

    def compare(name: str, before: float, after: float, form: str) -> str:
        return row(name, format(before, form), "", format(after, form), f"{after / before:.2f} ×")

    accuracies = [figures[f"{name}_accuracy"] for name in ("float", "qat", "int8")]
    change = 100 * (figures["int8_accuracy"] - figures["float_accuracy"])
    lines = [
        row("", "float", "fake-quant", "int8, loaded", "int8 to float"),
        row("accuracy", *(f"{accuracy:.2%}" for accuracy in accuracies), f"{change:+.2f} points"),
        row("same predictions", "", "", f"{figures['agreement']:.2%}", "(as fake-quant)"),
        compare("file, bytes", figures["float_bytes"], figures["int8_bytes"], ",.0f"),
        compare("1 image, ms", single_ms["float"], single_ms["int8"], ".2f"),
        compare("  frozen", single_ms["float"], single_ms["frozen"], ".2f"),
        compare(f"{BATCH} images, ms", batch_ms["float"], batch_ms["int8"], ".2f"),
        compare("  frozen", batch_ms["float"], batch_ms["frozen"], ".2f"),
    ]
    return "\n".join(lines)


def draw(path: Path, histories: dict[str, History], errors: dict[str, float]) -> None:
    """Two panels: the losses of each epoch, and how far int8 is from what was trained."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = 1
    for number, (name, history) in enumerate(histories.items()):
        epochs = range(first, first + len(history.losses))
        test_losses = [metrics["test_loss"] for metrics in history.metrics]
        left.plot(epochs, history.losses, color=f"C{number}", label=f"{name}, training")
        left.plot(epochs, test_losses, color=f"C{number}", linestyle=":", label=f"{name}, test")
        first += len(history.losses)
    left.set(title="Loss", xlabel="epoch", ylabel="cross entropy", yscale="log")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend()
    right.barh(list(errors), list(errors.values()), color="C2")
    right.invert_yaxis()
    right.set(title="int8 against fake-quant, layer by layer", xlabel="mean difference of outputs, int8 steps")
    right.set_xscale("log")  # a layer without a bar has no difference at all
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train, quantize, save and reload a small network.")
    parser.add_argument("--quick", action="store_true", help="a few epochs only: less accurate")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    parser.add_argument("--picture", type=Path, metavar="PATH", default=Path("quickstart.png"))
    return parser.parse_args()


def main() -> None:
    options = arguments()
    epochs, fine_epochs, repeats = (3, 3, 20) if options.quick else (12, 6, 200)
    torch.manual_seed(SEED)
    # So small a network gains little from a second thread; with one, the figures are those of any machine.
    torch.set_num_threads(1)
    batches, images, labels = digits()

    def evaluate(model: nn.Module) -> dict[str, float]:
        scores = model(images)
        return {
            "test_loss": cross_entropy(scores, labels).item(),
            "accuracy": share(scores.argmax(1) == labels),
        }

    model = DigitNet()
    print(f"training {sum(parameter.numel() for parameter in model.parameters()):,} parameters in float")
    histories = {"float": train(model, batches, evaluate, epochs, rate=0.05)}
    model.eval()
    print("fine-tuning with fake quantization")
    fake_quant, histories["fake-quant"] = train_quantized(model, batches, evaluate, fine_epochs)

    with tempfile.TemporaryDirectory() as folder:
        float_file, int8_file = Path(folder, "float.pt"), Path(folder, "int8.pt")
        torch.save(model.state_dict(), float_file)
        torch.save(convert(fake_quant).state_dict(), int8_file)  # plain tensors only
        int8 = load_int8(int8_file)
        sizes = {"float_bytes": float_file.stat().st_size, "int8_bytes": int8_file.stat().st_size}

    predicted = {name: predict(m, images) for name, m in (("qat", fake_quant), ("int8", int8), ("float", model))}
    one, many = (images[:count].contiguous(memory_format=torch.channels_last) for count in (1, BATCH))
    contenders = {"float": fused_float(model), "int8": int8, "frozen": frozen(int8, one, many)}
    single_ms, batch_ms = (latencies(contenders, some, repeats) for some in (one, many))
    figures: dict[str, float] = {
        "float_accuracy": share(predicted["float"] == labels),
        "qat_accuracy": share(predicted["qat"] == labels),
        "int8_accuracy": share(predicted["int8"] == labels),
        "agreement": share(predicted["qat"] == predicted["int8"]),
        **sizes,
        "float_ms": batch_ms["float"],
        "int8_ms": batch_ms["int8"],
    }
    print(f"\n{table(figures, single_ms, batch_ms)}\n")
    print("latency: median on one thread; the float model has its batch norms folded in as well;")
    print("frozen: the int8 model after eagerq.freeze, which plans its forward for these shapes")
    draw(options.picture, histories, layer_errors(fake_quant, int8, images))
    print(f"picture: {options.picture}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
