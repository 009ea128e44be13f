"""Convolutions in groups of one input, some of which oneDNN gets wrong, padding or none."""

from __future__ import annotations

import pytest
import torch
from kernels.calls import expected
from kernels.test_onednn import conv_call

from eagerq import kernels
from eagerq.kernels import onednn

MANY = (17, 24, 33, 48, 96)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("groups", [2, 3, 8])
def test_many_outputs(groups: int, padding: int) -> None:
    for outputs in MANY:
        call = conv_call((1, groups, 4, 6), (groups * outputs, 1, 1, 2), padding=[0, padding])
        for _ in range(2):
            assert torch.equal(kernels.conv(*call.values()), expected(call))


@pytest.mark.parametrize("outputs", [2, 8, 16])
def test_flat_volumes(outputs: int) -> None:
    for groups, taps in ((2, (4, 1, 2)), (4, (2, 2, 2)), (3, (3, 3, 3))):
        for batch in (1, 2):
            call = conv_call((batch, groups, 1, 4, 5), (groups * outputs, 1, *taps), padding=[taps[0] - 1, 0, 1])
            assert torch.equal(kernels.conv(*call.values()), expected(call))


@pytest.mark.skipif(not onednn.available() or onednn._saturates(), reason="needs oneDNN on a processor with VNNI")
def test_others_stay_fast() -> None:
    for x_shape, weight_shape, padding in (
        ((1, 1, 4, 6), (48, 1, 2, 2), [1, 1]),  # one group
        ((1, 8, 4, 6), (128, 1, 2, 2), [1, 1]),  # 16 outputs each
        ((1, 4, 4, 6), (96, 2, 2, 2), [1, 1]),  # two inputs each
        ((1, 4, 2, 4, 4), (8, 1, 2, 2, 2), [1, 0, 0]),
        ((1, 4, 1, 4, 4), (8, 1, 1, 2, 2), [0, 1, 1]),
    ):
        call = conv_call(x_shape, weight_shape, padding=padding)
        result = onednn.conv(*call.values())
        assert result is not NotImplemented
        assert torch.equal(result, expected(call))
