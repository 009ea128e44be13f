"""ONNX Runtime, on the ONNX file that ``eagerq.pt2e`` makes of the same int8 model."""

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backends import Backend, Deployed, eagerq
from .base import Peer


def _deploy(model: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
    import onnxruntime

    from eagerq.pt2e import export
    from eagerq.pt2e.onnx import translations

    program = export(model, (example,))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads wait for work by spinning, and would take the processors from whoever's turn comes next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter and onnxscript about themselves
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            program, (), path, dynamo=True, verbose=False, custom_translation_table=translations(), external_data=False
        )
        session = onnxruntime.InferenceSession(path, options)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.contiguous().numpy()})


def _load() -> Backend:
    return Deployed("onnxruntime", eagerq(), _deploy)


PEERS = (Peer("onnxruntime", "inference", ("onnx", "onnxscript", "onnxruntime"), _load),)
