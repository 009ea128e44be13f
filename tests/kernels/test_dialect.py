"""A dialect replaces doors and functions of QTensors, in one thread and for a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import eagerq
from eagerq import kernels
from eagerq.kernels.dispatch import Dialect, dialect, speaking

Q = eagerq.quantize_per_tensor(torch.tensor([-1.0, 2.0]), 0.1, 128, torch.uint8)


def _added(*args: Any) -> str:
    return "added"


def _rectified(x: Tensor) -> str:
    return "rectified"


WORDS = Dialect({"add": _added}, {torch.relu: _rectified})
ARGUMENTS = (*(Q.int_repr(), 0.1, 128), *(Q.int_repr(), 0.1, 128), *(0.2, 128, torch.uint8, 0, 255))


def _said() -> list[bool]:
    """Whether doors and functions speak the dialect."""
    return [kernels.add(*ARGUMENTS) == "added", isinstance(torch.relu(Q), str)]


def test_doors_and_functions_are_replaced_for_a_time() -> None:
    assert _said() == [False, False]
    with speaking(WORDS):
        assert _said() == [True, True]
        assert torch.sigmoid(Q).q_zero_point() == 0  # what the dialect has no word for stays
    assert _said() == [False, False]


def test_only_the_thread_that_asked_for_it_speaks_it() -> None:
    with ThreadPoolExecutor(1) as other:
        with speaking(WORDS):
            assert other.submit(_said).result() == [False, False]
            assert other.submit(dialect).result() is None
            assert _said() == [True, True]
        with other.submit(speaking, WORDS).result():  # made there, entered here
            assert other.submit(_said).result() == [False, False]
            assert _said() == [True, True]


def test_two_threads_speak_one_each() -> None:
    mine = Dialect({"add": lambda *args: "mine"}, {})
    with ThreadPoolExecutor(1) as other:
        theirs = speaking(WORDS)
        other.submit(theirs.__enter__).result()
        with speaking(mine):
            assert kernels.add(*ARGUMENTS) == "mine"
            assert other.submit(_said).result() == [True, True]
        assert _said() == [False, False]
        assert other.submit(_said).result() == [True, True]
        other.submit(theirs.__exit__, None, None, None).result()
        assert other.submit(_said).result() == [False, False]


def test_an_error_leaves_no_dialect_behind() -> None:
    def fail() -> None:
        assert dialect() is WORDS
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), speaking(WORDS):
        fail()
    assert dialect() is None
    assert _said() == [False, False]
