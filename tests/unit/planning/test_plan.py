"""`megaeva plan`: what it prints and refuses, what --search finds, and that all of it goes without torch."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megaeva.config import check_world, load
from megaeva.config.problem import divisors
from megaeva.errors import ConfigError, UserError
from megaeva.planning import plan
from megaeva.planning.command import run_plan
from megaeva.planning.formulae import GIB
from megaeva.planning.gpus import GPUS, find_gpu
from megaeva.planning.search import Search, overrides, search, search_lines

RECIPES = Path(__file__).parents[3] / "recipes"
EVA_18B = RECIPES / "clip_eva_18b.yaml"


def test_a_plan_takes_no_torch_and_little_time() -> None:
    """Of a processor, all of Python's start included: this machine may be busy with other tests."""
    command = ["plan", str(EVA_18B), "--gpus", "360", "--gpu", "a100-40"]
    code = f"import sys; sys.modules['torch'] = None; from megaeva.cli import app; app({command!r})"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "100"}
    )
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    assert usage.ru_utime + usage.ru_stime < 2.0
    assert "fits, " in text
    assert " days, " in text
    assert max(map(len, text.splitlines())) < 100


@pytest.fixture(scope="module")
def found() -> Search:
    """EVA-CLIP-18B as it was trained: 360 A100-40, batch 108,000."""
    begun = time.process_time()
    result = search(load(EVA_18B), 360, GPUS["a100-40"])
    assert (time.process_time() - begun) / result.tried < 10 / 1000
    return result


def test_the_published_run_of_18b_is_feasible(found: Search) -> None:
    assert found.tried > 1000
    best = found.best[0]
    assert best.fits
    assert best.cfg.train.global_batch_size == 108_000
    assert [one.days for one in found.best] == sorted(one.days for one in found.best)
    assert best.days < plan(load(EVA_18B), 360, GPUS["a100-40"]).days, "the recipe's own layout is one of them"
    whole = {(family.tp, family.pp): family for family in found.families}[1, 1]
    assert not whole.fits
    lines = search_lines(found)
    assert any("tp=1 pp=1:" in line and "of 39.4 at the least" in line and "gradients" in line for line in lines)
    assert any(line.startswith("  tp=8 pp=2,4,6-8,") and "does not divide 360 GPUs" in line for line in lines)
    assert any(line.startswith("  tp=5,10,20,40: ") for line in lines)
    assert "  fp8: a100-40 does not multiply in it" in lines
    rejected = {(family.tp, family.pp) for family in found.families if not family.fits}
    assert rejected >= {(1, 45), (8, 45)}, "as deep as the tower"


def test_a_search_recomputes_no_more_layers_than_it_must() -> None:
    recipe = load(RECIPES / "clip_eva02_b16.yaml")
    found = search(recipe, 64, GPUS["a100-40"])
    best = found.best[0]
    layers = best.cfg.parallel.vision.recompute
    assert isinstance(layers, int) and 1 < layers < recipe.model.vision.num_layers
    assert best.cfg.train.micro_batch_size == 2048, "the whole share of a GPU, in one pass"
    assert best.days < plan(recipe, 64, GPUS["a100-40"]).days, "the recipe recomputes all"
    changes = [*overrides(best.cfg, recipe), f"parallel.vision.recompute={layers - 1}"]
    assert not plan(load(RECIPES / "clip_eva02_b16.yaml", changes), 64, GPUS["a100-40"]).fits
    assert any("data.decoder=pillow" in line for line in search_lines(found))


def test_a_layout_that_was_found_is_a_recipe(found: Search) -> None:
    for one in found.best:
        cfg = load(EVA_18B, overrides(one.cfg, found.cfg))
        check_world(cfg, 360)
        assert plan(cfg, 360, GPUS["a100-40"]).days == one.days


def test_nothing_fits() -> None:
    with pytest.raises(UserError) as caught:
        run_plan(EVA_18B, ["train.global_batch_size=120"], 2, "a100-40", searching=True)
    text = str(caught.value)
    assert text.startswith("Nothing fits: the least is ")
    assert "too many, with:" in text
    assert "Most of it is " in text
    assert "It does not fit with data.decoder=pillow either" in text
    with pytest.raises(UserError, match=r"on 7 GPUs; .*use --gpus 6 or 8, or change train.global_batch_size") as caught:
        run_plan(EVA_18B, [], 7, "a100-40", searching=True)


def test_images_that_a_host_has_room_for() -> None:
    recipe = RECIPES / "clip_eva02_e14plus.yaml"
    with pytest.raises(UserError) as caught:
        run_plan(recipe, ["data.decoder=auto"], 24, "a100-40", searching=True)
    said = re.search(r"pillow it would fit, where a node has (.*) GiB .*, with:\n((  .*\n)+)", str(caught.value))
    assert said is not None
    one = plan(load(recipe, said[2].replace("\\", "").split()), 24, GPUS["a100-40"])
    assert one.fits and float(said[1]) == round(one.host_image_bytes / GIB, 1) < 256
    found = search(load(EVA_18B), 24, GPUS["a100-40"])
    room = re.compile(
        r"with data\.decoder=pillow it would fit, but images take (.*) GiB .* 2 TB have 256 GiB each", re.I
    )
    (line,) = filter(room.match, search_lines(found))
    assert float(room.match(line)[1]) > 256  # type: ignore[index]
    (line,) = filter(room.match, lines := run_plan(EVA_18B, [], 24, "a100-40"))
    taken = plan(load(EVA_18B, ["data.decoder=pillow"]), 24, GPUS["a100-40"]).host_image_bytes
    assert float(room.match(line)[1]) == round(taken / GIB, 1)  # type: ignore[index]
    assert "no single change makes it fit; try --search" in lines


def test_the_number_of_gpus_on_which_it_fits() -> None:
    """Of all numbers that divide the batch the first on which a search finds something; none is not called never."""
    recipe, gpu = load(RECIPES / "clip_eva02_l14.yaml"), GPUS["a100-40"]
    shares = [number for number in divisors(recipe.train.global_batch_size) if 2 < number <= 64]
    fewest = next(number for number in shares if search(recipe, number, gpu).best)
    assert fewest > shares[0]
    line = "It fits on {0} GPUs, the fewest found: use --gpus {0} --search."
    assert line.format(fewest) in search_lines(search(recipe, 2, gpu))
    assert line.format(144) in search_lines(search(load(EVA_18B), 8, gpu)), "no power of 2 more"
    assert search(load(EVA_18B), 144, gpu).best
    small = gpu.model_copy(update={"memory_gib": 1.0})
    assert "No larger number of GPUs was found on which it fits." in search_lines(search(recipe, 2, small))


def test_what_would_make_a_plan_fit() -> None:
    """EVA02-E/14+ is written for 80 GB."""
    lines = run_plan(RECIPES / "clip_eva02_e14plus.yaml", [], 144, "a100-40")
    assert any("does not fit: " in line for line in lines)
    ways = [line.removeprefix("it would fit with: ") for line in lines if line.startswith("it would fit with: ")]
    assert ways
    for way in ways:
        cfg = load(RECIPES / "clip_eva02_e14plus.yaml", way.split())
        assert plan(cfg, 144, GPUS["a100-40"]).fits


def test_files(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"json_path": tmp_path / "plan.json", "plot_path": tmp_path / "plan.svg"}
    run_plan(EVA_18B, ["parallel.vision.pp=3"], 360, "h200", **arguments)
    values = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["layers"] for stage in values["stages"]] == ["0-15", "16-31", "32-47"]
    assert values["stages"][0]["total_bytes"] == sum(values["stages"][0]["bytes"].values())
    assert [stage["passes_in_flight"] for stage in values["stages"]] == [3, 2, 1]
    assert (tmp_path / "plan.svg").stat().st_size > 10_000
    recipe = RECIPES / "mim_eva02_l14.yaml"
    lines = run_plan(recipe, [], 64, "a100-40", searching=True, json_path=tmp_path / "search.json")
    values = json.loads((tmp_path / "search.json").read_text())
    assert len(values["best"]) == 5 and lines[0].startswith(f"{values['tried']} layouts")
    assert [line.strip() for line in lines[lines.index("not possible:") + 1 :]] == values["not_possible"]


def test_files_that_cannot_be_written_are_said(tmp_path: Path) -> None:
    def run(**paths: Path) -> None:
        run_plan(EVA_18B, [], 360, "a100-40", **paths)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"--json .*/nope/plan.json lies in .*/nope, which is no folder; it must be "):
        run(json_path=tmp_path / "nope" / "plan.json")
    with pytest.raises(UserError, match=r"--plot .* is a folder; "):
        run(plot_path=tmp_path)
    for name in ("plan.txt", "plan"):
        with pytest.raises(UserError, match=r"--plot .*must end in one of .*\.png"):
            run(plot_path=tmp_path / name)
    for option, name, path in (
        ("--json", "json_path", "/dev/full"),
        ("--json", "json_path", "/proc/x.json"),
        ("--plot", "plot_path", "/proc/x.png"),
        ("--json", "json_path", f"/tmp/{'x' * 300}"),
    ):
        with pytest.raises(
            UserError, match=rf"^{option} {path} cannot be written \(.+\); it must be a file in a folder "
        ):
            run(**{name: Path(path)})


def test_a_teacher_is_that_of_the_recipe_that_makes_it(tmp_path: Path) -> None:
    recipe = RECIPES / "mim_eva_18b.yaml"
    lines = run_plan(recipe, [], 512, "h100-80")
    assert any(line.startswith("teacher matmul") for line in lines)
    away = ["teacher.checkpoint=weights/nobody_has_it.pt"]
    assert any("--teacher NAME" in line for line in run_plan(recipe, away, 512, "h100-80"))
    named = run_plan(recipe, away, 512, "h100-80", teacher_name="EVA02-CLIP-bigE-14-plus")
    assert named == lines
    with pytest.raises(ConfigError, match="did you mean EVA02-CLIP-bigE-14-plus"):
        run_plan(recipe, away, 512, "h100-80", teacher_name="EVA02-bigE-14-plus")
    with pytest.raises(ConfigError, match="leave it out"):
        run_plan(EVA_18B, [], 360, "a100-40", teacher_name="EVA-CLIP-8B")


def test_gpus(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--gpu h100 is not a known GPU .*did you mean .*h100-80(.|\n)*memory_gib: "):
        find_gpu("h100")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "memory_gib: 24\nmemory_gb_s: 900\nlink_gb_s: 30\nnetwork_gb_s: 3\npeak_tflops: {bf16: 165, fp32: 40}\n"
    )
    assert find_gpu(str(path)).name == "mine"
    path.write_text("memory_gib: -1\nmemory: 3\n")
    with pytest.raises(ConfigError, match=r"(?s)memory_gib=-1 \(.*:1\) must be .*memory_gb_s .*missing.*memory=3 .*:2"):
        find_gpu(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        find_gpu(str(tmp_path / "absent.yaml"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_gpu(str(path))
    path.write_text("- memory_gib\n")
    with pytest.raises(ConfigError, match="holds no keys"):
        find_gpu(str(path))


_MINE = "memory_gib: 24\nmemory_gb_s: 900\nlink_gb_s: 30\nnetwork_gb_s: 3\n"
_PEAK = "peak_tflops: {bf16: 165}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (_PEAK + "slowdown: 1\nslowdown: 2", r"slowdown \(.*:7\) is written twice, first at .*:6; keep one"),
        ("peak_tflops: {bf16: 1, bf16: 2}", r"peak_tflops\.bf16 \(.*:5\) is written twice"),
        ("peak_tflops: {bf16: -1}", r"peak_tflops\.bf16=-1 \(.*:5\) must be at least 0\.001"),
        ("peak_tflops: {fp8: 1979}", r"peak_tflops=.* \(.*:5\) must have bf16 beside fp8: "),
        (_PEAK + "matmul_share: {0: 0.5, 128: 3}", r"(?s)matmul_share\.0.*matmul_share\.128=3 .* must be at most 1"),
        (_PEAK + "reserved_gib: .inf", r"reserved_gib=\.inf \(.*:6\) must be a finite number"),
        (_PEAK + "slowdown: .inf", r"slowdown=\.inf \(.*:6\) must be a finite number"),
        (_PEAK + "slowdown: 1e300", r"slowdown=.* must be at most 100"),
        (_PEAK + "fragmentation: 1.5", r"fragmentation=1\.5 \(.*:6\) must be at most 1;"),
        (_PEAK + "memory_share: 1e-200", r"memory_share=1e-200 .* must be at least 0\.0001"),
        (_PEAK + "gpus_per_node: 10000000000", r"gpus_per_node=.* must be at most 1024"),
        (_PEAK + "launch_us: '5'", r"launch_us=\"5\" .* must be a number"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_of_a_gpu(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(_MINE + text + "\n")
    with pytest.raises(ConfigError, match=told) as caught:
        find_gpu(str(path))
    assert "a whole file is for example:\nname: my-gpu" in str(caught.value)


def test_a_gpu_that_multiplies_in_fp16(tmp_path: Path) -> None:
    """A V100 has no bf16."""
    path = tmp_path / "v100.yaml"
    path.write_text(_MINE + "peak_tflops: {fp16: 125, fp32: 15}\nmatmul_share: {128: 0.1, 4096: 0.8}\n")
    gpu = find_gpu(str(path))
    assert gpu.matmul_share == {128: 0.1, 4096: 0.8}
    cfg = load(RECIPES / "clip_eva02_b16.yaml", ["train.precision=fp16"])
    one, twice = (plan(cfg, 64, gpu.model_copy(update={"peak_tflops": {"fp16": peak}})) for peak in (125.0, 250.0))
    seconds, flops = (
        sum(getattr(phase, key) * phase.phase.steps for phase in one.phases) for key in ("step", "model_flops")
    )
    assert one.mfu == pytest.approx(flops / (seconds * 64 * 125e12))
    assert twice.mfu < one.mfu
    assert any(
        "MFU" in line for line in run_plan(RECIPES / "clip_eva02_b16.yaml", ["train.precision=fp16"], 64, str(path))
    )
    for edge in ("reserved_gib: 1e6", "slowdown: 100", "memory_share: 1e-4", "matmul_share: {1000000: 1e-4}"):
        path.write_text(_MINE + "peak_tflops: {fp16: 1e-3}\n" + edge + "\n")
        assert math.isfinite(plan(cfg, 64, find_gpu(str(path))).days)


def test_a_precision_that_the_gpu_lacks() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision=fp8 .*a100-40.* bf16"):
        run_plan(EVA_18B, ["train.precision=fp8"], 360, "a100-40")


def test_what_a_layout_changes() -> None:
    """Directions that must hold whatever the constants."""
    gpu = GPUS["h100-80"]
    base = ["train.global_batch_size=110592", "train.micro_batch_size=16", "parallel.text.tp=1"]

    def planned(*more: str) -> Any:
        return plan(load(EVA_18B, [*base, *more]), 256, gpu)

    full, none = planned(), planned("parallel.vision.recompute=none")
    assert none.worst.parts["activations"] > 3 * full.worst.parts["activations"]
    assert none.days < full.days
    two = planned("parallel.vision.recompute=none", "parallel.vision.tp=4", "parallel.vision.pp=2")
    assert two.phases[0].parts["pipeline bubble"] > 0
    assert len(two.stages) == 2
    chunks = planned(
        "parallel.vision.recompute=none", "parallel.vision.tp=4", "parallel.vision.pp=2", "parallel.vision.vpp=2"
    )
    assert chunks.phases[0].parts["pipeline bubble"] < two.phases[0].parts["pipeline bubble"]
    assert chunks.stages[0].parts["activations"] > two.stages[0].parts["activations"]
    eight = planned("train.precision=fp8")
    assert eight.days < full.days
    assert eight.worst.parts["FP8 copies"] > 0
    assert planned("optim.ema_decay=0.999").worst.parts["optimizer"] == pytest.approx(
        full.worst.parts["optimizer"] * 16 / 12, rel=1e-6
    )
    frozen = planned("optim.frozen=[vision]")
    assert frozen.worst.parts["gradients"] < 4 * GIB
    assert frozen.days < full.days / 2
