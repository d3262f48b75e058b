"""`megaeva plan --calibration`: what was fitted, how far off the rest is, and that rows are their sources'."""

from pathlib import Path

import pytest

from megaeva.config import load
from megaeva.planning import plan
from megaeva.planning.calibration import RUNS, calibration_lines
from megaeva.planning.formulae import Work
from megaeva.planning.gpus import GPUS
from megaeva.planning.published import Gpt, Kernels, eva_clip_18b, layer_seconds
from megaeva.planning.table import in_bytes

EVA_18B = Path(__file__).parents[3] / "recipes/clip_eva_18b.yaml"


def test_what_is_called_fitted_is() -> None:
    """One row of each generation. Predictions stay near enough to be printed; OpenCLIP's is a run by the clock."""
    assert [run.what for run in RUNS if run.basis == "fitted"] == [
        "2022 GPT 22B, 8 A100",
        "DGXC GPT 175B bf16, 128 H100",
    ]
    for run in RUNS:
        off = run.predict() / run.published
        if run.basis == "fitted":
            assert abs(off - 1) < 0.01, run.what
        else:
            assert 0.85 < off < (1.9 if run.what.startswith("OpenCLIP") else 1.25), run.what
    lines = calibration_lines()
    assert len(lines) > len(RUNS)
    assert max(map(len, lines)) <= 120


def test_published_runs_have_the_layouts_of_their_sources() -> None:
    """tp x pp x vpp, micro batch, recomputation: run_table_1.sh, tables 3 and 5, READMEs and configurations."""
    told = {run.what: run.layout for run in RUNS if run.basis != "assumed" and run.layout}
    assert told.pop("2022 GPT 22B, 8 A100") == "8 x 1 x 1, 4, full", "the second of the two rows"
    assert told == {
        "OpenCLIP L/14, 400 A100-40": "1 x 1 x 1, 96, full",
        "2021 GPT 1.7B, 32 A100": "1 x 1 x 1, 16, full",
        "2021 GPT 3.6B, 64 A100": "2 x 1 x 1, 16, full",
        "2021 GPT 7.5B, 128 A100": "4 x 1 x 1, 16, full",
        "2021 GPT 18.4B, 256 A100": "8 x 1 x 1, 8, full",
        "2021 GPT 39.1B, 512 A100": "8 x 2 x 1, 4, full",
        "2021 GPT 76.1B, 1024 A100": "8 x 4 x 3, 2, full",
        "2021 GPT 145.6B, 1536 A100": "8 x 8 x 2, 2, full",
        "2021 GPT 310.1B, 1920 A100": "8 x 16 x 2, 1, full",
        "2021 GPT 529.6B, 2520 A100": "8 x 35 x 3, 1, full",
        "2021 GPT 1008B, 3072 A100": "8 x 64 x 1, 1, full",
        "2022 GPT 175B, 64 A100": "8 x 8 x 3, 1, full",
        "2022 GPT 530B, 280 A100": "8 x 35 x 3, 1, full",
        "2022 GPT 1T, 512 A100": "8 x 64 x 1, 1, full",
        "DGXC GPT 175B bf16, 128 H100": "4 x 8 x 12, 1, none",
        "DGXC GPT 175B bf16, 512 H100": "4 x 8 x 12, 1, none",
        "DGXC GPT 175B bf16, 2048 H100": "4 x 8 x 12, 1, none",
        "DGXC GPT 175B fp8, 128 H100": "4 x 8 x 12, 1, none",
        "DGXC GPT 175B fp8, 512 H100": "4 x 8 x 12, 1, none",
        "DGXC GPT 175B fp8, 2048 H100": "4 x 8 x 12, 1, none",
    }


def test_one_layer_takes_what_was_measured_of_it() -> None:
    """Korthikanti et al. 2022, table 4: a layer of the 22B model, tp 8, sequence parallelism, no flash attention."""
    gpu = GPUS["a100-80"]
    model = Gpt(48, 6144, 64, 8, 1, 1, 8, 4, 4)
    work = Work(2048, 4, 8, True, "bf16", True)
    times = layer_seconds(model.section, work, gpu, Kernels(dropout=True))
    assert [1000 * one.total * gpu.slowdown for one in times] == pytest.approx([7.2, 11.8], rel=0.1)
    flash = layer_seconds(model.section, work, gpu, None)
    assert all(one.attention < other.attention for one, other in zip(flash, times, strict=True))


def test_the_table_has_the_plan_of_18b() -> None:
    ours, recipe = eva_clip_18b(), plan(load(EVA_18B), 360, GPUS["a100-40"])
    assert ours.fits
    assert (ours.days, ours.worst.total) == (recipe.days, recipe.worst.total)
    assert any(f"fits, {in_bytes(ours.worst.total)} of" in line for line in calibration_lines())
