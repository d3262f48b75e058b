"""What must hold of any plan, whatever the constants: sums, directions, and that each recipe fits somewhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from megaeva.config import load
from megaeva.config.topology import sharing_ranks
from megaeva.planning import plan
from megaeva.planning.command import run_plan
from megaeva.planning.estimate import PARTS, Plan
from megaeva.planning.gpus import GPUS

RECIPES = Path(__file__).parents[3] / "recipes"
# A cluster that holds each recipe as it is written, or with what is set beside it.
CLUSTERS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "clip_eva_18b": (360, "a100-40", ()),
    "clip_eva_8b": (384, "a100-40", ()),
    "clip_eva_8b_448": (384, "a100-40", ()),
    "clip_eva02_e14plus": (144, "a100-80", ()),
    "clip_eva02_l14": (128, "a100-40", ()),
    "clip_eva02_b16": (64, "a100-40", ()),
    "mim_eva_18b": (512, "h100-80", ()),
    "mim_eva_8b": (512, "a100-40", ()),
    "mim_eva01_g14": (128, "a100-40", ()),
    "mim_eva02_l14": (64, "a100-40", ()),
    "mim_eva02_b": (32, "a100-40", ()),
}
BASE = ("train.global_batch_size=110592", "train.micro_batch_size=16", "parallel.text.tp=1")


def test_no_recipe_is_missing() -> None:
    """Demos are for a laptop, the loop makes recipes of its own."""
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    assert {name for name in names if name.startswith(("clip", "mim"))} == set(CLUSTERS)


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_recipe_fits_and_its_parts_are_its_sums(name: str, tmp_path: Path) -> None:
    gpus, gpu, more = CLUSTERS[name]
    lines = run_plan(RECIPES / f"{name}.yaml", list(more), gpus, gpu, json_path=tmp_path / "plan.json")
    assert any("fits, " in line for line in lines), lines
    assert max(map(len, lines)) < 130
    values = json.loads((tmp_path / "plan.json").read_text())
    for stage in values["stages"]:
        assert set(stage["bytes"]) == set(PARTS) and min(stage["bytes"].values()) >= 0
        assert stage["total_bytes"] == sum(stage["bytes"].values())
    shown = [line.split() for line in lines[lines.index("") + 2 : lines.index("", lines.index("") + 1)]]
    numbers = {" ".join(words[:-1]): float(words[-1]) for words in shown if words[-1].replace(".", "").isdigit()}
    total = numbers.pop("together")
    assert set(numbers) <= set(PARTS) and sum(numbers.values()) == pytest.approx(total, abs=0.05)
    days = 0.0
    for phase in values["phases"]:
        assert phase["step_seconds"] == pytest.approx(sum(phase["seconds"].values())) and "data" in phase["seconds"]
        days += phase["steps"] * phase["step_seconds"] / 86400
    assert values["days"] == pytest.approx(days)
    assert values["gpu_hours"] == pytest.approx(24 * days * gpus)


def planned(*more: str, gpus: int = 256, gpu: str = "h100-80", **changes: Any) -> Plan:
    described = GPUS[gpu].model_copy(update=changes)
    return plan(load(RECIPES / "clip_eva_18b.yaml", [*BASE, *more]), gpus, described)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("stages", [(1, 1), (2, 1), (4, 3)])
def test_more_gpus_never_need_more_memory(recompute: str, stages: tuple[int, int]) -> None:
    pp, vpp = stages
    layout = (f"parallel.vision.recompute={recompute}", f"parallel.vision.pp={pp}", f"parallel.vision.vpp={vpp}")
    totals = [planned(*layout, gpus=gpus).worst.total for gpus in (128, 256, 512)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("micro", [1, 16])
@pytest.mark.parametrize("stages", [(1, 1), (4, 1), (4, 3)])
def test_more_recomputation_never_needs_more_memory(stages: tuple[int, int], micro: int) -> None:
    """And never less time, nor does a larger micro batch need less memory."""
    pp, vpp = stages
    layout = (f"parallel.vision.pp={pp}", f"parallel.vision.vpp={vpp}", f"train.micro_batch_size={micro}")
    ways = [planned(*layout, f"parallel.vision.recompute={way}") for way in ("none", "selective", "2", "3", "full")]
    none, selective, two, three, full = ways
    assert none.worst.total >= selective.worst.total >= full.worst.total
    assert none.worst.total >= two.worst.total >= three.worst.total >= full.worst.total
    assert none.days <= selective.days <= full.days and none.days <= two.days <= three.days <= full.days
    larger = planned(*layout[:2], f"train.micro_batch_size={2 * micro}", "parallel.vision.recompute=2")
    assert larger.worst.total >= two.worst.total


@pytest.mark.parametrize(
    "changes",
    [
        {"peak_tflops": {"bf16": 2000.0}},
        {"memory_gb_s": 7000.0},
        {"link_gb_s": 900.0},
        {"network_gb_s": 100.0},
        {"latency_us": 1.0},
        {"decoded_images_s": 1e9},
        {"host_gb_s": 1e9},
    ],
)
def test_a_faster_gpu_is_never_slower(changes: dict[str, Any]) -> None:
    for more in ((), ("data.decoder=pillow",), ("parallel.vision.pp=4", "parallel.vision.tp=2")):
        assert planned(*more, **changes).days <= planned(*more).days


@pytest.mark.parametrize("pp", [1, 2, 5, 7, 8, 16, 48])
def test_the_worst_stage_is_the_worst_of_all(pp: int) -> None:
    """Which a search finds without planning all of them."""
    for more in ((), ("parallel.vision.recompute=none",)):
        one = planned(
            *more, f"parallel.vision.pp={pp}", "parallel.vision.tp=1", "train.micro_batch_size=1", gpus=pp * 8
        )
        assert one.worst == max(one.stages, key=lambda stage: stage.total)


def test_decoded_images_are_where_they_are_decoded() -> None:
    """All ranks of a data block hold its whole batch; of videos the host does."""
    gpu, cpu = planned(), planned("data.decoder=pillow")
    block = 110592 * sharing_ranks(gpu.cfg) // 256 * 3 * 224**2 * 4
    assert gpu.worst.parts["images"] == 5 * block, "the trainer's, two that wait, one at work and its copy"
    assert cpu.worst.parts["images"] == 0
    assert cpu.host_image_bytes == (1 + 2 * 8) * 8 * block, "of phase 3, videos"
    assert gpu.host_image_bytes == 4 * 8 * block
    assert gpu.worst.parts["margin"] > cpu.worst.parts["margin"], "DALI has an output of its own"
    assert planned("data.num_workers=0").worst.parts["images"] == block
    assert cpu.phases[0].parts["data"] > gpu.phases[0].parts["data"], "pixels must get to the GPU"


def test_what_a_rank_waits_for() -> None:
    """Decoding is behind the step where a thread or workers decode, else before it."""
    number = 110592 * 8 // 256
    here, behind = planned("data.num_workers=0"), planned()
    assert here.phases[0].parts["data"] == pytest.approx(number / GPUS["h100-80"].decoded_images_s)
    assert behind.phases[0].parts["data"] == 0
    slow = planned(decoded_images_s=1.0)
    assert slow.phases[0].step == pytest.approx(number)


def test_a_plan_that_does_not_fit_for_its_images_says_so() -> None:
    recipe = RECIPES / "clip_eva_8b_448.yaml"
    lines = run_plan(recipe, [], 48, "a100-40")
    on_host = plan(load(recipe, ["data.decoder=pillow"]), 48, GPUS["a100-40"])
    room = f"where a node has {on_host.host_image_bytes / 2**30:.1f} GiB of memory for images for each GPU"
    assert f"with data.decoder=pillow it would fit, {room}" in lines, lines
    assert not any(line.startswith("no single change") for line in lines)


def test_all_ranks_of_a_block_hold_its_targets() -> None:
    """Also where the teacher is cut over more ranks than the student, whose data ranks then share a block."""
    more = ["parallel.vision.tp=1", "parallel.vision.sequence_parallel=false", "parallel.teacher.tp=4"]
    cfg = load(RECIPES / "mim_eva_8b.yaml", more)
    teacher = load(RECIPES / "clip_eva02_e14plus.yaml").model
    (step,) = plan(cfg, 512, GPUS["h200"], teacher).steps
    assert cfg.mim is not None
    targets = cfg.mim.mask.num_masked * cfg.train.global_batch_size * 4 // 512 * teacher.embed_dim * 2
    assert {name: loss for name, _, loss in step._moments(0)}["the teacher's pass"] == targets
