"""The averages of a run's weights (optim.ema_decay) read in place of the weights."""

from pathlib import Path

from megaeva.checkpoint.pieces import AVERAGE
from megaeva.checkpoint.torch_dist import Reader
from megaeva.errors import CheckpointError


class AveragedReader(Reader):
    """A checkpoint whose weights are their averages over the run, fp32; what was frozen has none and is as it is."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        CheckpointError: as `Reader`, or the checkpoint has no averages.
        """
        super().__init__(folder)
        averages = {key.removeprefix(AVERAGE): key for key in self.infos if key.startswith(AVERAGE)}
        if not averages:
            raise CheckpointError(
                f"{folder} has no averaged weights; it must be of a run that keeps them; leave --ema out, or train "
                "with e.g. optim.ema_decay=0.9999."
            )
        self._records |= {name: self._records[key] for name, key in averages.items()}
        self.infos = {**self.infos, **{name: self.infos[key] for name, key in averages.items()}}
        self.weights = {name: self.infos[name] for name in self.weights}


def checkpoint_reader(folder: Path, *, averaged: bool) -> Reader:
    """Of a checkpoint's weights, or of their averages. Raises as the two do."""
    return AveragedReader(folder) if averaged else Reader(folder)
