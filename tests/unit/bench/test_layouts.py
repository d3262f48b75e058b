"""`megaeva bench layouts`: the runs it plans, and what it says of finished, differing and missing ones, untrained."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megaeva import cli
from megaeva.bench.layout_table import compare
from megaeva.bench.layouts import ONE_RANK, Layout, Run, plan_runs, two_rank_layouts
from megaeva.config import check_world, load
from megaeva.config.schema import Config, LaunchSection
from megaeva.errors import ConfigError
from megaeva.loop.launch import StageFailedError
from megaeva.loop.ledger import Ledger

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "demo_teacher.yaml"
SEEDS = (0, 1, 2)
# 1 rank: 80, 81, 82 percent, a spread of 1 point.
RECALL = {0: 0.80, 1: 0.81, 2: 0.82}
Recall = Callable[[str, int], float | None]


def plan(run_dir: Path, seeds: Sequence[int] = SEEDS) -> list[Run]:
    return plan_runs(RECIPE, 1000, seeds, run_dir)


class FakeTraining:
    """A `launch` that leaves what a finished job leaves, or fails where no recall is given."""

    def __init__(self, recall: Recall) -> None:
        self.recall = recall
        self.started: list[tuple[str, int]] = []
        self.loss_falls = True
        self.commit = "abc1234"

    def __call__(
        self, recipe: Path, overrides: Sequence[str], launch: LaunchSection, log_path: Path, resume: bool, *, stage: str
    ) -> None:
        self.started.append((stage, launch.num_processes))
        cfg = load(recipe, overrides)
        recall = self.recall(stage.split("/")[0], cfg.seed)
        if recall is None:
            raise StageFailedError(stage, 1, -9, "", log_path)
        run_dir = Path(cfg.run_dir)
        (run_dir / "checkpoints" / "step_00000015").mkdir(parents=True)
        (run_dir / "checkpoints" / "step_00000015" / "megaeva.json").write_text("{}")
        other = {"mean_recall": 0.0}
        (run_dir / "eval.json").write_text(
            json.dumps({"retrieval/val": other, "retrieval/heldout": {"mean_recall": recall}})
        )
        manifest = {"git_commit": self.commit, "packages": {"torch": "2.0"}, "machine": {"cores": 2}}
        (run_dir / "manifest.json").write_text(json.dumps(manifest))
        slope = -0.1 if self.loss_falls else 0.0
        lines = [{"step": n, "wall_time": 0.0, "loss": 4.0 + slope * n + self.rounding(stage, n)} for n in range(1, 16)]
        (run_dir / "metrics.jsonl").write_text(
            "".join(
                json.dumps(line) + "\n" for line in [*lines, {"step": 15, "wall_time": 0.0, "retrieval/val/x": 0.0}]
            )
        )
        (run_dir / "finished.json").write_text("{}")

    @staticmethod
    def rounding(stage: str, step: int) -> float:
        return 0.0 if stage.startswith(ONE_RANK.name) else 1e-7 * step


def as_one_rank(layout: str, seed: int) -> float:
    """A tenth of a point below 1 rank, everywhere but there."""
    return RECALL[seed] - (0.001 if layout != ONE_RANK.name else 0.0)


def run(run_dir: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("megaeva.loop.weak_to_strong.launch", training)
    command = ["bench", "layouts", "--recipe", str(RECIPE), "--samples", "1000", "--run-dir", str(run_dir), *arguments]
    result = CliRunner().invoke(cli.app, command)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def config_of(layout: Layout) -> Config:
    runs = [run for run in plan(Path("runs/x")) if run.layout == layout]
    return runs[0].stage.config


@pytest.mark.parametrize("layout", [ONE_RANK, *two_rank_layouts(64)], ids=lambda layout: layout.name)
def test_each_layout_fits_the_demos_teacher(layout: Layout) -> None:
    check_world(config_of(layout), layout.num_processes)


def test_the_layouts_are_what_their_names_say() -> None:
    by_name = {layout.name: config_of(layout) for layout in two_rank_layouts(64)}
    vision = {name: cfg.parallel.vision for name, cfg in by_name.items()}
    assert {name for name, axes in vision.items() if axes.tp == 2} == {
        "tp2", "tp2_sp", "vision_tp2_text_tp1", "tp2_recompute",
    }  # fmt: skip
    assert {name for name, axes in vision.items() if axes.pp == 2} == {"pp2", "pp2_vpp2", "pp2_overlap"}
    assert {name for name, axes in vision.items() if axes.vpp == 2} == {"pp2_vpp2"}
    assert {name for name, axes in vision.items() if axes.sequence_parallel} == {"tp2_sp"}
    assert {name for name, axes in vision.items() if axes.recompute == "full"} == {"tp2_recompute"}
    assert by_name["vision_tp2_text_tp1"].parallel.text.tp == 1
    parallel = by_name["pp2_overlap"].parallel
    assert parallel.distributed_optimizer and parallel.overlap_grad_reduce and parallel.overlap_param_gather
    passes = {name for name, cfg in by_name.items() if cfg.train.micro_batch_size == 16}
    assert passes == {"pp2", "pp2_vpp2", "pp2_overlap", "accumulate4"}


def test_only_the_layout_with_other_samples_runs_with_every_seed() -> None:
    runs = plan(Path("runs/x"), (5, 6))
    seeds = {name: [run.seed for run in runs if run.layout.name == name] for name in {r.layout.name for r in runs}}
    assert seeds.pop("1_rank") == seeds.pop("dp2") == [5, 6]
    assert set(map(tuple, seeds.values())) == {(5,)}
    assert [run.layout.name for run in runs if not run.same_samples] == ["dp2", "dp2"]
    assert all(run.stage.config.seed == run.seed for run in runs)
    assert len({run.stage.run_dir for run in runs}) == len(runs)


def test_a_shorter_run_keeps_its_share_of_warm_up() -> None:
    full, short = load(RECIPE), plan(Path("runs/x"))[0].stage.config
    assert short.train.total_samples == 1000
    assert short.optim.warmup_steps / short.train.total_samples == pytest.approx(
        full.optim.warmup_steps / full.train.total_samples, rel=0.4
    )
    unchanged = plan_runs(RECIPE, None, SEEDS, Path("runs/x"))[0].stage.config
    assert (unchanged.optim, unchanged.train.total_steps) == (full.optim, full.train.total_steps)


@pytest.mark.parametrize("seeds", [(0,), (1, 1), (0, 1, 0)])
def test_a_spread_needs_two_seeds(seeds: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="at least two different"):
        plan(Path("runs/x"), seeds)


def test_a_recipe_without_recall_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be contrastive"):
        plan_runs(ROOT / "recipes" / "demo_mim.yaml", None, SEEDS, Path("runs/x"))


def test_all_within_the_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = FakeTraining(as_one_rank)
    code, output = run(tmp_path / "runs", training, monkeypatch)
    lines = output.splitlines()
    assert code == 0
    rule = "|difference| <= 2 x 1.00 points, the spread of 1 rank over seeds"
    assert lines[-1] == f"every layout trains to within the seeds' noise: {rule}"
    assert "dp2 minus 1 rank, mean over 3 seeds: -0.10" in lines
    assert training.started[0] == ("1_rank/seed_0", 1) and ("tp2/seed_0", 2) in training.started
    assert ("accumulate4/seed_0", 1) in training.started
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert len(rows) == 1 + len(training.started) and len({len(row) for row in rows}) == 1
    by_name = {(row[2], row[3]): row[1:2] + row[5:] for row in rows}
    assert by_name["1_rank", "1"] == ["abc1234", "81.00", "-", "3.900", "2.500", "-", "2 cores, torch 2.0"]
    assert by_name["pp2", "0"] == [
        "abc1234", "79.90", "-0.10", "3.900", "2.500", "1e-07, 2e-06", "2 cores, torch 2.0",
    ]  # fmt: skip
    assert by_name["dp2", "2"][-2] == "other samples"


def test_the_json_holds_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, output = run(tmp_path, FakeTraining(as_one_rank), monkeypatch)
    told = json.loads((tmp_path / "layouts.json").read_text())
    assert told["spread"] == pytest.approx(0.01) and told["limit"] == pytest.approx(0.02)
    assert told["commits"] == ["abc1234"] and told["versions"] == {"torch": "2.0"}
    assert told["verdict"] == output.splitlines()[-1]
    layout = next(layout for layout in told["layouts"] if layout["name"] == "vision_tp2_text_tp1")
    assert layout["set"] == {"parallel.vision.tp": 2} and layout["fault"] == ""
    [figures] = layout["runs"]
    assert figures["mean_recall"] == pytest.approx(0.799) and figures["difference"] == pytest.approx(-0.001)
    assert figures["largest_loss_difference"] == pytest.approx(15e-7)


@pytest.mark.parametrize("shift", [-0.021, 0.021])
def test_out_of_the_spread_is_named(shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = FakeTraining(lambda layout, seed: RECALL[seed] + (shift if layout == "tp2_sp" else 0.0))
    code, output = run(tmp_path, training, monkeypatch)
    assert code == 1
    verdict = output.splitlines()[-1]
    assert verdict.startswith("NOT every layout") and verdict.endswith(f": tp2_sp ({100 * shift:+.2f} points)")


def test_one_seed_of_several_may_lie_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = FakeTraining(lambda layout, seed: RECALL[seed] + (0.03 if (layout, seed) == ("dp2", 1) else 0.0))
    code, output = run(tmp_path, training, monkeypatch)
    assert code == 0
    assert "mean over 3 seeds: +1.00" in output


def test_a_run_without_result_is_a_row_and_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run(tmp_path, FakeTraining(lambda *run: None if run[0] == "pp2" else as_one_rank(*run)), monkeypatch)
    assert code == 1
    assert output.splitlines()[-1].endswith(": pp2 (no result)")
    assert "stage pp2/seed_0 failed: rank 1 was killed by SIGKILL" in output
    assert "| pp2 | - | - | no result |" in output and "| pp2_overlap | 0 |" in output
    again = FakeTraining(as_one_rank)
    again.commit = "def5678"
    code, output = run(tmp_path, again, monkeypatch)
    assert code == 0
    assert again.started == [("pp2/seed_0", 2)]
    assert "note: the runs are of several commits: abc1234, def5678" in output


def test_nothing_is_said_without_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = FakeTraining(lambda layout, seed: None if (layout, seed) == ("1_rank", 1) else RECALL[seed])
    code, output = run(tmp_path, training, monkeypatch)
    assert code == 1
    assert "stage 1_rank/seed_1 failed" in output and "every layout" not in output
    assert len(training.started) == 2


def test_a_loss_that_does_not_fall_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = FakeTraining(as_one_rank)
    training.loss_falls = False
    monkeypatch.setattr(FakeTraining, "rounding", staticmethod(lambda stage, step: 0.0))
    code, output = run(tmp_path, training, monkeypatch)
    assert code == 1
    assert "tp2 (its loss does not fall)" in output.splitlines()[-1]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = FakeTraining(as_one_rank)
    run(tmp_path, training, monkeypatch)
    started = len(training.started)
    code, output = run(tmp_path, training, monkeypatch, "--samples", "2000")
    assert code == 2
    assert "train.total_samples: 1000 -> 2000" in output and len(training.started) == started
    assert compare(plan(tmp_path), Ledger(tmp_path)).samples == 15 * 64
