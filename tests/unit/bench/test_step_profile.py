"""The shares of a step's parts: what is counted where, and what is printed."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megaeva.bench import step_profile
from megaeva.bench.captions import typical_tokens
from megaeva.bench.step import MegatronStep, example_batch, recipe
from megaeva.bench.step_profile import PARTS, Clock, StepProfile, profile_step, timed
from megaeva.optim.lamb import Lamb
from megaeva.parallel import schedule
from tests.helpers.tiny import tiny

LOG = (Path(__file__).parents[3] / "benchmarks" / "log.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_a_part_inside_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(step_profile, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = Clock(torch.device("cpu"))

    def step() -> None:
        now[0] += 1
        with clock.part("update"):
            now[0] += 2
            with clock.part("zeroing"):
                now[0] += 5
            now[0] += 3

    clock.one_step(step)
    assert clock.one_step(step) == {"other": 1, "update": 5, "zeroing": 5}


def test_every_call_of_the_step_is_counted_and_none_afterwards(runtime: Any) -> None:
    model = tiny("EVA02-CLIP-B-16")
    batch = example_batch(model, typical_tokens(model.text, 4)[0])
    step = MegatronStep(recipe(model, 4, "bf16", "lamb"), runtime, batch)
    assert all(isinstance(one.optimizer, Lamb) for one in step.optimizer.chained_optimizers)
    before = torch.Tensor.backward, schedule.reduce_gradients, schedule.zero_gradients
    clock = Clock(runtime.device)
    started_at = time.perf_counter()
    with timed(step, clock):
        seconds = clock.one_step(step)
    elapsed = time.perf_counter() - started_at
    assert set(seconds) == set(PARTS) and min(seconds.values()) > 0
    assert 0.9 * elapsed < sum(seconds.values()) <= elapsed
    assert seconds["backward"] > seconds["zeroing"]
    assert before == (torch.Tensor.backward, schedule.reduce_gradients, schedule.zero_gradients)
    clock.seconds.clear()
    step()
    assert not clock.seconds


def test_shares_are_medians_and_the_row_fits_the_logs_table() -> None:
    rounds = tuple(
        {"forward": 3.0, "backward": 6.0, "update": update, "gradient norm": 0.25} for update in (9, 0.75, 0.5)
    )
    profile = StepProfile(rounds, batch_size=9, num_parameters=2_000_000, captions="captions")
    assert profile.share("update", "gradient norm") == pytest.approx(1 / 10)
    # 1 s of optimizer beside 1 s a sample: 19 samples make it a twentieth.
    assert profile.samples_for(0.05) == pytest.approx(19)
    assert profile.share_at(19) == pytest.approx(0.05)
    *lines, row = profile.report("c")
    assert any("the optimizer (gradient norm, update): 10.00 %" in line for line in lines)
    assert any("5 % from 19 and 3 % from 32 samples a rank and step, 0.10 % at 1024" in line for line in lines)
    header = next(line for line in LOG.splitlines() if "| gradient norm | update |" in line)
    assert len(cells(row)) == len(cells(header))
    assert cells(row)[cells(header).index("update")] == "7.50 %"
    assert cells(row)[cells(header).index("optimizer")] == "10.00 %"


def test_one_step_goes_before_those_that_count() -> None:
    profile = profile_step(
        tiny("EVA02-CLIP-B-16"), batch_size=3, precision="fp32", part="vision", optimizer="adamw", num_rounds=2
    )
    assert len(profile.rounds) == 2 and profile.num_parameters > 0
