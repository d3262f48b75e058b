"""What the trainer asks of a task: its towers, a step, and a summary. The trainer never asks which task it is."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from megaeva.checkpoint.weights import LoadReport
from megaeva.data.batch import Batch
from megaeva.parallel.grid import Grid
from megaeva.parallel.wrap import Tower


class Task(Protocol):
    """Model, loss and batch contract of one kind of training.

    Attributes:
        towers: trained modules in a fixed order; also what checkpoints hold.
        grid: the data grid: its data ranks are the blocks of ranks that read the same samples
            (`config.topology.sharing_ranks`), its tp axis the ranks of a block. Each tower has its own grid.
        start_reports: where each weight came from.
    """

    towers: Sequence[Tower]
    grid: Grid
    start_reports: list[LoadReport]

    def step(self, batch: Batch, seed_pass: Callable[[int], None], loss_scale: float = 1.0) -> Tensor:
        """The loss over the global batch (0-dim, detached, equal on every rank); gradients are left reduced.

        Args:
            batch: the samples of this data block, on the CPU; a tower takes what it needs to the device.
            seed_pass: (number of a microbatch in the global batch) -> None; seeds what its pass draws.
            loss_scale: gradients are those of loss_scale times the loss.
        """
        ...

    def after_step(self) -> dict[str, float]:
        """What must follow an optimizer step (clamping), and figures for the log."""
        ...

    def evaluate(self) -> dict[str, Any]:
        """Evaluation results by set name; empty when the task has none. All ranks call it."""
        ...
