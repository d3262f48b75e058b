"""The dynamic loss scale of train.precision=fp16."""

from typing import Any

from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from megaeva.config.schema import MAX_LOSS_SCALE, Fp16Section


class LossScale(DynamicGradScaler):
    """One scale for all towers: halved by each overflow, doubled after `growth_interval` steps in a row without one.

    mcore updates its scaler with each tower's gradients; then those of the next would be divided by another scale than
    the loss was multiplied by. Here `settle` updates once, when all are known. Source: DeepSpeed's DynamicLossScaler;
    EVA-02's hysteresis of 2 (asuka/utils.py) lets the first overflow after a doubling pass, here each one halves.

    Attributes:
        value: of the next step.
        before: of the last one.
        overflowed: whether that had an overflow, on any rank.
    """

    def __init__(self, section: Fp16Section) -> None:
        super().__init__(section.initial_scale, section.min_scale, 2.0, 0.5, section.growth_interval, hysteresis=1)
        # As fp32 holds them, so that the smallest is known again.
        self.min_value, self.value = self.min_scale.item(), self._scale.item()
        self.before = self.value
        self.overflowed = False

    @property
    def collapsed(self) -> bool:
        """Whether there was an overflow at the smallest scale."""
        return self.overflowed and self.before <= self.min_value

    def update(self, found_inf: bool) -> None:
        """mcore's call for each tower: nothing."""

    def settle(self, overflowed: bool) -> None:
        """Set the scale of the next step; all ranks pass the same."""
        super().update(overflowed)
        self._scale.clamp_(max=MAX_LOSS_SCALE)  # a run that trains only the logit scale never overflows
        self.before, self.value, self.overflowed = self.value, self._scale.item(), overflowed

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"scale": self.value, "growth_tracker": self._growth_tracker}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue as the run that saved it."""
        self._scale.fill_(state_dict["scale"])
        self.value = self.before = state_dict["scale"]
        # mcore waits for equality, which a smaller growth_interval than that run's may have missed.
        self._growth_tracker = min(state_dict["growth_tracker"], self.growth_interval - 1)
        self.overflowed = False
