"""Work in C, where a compiler was at hand when eagerq was installed."""

from eagerq.native.conv import PackedConv, conv, conv_ready, linear, linear_dynamic
from eagerq.native.embedding import embedding, embedding_bag
from eagerq.native.layers import layer_norm, look_up, quantize_dynamic
from eagerq.native.library import available, serves
from eagerq.native.lstm import Requantized, States, lstm
from eagerq.native.normalizing import Batch, Norm, batch_norm, batch_norm_backward, fold, fold_backward_, norms
from eagerq.native.pointwise import add, dequantize, max_pool, mul, quantize, spatial_mean
from eagerq.native.program import Step, runner, step
from eagerq.native.recording import Bound, recording
from eagerq.native.recurrent import recur
from eagerq.native.training import (
    Passing,
    Rounding,
    Running,
    fake_quantize,
    masked,
    masked_rows,
    masked_rows_,
    rectify_,
    room_for_bits,
    round_over,
    sum_of,
    unpacked,
)

__all__ = [
    # whether
    "available",
    "serves",
    # integers
    "Bound",
    "PackedConv",
    "Requantized",
    "States",
    "Step",
    "add",
    "conv",
    "conv_ready",
    "dequantize",
    "embedding",
    "embedding_bag",
    "layer_norm",
    "linear",
    "linear_dynamic",
    "look_up",
    "lstm",
    "max_pool",
    "mul",
    "quantize",
    "quantize_dynamic",
    "recording",
    "runner",
    "recur",
    "spatial_mean",
    "step",
    # training
    "Batch",
    "Norm",
    "Passing",
    "Rounding",
    "Running",
    "batch_norm",
    "batch_norm_backward",
    "fake_quantize",
    "fold",
    "fold_backward_",
    "masked",
    "masked_rows",
    "masked_rows_",
    "norms",
    "rectify_",
    "room_for_bits",
    "round_over",
    "sum_of",
    "unpacked",
]
