"""metrics.jsonl: what is written is what is read, and a resumed run's file equals an uninterrupted one's."""

import math
from pathlib import Path

import pytest

from megaeva.errors import DataError
from megaeva.observability.metrics import MetricLog, read_metrics


def _log(run_dir: Path, steps: range, first_step: int = 0) -> None:
    with MetricLog(run_dir, first_step=first_step, tensorboard=False) as log:
        for step in steps:
            log.write(step, {"loss": 1.0 / step, "lr": 0.1 * step})


def _without_time(run_dir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "wall_time"} for line in read_metrics(run_dir)]


def test_round_trip_keeps_order_and_values(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 4))
    assert _without_time(tmp_path) == [{"step": s, "loss": 1.0 / s, "lr": 0.1 * s} for s in (1, 2, 3)]


def test_resumed_file_equals_uninterrupted(tmp_path: Path) -> None:
    _log(tmp_path / "whole", range(1, 11))
    _log(tmp_path / "cut", range(1, 8))  # died at 7, last checkpoint at 4
    _log(tmp_path / "cut", range(5, 11), first_step=4)
    assert _without_time(tmp_path / "cut") == _without_time(tmp_path / "whole")


def test_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    _log(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    _log(tmp_path, range(4, 6), first_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", [b"{oops", b"\0\0\0", b"\xff\xfe", b"[1]", b'{"step": 1}'])
def test_broken_line_in_the_middle_is_an_error(tmp_path: Path, line: bytes) -> None:
    _log(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    for read in (lambda: read_metrics(tmp_path), lambda: MetricLog(tmp_path, first_step=1, tensorboard=False)):
        with pytest.raises(DataError, match=r"metrics\.jsonl:1 is no line of figures .* or move the file away"):
            read()


def test_non_finite_values_survive_as_valid_json(tmp_path: Path) -> None:
    with MetricLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": math.nan, "grad_norm": math.inf})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["loss"])
    assert line["grad_norm"] == math.inf


def test_lines_are_on_disk_before_close(tmp_path: Path) -> None:
    log = MetricLog(tmp_path, tensorboard=False)
    log.write(1, {"loss": 2.0})
    assert len(read_metrics(tmp_path)) == 1
    log.close()


def test_tensorboard_has_the_same_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricLog(tmp_path) as log:
        for step in (1, 2):
            log.write(step, {"loss": 3.0 / step})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 1.5)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricLog(tmp_path / "run", enabled=False) as log:
        log.write(1, {"loss": 1.0})
        log.flush()
    assert not (tmp_path / "run").exists()
