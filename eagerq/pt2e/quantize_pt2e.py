"""Quantization of exported graphs: observe or train, then convert to Q/DQ."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from eagerq.errors import InvalidArgumentError, UnsupportedError
from eagerq.pt2e.constant_folding import fold_quantize as fold_constants
from eagerq.pt2e.conv_bn import fold_batch_norms
from eagerq.pt2e.convert import observer_nodes, replace_observers
from eagerq.pt2e.export_utils import disallow_exported_model_train_eval
from eagerq.pt2e.prepare import insert_observers
from eagerq.pt2e.qat import fold_simulated, simulate_folding
from eagerq.pt2e.quantizer.duplicate_dq_pass import DuplicateDQPass
from eagerq.pt2e.quantizer.port_metadata_pass import PortNodeMetaForQDQ
from eagerq.pt2e.quantizer.quantizer import Quantizer
from eagerq.pt2e.rewriting import copied, pruned

__all__ = ["convert_pt2e", "prepare_pt2e", "prepare_qat_pt2e"]

_PREPARED = "eagerq_prepared"  # in a graph module's meta: a quantizer may want no observer at all


def prepare_pt2e(model: GraphModule, quantizer: Quantizer) -> GraphModule:
    """Put observers into an exported model, where a quantizer wants them.

    Args:
        model: what ``torch.export.export(net.eval(), example_inputs).module()`` returns. It stays as it
            is, but the result has the same parameters and buffers.
        quantizer: says which tensors are quantized and how; ours, torchao's or ExecuTorch's.

    Returns:
        A new graph module that observes; run it on data, then give it to :func:`convert_pt2e`.

    Raises:
        InvalidArgumentError: when ``model`` is not an exported model, or has observers already.
        InvalidConfigError: for an annotation that cannot be followed, naming the node.
    """
    model = _annotated(fold_batch_norms(_unprepared_copy(model)), quantizer)
    return _observed(model, quantizer, is_qat=False)


def prepare_qat_pt2e(model: GraphModule, quantizer: Quantizer) -> GraphModule:
    """Put fake quantizers into an exported model, where a quantizer wants them, to train it further.

    A convolution before a batch norm trains with the weight that folding will give it: scaled by
    ``bn.weight / sqrt(running_var + eps)``, fake-quantized, and the result scaled back before the batch norm
    (Krishnamoorthi 2018, arXiv:1806.08342). :func:`convert_pt2e` folds the batch norm.

    Args:
        model: what ``torch.export.export(net.train(), example_inputs).module()`` returns, best with a dynamic batch
            size. It stays as it is, but the result has the same parameters and buffers, which training changes.
        quantizer: as for :func:`prepare_pt2e`, with fake quantizers in its specifications.

    Returns:
        A new graph module to be trained. :func:`eagerq.pt2e.move_exported_model_to_eval` does what ``eval()`` would.

    Raises:
        InvalidArgumentError: when ``model`` is not an exported model, or has observers already.
        InvalidConfigError: for an annotation that cannot be followed, naming the node.
    """
    model = _annotated(_unprepared_copy(model), quantizer)
    simulate_folding(model)
    return _observed(model, quantizer, is_qat=True)


def convert_pt2e(
    model: GraphModule, use_reference_representation: bool = False, fold_quantize: bool = True
) -> GraphModule:
    """Turn a calibrated or trained model into one in Q/DQ form.

    Args:
        model: from :func:`prepare_pt2e` or :func:`prepare_qat_pt2e`, after it has seen data. It stays as it is.
        use_reference_representation: torchao's integer arithmetic written out; not supported.
        fold_quantize: store weights (and all else that is constant before a quantize) as integers.

    Returns:
        A new graph module of float operators between ``quantized_decomposed`` quantize and dequantize,
        for ``torch.export.export`` and what follows it.

    Raises:
        InvalidArgumentError: when ``model`` is not a prepared graph module.
        UnsupportedError: when asked for the reference representation.
    """
    if use_reference_representation:
        raise UnsupportedError(
            "the reference representation is not supported",
            remedy="leave out use_reference_representation: the Q/DQ form says the same",
        )
    model = _working_copy(model)
    if not model.meta.pop(_PREPARED, False) and not observer_nodes(model):
        raise InvalidArgumentError(
            "this graph has no observers", remedy="prepare it with prepare_pt2e, run it on data, then convert it once"
        )
    fold_simulated(model)
    replace_observers(model)
    DuplicateDQPass()(model)
    PortNodeMetaForQDQ()(model)
    if fold_quantize:
        fold_constants(model)
    return disallow_exported_model_train_eval(pruned(model))


def _annotated(model: GraphModule, quantizer: Any) -> GraphModule:
    is_class = isinstance(quantizer, type)
    if is_class or not hasattr(quantizer, "transform_for_annotation"):
        name = f"the class {quantizer.__name__}" if is_class else type(quantizer).__name__
        raise InvalidArgumentError(
            f"got {name}, but a quantizer is needed",
            remedy="pass one, such as XNNPACKQuantizer().set_global(get_symmetric_quantization_config())",
        )
    model = quantizer.transform_for_annotation(model)
    quantizer.annotate(model)
    quantizer.validate(model)
    return model


def _observed(model: GraphModule, quantizer: Quantizer, is_qat: bool) -> GraphModule:
    insert_observers(model, is_qat, callback=getattr(quantizer, "prepare_obs_or_fq_callback", None))
    model.meta[_PREPARED] = True
    return disallow_exported_model_train_eval(model)


def _working_copy(model: Any) -> GraphModule:
    if not isinstance(model, GraphModule):
        raise InvalidArgumentError(
            f"got {type(model).__name__}, but a graph is needed",
            remedy="export the model first: torch.export.export(model.eval(), example_inputs).module()",
        )
    return copied(model)


def _unprepared_copy(model: Any) -> GraphModule:
    model = _working_copy(model)
    if found := observer_nodes(model):
        raise InvalidArgumentError(
            f"this graph has observers already, such as {found[0][0].target}",
            remedy="prepare the exported model once, with a ComposableQuantizer where several quantizers have a say",
        )
    return model
