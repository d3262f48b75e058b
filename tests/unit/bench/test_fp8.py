"""The chains of `megaeva bench fp8`, the processes they run in, and what is made of their results."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megaeva.bench import fp8
from megaeva.bench.fp8 import Chain, draw_curves, measured, plan_chains, run_chains, table_lines, within_limit
from megaeva.config import load, load_loop
from megaeva.errors import UserError
from megaeva.loop.stages import plan_stages

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "demo.yaml"
LOG = (ROOT / "benchmarks" / "log.md").read_text(encoding="utf-8")
ALL = ("fp32", "bf16", "fp8_delayed", "fp8_current")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def finish(chain: Chain, recall: float, losses: Sequence[float]) -> None:
    for stage in chain.stages:
        folder = chain.run_dir / stage
        folder.mkdir(parents=True)
        lines = [{"step": 25 * i, "wall_time": 0.0, "loss": loss} for i, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (chain.run_dir / "results.json").write_text(json.dumps({"student": {"mean_recall": recall}}))


def test_every_stage_of_a_chain_has_its_precision(tmp_path: Path) -> None:
    chains = plan_chains(RECIPE, ALL, [0, 1], tmp_path)
    assert [(chain.precision, chain.seed) for chain in chains[:5]] == [
        ("bf16", 0), ("fp32", 0), ("fp8_delayed", 0), ("fp8_current", 0), ("bf16", 1),
    ]  # fmt: skip
    assert len({chain.run_dir for chain in chains}) == 8
    for chain in chains:
        assert chain.stages == ("teacher", "round1/distil", "round1/clip")
        for stage in plan_stages(chain.content, RECIPE):
            train = stage.config.train
            assert stage.config.seed == chain.seed
            assert train.precision == chain.precision.split("_")[0]
            if train.precision == "fp8":
                assert train.fp8.recipe == chain.precision.removeprefix("fp8_") and train.fp8.rehearse
                assert train.fp8.first_layers_bf16 == train.fp8.last_layers_bf16 == 0
    (student,) = [s.config for s in plan_stages(chains[0].content, RECIPE) if s.role == "clip"]
    usual = load(ROOT / "recipes" / "demo_clip.yaml")
    assert (student.optim, student.train.total_samples) == (usual.optim, usual.train.total_samples)


def test_what_is_unfinished_runs_and_a_failure_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, subprocess.Popen[bytes]] = {}

    def start_with(**scripts: str) -> None:
        def start(chain: Chain) -> "subprocess.Popen[bytes]":
            command = [sys.executable, "-S", "-c", scripts.get(chain.precision, "")]
            started[chain.precision] = subprocess.Popen(command)
            return started[chain.precision]

        started.clear()
        monkeypatch.setattr(fp8, "_start", start)

    chains = plan_chains(RECIPE, ALL, [0], tmp_path)
    finish(chains[1], 0.5, [1.0])
    start_with()
    run_chains(chains, 2)
    assert set(started) == {"bf16", "fp8_current", "fp8_delayed"}

    endless = "import time; time.sleep(60)"
    start_with(bf16="raise SystemExit(1)", fp8_delayed=endless)
    with pytest.raises(UserError, match=r"bf16_seed_0 ended with exit code 1.*bf16_seed_0\.log"):
        run_chains(chains, 2)
    assert started["fp8_delayed"].returncode == -signal.SIGTERM and "fp8_current" not in started

    start_with(bf16="import os; os.kill(os.getppid(), 15)", fp8_delayed=endless, fp8_current=endless)
    with pytest.raises(SystemExit) as end:
        run_chains(chains, 2)
    assert end.value.code == 143
    assert started["fp8_delayed"].returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_recipe_of_a_chain_is_one_that_the_loop_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: commands.append(command))
    (chain,) = plan_chains(RECIPE, ["bf16"], [3], tmp_path)
    fp8._start(chain)
    assert commands[0][-2:] == ["loop", str(tmp_path / "bf16_seed_3.yaml")]
    read = load_loop(tmp_path / "bf16_seed_3.yaml")
    assert read == chain.content
    assert [stage.config for stage in plan_stages(read, Path(commands[0][-1]))] == [
        stage.config for stage in plan_stages(chain.content, RECIPE)
    ]


def test_differences_are_from_bf16_of_the_same_seed(tmp_path: Path) -> None:
    recalls = {"bf16": (0.50, 0.54), "fp32": (0.51, 0.53), "fp8_delayed": (0.52, 0.53), "fp8_current": (0.48, 0.53)}
    chains = plan_chains(RECIPE, ALL, [0, 1], tmp_path)
    for chain in chains:
        finish(chain, recalls[chain.precision][chain.seed], [2.0, 1.0 + chain.seed])
    results = measured(chains)
    precisions = results["precisions"]
    assert precisions["fp32"]["minus_reference"] == pytest.approx(0)
    assert precisions["fp32"]["spread_of_differences"] == pytest.approx(0.01 * 2**0.5)
    assert precisions["fp8_delayed"]["minus_reference"] == pytest.approx(0.005)
    assert precisions["fp8_current"]["minus_reference"] == pytest.approx(-0.015)
    assert precisions["bf16"]["loss"]["round1/clip"] == {"0": {"25": 2.0, "50": 1.0}, "1": {"25": 2.0, "50": 2.0}}
    assert not within_limit(results)
    sentence, *rows = table_lines(results, "c")
    assert sentence.endswith("within 1 point of bf16: NO")
    header = cells(next(line for line in LOG.splitlines() if "| minus bf16 |" in line))
    assert {len(cells(row)) for row in rows} == {len(header)}
    (row,) = [cells(row) for row in rows if "fp8_current" in row]
    assert row[header.index("minus bf16")] == "-1.50 ± 0.71"
    assert row[header.index("last losses")] == "teacher 1.5000, distil 1.5000, clip 1.5000"
    del precisions["fp8_current"]
    assert within_limit(results)
    draw_curves(results, tmp_path / "curves.svg")
    picture = (tmp_path / "curves.svg").read_text()
    assert "<svg" in picture and len(picture) < 200_000
