"""What every test gets: two threads, a seed, a device to run on, and torch.ao to compare with."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import hypothesis
import pytest
import torch

# What torch.ao says about itself. Nothing wider: a warning of eagerq's own must still fail the
# test that compares the two. Regular expressions, matched at the start of the message.
AO_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    (r"torch\.ao\.quantization is deprecated", DeprecationWarning),
    (r"torch\.quantize_per_tensor, torch\.quantize_per_channel and other", UserWarning),
    # Its observers, on reduced ranges and on data they have not seen; ours speak in other words.
    (r"Please use quant_min and quant_max to specify the range for observers", UserWarning),
    (r"must run observer before calling calculate_qparams", UserWarning),
    # torch.save and torch.load on quantized tensors.
    (r"TypedStorage is deprecated", UserWarning),
)

# What Dynamo causes: it makes one to trace an autograd function.
DYNAMO_WARNINGS: tuple[tuple[str, type[Warning]], ...] = ((".*should not be instantiated", DeprecationWarning),)


@dataclass(frozen=True)
class Oracle:
    """The packages of torch.ao that eagerq is measured against, under short names."""

    quantization: ModuleType
    qat: ModuleType
    quantized: ModuleType
    dynamic: ModuleType
    quantizable: ModuleType
    intrinsic: ModuleType
    intrinsic_qat: ModuleType
    intrinsic_quantized: ModuleType

    @staticmethod
    @contextmanager
    def quiet() -> Iterator[None]:
        """Silence what torch.ao says about itself; tests that take ``ao`` are already silenced."""
        with warnings.catch_warnings():
            for message, category in AO_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category)
            yield


ORACLE_PACKAGES = {
    "quantization": "torch.ao.quantization",
    "qat": "torch.ao.nn.qat",
    "quantized": "torch.ao.nn.quantized",
    "dynamic": "torch.ao.nn.quantized.dynamic",
    "quantizable": "torch.ao.nn.quantizable",
    "intrinsic": "torch.ao.nn.intrinsic",
    "intrinsic_qat": "torch.ao.nn.intrinsic.qat",
    "intrinsic_quantized": "torch.ao.nn.intrinsic.quantized",
}


class TorchGenerator:
    """Lets hypothesis seed and restore torch's generator around each of its examples.

    Without it a failing example could not be replayed: it would have depended on how many random
    tensors the examples before it had drawn. So ``torch.randn`` gives every example the same
    values; a test that wants them to vary draws a seed.
    """

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


torch_generator = TorchGenerator()  # hypothesis keeps only a weak reference to it
hypothesis.register_random(torch_generator)

# The everyday profile draws the same examples for everybody, so a failure is about the change at
# hand; the thorough one looks for new ones: HYPOTHESIS_PROFILE=thorough python -m pytest
_slow_is_fine = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
hypothesis.settings.register_profile(
    "everyday",
    max_examples=25,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=_slow_is_fine,
)
hypothesis.settings.register_profile(
    "thorough", max_examples=500, deadline=None, print_blob=True, suppress_health_check=_slow_is_fine
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "everyday"))

# Two, whatever the machine: reductions split over threads differ in their last bits.
torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        wanted = getattr(item, "fixturenames", ())
        expected = [*(AO_WARNINGS if "ao" in wanted else ()), *(DYNAMO_WARNINGS if "fresh_compiler" in wanted else ())]
        for message, category in expected:
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}:{category.__name__}"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that remembers nothing, neither before the test nor after it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="session", params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def ao() -> Iterator[Oracle]:
    """torch.ao with the engine whose integers eagerq reproduces, or a skip when it has gone."""
    with Oracle.quiet():
        try:
            packages = {name: importlib.import_module(path) for name, path in ORACLE_PACKAGES.items()}
        except ImportError as error:
            pytest.skip(f"torch.ao is the oracle of this test, and torch {torch.__version__} lacks it: {error}")
        engines = torch.backends.quantized.supported_engines
        if "onednn" not in engines:
            pytest.skip(f"the oracle's engine is onednn, and this build of torch has only {engines}")
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = "onednn"
    yield Oracle(**packages)
    torch.backends.quantized.engine = before
