"""results.json of a loop and the table it ends with."""

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megaeva.config.schema import LoopConfig
from megaeva.loop.ledger import Ledger
from megaeva.loop.stages import Stage, chain_samples

PREFERRED_SET = "heldout"
METRICS = (
    "image_to_text_r1", "image_to_text_r5", "image_to_text_r10",
    "text_to_image_r1", "text_to_image_r5", "text_to_image_r10",
    "mean_recall", "zero_shot_top1", "zero_shot_top5",
)  # fmt: skip
_COLUMNS = (
    ("image_to_text_r1", "I→T\nR@1"), ("image_to_text_r5", "I→T\nR@5"),
    ("text_to_image_r1", "T→I\nR@1"), ("text_to_image_r5", "T→I\nR@5"),
    ("mean_recall", "mean\nrecall"), ("zero_shot_top1", "zero-\nshot"),
)  # fmt: skip


def write_results(cfg: LoopConfig, stages: list[Stage], ledger: Ledger) -> dict[str, dict[str, Any]]:
    """The figures of every contrastive run, also written to `<run_dir>/results.json`.

    Rows: `teacher`; `student`, the last round's; its controls under their own names; what earlier rounds made as
    `<round>/<part>`. Each row holds `num_parameters` (both towers and the scale), `samples_seen` in that run's own
    training, `chain_samples` with everything its weights descend from, the retrieval and zero-shot figures (shares of
    1) of the set named `heldout` or else the first one, and all sets under `eval`.
    """
    rows: dict[str, dict[str, Any]] = {}
    if cfg.teacher.checkpoint is not None:
        folder = Path(cfg.teacher.checkpoint)
        evaluation = json.loads((Path(cfg.run_dir) / "teacher" / "eval.json").read_text(encoding="utf-8"))
        finished = _finished(folder if (folder / "finished.json").exists() else folder.parent.parent)
        rows["teacher"] = _row(finished, finished.get("samples"), None, evaluation)
    for stage in stages:
        if stage.role == "distil":
            continue
        evaluation = ledger.entries[stage.name].results
        row = _row(_finished(stage.run_dir), stage.num_samples, chain_samples(stage, stages), evaluation)
        rows[_row_name(stage, cfg)] = row
    path = Path(cfg.run_dir) / "results.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return rows


def print_results(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """Prints the rows of results.json as a table; shares in percent."""
    first = next(iter(rows.values()), {})
    title = f"retrieval: {first.get('retrieval_set', '-')} · zero-shot: {first.get('zero_shot_set', '-')}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    table.add_column("run", no_wrap=True, vertical="bottom")
    for title in ("param-\neters", "samples", "chain", *(title for _, title in _COLUMNS)):
        table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
    for name, row in rows.items():
        cells = [_count(row[key]) for key in ("num_parameters", "samples_seen", "chain_samples")]
        cells += [f"{100 * row[key]:.1f}" if key in row else "-" for key, _ in _COLUMNS]
        table.add_row(name, *cells)
    console.print(table)
    console.print("In percent. samples: this run's own; chain: with those its weights come from.")


def _row(
    finished: dict[str, Any], num_samples: int | None, chain: int | None, evaluation: dict[str, dict[str, float]]
) -> dict[str, Any]:
    parameters = finished.get("num_parameters")
    row: dict[str, Any] = {
        "num_parameters": parameters["total"] if isinstance(parameters, dict) else parameters,
        "samples_seen": num_samples,
        "chain_samples": chain,
    }
    for kind, prefix in (("retrieval", ""), ("zero_shot", "zero_shot_")):
        name = _set_name(kind, evaluation)
        if name is not None:
            row[f"{kind}_set"] = name
            row |= {prefix + metric: value for metric, value in evaluation[f"{kind}/{name}"].items()}
    return row | {"eval": evaluation}


def _set_name(kind: str, evaluation: dict[str, dict[str, float]]) -> str | None:
    names = [name.removeprefix(f"{kind}/") for name in evaluation if name.startswith(f"{kind}/")]
    return PREFERRED_SET if PREFERRED_SET in names else next(iter(names), None)


def _row_name(stage: Stage, cfg: LoopConfig) -> str:
    if stage.role == "teacher":
        return "teacher"
    round_name, part = stage.name.split("/", 1)
    if round_name != cfg.rounds[-1].name:
        return stage.name
    return "student" if stage.role == "clip" else part


def _finished(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "finished.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _count(value: int | None) -> str:
    """1,234,567 -> 1.23 M, 80,000 -> 80 k; None -> "-"."""
    if value is None:
        return "-"
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1000:.3g} k" if value >= 1000 else str(value)
