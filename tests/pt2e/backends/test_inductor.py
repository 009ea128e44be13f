"""torch.compile of exported programs: oneDNN's int8 kernels in the generated code, and the eager model's numbers."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
import torch
from pt2e.backends.nets import NETS, Classifier, Mobile, Residual, agree, int8
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code
from torch.export import Dim

from eagerq.errors import MissingExtraError
from eagerq.pt2e import export
from eagerq.pt2e.inductor import load_patterns

COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="Inductor needs a C++ compiler"),
    # Inductor about its own way with scales
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),
]

KERNEL = re.compile(r"= torch\.ops\.onednn\.(qconv|qlinear)\w*_pointwise")
# whatever else is called rather than generated, such as a float convolution; comments name operators, too
OTHER = re.compile(r"^ *(?:\w+ = )?((?:extern_kernels|torch\.ops\.(?:aten|mkldnn|mkl))\.\w+)", re.MULTILINE)


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    """Weights as constants: without, Inductor packs none of them. Nothing compiled before is taken again."""
    try:
        load_patterns()
    except MissingExtraError:
        pytest.importorskip("torchao")
    torch._dynamo.reset()
    with config.patch(freezing=True, fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def compiled(graph: nn.Module, images: Tensor) -> tuple[Tensor, str]:
    with torch.no_grad():
        result, codes = run_and_get_code(torch.compile(graph), images)
    return result, "\n".join(codes)


def test_float_layers_would_be_seen() -> None:
    _, code = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), torch.randn(2, 3, 8, 8))
    assert len(OTHER.findall(code)) == 2
    assert not KERNEL.search(code)


@pytest.mark.parametrize("net", NETS)
def test_every_convolution_and_linear_layer_is_an_int8_kernel(net: type[Classifier]) -> None:
    model, images = int8(net)
    program = export(model, (images,), activation_dtype=torch.uint8)
    result, code = compiled(program.module(), images)
    assert len(KERNEL.findall(code)) == net.weighted
    assert not OTHER.findall(code)
    assert agree(result, model, images)


def test_a_range_narrower_than_the_dtype_is_kept() -> None:
    """The kernels fill all of uint8; what was trained with 7 bits is clamped besides."""
    model, images = int8(Mobile, "x86")
    images = 3 * images  # beyond what training has seen
    result, code = compiled(export(model, (images,)).module(), images)
    assert len(KERNEL.findall(code)) == Mobile.weighted
    assert agree(result, model, images)


def test_batches_of_any_size_run_the_same_kernels() -> None:
    model, images = int8(Residual)
    program = export(model, (images,), dynamic_shapes=({0: Dim("batch", min=2)},), activation_dtype=torch.uint8)
    graph = torch.compile(program.module(), dynamic=True)
    with torch.no_grad():
        result, codes = run_and_get_code(graph, images)
        assert len(KERNEL.findall("\n".join(codes))) == Residual.weighted
        with torch.compiler.set_stance("fail_on_recompile"):
            some = graph(images[:5])
    assert agree(result, model, images)
    assert agree(some, model, images[:5])
