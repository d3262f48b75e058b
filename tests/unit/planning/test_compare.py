"""The plan beside the run, at the run's tenth step."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from megaeva.planning.compare import STEP, PlanComparison, gpu_of_chip
from megaeva.planning.estimate import plan
from megaeva.planning.formulae import GIB
from tests.helpers.trainer_recipe import model, trainer_recipe


class Record:
    """What a RunRecord is to the comparison."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.said = run_dir, []  # type: ignore[var-annotated]
        (run_dir / "manifest.json").write_text('{"git_commit": "0"}')

    def say(self, text: str) -> None:
        self.said.append(text)

    def write_json(self, name: str, value: Any) -> None:
        (self.run_dir / name).write_text(json.dumps(value))


def resident_gib() -> float:
    """What a run finds at its tenth step that took 1 GiB since its beginning."""
    return 1 + psutil.Process().memory_info().rss / GIB


def compared(folder: Path, steps: int, is_main: bool = True, **runtime: Any) -> Record:
    cfg = trainer_recipe(folder, "run", 20, model=model(2, 1), optim={"vision": {"lr": 1e-3}})
    this = {"device": torch.device("cpu"), "world_size": 1, "memory_gib": resident_gib, "is_main": is_main} | runtime
    record: Any = Record(folder)
    comparison = PlanComparison(cfg, SimpleNamespace(**this))  # type: ignore[arg-type]
    for step in range(steps):
        comparison.after_step(step + 1, record)
    return record


def start_line(folder: Path, **runtime: Any) -> str:
    cfg = trainer_recipe(folder, "run", 20, model=model(2, 1), optim={"vision": {"lr": 1e-3}})
    this = {"device": torch.device("cpu"), "world_size": 1, "is_main": True} | runtime
    return PlanComparison(cfg, SimpleNamespace(**this)).start_line()  # type: ignore[arg-type]


def test_the_start_says_what_is_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GiB of tensors on a rank; of a CPU no seconds" in start_line(tmp_path)
    assert start_line(tmp_path, is_main=False) == ""
    assert start_line(tmp_path, world_size=0).startswith("plan: none (")
    for name, gpu in (("NVIDIA H200", "h200)"), ("Some Card 3", "the nearest that the planner knows to Some Card 3)")):
        monkeypatch.setattr("megaeva.planning.compare.chip", lambda name=name: name)
        line = start_line(tmp_path, device=torch.device("cuda"))
        assert line.startswith("plan: at most ") and line.endswith(gpu) and " days " in line


def test_the_tenth_step_says_both_sides_once(tmp_path: Path) -> None:
    record = compared(tmp_path, 20)
    assert len(record.said) == 1 and "rank 0 holds" in record.said[0], record.said
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["git_commit"] == "0"
    found = written["plan"]
    # At most what this recipe's parameters take, several times over; a rank of a cluster would hold a margin of GiB.
    assert 0 < found["memory_gib"] < 0.05
    assert found["measured_memory_gib"] == pytest.approx(1, abs=0.2) and found["measured_step_seconds"] >= 0
    assert found["step_seconds"] is None


@pytest.mark.parametrize(("steps", "is_main"), [(STEP - 1, True), (20, False)])
def test_no_other_step_and_no_other_rank_says_anything(tmp_path: Path, steps: int, is_main: bool) -> None:
    assert compared(tmp_path, steps, is_main).said == []


def test_on_a_gpu_seconds_are_predicted_and_the_nearest_gpu_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaeva.planning.compare.chip", lambda: "NVIDIA H100 PCIe (compute capability 9.0)")
    record = compared(tmp_path, STEP, device=torch.device("cuda"))
    assert "planned as h100-80, the nearest that the planner knows to NVIDIA H100 PCIe" in record.said[0]
    found = json.loads((tmp_path / "manifest.json").read_text())["plan"]
    gpu = gpu_of_chip("h100 80")[0]
    whole = plan(trainer_recipe(tmp_path, "run", 20, model=model(2, 1), optim={"vision": {"lr": 1e-3}}), 1, gpu)
    assert found["step_seconds"] == pytest.approx(whole.phases[0].step)
    assert found["memory_gib"] < whole.worst.total / GIB - gpu.reserved_gib + 1e-9


def test_a_plan_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    record = compared(tmp_path, STEP, world_size=0)
    assert len(record.said) == 1 and record.said[0].startswith("plan: none"), record.said


@pytest.mark.parametrize(
    ("name", "gpu", "known"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40", True),
        ("NVIDIA A100-SXM4-80GB (compute capability 8.0)", "a100-80", True),
        ("NVIDIA H100 80GB HBM3", "h100-80", True),
        ("NVIDIA H200", "h200", True),
        ("NVIDIA B200", "b200", True),
        ("NVIDIA GB200", "b200", False),
        ("NVIDIA A100 80GB PCIe", "a100-80", False),
        ("NVIDIA H200 NVL", "h200", False),
    ],
)
def test_names_of_devices(name: str, gpu: str, known: bool) -> None:
    found, exact = gpu_of_chip(name)
    assert (found.name, exact) == (gpu, known)
