"""Inductor's knowledge of Q/DQ graphs on x86: torch's own up to 2.13, torchao's since torch gave it away."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

from eagerq.errors import MissingExtraError

__all__ = ["load_patterns"]


def load_patterns() -> None:
    """See to it that ``torch.compile`` makes int8 layers of exported programs.

    Up to torch 2.13 it knows how; later, torchao's quantizer for x86 teaches it when it is imported.  Freezing
    (``torch._inductor.config.freezing = True``) is needed besides.

    Raises:
        MissingExtraError: when torchao is needed and not installed.
    """
    if hasattr(importlib.import_module("torch._inductor.fx_passes.quantization"), "_register_qconv_weight_prepack"):
        return
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtraError(
            "this release of torch leaves int8 layers to torchao, which is not installed",
            remedy="pip install 'eagerq[torchao]'",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao, about its own files
        importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
