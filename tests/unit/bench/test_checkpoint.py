"""What the bench of saves measures and prints."""

from pathlib import Path
from types import SimpleNamespace

from megaeva.bench.checkpoint import CheckpointTimes, _Stopwatch, benchmark_checkpoint
from megaeva.bench.compare import Comparison
from tests.helpers.tiny import tiny

LOG = (Path(__file__).parents[3] / "benchmarks" / "log.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def times(ours: float) -> CheckpointTimes:
    return CheckpointTimes(Comparison((ours, ours), (100.0, 100.0)), {"gate": ours}, 9.0, 50.0, (20.0, 40.0), 10**9)


def test_the_row_fits_the_logs_table() -> None:
    head = LOG.split("`make bench-checkpoint`")[1].split("\n| ")[1].splitlines()[0]
    row = cells(times(2.0).report("megaeva bench checkpoint")[-1])
    assert len(row) == len(cells(head))
    assert row[2:7] == ["`megaeva bench checkpoint`", "2.0", "100", "0.02 (0.02-0.02)", "30"]


def test_the_bound() -> None:
    assert "(bound 0.05: kept)" in times(5.0).report("")[0]
    assert "(bound 0.05: MISSED)" in times(6.0).report("")[0]
    assert "took 30 (20 to 40) ms longer together, 30 % of a synchronous save" in times(5.0).report("")[2]


def test_calls_within_calls_count_once() -> None:
    target = SimpleNamespace(inner=lambda: None, outer=lambda: target.inner())
    stopwatch = _Stopwatch()
    stopwatch.time(target, "inner", "between steps")
    stopwatch.time(target, "outer", "beginning")
    target.outer()
    assert stopwatch.spent["beginning"] > 0
    assert stopwatch.spent["between steps"] == 0
    target.inner()
    assert stopwatch.spent["between steps"] > 0


def test_a_tiny_run(tmp_path: Path) -> None:
    model = tiny("EVA02-CLIP-B-16")
    model = model.model_copy(update={"text": model.text.model_copy(update={"vocab_size": 49408})})
    timed = benchmark_checkpoint(model, batch_size=2, precision="fp32", num_rounds=1, folder=tmp_path)
    assert len(timed.stalls.ours_ms) == len(timed.slowdown_ms) == 1
    parameters = 49408 * 48
    assert 16 * parameters < timed.num_bytes < 20 * parameters
    assert timed.stalls.ours > 0
    assert list(tmp_path.iterdir()) == []
