"""The loader of a run whose data changes on the way (`data.phases`)."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megaeva.config.phases import Phase, run_phases
from megaeva.config.schema import Config
from megaeva.data.batch import Batch
from megaeva.data.builder import check_enough_shards
from megaeva.data.loader import Loader
from megaeva.data.shards import expand_shards
from megaeva.errors import DataError

logger = logging.getLogger(__name__)


class PhasedLoader:
    """A `Loader` for each phase of the recipe, one after the other; a run without phases has one.

    A phase is over when the batches of its steps have been given out; the last one has no end. So a run that goes back
    to a checkpoint, but not in its data, still gives each phase before the last its samples. A phase begins at the
    start of its own shards, in as many streams as the run began with: global batches stay the same on any layout.
    """

    def __init__(self, cfg: Config, *, data_rank: int, data_size: int, num_patches: int) -> None:
        """Finds the shards of the first phase; `preflight` looks at those of all.

        Raises:
            DataError: shards are missing or empty.
        """
        self._phases, self._is_first = run_phases(cfg), data_rank == 0
        self._open = partial(Loader, data_rank=data_rank, data_size=data_size, num_patches=num_patches)
        self._index = self._given = 0  # phase of the last batch; batches given out in it
        self._current = self._open(self.phase.cfg)
        self._waited = 0.0  # in phases that are over, as the next
        self._dropped: Counter[str] = Counter()

    @property
    def phase(self) -> Phase:
        """That of the last batch given out, before it the first."""
        return self._phases[self._index]

    @property
    def phases(self) -> list[dict[str, Any]]:
        """All of them, for the manifest; none for a run without `data.phases`."""
        return [phase.as_dict() for phase in self._phases if phase.title]

    @property
    def figures(self) -> dict[str, float]:
        """The number of the phase, from 1, for the metrics of a run that has phases."""
        return {"phase": self._index + 1} if self.phase.title else {}

    @property
    def shards(self) -> list[Path]:
        """Those of all phases."""
        return [path for phase in self._phases for path in expand_shards(phase.cfg.data.train)]

    @property
    def wait_seconds(self) -> float:
        """Time the caller has spent waiting in `next`, in total."""
        return self._waited + self._current.wait_seconds

    @property
    def dropped(self) -> Counter[str]:
        """As of `Loader`, over all phases."""
        return self._dropped + self._current.dropped

    def __iter__(self) -> "PhasedLoader":
        return self

    def __next__(self) -> Batch:
        if self._given >= self.phase.steps and self._index + 1 < len(self._phases):
            self._begin_next()
        batch = next(self._current)
        self._given += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch given out, as of `Loader`."""
        mine = {"phase": self._index, "batches": self._given, "dropped_before": dict(self._dropped)}
        return self._current.state_dict() | mine

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """As of `Loader`. Phases that are over, or have not begun, may differ from those of the run that saved.

        Raises:
            DataError: as of `Loader`; or the run was in a phase that the recipe has not, or a phase to come has fewer
                shards than the run has streams.
        """
        first = states[0]
        index = first.get("phase", 0)
        if index >= len(self._phases):
            raise DataError(
                f"the saved data position is in phase {index + 1}; data.phases has {len(self._phases)}; "
                "resume with the phases of that run"
            )
        current = self._open(self._phases[index].cfg)
        current.load_state_dicts(states)
        for phase in self._phases[index + 1 :]:
            try:
                check_enough_shards(len(expand_shards(phase.cfg.data.train)), *current.streams)
            except DataError as error:
                raise DataError(f"{phase.key}: {error}") from error
        self.close()
        self._current, self._index, self._given = current, index, first["batches"]
        self._dropped = Counter()
        if self._is_first:  # the sum over data blocks is the run's
            for state in states:
                self._dropped.update(state["dropped_before"])

    def close(self) -> None:
        """As of `Loader`."""
        self._current.close()

    def _begin_next(self) -> None:
        past, following = self._current, self._phases[self._index + 1]
        self._current = self._open(following.cfg, streams=past.streams)
        past.close()
        self._waited += past.wait_seconds
        self._dropped += past.dropped
        self._index, self._given = self._index + 1, 0
        if self._is_first:
            logger.info("%s", following.line())
