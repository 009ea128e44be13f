"""Where a quantized model parts from its float one: weights, outputs, and each layer on equal input."""

from eagerq.numeric_suite.comparisons import (
    compare_model_outputs,
    compare_model_stub,
    get_matching_activations,
    prepare_model_outputs,
    prepare_model_with_stubs,
)
from eagerq.numeric_suite.loggers import Logger, OutputLogger, Shadow, ShadowLogger, get_logger_dict, remove_loggers
from eagerq.numeric_suite.weights import compare_weights, compute_error

__all__ = [
    # loggers
    "Logger",
    "OutputLogger",
    "Shadow",
    "ShadowLogger",
    "get_logger_dict",
    "remove_loggers",
    # comparisons
    "compare_model_outputs",
    "compare_model_stub",
    "compare_weights",
    "compute_error",
    "get_matching_activations",
    "prepare_model_outputs",
    "prepare_model_with_stubs",
]
