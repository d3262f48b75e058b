"""The parts of a run that have data of their own (`data.phases`): which steps each has, and its rules. No torch."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from megaeva.config.problem import Problem
from megaeva.config.schema import Config


class Phase(NamedTuple):
    """One part of a run; a run without `data.phases` is one part.

    Attributes:
        title: "phase 2 of 3"; empty for a run without phases.
        key: where its shards are named: "data.phases.1", or "data".
        first_step: counted from 0.
        steps: optimizer steps.
        cfg: the recipe as if this phase's data were all it has, with a seed of the phase's own: shards that an earlier
            phase read too come in another order and other crops.
    """

    title: str
    key: str
    first_step: int
    steps: int
    cfg: Config

    @property
    def samples(self) -> int:
        """Samples of its steps."""
        return self.steps * self.cfg.train.global_batch_size

    def line(self) -> str:
        """What it is, for the log; steps are counted from 1 there."""
        data, vision = self.cfg.data, self.cfg.model.vision
        frames = f", {data.frames} frames of each video" if data.frames > 1 else ""
        return (
            f"{self.title}: steps {self.first_step + 1} to {self.first_step + self.steps}, {self.samples:,} samples in "
            f"whole steps, patch dropout {vision.patch_dropout:g}{frames}, {', '.join(data.train)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for the manifest."""
        return {
            "first_step": self.first_step,
            "steps": self.steps,
            "samples": self.samples,
            "train": list(self.cfg.data.train),
            "patch_dropout": self.cfg.model.vision.patch_dropout,
            "frames": self.cfg.data.frames,
            "seed": self.cfg.seed,
        }


def run_phases(cfg: Config) -> tuple[Phase, ...]:
    """The phases of a run in their order.

    One begins at the first whole step at which all samples of the phases before it have been seen, or would be with the
    rest of less than one step: samples / train.global_batch_size, rounded down.
    """
    if not cfg.data.phases:
        return (Phase("", "data", 0, cfg.train.total_steps, cfg),)
    phases: list[Phase] = []
    for index, (section, (first, end)) in enumerate(zip(cfg.data.phases, _bounds(cfg), strict=True)):
        vision = cfg.model.vision
        if section.patch_dropout is not None:
            vision = vision.model_copy(update={"patch_dropout": section.patch_dropout})
        own = cfg.model_copy(
            update={
                "seed": cfg.seed + index,
                "model": cfg.model.model_copy(update={"vision": vision}),
                "data": cfg.data.model_copy(update={"train": section.train, "frames": section.frames, "phases": ()}),
            }
        )
        title = f"phase {index + 1} of {len(cfg.data.phases)}"
        phases.append(Phase(title, f"data.phases.{index}", first, end - first, own))
    return tuple(phases)


def _bounds(cfg: Config) -> list[tuple[int, int]]:
    """First step and the step after the last of each phase."""
    bounds, samples, first = [], 0, 0
    for section in cfg.data.phases:
        samples += section.samples
        end = samples // cfg.train.global_batch_size
        bounds.append((first, end))
        first = end
    return bounds


# ----------------------------------------------------------------------------------------------------------- rules


def _one_kind_of_data(cfg: Config) -> Iterator[Problem]:
    if cfg.data.train and cfg.data.phases:
        yield Problem(
            "data.phases", "must be absent beside data.train", "remove one of the two, e.g. with data.phases=[]"
        )
    elif cfg.data.frames > 1 and cfg.data.phases:
        yield Problem("data.frames", "must be 1 beside data.phases", "set frames in the phases that are of videos")
    elif not cfg.data.train and not cfg.data.phases:
        yield Problem("data.train", "must name at least one shard", 'e.g. data.train=["data/emoji/train/*.tar"]')
    for index, phase in enumerate(cfg.data.phases):
        if not phase.train:
            yield Problem(f"data.phases.{index}.train", "must name at least one shard", "name the shards of the phase")


def _phases_fill_the_run(cfg: Config) -> Iterator[Problem]:
    if not cfg.data.phases:
        return
    total = sum(phase.samples for phase in cfg.data.phases)
    if total != cfg.train.total_samples:
        yield Problem(
            "train.total_samples",
            f"must be the sum of data.phases.*.samples, {total}",
            f"set it to {total}, or change a phase",
        )
    for index, (first, end) in enumerate(_bounds(cfg)):
        if end == first:
            yield Problem(
                f"data.phases.{index}.samples",
                f"must make a whole step of train.global_batch_size={cfg.train.global_batch_size}",
                "give the phase more samples or remove it",
            )


def _phases_of_mim(cfg: Config) -> Iterator[Problem]:
    if cfg.task != "mim":
        return
    if cfg.data.frames > 1:
        yield Problem("data.frames", "must be 1 in task=mim, which distils images", "remove it")
    for index, phase in enumerate(cfg.data.phases):
        if phase.patch_dropout:
            yield Problem(
                f"data.phases.{index}.patch_dropout",
                "must be 0 in task=mim, whose encoder runs on all tokens",
                "remove it",
            )
        if phase.frames > 1:
            yield Problem(f"data.phases.{index}.frames", "must be 1 in task=mim, which distils images", "remove it")


PHASE_RULES = (_one_kind_of_data, _phases_fill_the_run, _phases_of_mim)
