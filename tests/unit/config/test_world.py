"""Which processes can run a recipe; every suggestion made for those that cannot is tried."""

import re
from pathlib import Path

import pytest

from megaeva.config import check_world, load
from megaeva.config.schema import Config
from megaeva.config.validate import RULES, problems
from megaeva.config.world import Layout, describe_layouts, nearest_layouts, world_fault
from megaeva.errors import ConfigError

CLIP = """\
task: contrastive
run_dir: runs/x
model: {variant: EVA-CLIP-18B}
data: {train: [a.tar]}
optim: {vision: {lr: 0.001}, warmup_steps: 10}
train: {total_samples: 64000, global_batch_size: 480}
"""
MIM = CLIP.replace("contrastive", "mim") + (
    "teacher: {checkpoint: runs/t}\nmim: {mask: {num_masked: 105, min_block: 16}}\n"
)


def recipe(folder: Path, text: str, overrides: str) -> Config:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, [f"{'train' if '_size' in part else 'parallel'}.{part}" for part in overrides.split()])


@pytest.mark.parametrize(
    ("text", "world", "overrides"),
    [
        (CLIP, 1, ""),
        (CLIP, 480, ""),
        (CLIP, 8, "vision.tp=8 text.tp=4"),
        (CLIP, 40, "vision.tp=8 text.tp=5"),
        (CLIP, 24, "vision.tp=2 vision.pp=3 vision.vpp=2 text.tp=4 micro_batch_size=20"),
        (CLIP, 6, "vision.pp=3 micro_batch_size=60"),
        (MIM, 32, "vision.tp=8 teacher.tp=4 micro_batch_size=40"),
        (MIM, 30, "micro_batch_size=16"),
    ],
)
def test_layouts_that_fit(tmp_path: Path, text: str, world: int, overrides: str) -> None:
    check_world(recipe(tmp_path, text, overrides), world)


FAULTS = [
    (CLIP, 6, "vision.tp=8", "6 processes must be a multiple of 8, for parallel.vision.tp=8 and parallel.text.tp=1"),
    (CLIP, 16, "vision.tp=4 vision.pp=2 text.tp=5", "16 processes must be a multiple of 40, for parallel.vision.tp=4"),
    (CLIP, 7, "vision.pp=2 vision.vpp=2 micro_batch_size=40", "7 processes must be a multiple of 2, for"),
    (CLIP, 9, "", "train.global_batch_size=480 must be a multiple of the 9 processes"),
    (CLIP, 7, "global_batch_size=640", "train.global_batch_size=640 must be a multiple of the 7 processes"),
    (MIM, 56, "vision.tp=8 teacher.tp=4",
     "train.global_batch_size=480 must be a multiple of the 7 data ranks of the student (56 processes / parallel.vis"),
    (MIM, 64, "vision.tp=8 teacher.tp=1",
     "train.global_batch_size=480 must be a multiple of the 64 data ranks of the teacher (64 processes / parallel.tea"),
    (CLIP, 4, "micro_batch_size=48", "train.micro_batch_size=48 must divide the 120 samples of a vision data rank"),
    (MIM, 12, "vision.tp=4 micro_batch_size=96", "train.micro_batch_size=96 must divide the 160 samples of a student"),
    (CLIP, 8, "vision.tp=2 vision.pp=4 vision.vpp=2 micro_batch_size=80",
     "train.micro_batch_size=80 cuts the 480 samples of a vision data rank into 6; with parallel.vision.vpp=2 the"),
    (CLIP, 8, "vision.tp=2 vision.pp=4 vision.vpp=2", "train.micro_batch_size=null cuts the 480 samples of a"),
    (CLIP, 6, "vision.pp=4 vision.layers_per_stage=[11,13,13,11]", "6 processes must be a multiple of 4, for"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "world", "overrides", "expected"), FAULTS, ids=lambda v: v if v != CLIP else "clip")
def test_every_layout_that_is_named_works(tmp_path: Path, text: str, world: int, overrides: str, expected: str) -> None:
    cfg = recipe(tmp_path, text, overrides)
    with pytest.raises(ConfigError) as caught:
        check_world(cfg, world)
    message = str(caught.value)
    assert message.startswith(expected)
    # Read back from the message, as its reader does.
    advice = message.rpartition("; ")[2].rstrip(".")
    starts, _, changes = advice.partition("use ")
    layouts = [(int(count), []) for count in re.findall(r"\d+", starts)]
    for change in filter(None, changes.split(", or ")):
        set_keys, _, other = change.partition(" with ")
        layouts.append((int(other.split()[0]) if other else world, set_keys.split()))
    assert layouts, message
    given = [f"{'train' if '_size' in part else 'parallel'}.{part}" for part in overrides.split()]
    for processes, more in layouts:
        check_world(load(tmp_path / "r.yaml", [*given, *more]), processes)


def test_the_nearest_are_named(tmp_path: Path) -> None:
    def advice(world: int, overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            check_world(recipe(tmp_path, CLIP, overrides), world)
        return str(caught.value).rpartition("; ")[2]

    assert advice(6, "vision.tp=8") == "start 8 processes, or use parallel.vision.tp=2, or parallel.vision.tp=1."
    assert advice(9, "").startswith(
        "start 8 or 10 processes, or use train.global_batch_size=477, or train.global_batch"
    )
    assert advice(4, "micro_batch_size=48").startswith(
        "use train.micro_batch_size=40, or train.micro_batch_size=60, or"
    )
    assert advice(8, "vision.tp=2 vision.pp=4 vision.vpp=2 micro_batch_size=80").startswith(
        "use train.micro_batch_size=60, or train.micro_batch_size=120, or parallel.vision.vpp=1"
    )


def test_a_remedy_may_need_the_micro_batch_size_too(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, CLIP, "vision.tp=4 micro_batch_size=60")
    fault = world_fault(cfg, 9)
    assert fault is not None
    found = nearest_layouts(cfg, 9, fault, allowed=lambda changed: not problems(changed, RULES))
    assert Layout(8) in found and Layout(16) in found


def test_a_suggestion_keeps_the_recipe_rules(tmp_path: Path) -> None:
    # 6000 would divide too, but leaves 10 steps of 64,000 samples, no more than the warm-up takes.
    cfg = recipe(tmp_path, CLIP, "global_batch_size=5800")
    fault = world_fault(cfg, 1000)
    assert fault is not None
    found = nearest_layouts(cfg, 1000, fault, allowed=lambda changed: not problems(changed, RULES))
    assert [one.set["train.global_batch_size"] for one in found if one.set] == [5000]


def test_nothing_near_is_said_in_words() -> None:
    assert describe_layouts([], 4) == "change train.global_batch_size or the axes in `parallel`"
    assert describe_layouts([Layout(2), Layout(4), Layout(3, {"a.b": None})], 2) == (
        "start 2 or 4 processes, or use a.b=null with 3 processes"
    )
