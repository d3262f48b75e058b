"""Mean and spread over seeds, and differences within each seed."""

import json
from pathlib import Path

import pytest

from megaeva.errors import DataError
from megaeva.loop.aggregate import aggregate, write_aggregate


def _write(folder: Path, teacher: float, student: float, extra: str | None = None) -> Path:
    fixed = {"num_parameters": 5, "samples_seen": 10, "chain_samples": 20}
    rows = {"teacher": fixed | {"mean_recall": teacher}, "student": fixed | {"mean_recall": student}}
    if extra:
        rows[extra] = fixed
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(rows))
    return folder


def test_mean_spread_and_paired_difference(tmp_path: Path) -> None:
    seeds = [_write(tmp_path / "0", 0.70, 0.74), _write(tmp_path / "1", 0.60, 0.66), _write(tmp_path / "2", 0.80, 0.82)]
    result = aggregate(seeds)
    teacher = result["rows"]["teacher"]["mean_recall"]
    assert teacher["mean"] == pytest.approx(0.70)
    assert teacher["spread"] == pytest.approx(0.10)
    difference = result["student_minus"]["teacher"]["mean_recall"]
    assert difference["values"] == pytest.approx([0.04, 0.06, 0.02])
    assert difference["spread"] == pytest.approx(0.02)  # far below the spread of either row


def test_file_and_table_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = write_aggregate([_write(tmp_path / "0", 0.7, 0.75)], tmp_path / "out" / "bench.json")
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == result
    assert "75.0" in capsys.readouterr().out


def test_missing_or_unlike_loops_are_refused(tmp_path: Path) -> None:
    first = _write(tmp_path / "0", 0.7, 0.75)
    with pytest.raises(DataError, match=r"results\.json is missing"):
        aggregate([first, tmp_path / "1"])
    with pytest.raises(DataError, match="same rows"):
        aggregate([first, _write(tmp_path / "2", 0.7, 0.75, "scratch")])
