"""Inductor's int8 kernels, from ``eagerq.pt2e``'s export of the same int8 model and from torchao's own graph flow."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends import Backend, Deployed, eagerq
from .base import Peer


def _compiled(graph: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
    """Compiled now, with weights as constants: without, Inductor packs none of them."""
    from torch._inductor import config

    run: Callable[[Tensor], object] = torch.compile(graph)
    with config.patch(freezing=True), torch.no_grad():
        run(example)
    return lambda images: _without_grad(run, images)


def _without_grad(run: Callable[[Tensor], object], images: Tensor) -> object:
    """In the mode that it was compiled in."""
    with torch.inference_mode(False), torch.no_grad():
        return run(images)


def _exported(model: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
    from eagerq.pt2e import export
    from eagerq.pt2e.inductor import load_patterns

    load_patterns()
    return _compiled(export(model, (example,), activation_dtype=torch.uint8).module(), example)


def _torchao(model: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao, about its own files
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(model, (example,)).module(), quantizer)
        with torch.no_grad():
            prepared(example)
        return _compiled(convert_pt2e(prepared), example)


_NEEDS = ("torch._inductor",)

PEERS = (
    Peer("Inductor (eagerq.pt2e)", "inference", _NEEDS, lambda: Deployed("Inductor", eagerq(), _exported), slow=True),
    Peer(
        "Inductor (torchao)",
        "inference",
        (*_NEEDS, "torchao"),
        lambda: Deployed("Inductor (torchao)", Backend(), _torchao),
        slow=True,
    ),
)
