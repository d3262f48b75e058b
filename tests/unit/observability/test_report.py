"""The report says what the files say, in one file that fetches nothing."""

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megaeva.errors import DataError
from megaeva.observability.figures import smoothed
from megaeva.observability.report import collect, write_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def _png(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _recipe(task: str) -> dict[str, Any]:
    return {"task": task, "model": {"variant": None}, "train": {"total_samples": 130, "global_batch_size": 64}}


def _row(recall: float, parameters: int) -> dict[str, Any]:
    return {
        "num_parameters": parameters, "samples_seen": 640, "chain_samples": 1280, "retrieval_set": "heldout",
        "zero_shot_set": "names", "mean_recall": recall, "image_to_text_r1": recall - 0.1,
    }  # fmt: skip


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    """A finished loop of three stages, with a caption that would be markup if it were trusted."""
    stages = []
    for name, task in (("teacher", "contrastive"), ("one/distil", "mim"), ("one/clip", "contrastive")):
        run_dir = tmp_path / name
        run_dir.mkdir(parents=True)
        sign = -1 if task == "mim" else 1
        lines = [{"step": s, "wall_time": 0.0, "loss": sign * 2.0 / s} for s in range(1, 30)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        stage = {"stage": name, "run_dir": str(run_dir), "seconds": 61, "status": "finished", "recipe": _recipe(task)}
        stages.append(stage | {"changes": ["optim.vision.lr: 0.001 -> 0.0015"] if task == "mim" else []})
    (tmp_path / "ledger.json").write_text(json.dumps({"stages": stages}))
    rows = {"teacher": _row(0.5, 900_000), "student": _row(0.6, 3_200_000), "scratch": _row(0.65, 3_200_000)}
    (tmp_path / "results.json").write_text(json.dumps(rows))

    def prediction(number: int, ahead: int) -> dict[str, Any]:
        top = [{"caption": f"caption {n}", "score": 0.5, "correct": n == 0} for n in range(5)]
        right = "<script>alert(1)</script>" if number == 3 else f"true {number}"
        return {"key": f"s/{number}", "captions": [right], "ahead": ahead, "top": top, "png": _png("red")}

    student = {"heldout": [prediction(n, ahead=(n % 4 == 3) * 6) for n in range(40)]}
    (tmp_path / "one/clip/predictions.json").write_text(json.dumps(student))
    (tmp_path / "teacher/predictions.json").write_text(json.dumps({"heldout": [prediction(3, ahead=9)]}))
    example = {"key": "s/1", "caption": "masked one", "png": _png("blue"), "cosine": [None, 0.25, 0.75, None]}
    masked = {"set": "heldout", "grid": 2, "examples": [example]}
    (tmp_path / "one/distil/masked.json").write_text(json.dumps(masked))
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/ATTRIBUTION.md").write_text("Drawings by someone, CC BY-SA 4.0")
    manifest = {
        "packages": {"torch": "9.9.9"}, "python": "3.11.7", "git_commit": "abc1234", "world_size": 2, "threads": "1",
        "machine": {"platform": "Linux", "cores": 2, "memory_gib": 8.0},
        "shards": {str(tmp_path / "data/train/000000.tar"): 10},
    }  # fmt: skip
    (tmp_path / "one/clip/manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_page_shows_every_part(loop: Path) -> None:
    page = html.unescape(write_report(loop).read_text())
    for part in (
        "60.0 %", "+10.0", "-5.0",  # the student, against teacher and scratch
        "Recall against size", "Behind the mask", "masked one", "mean 0.50",
        "rank 7", "teacher: rank 10", "optim.vision.lr: 0.001 -> 0.0015", "total_samples: 130",
        "9.9.9", "abc1234", "Drawings by someone, CC BY-SA 4.0",
    ):  # fmt: skip
        assert part in page, part
    assert page.count("<svg") == 3 + 2


def test_page_stands_alone(loop: Path) -> None:
    page = write_report(loop).read_text()
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", page)
    assert fetched
    assert all(address.startswith("data:") for address in fetched)
    assert "@import" not in page
    assert "url(http" not in page


def test_captions_are_text_not_markup(loop: Path) -> None:
    page = write_report(loop).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_gallery_has_right_and_wrong_images(loop: Path) -> None:
    gallery = collect(loop)["gallery"]
    ahead = [entry["ahead"] for entry in gallery["entries"]]
    assert (gallery["num_sampled"], gallery["num_right"]) == (40, 30)
    assert (ahead.count(0), len(ahead)) == (6, 12)


def test_mim_curve_is_the_cosine_and_samples_are_those_seen(loop: Path) -> None:
    shown = collect(loop)
    assert "cosine behind the mask" in shown["curve_svgs"][1]
    assert shown["stages"][0]["samples"] == 128


def test_single_run_and_bare_loop_are_enough(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps(_recipe("mim")))
    assert "Recipes" in write_report(run).read_text()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither ledger\.json nor config\.yaml"):
        write_report(tmp_path)


def test_smoothing_keeps_lines_and_ends() -> None:
    line = [float(n) for n in range(100)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([5.0]) == [5.0]
