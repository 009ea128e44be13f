"""From eager models to Q/DQ graphs, and the graph flow for models that can be traced."""

from eagerq.fake_quantize import (
    FakeQuantize,
    FakeQuantizeBase,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    LearnableFakeQuantize,
    default_dynamic_fake_quant,
    default_fake_quant,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from eagerq.observer import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    NoopObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
    UniformQuantizationObserverBase,
)
from eagerq.pt2e.derived import (
    DerivedObserverOrFakeQuantize,
    ObserverOrFakeQuantize,
    ObserverOrFakeQuantizeConstructor,
)
from eagerq.pt2e.export_utils import (
    allow_exported_model_train_eval,
    disallow_exported_model_train_eval,
    model_is_exported,
    move_exported_model_to_eval,
    move_exported_model_to_train,
)
from eagerq.pt2e.exporting import export
from eagerq.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e

__all__ = [
    # from eager models
    "export",
    # the graph flow
    "convert_pt2e",
    "prepare_pt2e",
    "prepare_qat_pt2e",
    # modes of graphs
    "allow_exported_model_train_eval",
    "disallow_exported_model_train_eval",
    "model_is_exported",
    "move_exported_model_to_eval",
    "move_exported_model_to_train",
    # observers
    "DerivedObserverOrFakeQuantize",
    "FixedQParamsObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NoopObserver",
    "ObserverBase",
    "ObserverOrFakeQuantize",
    "ObserverOrFakeQuantizeConstructor",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "RecordingObserver",
    "ReuseInputObserver",
    "UniformQuantizationObserverBase",
    # fake quantizers
    "FakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "LearnableFakeQuantize",
    "default_dynamic_fake_quant",
    "default_fake_quant",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
]
