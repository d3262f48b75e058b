"""report.html: one self-contained page about a loop or a run."""

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megaeva.errors import DataError, UserError
from megaeva.observability.figures import Curve, Point, loss_curve, recall_against
from megaeva.observability.metrics import read_metrics
from megaeva.observability.progress import format_duration

NUM_PICTURES = 12
_COLUMNS = (
    ("image_to_text_r1", "Image → text R@1"),
    ("image_to_text_r5", "R@5"),
    ("text_to_image_r1", "Text → image R@1"),
    ("text_to_image_r5", "R@5"),
    ("mean_recall", "Mean recall"),
    ("zero_shot_top1", "Zero-shot top-1"),
)


def write_report(run_dir: Path | str) -> Path:
    """The path of the `report.html` written to a loop's or a single run's folder; needs no network to be read.

    Shown is what is there: results, loss curves, recall against size, held-out images with the captions ranked first,
    predictions behind the mask, recipes, versions, data attribution. Parts without data are left out.

    Raises:
        DataError: the folder is of neither a loop nor a run.
        UserError: matplotlib or jinja2 is not installed.
    """
    run_dir = Path(run_dir)
    try:
        import jinja2
    except ImportError as error:
        raise UserError("jinja2 is not installed.\nThe report needs it; run: pip install 'megaeva[demo]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # captions are anyone's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(collect(run_dir))
    path = run_dir / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def collect(run_dir: Path) -> dict[str, Any]:
    """Everything the template shows."""
    stages = _stages(run_dir)
    rows = _read(run_dir / "results.json") or {}
    manifests = [m for stage in stages if (m := _read(stage["run_dir"] / "manifest.json"))]
    points = [
        Point(name, row["num_parameters"], row["chain_samples"] or row["samples_seen"], row["mean_recall"])
        for name, row in rows.items()
        if "mean_recall" in row and row["num_parameters"]
    ]
    curves = [curve for stage in stages if (curve := _curve(stage))]
    return {
        "title": run_dir.name,
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "columns": _COLUMNS,
        "rows": rows,
        "best": {key: max((r[key] for r in rows.values() if key in r), default=None) for key, _ in _COLUMNS},
        "comparisons": _comparisons(rows),
        "seconds": format_duration(sum(stage["seconds"] for stage in stages)),
        "curve_svgs": [loss_curve(curve) for curve in curves],
        "recall_svgs": [recall_against(points, "num_parameters"), recall_against(points, "chain_samples")]
        if points
        else [],
        "gallery": _gallery(run_dir, stages),
        "masked": [m for stage in stages if (m := _masked(stage))],
        "stages": stages,
        "manifest": manifests[-1] if manifests else None,
        "attributions": _attributions(manifests),
        "format_count": format_count,
    }


def format_count(value: float | None) -> str:
    """899,712 -> 0.90 M; 80,000 -> 80 k; None -> –"""
    if value is None:
        return "–"
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if value >= 0.5 * size:
            return f"{value / size:.2f} {unit}"
    return f"{value / 1e3:.4g} k" if value >= 1000 else f"{value:g}"


def _stages(run_dir: Path) -> list[dict[str, Any]]:
    """Stages in order, or the one run of a folder that is not a loop."""
    ledger = _read(run_dir / "ledger.json")
    if ledger is not None:
        found = [
            {
                "name": entry["stage"],
                "run_dir": Path(entry["run_dir"]),
                "seconds": entry["seconds"],
                "status": entry["status"],
                "recipe": entry["recipe"],
                "changes": entry["changes"],
            }
            for entry in ledger["stages"]
        ]
    elif (run_dir / "config.yaml").exists():
        import yaml

        recipe = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        metrics = read_metrics(run_dir)
        seconds = metrics[-1]["wall_time"] - metrics[0]["wall_time"] if metrics else 0.0
        status = "finished" if (run_dir / "finished.json").exists() else "running"
        found = [
            {"name": run_dir.name, "run_dir": run_dir, "seconds": seconds, "status": status, "recipe": recipe}
            | {"changes": []}
        ]
    else:
        raise DataError(
            f"{run_dir} has neither ledger.json nor config.yaml.\n"
            f"It must be the folder of a loop or of a training run; check the path."
        )
    for stage in found:
        stage["duration"] = format_duration(stage["seconds"])
        stage["recipe_text"] = _as_yaml(stage["recipe"])
        train = stage["recipe"]["train"]
        stage["samples"] = max(1, train["total_samples"] // train["global_batch_size"]) * train["global_batch_size"]
    return found


def _curve(stage: dict[str, Any]) -> Curve | None:
    lines = [line for line in read_metrics(stage["run_dir"]) if "loss" in line]
    if not lines:
        return None
    mim = stage["recipe"]["task"] == "mim"
    # MIM minimises a negative cosine; the cosine itself is what one can read.
    values = [-line["loss"] if mim else line["loss"] for line in lines]
    unit = "cosine behind the mask" if mim else "contrastive loss"
    return Curve(stage["name"], unit, [line["step"] for line in lines], values)


def _comparisons(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How far the student is from every other row, in points of mean recall."""
    student = rows.get("student", {})
    return [
        {"name": name, "points": 100 * (student["mean_recall"] - row["mean_recall"])}
        for name, row in rows.items()
        if name != "student" and "mean_recall" in row and "mean_recall" in student
    ]


def _gallery(run_dir: Path, stages: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Held-out images of the last student beside its teacher's rank, half of them right, half wrong where possible."""
    clips = [stage for stage in stages if stage["name"].endswith("/clip")]
    named = clips[-1:] or [stage for stage in stages if (stage["run_dir"] / "predictions.json").exists()][-1:]
    if not named:
        return None
    predictions = _read(named[0]["run_dir"] / "predictions.json") or {}
    if not predictions:
        return None
    name = "heldout" if "heldout" in predictions else next(iter(predictions))
    teacher = _read(run_dir / "teacher" / "predictions.json") or {}
    rank_of_teacher = {entry["key"]: entry["ahead"] + 1 for entry in teacher.get(name, [])}
    right = [entry for entry in predictions[name] if entry["ahead"] == 0]
    wrong = [entry for entry in predictions[name] if entry["ahead"] > 0]
    half = NUM_PICTURES // 2
    num_right = min(len(right), max(half, NUM_PICTURES - len(wrong)))
    entries = right[:num_right] + wrong[: NUM_PICTURES - num_right]
    return {
        "set": name,
        "model": named[0]["name"],
        "num_sampled": len(predictions[name]),
        "num_right": len(right),
        "entries": [entry | {"teacher_rank": rank_of_teacher.get(entry["key"])} for entry in entries],
    }


def _masked(stage: dict[str, Any]) -> dict[str, Any] | None:
    stored = _read(stage["run_dir"] / "masked.json")
    if not stored:
        return None
    for example in stored["examples"]:
        shown = [c for c in example["cosine"] if c is not None]
        example["mean"] = sum(shown) / max(1, len(shown))
    return {"stage": stage["name"], **stored}


def _attributions(manifests: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Every ATTRIBUTION.md beside or one above the shards that were trained on."""
    found: dict[Path, str] = {}
    for manifest in manifests:
        for shard in manifest.get("shards", {}):
            for folder in Path(shard).parents[:2]:
                path = folder / "ATTRIBUTION.md"
                if path not in found and path.is_file():
                    found[path] = path.read_text(encoding="utf-8")
    return [{"path": str(path), "text": text.strip()} for path, text in found.items()]


def _as_yaml(tree: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)).strip()


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
