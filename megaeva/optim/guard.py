"""What becomes of an optimizer step, from its loss and gradient norm: made, skipped, rolled back, or the run's last."""

import math
from collections import deque
from statistics import median
from typing import Any, Literal, NamedTuple

from megaeva.config.schema import SpikeGuardSection
from megaeva.optim.loss_scale import LossScale

_NOT_FINITE = "it must be finite; lower the learning rate or beta2"


class Verdict(NamedTuple):
    """What to do with a step.

    Attributes:
        action: update; rescale: no update, and go on at the smaller loss scale that is set already; skip or roll_back:
            a spike, see SpikeGuardSection; stop: the run ends.
        fault: why, but for update.
    """

    action: Literal["update", "rescale", "skip", "roll_back", "stop"]
    fault: str = ""


class StepGuard:
    """Judges every step, alike on all ranks as they give it the same numbers. No collective, no tensor.

    A spike is a loss more than (loss_ratio - 1) |m| above m, the median of the last `window` accepted losses
    (loss_ratio times it where losses are positive), or a gradient norm above grad_norm_ratio times the norms' median,
    or one of the two that is not finite. Until `window` steps are accepted there is none, and a number that is not
    finite stops the run, as it does without a guard. Each phase of the data has a median of its own: other data have
    another loss. An overflow of fp16 is neither: it skips a step, and stops the run at the smallest scale.

    Attributes:
        num_skipped: steps of the run so far that made no update.
    """

    def __init__(self, section: SpikeGuardSection | None, scale: LossScale | None = None) -> None:
        self.num_skipped = 0
        self._section, self._scale = section, scale
        window = section.window if section else 0
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)
        self._num_spikes, self._last_spike = 0, -1
        self._phase = ""

    def judge(self, step: int, loss: float, grad_norm: float, phase: str = "") -> Verdict:
        """The verdict on `step`, whose numbers count among the accepted ones if it is `update`.

        Args:
            phase: of the data, any name; in another one than before, the accepted steps are forgotten.
        """
        if phase != self._phase:
            self._losses.clear()
            self._norms.clear()
            self._phase = phase
        verdict = self._verdict(step, loss, grad_norm)
        if verdict.action != "update":
            self.num_skipped += 1
            return verdict
        self._losses.append(loss)
        self._norms.append(grad_norm)
        return verdict

    def figures(self) -> dict[str, float]:
        """For the log: how many steps made no update, where there may be some, and fp16's scale of the step."""
        figures: dict[str, float] = {}
        if self._section or self._scale:
            figures["skipped_steps"] = self.num_skipped
        if self._scale:
            figures["loss_scale"] = self._scale.before
        return figures

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
            "phase": self._phase,
            "num_spikes": self._num_spikes,
            "last_spike": self._last_spike,
            "num_skipped": self.num_skipped,
            "loss_scale": None if self._scale is None else self._scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue as the run that saved it; None: of a megaeva that did not, as a run that starts."""
        if state is not None:
            self.go_back(state)
            self._num_spikes, self._last_spike = state["num_spikes"], state["last_spike"]
            self.num_skipped = state["num_skipped"]

    def go_back(self, state: dict[str, Any] | None) -> None:
        """To the accepted steps and loss scale of then; spikes since are remembered, or it might never end."""
        if state is not None:
            self._losses = deque(state["losses"], self._losses.maxlen)
            self._norms = deque(state["grad_norms"], self._norms.maxlen)
            self._phase = state.get("phase", "")
            if self._scale is not None and state["loss_scale"] is not None:
                self._scale.load_state_dict(state["loss_scale"])

    def _verdict(self, step: int, loss: float, grad_norm: float) -> Verdict:
        scale, section = self._scale, self._section
        if scale is not None and scale.overflowed and math.isfinite(loss):
            if scale.collapsed:
                return Verdict(
                    "stop",
                    f"the loss scale collapses: gradients overflow fp16 at loss_scale={scale.before:g} too; they must "
                    "be finite at train.fp16.min_scale; lower the learning rate, or use train.precision=bf16",
                )
            return Verdict(
                "rescale", f"gradients overflow fp16 at loss_scale={scale.before:g}; no update, now {scale.value:g}"
            )
        fault = self._spike(loss, grad_norm)
        if section is not None and fault:
            # Steps that a roll back repeats do not count: it may be the same spike every time.
            self._num_spikes = 1 if step - self._last_spike > section.window else self._num_spikes + 1
            self._last_spike = max(step, self._last_spike)
            if self._num_spikes < section.max_spikes:
                return Verdict(section.action, fault)
            return Verdict(
                "stop",
                f"{fault}; it is spike {self._num_spikes} without {section.window} steps between, and "
                f"train.spike_guard.max_spikes={section.max_spikes}; lower the learning rate, or look at the data",
            )
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return Verdict("stop", f"{name}={value}; {_NOT_FINITE}")
        return Verdict("update")

    def _spike(self, loss: float, grad_norm: float) -> str:
        """Why the step is a spike; empty if it is none."""
        section = self._section
        if section is None or len(self._losses) < section.window:
            return ""
        for name, value, before, ratio in (
            ("loss", loss, median(self._losses), section.loss_ratio),
            ("grad_norm", grad_norm, median(self._norms), section.grad_norm_ratio),
        ):
            limit = math.inf if ratio is None else before + (ratio - 1.0) * abs(before)
            if not value <= limit or not math.isfinite(value):
                return f"{name}={value:.6g} is a spike: the median of the last {section.window} steps is {before:.6g}"
        return ""
