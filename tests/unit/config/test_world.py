"""Which processes can run a recipe; every suggestion made for those that cannot is tried."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megaeva import cli, train
from megaeva.config import check_world, load
from megaeva.config.schema import Config
from megaeva.config.validate import RULES, check_teacher, problems
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


def test_a_teacher_that_is_not_known_is_cut_as_every_variant_can_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(recipe(tmp_path, MIM, "teacher.tp=3"), 32)
    assert str(caught.value).endswith("or use parallel.teacher.tp=2, or parallel.teacher.tp=1.")


def test_nothing_near_is_said_in_words() -> None:
    assert describe_layouts([], 4) == "change train.global_batch_size or the axes in `parallel`"
    assert describe_layouts([Layout(2), Layout(4), Layout(3, {"a.b": None})], 2) == (
        "start 2 or 4 processes, or use a.b=null with 3 processes"
    )


# ------------------------------------------------------------------------------ what the rules of a recipe suggest

# Overrides, processes (None: not known), and the end of each line of the message.
REMEDIES: list[tuple[str, str, int | None, list[str]]] = [
    (CLIP, "vision.pp=96", None, ["use parallel.vision.pp=48."]),
    (CLIP, "vision.pp=96 vision.tp=8", 120, ["use parallel.vision.pp=15."]),
    (CLIP, "vision.pp=96 vision.recompute=20", None, ["use parallel.vision.pp=2."]),
    (CLIP, f"vision.pp=50 vision.layers_per_stage=[{','.join('1' * 50)}]", None,
     ["use parallel.vision.pp=48 parallel.vision.layers_per_stage=null."]),
    (CLIP, "vision.vpp=2 micro_batch_size=4", 6, ["use parallel.vision.vpp=1 or parallel.vision.pp=2."]),
    (CLIP, "vision.vpp=2 micro_batch_size=4", 5, ["use parallel.vision.vpp=1 or parallel.vision.pp=5."]),
    (CLIP, "vision.vpp=2", 6, ["use parallel.vision.vpp=1."]),
    (CLIP, "vision.pp=10 vision.vpp=6 micro_batch_size=4", 30, ["use parallel.vision.pp=6 or parallel.vision.vpp=4."]),
    (CLIP, "micro_batch_size=7", None, ["use 6."]),
    (CLIP, "micro_batch_size=63", None, ["use 60."]),
    (CLIP, "micro_batch_size=70", None, ["use 60."]),
    (CLIP, "micro_batch_size=71", None, ["use 80."]),
    (CLIP, "micro_batch_size=71", 8, ["use 60."]),
    (CLIP, "text.tp=8", None, ["use 1, 2, 4, 5, 10 or 20."]),
    (CLIP, "text.tp=8", 8, ["use 1, 2 or 4."]),
    (CLIP, "text.tp=8 vision.tp=3", 8, ["use 1, 2, 4 or 8.", "use 1, 2 or 4."]),
    (CLIP, "vision.tp=3 vision.pp=96 micro_batch_size=7", 120,
     ["use 1.", "use parallel.vision.pp=40.", "use 8."]),
    (CLIP, "vision.tp=3 vision.tp_comm_overlap=true vision.sequence_parallel=true", 2, ["use 2."]),
    (CLIP, "text.pp=2", 8, ["remove it, or raise parallel.text.tp."]),
    (CLIP, "vision.pp=3 vision.layers_per_stage=[1,2]", 3, ["use [16, 16, 16], or remove it for that."]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "world", "ends"), REMEDIES, ids=lambda v: v if v != CLIP else "clip")
def test_a_rule_names_values_that_are_accepted(
    tmp_path: Path, text: str, overrides: str, world: int | None, ends: list[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    given = [f"{'train' if '_size' in part else 'parallel'}.{part}" for part in overrides.split()]
    with pytest.raises(ConfigError) as caught:
        load(path, given, world)
    lines = str(caught.value).splitlines()[-len(ends) :]
    assert [line.rpartition("; ")[2] for line in lines] == ends
    # Read back from the message, as its reader does: each value with the first of the other lines.
    offered = []
    for line in lines:
        key, advice = line.split("=")[0].strip(), line.rpartition("; ")[2].rstrip(".").removeprefix("use ")
        if advice.startswith("remove it"):
            offered.append([[f"{key}=1"]])
        elif advice.startswith("["):
            offered.append([[f"{key}={advice.partition(', or remove')[0]}"], [f"{key}=null"]])
        else:
            offered.append([way.split() if "=" in way else [f"{key}={way}"] for way in re.split(", | or ", advice)])
    for at, ways in enumerate(offered):
        for way in ways:
            others = [value for i, other in enumerate(offered) if i != at for value in other[0]]
            cfg = load(path, [*given, *others, *way])
            if world is not None:
                check_world(cfg, world)


def test_a_rule_that_no_value_keeps_says_what_else_must_hold(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(CLIP, encoding="utf-8")

    def advice(overrides: list[str], world: int) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(path, overrides, world)
        return [line.rpartition("; ")[2] for line in str(caught.value).splitlines()]

    assert advice(["parallel.text.tp=8"], 7) == [
        "change more than this key: even with parallel.text.tp=1, train.global_batch_size=480 must be a multiple of "
        "the 7 processes, which share the rows of the loss."
    ]
    # Two at once have one reason.
    of_two = advice(["parallel.vision.tp=8", "parallel.text.tp=8", "parallel.vision.pp=96"], 12)[1:]
    assert of_two == 2 * [
        "change more than this key: even with parallel.text.tp=1 parallel.vision.pp=1, 12 processes must be a multiple "
        "of 8, for parallel.vision.tp=8 and parallel.text.tp=1."
    ]


def test_other_mistakes_do_not_hide_the_values(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(CLIP, encoding="utf-8")
    for other in (["foo=3"], ["save.every_steps=0"], ["train.global_batch_size=x"]):
        with pytest.raises(ConfigError) as caught:
            load(path, ["parallel.text.tp=8", *other], 8)
        # Without a batch size the number of processes is not held against them.
        few = "train" not in other[0]
        assert f"num_heads=20; use 1, 2{' or 4.' if few else ', 4, 5, 10 or 20.'}" in str(caught.value)


def test_a_teacher_is_cut_as_the_processes_allow(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, MIM, "vision.tp=5 teacher.tp=5")
    for world, ends in ((None, "use 1, 2, 4, 5, 8, 10, 20 or 40."), (10, "use 1, 2, 5 or 10.")):
        teacher = cfg.model.vision.model_copy(update={"num_heads": 40})
        with pytest.raises(ConfigError, match=re.escape(ends)):
            check_teacher(_with_teacher_tp(cfg, 3), teacher, world)


def _with_teacher_tp(cfg: Config, tp: int) -> Config:
    axes = cfg.parallel.teacher.model_copy(update={"tp": tp})
    return cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"teacher": axes})})


def test_the_train_command_knows_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(CLIP, encoding="utf-8")
    said = CliRunner().invoke(cli.app, ["train", str(path), "--processes", "2", "parallel.text.tp=8", "--topology"])
    assert "use 1 or 2." in said.output
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="use 1, 2 or 4"):
        train.train(str(path), ["parallel.text.tp=8"], resume=False)
