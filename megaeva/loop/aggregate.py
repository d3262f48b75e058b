"""Several loops that differ in their seed, as one table of mean and spread."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megaeva.errors import DataError
from megaeva.loop.results import METRICS

_SHOWN = ("image_to_text_r1", "text_to_image_r1", "mean_recall", "zero_shot_top1")


def aggregate(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """Mean, spread and single values over loops of the same recipe.

    Returns:
        `{"num_seeds", "rows": {run: {"num_parameters", "samples_seen", "chain_samples", metric: {"mean", "spread",
        "values"}}}, "student_minus": {other run: {metric: {...}}}}`. Spread is the sample standard deviation (0 for one
        seed). Differences are taken within each seed, so what the seeds share cancels.

    Raises:
        DataError: a results.json is missing, or the loops have different rows.
    """
    loops = [_read(run_dir) for run_dir in run_dirs]
    names = list(loops[0])
    for run_dir, rows in zip(run_dirs, loops):
        if set(rows) != set(names):
            raise DataError(
                f"{run_dir}/results.json has rows {', '.join(sorted(rows))}, {run_dirs[0]} has "
                f"{', '.join(sorted(names))}.\nLoops of one recipe must have the same rows; aggregate only those."
            )
    result: dict[str, Any] = {"num_seeds": len(loops), "rows": {}, "student_minus": {}}
    for name in names:
        fixed = {key: loops[0][name].get(key) for key in ("num_parameters", "samples_seen", "chain_samples")}
        metrics = {m: _spread([rows[name][m] for rows in loops]) for m in METRICS if m in loops[0][name]}
        result["rows"][name] = fixed | metrics
    for name in names:
        if "student" in names and name != "student":
            shared = [m for m in METRICS if m in loops[0][name] and m in loops[0]["student"]]
            result["student_minus"][name] = {
                m: _spread([rows["student"][m] - rows[name][m] for rows in loops]) for m in shared
            }
    return result


def write_aggregate(run_dirs: Sequence[Path], output: Path, console: Console | None = None) -> dict[str, Any]:
    """`aggregate`, also written to `output` as JSON and printed as tables in percent points."""
    result = aggregate(run_dirs)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console = console or Console(highlight=False)
    for title, rows in (("mean ± spread", result["rows"]), ("student minus ...", result["student_minus"])):
        table = Table(title=f"{title} over {result['num_seeds']} seeds")
        table.add_column("run", no_wrap=True)
        for metric in _SHOWN:
            table.add_column(metric, justify="right")
        for name, row in rows.items():
            cells = [f"{100 * row[m]['mean']:+.1f} ± {100 * row[m]['spread']:.1f}" if m in row else "-" for m in _SHOWN]
            table.add_row(name, *(c if "minus" in title else c.lstrip("+") for c in cells))
        console.print(table)
    return result


def _read(run_dir: Path) -> dict[str, dict[str, Any]]:
    path = run_dir / "results.json"
    if not path.exists():
        raise DataError(f"{path} is missing.\nEach loop must have finished; run `megaeva loop` for this folder first.")
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }
