"""Inductor hands our operators images as they are best stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import lowering
from training.compiled import Convolution, prepared

from eagerq import native
from eagerq.kernels import storing, training_layers, training_norm

pytestmark = pytest.mark.skipif(not native.available, reason="these operators are the C library's")


@pytest.mark.usefixtures("fresh_compiler")
def test_images_are_stored_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def noting(ready: Any) -> Any:
        def call(x: Tensor) -> Tensor:
            made: Tensor = ready(x)
            if type(x) is Tensor:  # not while tracing
                seen.append((x is made, made.is_contiguous(memory_format=torch.channels_last)))
            return made

        return call

    for module in (training_layers, training_norm):
        monkeypatch.setattr(module, "ready", noting(module.ready))
    model = prepared(Convolution)
    call = torch.compile(model, fullgraph=True)
    for _ in range(2):
        seen.clear()
        call(torch.randn(4, *Convolution.shape)).sum().backward()
    assert len(seen) >= 6
    assert set(seen) == {(True, True)}


def test_an_inductor_of_other_names_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(lowering, "register_lowering", lambda *names, **how: told.append(names) or (lambda made: made))
    tell = storing._tell.__wrapped__
    tell("batch_norm_of_scaled", images=False)
    assert len(told) == 1
    monkeypatch.setattr(storing, "_OF_IR", ("no_such_name",))
    tell("batch_norm_of_scaled", images=False)
    assert len(told) == 1
