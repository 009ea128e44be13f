"""What the contenders are asked to do: a training step, and int8 inference."""

from collections.abc import Callable
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


def training_step(
    backend: Backend,
    net: str,
    frozen: bool = False,
    layout: torch.memory_format = torch.contiguous_format,
) -> Callable[[], None]:
    """One SGD step, batch 8 of 3x128x128.

    Args:
        frozen: as late in training (the float step stays as it is).
        layout: of the images and the weights.
    """
    torch.manual_seed(0)
    model = backend.prepare(backend.fuse(NETS[net](backend)))
    model.to(memory_format=layout)  # type: ignore[call-overload]
    images, labels = torch.randn(8, 3, 128, 128).contiguous(memory_format=layout), torch.randint(CLASSES, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # observers have seen data before they are switched off
    if frozen:
        backend.freeze(model)
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


def inference(backend: Backend, net: str, batch: int) -> Callable[[], object]:
    """One forward of a converted classifier on images of 224x224."""
    images = channels_last(torch.randn(batch, 3, 224, 224))
    run = backend.deploy(classifier(backend, net), images)

    def forward() -> object:
        with torch.inference_mode():
            return run(images)

    return forward
