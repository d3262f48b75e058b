"""What the runs of `megaeva bench layouts` came to: recall and losses beside one rank's, the table and the verdict."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megaeva.bench.layouts import ONE_RANK, Layout, Run, is_finished
from megaeva.config.schema import Config
from megaeva.errors import DataError
from megaeva.loop.ledger import Ledger
from megaeva.loop.results import PREFERRED_SET
from megaeva.loop.weak_to_strong import read_eval
from megaeva.observability.metrics import read_metrics

LIMIT_IN_SPREADS = 2.0


@dataclass(frozen=True)
class RunFigures:
    """A finished run beside the 1-rank run of its seed.

    Attributes:
        seconds: wall time from start to exit, over all attempts.
        mean_recall: share of 1, of the compared set.
        difference: of `mean_recall`, from the 1-rank run.
        first_loss: of the first step.
        last_loss: mean over the last tenth of the steps.
        first_loss_difference, largest_loss_difference: absolute, of the first step and over all; None where the steps
            saw other samples.
        commit, day: of the run.
    """

    seed: int
    seconds: float
    mean_recall: float
    difference: float
    first_loss: float
    last_loss: float
    first_loss_difference: float | None
    largest_loss_difference: float | None
    commit: str
    day: str


@dataclass(frozen=True)
class LayoutFigures:
    """What a layout came to.

    Attributes:
        set: keys on top of the recipe.
        runs: one for each seed that it was trained with; None for one without a result.
        difference: mean over its runs; None if one has no result.
        fault: why it does not reach what one rank reaches; empty if it does.
    """

    name: str
    num_processes: int
    set: Mapping[str, object]
    runs: tuple[RunFigures | None, ...]
    difference: float | None
    fault: str


@dataclass(frozen=True)
class Comparison:
    """All layouts, the 1-rank runs first.

    Attributes:
        retrieval_set: the compared set.
        spread: sample standard deviation of the 1-rank runs' mean recall over seeds.
        limit: largest mean difference of a layout that counts as the seed's noise.
        versions, machine: as the first run's manifest has them.
    """

    retrieval_set: str
    samples: int
    spread: float
    limit: float
    layouts: tuple[LayoutFigures, ...]
    versions: dict[str, str]
    machine: dict[str, Any]

    @property
    def commits(self) -> list[str]:
        """Of all runs; more than one if the program changed between calls."""
        return sorted({run.commit for layout in self.layouts for run in layout.runs if run})

    def verdict(self) -> str:
        """One line: whether every layout trains and lies within the spread, else which do not and why."""
        rule = f"|difference| <= {LIMIT_IN_SPREADS:g} x {100 * self.spread:.2f} points, the spread of 1 rank over seeds"
        faults = [f"{layout.name} ({layout.fault})" for layout in self.layouts if layout.fault]
        if faults:
            return f"NOT every layout trains to within the seeds' noise ({rule}): {', '.join(faults)}"
        return f"every layout trains to within the seeds' noise: {rule}"


def compare(runs: Sequence[Run], ledger: Ledger) -> Comparison:
    """Reads every run's folder: eval.json, metrics.jsonl, manifest.json.

    Raises:
        DataError: a 1-rank run has no result.
    """
    name = _retrieval_set(runs[0].stage.config)
    reference = {run.seed: run for run in runs if run.layout == ONE_RANK}
    missing = [run.stage.run_dir for run in reference.values() if not is_finished(run.stage, ledger)]
    if missing:
        raise DataError(f"{missing[0]} has no result; every 1-rank run must have one: run the same command again.")
    spread = statistics.stdev(_recall(run, name) for run in reference.values())
    limit = LIMIT_IN_SPREADS * spread
    rows = []
    for layout in dict.fromkeys(run.layout.name for run in runs):
        own = [run for run in runs if run.layout.name == layout]
        figures = [_figures(run, reference[run.seed], name, ledger) for run in own]
        rows.append(_judge(own[0].layout, figures, limit))
    manifest = _manifest(runs[0])
    return Comparison(
        retrieval_set=name,
        samples=runs[0].stage.num_samples,
        spread=spread,
        limit=limit,
        layouts=tuple(rows),
        versions=manifest["packages"],
        machine=manifest["machine"],
    )


def _judge(layout: Layout, figures: Sequence[RunFigures | None], limit: float) -> LayoutFigures:
    finished = [run for run in figures if run]
    difference = statistics.fmean(run.difference for run in finished) if len(finished) == len(figures) else None
    if difference is None:
        fault = "no result"
    elif any(run.last_loss >= run.first_loss for run in finished):
        fault = "its loss does not fall"
    elif layout != ONE_RANK and abs(difference) > limit:
        fault = f"{100 * difference:+.2f} points"
    else:
        fault = ""
    return LayoutFigures(layout.name, layout.num_processes, dict(layout.set), tuple(figures), difference, fault)


def _figures(run: Run, reference: Run, name: str, ledger: Ledger) -> RunFigures | None:
    if not is_finished(run.stage, ledger):
        return None
    entry, recall, losses = ledger.entries[run.stage.name], _recall(run, name), _losses(run)
    assert entry.finished_at is not None
    distances = [abs(a - b) for a, b in zip(losses, _losses(reference), strict=True)]
    return RunFigures(
        seed=run.seed,
        seconds=entry.seconds,
        mean_recall=recall,
        difference=recall - _recall(reference, name),
        first_loss=losses[0],
        last_loss=statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        first_loss_difference=distances[0] if run.same_samples else None,
        largest_loss_difference=max(distances) if run.same_samples else None,
        commit=_manifest(run)["git_commit"] or "unknown",
        day=f"{datetime.fromtimestamp(entry.finished_at, UTC):%Y-%m-%d}",
    )


def _retrieval_set(cfg: Config) -> str:
    return PREFERRED_SET if PREFERRED_SET in cfg.eval.retrieval else next(iter(cfg.eval.retrieval))


def _recall(run: Run, name: str) -> float:
    return read_eval(run.stage.run_dir)[f"retrieval/{name}"]["mean_recall"]


def _losses(run: Run) -> list[float]:
    """Of every step."""
    return [line["loss"] for line in read_metrics(run.stage.run_dir) if "loss" in line]


def _manifest(run: Run) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((run.stage.run_dir / "manifest.json").read_text(encoding="utf-8"))
    return manifest


# ---------------------------------------------------------------------------------------------------------- report


_HEAD = ("layout", "seed", "wall s", "mean recall", "minus 1 rank", "first loss", "last loss", "loss - 1 rank's")


def write_json(comparison: Comparison, recipe: Path, path: Path) -> None:
    """All figures, shares of 1, with the commits, versions and machine they were measured with."""
    told = {"recipe": str(recipe), "commits": comparison.commits, "verdict": comparison.verdict()}
    path.write_text(json.dumps(told | asdict(comparison), indent=2) + "\n", encoding="utf-8")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The table, its rows for benchmarks/log.md, and last the verdict."""
    title = f"{comparison.retrieval_set}, {comparison.samples:,} samples"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    for name in _HEAD:
        table.add_column(name.replace(" ", "\n", 1), justify="left" if name == "layout" else "right", vertical="bottom")
    for layout in comparison.layouts:
        for run in layout.runs:
            table.add_row(*_cells(layout, run))
    console.print(table)
    console.print(
        "Recall in percent. Last loss: mean of the last tenth. Loss - 1 rank's: of step 1, and largest over all steps."
    )
    for line in log_rows(comparison):
        console.print(line, markup=False, soft_wrap=True)
    for layout in comparison.layouts[1:]:
        if len(layout.runs) > 1 and layout.difference is not None:
            text = f"{layout.name} minus 1 rank, mean over {len(layout.runs)} seeds: {100 * layout.difference:+.2f}"
            console.print(text, markup=False)
    if len(comparison.commits) > 1:
        console.print(f"note: the runs are of several commits: {', '.join(comparison.commits)}", soft_wrap=True)
    console.print(comparison.verdict(), markup=False, soft_wrap=True)


def log_rows(comparison: Comparison) -> list[str]:
    """A head and one row for each run, as benchmarks/log.md has them."""
    machine = f"{comparison.machine['cores']} cores, torch {comparison.versions['torch']}"
    lines = [_row("date", "commit", *_HEAD, "machine"), "|" + "---|" * (len(_HEAD) + 3)]
    for layout in comparison.layouts:
        for run in layout.runs:
            made = (run.day, run.commit) if run else ("-", "-")
            lines.append(_row(*made, *_cells(layout, run), machine))
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(layout: LayoutFigures, run: RunFigures | None) -> list[str]:
    if run is None:
        return [layout.name, "-", "-", "no result", *["-"] * 4]
    first, largest = run.first_loss_difference, run.largest_loss_difference
    is_one_rank = layout.name == ONE_RANK.name
    return [
        layout.name,
        str(run.seed),
        f"{run.seconds:.0f}",
        f"{100 * run.mean_recall:.2f}",
        "-" if is_one_rank else f"{100 * run.difference:+.2f}",
        f"{run.first_loss:.3f}",
        f"{run.last_loss:.3f}",
        "-" if is_one_rank else "other samples" if first is None else f"{first:.0e}, {largest:.0e}",
    ]
