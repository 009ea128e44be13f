"""A door picks its implementation by device, and refuses one with another signature."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from eagerq.kernels.dispatch import Kernel

_numbers = count()


def scaled(x: Tensor, factor: float) -> Tensor:
    return x * factor


def like(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def door(reference: Callable[..., Tensor] = scaled, fake: Callable[..., Tensor] = like) -> Kernel:
    """A new operator at each call: torch keeps their names for ever."""
    return Kernel(f"test_{next(_numbers)}(Tensor x, float factor) -> Tensor", reference, fake)


def test_reference_without_others() -> None:
    assert door()(torch.ones(2), 3.0).tolist() == [3, 3]


def test_first_that_takes_the_arguments() -> None:
    kernel, asked = door(), []

    def picky(x: Tensor, factor: float) -> Any:
        asked.append("picky")
        return NotImplemented if factor > 10 else x * 0

    def easy(x: Tensor, factor: float) -> Any:
        asked.append("easy")
        return NotImplemented if factor > 20 else x * 0 + 1

    kernel.register("cpu", picky)
    kernel.register("cpu", easy)
    for factor, wanted, order in ((5.0, 0, ["picky"]), (15.0, 1, ["picky", "easy"]), (25.0, 25, ["picky", "easy"])):
        asked.clear()
        assert kernel(torch.ones(1), factor).tolist() == [wanted]
        assert asked == order
        assert kernel._operator(torch.ones(1), factor).tolist() == [wanted]


def test_other_devices_have_the_reference() -> None:
    kernel = door()
    kernel.register("cuda", lambda x, factor: x / 0)
    assert kernel(torch.ones(1), 2.0).tolist() == [2]
    kernel.register("cpu", lambda x, factor: x * 0)
    assert kernel(torch.ones(1, device="meta"), 2.0).device.type == "meta"
    assert kernel(torch.ones(1), 2.0).tolist() == [0]


def swapped(factor: float, x: Tensor) -> Tensor:
    return x


def renamed(x: Tensor, scale: float) -> Tensor:
    return x


def longer(x: Tensor, factor: float, more: int) -> Tensor:
    return x


@pytest.mark.parametrize("other", [swapped, renamed, longer])
def test_signatures_are_checked(other: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"implementation takes .* schema \['x', 'factor'\]"):
        door(reference=other)
    with pytest.raises(TypeError, match="implementation takes"):
        door(fake=other)
    kernel = door()
    with pytest.raises(TypeError, match=kernel.name):
        kernel.register("cpu", other)
    assert kernel(torch.ones(1), 2.0).tolist() == [2]


@pytest.mark.usefixtures("fresh_compiler")
def test_recorded_when_traced() -> None:
    kernel = door()

    def twice(x: Tensor) -> Tensor:
        return kernel(kernel(x, 2.0), 3.0)

    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    assert torch.compile(twice, fullgraph=True, backend=backend)(torch.ones(1)).tolist() == [6]
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == [kernel._operator] * 2
