"""What the contenders are asked to do: a training step, and int8 inference."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .backends import Backend
from .models import CLASSES, NETS, Parts

THREADS = 2
_CALIBRATION_STEPS = 2


def channels_last(x: Tensor) -> Tensor:
    """Images in the layout that convolutions like best."""
    return x.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Where:
    """A device, and what is done there: batches of ``batch`` images of so many pixels, perhaps in autocast."""

    device: str = "cpu"
    batch: int = 8
    pixels: int = 128
    autocast: torch.dtype | None = None

    def run(self, call: Callable[[], object]) -> object:
        """Call, and wait until the device is done."""
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            result = call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return result


HERE = Where()


def training_step(
    backend: Backend,
    net: str,
    frozen: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
    where: Where = HERE,
    compiled: bool = False,
) -> Callable[[], None]:
    """One SGD step.

    Args:
        frozen: as late in training (the float step stays as it is).
        layout: of the images and the weights.
        where: the device, the batch (8 of 3x128x128 if left out) and autocast.
        compiled: by ``torch.compile``, after a first eager step.
    """
    torch.manual_seed(0)
    model = backend.prepare(backend.fuse(NETS[net](backend))).to(where.device)
    model.to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(where.batch, 3, where.pixels, where.pixels, device=where.device)
    images = images.contiguous(memory_format=layout)
    labels = torch.randint(CLASSES, (where.batch,), device=where.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        loss = where.run(lambda: cross_entropy(model(images), labels))
        loss.backward()  # type: ignore[attr-defined]
        where.run(optimizer.step)
        optimizer.zero_grad()

    step()  # observers have seen data before they are switched off
    if frozen:
        backend.freeze(model)
    if compiled:
        model.compile()
    return step


def converted(backend: Backend, net: Callable[[Parts], nn.Module], example: Tensor) -> nn.Module:
    """A net prepared, shown a little data as in training, and converted."""
    torch.manual_seed(0)
    model = backend.prepare(backend.fuse(net(backend)))
    with torch.no_grad():
        for _ in range(_CALIBRATION_STEPS):
            model(torch.randn_like(example))
    return backend.convert(model)


@cache
def classifier(backend: Backend, net: str) -> nn.Module:
    """A converted classifier, made once."""
    return converted(backend, NETS[net], torch.randn(4, 3, 64, 64))


def inference(
    backend: Backend, net: str, batch: int, device: str = "cpu", deployed: bool = True
) -> Callable[[], object]:
    """One forward of a converted classifier on images of 224x224, as it would be deployed or just as it is."""
    where = Where(device, batch, 224)
    images = channels_last(torch.randn(batch, 3, where.pixels, where.pixels, device=device))
    model = classifier(backend, net)
    model = model if device == "cpu" else copy.deepcopy(model).to(device)
    run = backend.deploy(model, images) if deployed else model

    def forward() -> object:
        with torch.inference_mode():
            return where.run(lambda: run(images))

    return forward
