"""`megaeva bench fp8`: a chain from weak to strong in several precisions and seeds, beside the same chain in bf16.

Each chain is a loop of its own, all of whose stages have one precision, on one process with one thread. The same
command again goes on where it stopped: a loop skips its finished stages, and here a finished loop is skipped.
"""

import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml

from megaeva.bench.compare import commit_and_machine
from megaeva.config import load_loop
from megaeva.config.schema import LaunchSection, LoopConfig, StageSection
from megaeva.errors import ConfigError, UserError
from megaeva.loop.results import PREFERRED_SET
from megaeva.loop.stages import plan_stages
from megaeva.observability.metrics import read_metrics

# The ends of the towers too: a demo's text tower has two layers, with the recipe's defaults none of them would be FP8.
_FP8 = {
    "train.precision": "fp8",
    "train.fp8.rehearse": True,
    "train.fp8.first_layers_bf16": 0,
    "train.fp8.last_layers_bf16": 0,
}
REFERENCE = "bf16"
PRECISIONS: Mapping[str, Mapping[str, object]] = {
    "bf16": {"train.precision": "bf16"},
    "fp32": {"train.precision": "fp32"},
    "fp8_delayed": _FP8 | {"train.fp8.recipe": "delayed"},
    "fp8_current": _FP8 | {"train.fp8.recipe": "current"},
}
LIMIT = 0.01
"""Largest difference of a precision's mean recall, mean of the seeds, from the reference's; 1 is all."""


@dataclass(frozen=True)
class Chain:
    """One loop: a precision and a seed.

    Attributes:
        content: its recipe.
        stages: names of its training jobs, in their order; also folders below `run_dir`.
        student: name of the one whose recall counts.
    """

    precision: str
    seed: int
    content: LoopConfig
    stages: tuple[str, ...]
    student: str

    @property
    def run_dir(self) -> Path:
        """The loop's folder; its recipe is written beside it."""
        return Path(self.content.run_dir)

    @property
    def is_finished(self) -> bool:
        """Whether it has its results."""
        return (self.run_dir / "results.json").exists()


def plan_chains(recipe: Path, precisions: Sequence[str], seeds: Sequence[int], run_dir: Path) -> list[Chain]:
    """All loops in the order they start: every precision of a seed before the next seed, the reference first.

    Controls of the recipe are left out.

    Raises:
        ConfigError: the recipe is wrong or has a precision that a tower cannot take; a precision that is not known or
            the reference missing.
    """
    unknown = [name for name in precisions if name not in PRECISIONS]
    if unknown or REFERENCE not in precisions:
        raise ConfigError(
            f"--precisions {','.join(precisions)} must be some of {', '.join(PRECISIONS)}, {REFERENCE} among them, "
            "with which the others are compared; e.g. --precisions bf16,fp8_delayed."
        )
    base = load_loop(recipe)
    chains = []
    for seed in seeds:
        for name in PRECISIONS:
            if name in precisions:
                content = _in_precision(base, recipe, name, seed, run_dir)
                stages = plan_stages(content, recipe)
                student = next(stage.name for stage in reversed(stages) if stage.role == "clip")
                chains.append(Chain(name, seed, content, tuple(stage.name for stage in stages), student))
    return chains


def _in_precision(base: LoopConfig, recipe: Path, precision: str, seed: int, run_dir: Path) -> LoopConfig:
    def stage(section: StageSection) -> StageSection:
        # By its whole path, as the chain's own recipe lies elsewhere.
        path = str((recipe.parent / section.recipe).resolve())
        return StageSection(recipe=path, set={**section.set, **PRECISIONS[precision]})

    teacher = base.teacher
    if teacher.stage is not None:
        teacher = teacher.model_copy(update={"stage": stage(teacher.stage)})
    rounds = tuple(
        part.model_copy(update={"distil": stage(part.distil), "clip": stage(part.clip), "controls": {}})
        for part in base.rounds
    )
    return LoopConfig(
        run_dir=str(run_dir / f"{precision}_seed_{seed}"),
        seed=seed,
        launch=LaunchSection(num_processes=1, threads_per_process=1),
        teacher=teacher,
        rounds=rounds,
        report=False,
    )


def run_chains(chains: Sequence[Chain], num_jobs: int) -> None:
    """Runs those that are not finished, `num_jobs` at a time; prints when one starts and ends, the rest is in its log.

    Raises:
        UserError: one failed; the others that run are ended, and go on with the next call.
    """
    waiting = [chain for chain in chains if not chain.is_finished]
    if len(waiting) < len(chains):
        print(f"{len(chains) - len(waiting)} of {len(chains)} chains finished earlier", flush=True)
    jobs: list[tuple[Chain, subprocess.Popen[bytes], float]] = []
    previous = signal.signal(signal.SIGTERM, _exit)  # by itself it would leave the loops running
    try:
        while waiting or jobs:
            while waiting and len(jobs) < num_jobs:
                chain = waiting.pop(0)
                jobs.append((chain, _start(chain), time.monotonic()))
                print(f"{chain.run_dir}: started", flush=True)
            time.sleep(0.2)
            for job in list(jobs):
                chain, process, started_at = job
                if (code := process.poll()) is None:
                    continue
                jobs.remove(job)
                if code:
                    raise UserError(
                        f"{chain.run_dir} ended with exit code {code}; it must train to its end: read {_log(chain)}, "
                        "mend the cause and run the same command again, which goes on."
                    )
                minutes = (time.monotonic() - started_at) / 60
                print(f"{chain.run_dir}: finished in {minutes:.1f} min", flush=True)
    finally:
        for _, process, _ in jobs:
            process.terminate()  # a loop passes it on: its stage saves
        for _, process, _ in jobs:
            process.wait()
        signal.signal(signal.SIGTERM, previous)


def _exit(signum: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _start(chain: Chain) -> "subprocess.Popen[bytes]":
    file = chain.run_dir.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(json.loads(chain.content.model_dump_json()), sort_keys=False))
    command = [sys.executable, "-m", "megaeva.cli", "loop", str(file)]
    with _log(chain).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _log(chain: Chain) -> Path:
    return chain.run_dir.with_suffix(".log")


# --------------------------------------------------------------------------------------------------------- the figures


def measured(chains: Sequence[Chain]) -> dict[str, Any]:
    """What finished chains came to.

    Returns:
        {"date", "commit", "machine", "set", "seeds", "precisions": {name: {"mean_recall": {seed: share of 1},
        "mean": over the seeds, "minus_reference": of the means, "spread_of_differences": sample standard deviation
        over seeds, within each seed, "loss": {stage: {seed: {step: loss}}}}}}
    """
    results: dict[str, Any] = commit_and_machine() | {
        "set": PREFERRED_SET,
        "seeds": sorted({chain.seed for chain in chains}),
        "precisions": {},
    }
    for chain in chains:
        rows = json.loads((chain.run_dir / "results.json").read_text(encoding="utf-8"))
        entry = results["precisions"].setdefault(chain.precision, {"mean_recall": {}, "loss": {}})
        entry["mean_recall"][str(chain.seed)] = rows["student"]["mean_recall"]
        for stage in chain.stages:
            lines = read_metrics(chain.run_dir / stage)
            curve = {str(int(line["step"])): round(line["loss"], 5) for line in lines if "loss" in line}
            entry["loss"].setdefault(stage, {})[str(chain.seed)] = curve
    reference = results["precisions"][REFERENCE]["mean_recall"]
    for entry in results["precisions"].values():
        differences = [recall - reference[seed] for seed, recall in entry["mean_recall"].items()]
        entry["mean"] = statistics.fmean(entry["mean_recall"].values())
        entry["minus_reference"] = statistics.fmean(differences)
        entry["spread_of_differences"] = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return results


def within_limit(results: Mapping[str, Any]) -> bool:
    """Whether every precision's mean recall is within LIMIT of the reference's."""
    return all(abs(entry["minus_reference"]) <= LIMIT for entry in results["precisions"].values())


def table_lines(results: Mapping[str, Any], command: str) -> list[str]:
    """A sentence, then the rows for benchmarks/log.md; recall in percent, differences in points."""
    seeds = ", ".join(map(str, results["seeds"]))
    lines = [
        f"mean recall on {results['set']} of the student, in percent, of seeds {seeds}; every precision "
        f"within {100 * LIMIT:g} point of {REFERENCE}: {'yes' if within_limit(results) else 'NO'}"
    ]
    for name, entry in results["precisions"].items():
        each = " ".join(f"{100 * recall:.1f}" for recall in entry["mean_recall"].values())
        difference = f"{100 * entry['minus_reference']:+.2f} ± {100 * entry['spread_of_differences']:.2f}"
        last = {
            stage: statistics.fmean(list(curve.values())[-1] for curve in curves.values())
            for stage, curves in entry["loss"].items()
        }
        losses = ", ".join(f"{stage.rsplit('/', 1)[-1]} {loss:.4f}" for stage, loss in last.items())
        cells = (results["date"], results["commit"], f"`{command}`", name, each, f"{100 * entry['mean']:.2f}")
        lines.append("| " + " | ".join((*cells, difference, losses, results["machine"])) + " |")
    return lines


def draw_curves(results: Mapping[str, Any], path: Path) -> None:
    """Loss of every stage by precision, mean of the seeds, as a picture; below it the difference from the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {
        name: {stage: _mean_curve(seeds) for stage, seeds in entry["loss"].items()}
        for name, entry in results["precisions"].items()
    }
    stages = list(curves[REFERENCE])
    figure, axes = pyplot.subplots(2, len(stages), figsize=(4 * len(stages), 5), sharex="col", squeeze=False)
    for column, stage in enumerate(stages):
        reference = curves[REFERENCE][stage]
        for name, of_stage in curves.items():
            steps = list(of_stage[stage])
            axes[0, column].plot(steps, list(of_stage[stage].values()), label=name, linewidth=1)
            differences = [of_stage[stage][step] - reference[step] for step in steps]
            axes[1, column].plot(steps, differences, label=name, linewidth=1)
        axes[0, column].set_title(stage.rsplit("/", 1)[-1])
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel(f"loss - {REFERENCE}'s")
    axes[0, 0].legend()
    figure.suptitle(f"The emoji chain by precision, mean of seeds {', '.join(map(str, results['seeds']))}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _mean_curve(seeds: Mapping[str, Mapping[str, float]]) -> dict[int, float]:
    first, *others = seeds.values()
    return {int(step): statistics.fmean([loss, *(other[step] for other in others)]) for step, loss in first.items()}
