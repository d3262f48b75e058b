"""The learning rate as a function of the step: linear warm-up, then a cosine."""

import math
from typing import Any, Protocol

from megaeva.config.schema import Config
from megaeva.optim.param_groups import peak_rate


class _HasGroups(Protocol):
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


def rate_share(step: int, *, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """The share of the peak rate at `step` (0 for the first), in [min_ratio, 1] after warm-up.

    Warm-up gives (step + 1) / warmup_steps; then min_ratio + (1 - min_ratio) * (1 + cos(pi * t)) / 2 with t the part
    of the remaining steps that is done. Source: open_clip and EVA-CLIP training/scheduler.py `cosine_lr`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class LearningRate:
    """Writes the rate of a step into an optimizer's groups; a pure function of the step, so nothing needs saving."""

    def __init__(self, optimizer: _HasGroups, cfg: Config) -> None:
        self.optimizer = optimizer
        self.peaks = {tower: peak_rate(tower, cfg.optim)[0] for tower in ("vision", "text", "scale", "student")}
        self.shape = {
            "warmup_steps": cfg.optim.warmup_steps,
            "total_steps": cfg.train.total_steps,
            "min_ratio": cfg.optim.min_lr_ratio,
        }

    def set(self, step: int) -> dict[str, float]:
        """Set every group's `lr` for `step` and return {tower: rate before layer decay} of the trained towers.

        All ranks call it before the step; a rank that holds no shard of a tower still reports its rate.
        """
        share = rate_share(step, **self.shape)  # type: ignore[arg-type]
        rates: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            rates[group["tower"]] = rate = share * self.peaks[group["tower"]]
            group["lr"] = rate * group["lr_mult"]
        return rates
