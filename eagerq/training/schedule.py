"""What to fix when, in the course of quantization-aware training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from eagerq.errors import CheckpointError, InvalidArgumentError, InvalidConfigError
from eagerq.fake_quantize import FakeQuantizeBase, disable_observer, enable_observer
from eagerq.intrinsic.qat import BatchNormMixin, freeze_bn_stats
from eagerq.training.batches import check_count

__all__ = ["QATSchedule"]


class QATSchedule:
    """Fixes ranges, then batch norm statistics, as quantization-aware training goes on.

    Call :meth:`step` at the end of each epoch (or step), as with torch's learning rate schedulers.
    At the end of fine-tuning the model then trains with exactly the numbers that int8 will use.
    The two may come in either order: torchvision's recipe freezes batch norm first.

    Args:
        model: prepared by ``prepare_qat``.
        observer_off: after how many epochs (or steps) observers stop; None for never.
        bn_freeze: after how many the batch norms fused into layers keep their statistics, in
            training mode too; None for never.  Batch norms that are not fused are left alone.
        unit: ``"epoch"`` or ``"step"``: what :meth:`step` counts, for :func:`fine_tune`.

    Raises:
        InvalidConfigError: for a model that is not prepared.
        InvalidArgumentError: for counts that are not integers ≥ 0, or when both are None.

    Example:
        >>> import eagerq
        >>> model = eagerq.QuantWrapper(nn.Linear(3, 2)).train()
        >>> model.qconfig = eagerq.get_default_qat_qconfig("onednn")
        >>> schedule = QATSchedule(eagerq.prepare_qat(model), observer_off=2, bn_freeze=3)
        >>> for epoch in range(4):  # train an epoch, then:
        ...     schedule.step()
        >>> schedule
        QATSchedule(observer_off=2, bn_freeze=3, unit='epoch', count=4)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        observer_off: int | None = None,
        bn_freeze: int | None = None,
        unit: str = "epoch",
    ) -> None:
        if not any(isinstance(module, FakeQuantizeBase) for module in model.modules()):
            raise InvalidConfigError(
                "QATSchedule found no fake quantizers: the model is not prepared",
                module=model,
                remedy="pass what prepare_qat returned",
            )
        self._check(observer_off, bn_freeze, unit, 0)
        self.model = model
        self.observer_off = observer_off
        self.bn_freeze = bn_freeze
        self.unit = unit
        self.count = 0
        self._apply()

    @staticmethod
    def _check(observer_off: Any, bn_freeze: Any, unit: Any, count: Any) -> None:
        if observer_off is None and bn_freeze is None:
            raise InvalidArgumentError(
                "a QATSchedule without observer_off and bn_freeze does nothing",
                remedy="say after how many epochs or steps each happens",
            )
        for name, value in (("observer_off", observer_off), ("bn_freeze", bn_freeze)):
            if value is not None:
                check_count(name, value, 0)
        check_count("count", count, 0)
        if unit not in ("epoch", "step"):
            raise InvalidArgumentError(f'unit must be "epoch" or "step", got {unit!r}')

    @property
    def observers_off(self) -> bool:
        """Whether the time of the observers is over."""
        return self.observer_off is not None and self.count >= self.observer_off

    @property
    def bn_frozen(self) -> bool:
        """Whether batch norm statistics are fixed by now."""
        return self.bn_freeze is not None and self.count >= self.bn_freeze

    def step(self) -> None:
        """Count one more epoch (or step), and do what is due."""
        self.count += 1
        if self.count in (self.observer_off, self.bn_freeze):
            self._apply()

    def _apply(self) -> None:
        if self.observers_off:
            self.model.apply(disable_observer)
        if self.bn_frozen:
            self.model.apply(freeze_bn_stats)

    def state_dict(self) -> dict[str, Any]:
        """The settings and the count, plain Python values."""
        return {name: getattr(self, name) for name in ("observer_off", "bn_freeze", "unit", "count")}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume where :meth:`state_dict` was taken: settings, count, and their effect on the model.

        Load the model's own state first; whether its batch norms are frozen is not part of that.

        Raises:
            CheckpointError: for anything but a state of this class; nothing has changed then.
        """
        try:
            state = {name: state_dict[name] for name in self.state_dict()}
            self._check(**state)
        except (KeyError, InvalidArgumentError) as error:
            raise CheckpointError(
                f"this is not the state of a QATSchedule: {error}", remedy="pass what state_dict() returned"
            ) from error
        were_off, was_frozen = self.observers_off, self.bn_frozen
        self.__dict__.update(state)
        if were_off and not self.observers_off:  # back to an earlier point in the same process
            self.model.apply(enable_observer)
        if was_frozen and not self.bn_frozen:
            for module in self.model.modules():
                if isinstance(module, BatchNormMixin):
                    module.update_bn_stats()
                    module.bn.train(module.training)
        self._apply()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.state_dict().items())
        return f"{type(self).__name__}({settings})"
