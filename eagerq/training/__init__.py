"""Help with the training between ``prepare_qat`` and ``convert``; each part stands on its own."""

from eagerq.training.calibration import Calibration, calibrate, default_eval_fn
from eagerq.training.loop import History, fine_tune
from eagerq.training.schedule import QATSchedule

__all__ = [
    "Calibration",
    "History",
    "QATSchedule",
    "calibrate",
    "default_eval_fn",
    "fine_tune",
]
