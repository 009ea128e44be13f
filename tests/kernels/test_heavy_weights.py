"""Layers with far more weights than pixels, which compiled training computes in another order of memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eagerq import native
from eagerq.functional import fake_quantize
from eagerq.kernels import training_layers

pytestmark = pytest.mark.skipif(not native.available, reason="these operators are the C library's")

operators = torch.ops.eagerq
LAST = torch.channels_last
WINDOW = [1, 1], [1, 1], [1, 1], 1


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("images_last", [False, True])
@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("channels", [5, 16])
def test_gives_what_the_formulas_do(images_last: bool, weights_last: bool, relu: bool, channels: int) -> None:
    x, weight = torch.randn(1, channels, 3, 2), torch.randn(24, channels, 3, 3)
    x = x.contiguous(memory_format=LAST) if images_last else x
    weight = weight.contiguous(memory_format=LAST) if weights_last else weight
    assert training_layers._is_heavy(x, weight) != weights_last
    factor, bias, scale = torch.rand(24) - 0.5, torch.randn(24), torch.rand(24) / 64 + 1e-3
    factor[3] = 0
    zero_point = torch.zeros(24, dtype=torch.int32)
    settings = -128, 127, *WINDOW, relu
    y, above, *copies = operators.convolved(x, weight, factor, bias, scale, zero_point, *settings)
    inputs = [one.clone().requires_grad_() for one in (x, weight, factor, bias)]
    used = torch.where(factor == 0, 1.0, inputs[2]).reshape(-1, 1, 1, 1)
    rounded = fake_quantize(inputs[1] * used, scale, zero_point, -128, 127, 0)
    wanted = F.conv2d(inputs[0], rounded * (inputs[2].reshape(-1, 1, 1, 1) / used), inputs[3], 1, 1)
    wanted = wanted.relu() if relu else wanted
    close(y, wanted.detach())
    assert y.is_contiguous(memory_format=LAST if images_last else torch.contiguous_format)
    for order in (torch.contiguous_format, LAST):
        grad = torch.randn(y.shape).contiguous(memory_format=order)
        expected = torch.autograd.grad(wanted, inputs, grad, retain_graph=True)
        saved = above, x, weight, factor, *copies
        found = operators.convolved_backward(grad, *saved, *settings, [True, True, True])
        for one, other in zip(found, expected, strict=True):
            close(one, other)
        assert found[1].stride() == weight.stride()


def test_is_a_sound_operator() -> None:
    x, weight = torch.randn(1, 16, 3, 3).contiguous(memory_format=LAST), torch.randn(24, 16, 3, 3)
    scale, zero_point = torch.rand(24) / 64 + 1e-3, torch.zeros(24, dtype=torch.int32)
    settings = -128, 127, *WINDOW, True
    values = x, weight, torch.rand(24), None, scale, zero_point, *settings
    torch.library.opcheck(operators.convolved.default, values)
    y, above, *_ = operators.convolved(*values)
    saved = y, above, *values[:3], scale, zero_point, *settings
    torch.library.opcheck(operators.convolved_backward.default, (*saved, [True, True, False]))


def test_observes_what_is_not_finite() -> None:
    x, weight = torch.randn(1, 16, 2, 2), torch.full((4, 16, 3, 3), torch.nan)
    scale, zero_point = torch.full((4,), 0.5), torch.zeros(4, dtype=torch.int32)
    ranges = torch.full((4,), -1.0), torch.full((4,), 1.0), torch.tensor(0)
    arguments = x, weight, torch.ones(4), None, scale, zero_point, -128, 127, *WINDOW, False, *ranges, 0.1, True
    y = operators.observed_convolved(*arguments)[0]
    assert y.isnan().all()
    assert ranges[2] == 1
    assert torch.equal(ranges[1], torch.ones(4))
