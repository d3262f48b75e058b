"""`megaeva bench step --profile`: what the parts of our training step take, by timers around the calls it makes."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megaeva.bench.captions import typical_tokens
from megaeva.bench.compare import drain, row
from megaeva.bench.step import MegatronStep, Part, Precision, example_batch, only, recipe
from megaeva.config.schema import ModelSection
from megaeva.parallel import schedule
from megaeva.parallel.runtime import start, stop

OptimizerName = Literal["adamw", "lamb"]

PARTS = ("forward", "loss", "backward", "reduction", "gradient norm", "update", "zeroing", "other")
OPTIMIZER = ("gradient norm", "update")
"""With the fp32 copies of the gradients that the norm is taken of, and the clipping."""
_SAMPLES = ("forward", "loss", "backward")
LIMITS = (0.05, 0.03)
PUBLISHED_BATCH = 1024
"""Samples of a step on one GPU in EVA02-CLIP-L-14's recipe; B-16's has twice as many."""


class Clock:
    """Seconds by part; a part that is called inside another is not counted in that one."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device.type
        self._running = ["other"]
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block as `name`."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def _turn(self) -> None:
        drain(self._device)
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def one_step(self, step: Callable[[], object]) -> dict[str, float]:
        """Seconds of the parts of one call."""
        drain(self._device)
        self.seconds.clear()
        self._since = time.perf_counter()
        step()
        self._turn()
        return dict(self.seconds)


@contextmanager
def timed(step: MegatronStep, clock: Clock) -> Iterator[None]:
    """Inside, the calls that `step` makes count as parts on the clock."""
    places: list[tuple[Any, str, str]] = [
        *((tower.ddp, "forward", "forward") for tower in (step.task.vision, step.task.text)),
        (step.task, "loss", "loss"),
        (torch.Tensor, "backward", "backward"),
        (schedule, "zero_gradients", "zeroing"),
        (schedule, "reduce_gradients", "reduction"),
        (step.optimizer, "prepare", "gradient norm"),
        (step.optimizer, "update", "update"),
        (step.optimizer, "drop", "zeroing"),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(_counted(owner, name, part, clock))
        yield


@contextmanager
def _counted(owner: Any, name: str, part: str, clock: Clock) -> Iterator[None]:
    function, own = getattr(owner, name), name in vars(owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.part(part):
            return function(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)


@dataclass(frozen=True)
class StepProfile:
    """What `profile_step` measured.

    Attributes:
        rounds: seconds of each part, of each step.
        batch_size: samples of a step.
        num_parameters: of the model.
        captions: what the text tower was fed.
    """

    rounds: tuple[dict[str, float], ...]
    batch_size: int
    num_parameters: int
    captions: str

    def share(self, *parts: str) -> float:
        """Of a step, median of the rounds."""
        return statistics.median(sum(r.get(part, 0.0) for part in parts) / sum(r.values()) for r in self.rounds)

    def seconds(self, *parts: str) -> float:
        """Median of the rounds."""
        return statistics.median(sum(r.get(part, 0.0) for part in parts) for r in self.rounds)

    def samples_for(self, share: float) -> float:
        """Samples a rank and step from which on the optimizer takes at most `share` of both.

        Computed, with a time of the samples that grows with their number, and an update that is not sharded.
        """
        return (1 / share - 1) * self._optimizer_per_sample

    def share_at(self, num_samples: int) -> float:
        """The optimizer's share with so many samples a rank and step; computed likewise."""
        return self._optimizer_per_sample / (self._optimizer_per_sample + num_samples)

    @property
    def _optimizer_per_sample(self) -> float:
        """Time of the optimizer over that of one sample."""
        return self.seconds(*OPTIMIZER) / (self.seconds(*_SAMPLES) / self.batch_size)

    def report(self, command: str) -> list[str]:
        """Sentences, and the row for the log's table of profiles."""
        step_ms = 1e3 * self.seconds(*PARTS)
        needed = " and ".join(f"{100 * share:g} % from {self.samples_for(share):.0f}" for share in LIMITS)
        cells = [f"{100 * self.share(part):.2f} %" for part in PARTS]
        millions = f"{self.num_parameters / 1e6:.0f} M parameters"
        return [
            f"a step of {self.batch_size} samples takes {step_ms:.0f} ms; {millions}; {self.captions}",
            *(f"  {part:<14} {1e3 * self.seconds(part):9.1f} ms  {100 * self.share(part):6.2f} %" for part in PARTS),
            f"the optimizer (gradient norm, update): {100 * self.share(*OPTIMIZER):.2f} %",
            f"computed, if forward, loss and backward grow with the samples: {needed} samples a rank and step, "
            f"{100 * self.share_at(PUBLISHED_BATCH):.2f} % at {PUBLISHED_BATCH}",
            row(f"`{command}`", f"{step_ms:.0f}", *cells, f"{100 * self.share(*OPTIMIZER):.2f} %"),
        ]


def profile_step(
    model: ModelSection,
    *,
    batch_size: int,
    precision: Precision,
    part: Part,
    optimizer: OptimizerName,
    num_rounds: int,
) -> StepProfile:
    """Times the parts of a contrastive step of one rank, the batch in memory, after one step that is not counted."""
    model = only(model, part)
    runtime = start("auto")
    try:
        token_BL, captions = typical_tokens(model.text, batch_size)
        batch = example_batch(model, token_BL).to(runtime.device)
        step = MegatronStep(recipe(model, batch_size, precision, optimizer), runtime, batch)
        step()
        clock = Clock(runtime.device)
        with timed(step, clock):
            rounds = tuple(clock.one_step(step) for _ in range(num_rounds))
        num_parameters = sum(p.numel() for tower in step.task.towers for p in tower.module.parameters())
        return StepProfile(rounds, batch_size, num_parameters, captions)
    finally:
        stop()
