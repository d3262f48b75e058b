"""Recipes: precedence, overrides, round trip, and one clear message for each mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from megaeva.config import VARIANTS, as_overrides, diff_from_base, dump, load, load_loop
from megaeva.config.schema import Config
from megaeva.errors import ConfigError

RECIPE = """\
task: contrastive
run_dir: runs/x
model: {variant: ViT-B-16-quickgelu}
data: {train: ["data/*.tar"]}
optim:
  vision: {lr: 1e-3}
train:
  total_samples: 6400
  global_batch_size: 64
"""
MIM = """\
task: mim
run_dir: runs/m
model: {variant: EVA02-CLIP-L-14}
teacher: {checkpoint: runs/x}
mim: {mask: {num_masked: 105, min_block: 16}}
data: {train: ["data/*.tar"]}
optim: {vision: {lr: 1e-3}}
train: {total_samples: 6400, global_batch_size: 64}
"""


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_precedence_is_variant_base_recipe_overrides(tmp_path: Path) -> None:
    write(
        tmp_path,
        "model: {variant: ViT-B-16-quickgelu, vision: {num_layers: 7, patch_size: 8}}\n"
        "seed: 1\nsave: {keep: 3}\noptim: {weight_decay: 0.3, warmup_steps: 5}\n",
        "b.yaml",
    )
    path = write(tmp_path, "base: b.yaml\n" + RECIPE + "seed: 2\n")
    cfg = load(path, ["optim.warmup_steps=9", "model.vision.num_layers=3"])
    assert cfg.model.vision.hidden_size == VARIANTS["ViT-B-16-quickgelu"]["vision"]["hidden_size"]  # variant
    assert cfg.model.vision.patch_size == 8  # base over variant
    assert cfg.save.keep == 3  # base over default
    assert cfg.seed == 2  # recipe over base
    assert cfg.optim.weight_decay == 0.3  # base beside recipe in one section
    assert cfg.optim.warmup_steps == 9  # override over base
    assert cfg.model.vision.num_layers == 3  # override over base over variant


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("5.e-4", 5e-4), (".5", 0.5), ("1", 1.0), ("2e0", 2.0), ("1_0", 10.0)],
)
def test_numbers_are_numbers(tmp_path: Path, text: str, expected: float) -> None:
    assert load(write(tmp_path, RECIPE.replace("1e-3", text))).optim.vision.lr == expected


def test_counts_may_be_written_in_scientific_form_or_with_underscores(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    assert load(path, ["train.total_samples=9e9"]).train.total_samples == 9_000_000_000
    assert load(path, ["train.total_samples=80_000"]).train.total_samples == 80_000


@pytest.mark.parametrize("text", ["no", "12:30", "2024-01-31", "on", "1.2.3", "0x10"])
def test_words_that_yaml_1_1_would_turn_into_other_things_stay_text(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path, RECIPE.replace("runs/x", text))).run_dir == text


def test_overrides_reach_lists_mappings_and_null(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    cfg = load(
        path,
        [
            "eval.retrieval.a.shards=[x.tar, y.tar]",
            "data.train.0=z.tar",
            "save.every_minutes=null",
            "optim.betas=[0.8, 0.9]",
        ],
    )
    assert cfg.eval.retrieval["a"].shards == ("x.tar", "y.tar")
    assert cfg.data.train == ("z.tar",)
    assert cfg.save.every_minutes is None
    assert cfg.optim.betas == (0.8, 0.9)


def test_a_dumped_recipe_loads_equal(tmp_path: Path) -> None:
    odd = [
        "run_dir='1e-3'",
        "data.train=['no', 'a: b', 'ü#', '2024-01-31', '123']",
        "optim.vision.lr=1.0000000000000002e-5",
    ]
    odd += ["eval.zero_shot.names={shards: [a.tar], classes: c.json}", "save.every_minutes=null", "optim.epsilon=1e-12"]
    cfg = load(write(tmp_path, RECIPE), odd)
    assert cfg.run_dir == "1e-3"
    dump(cfg, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == cfg
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_as_overrides_carries_values_exactly(tmp_path: Path) -> None:
    values = {"run_dir": "1e-3", "optim.vision.lr": 1e-3, "init.text": None, "data.train": ["a", "{1..2}"]}
    cfg = load(write(tmp_path, RECIPE), as_overrides(values))
    assert (cfg.run_dir, cfg.optim.vision.lr, cfg.init.text, cfg.data.train) == ("1e-3", 1e-3, None, ("a", "{1..2}"))


def test_diff_names_what_changed(tmp_path: Path) -> None:
    write(tmp_path, RECIPE, "b.yaml")
    path = write(tmp_path, "base: b.yaml\nseed: 3\ntrain: {global_batch_size: 64}\n")
    lines = diff_from_base(path, ["train.total_samples=80000", "teacher.checkpoint=t"])
    assert sorted(lines) == ["seed: 0 -> 3", "teacher.checkpoint: t", "train.total_samples: 6400 -> 80000"]
    assert diff_from_base(write(tmp_path, "base: b.yaml\n")) == []


def test_an_empty_mapping_drops_what_is_inherited(tmp_path: Path) -> None:
    write(
        tmp_path, RECIPE + "eval: {batch_size: 7, retrieval: {a: {shards: [a.tar]}, b: {shards: [b.tar]}}}\n", "b.yaml"
    )
    path = write(tmp_path, "base: b.yaml\n")
    child = write(tmp_path, "base: b.yaml\neval: {retrieval: {}}\n", "child.yaml")
    for recipe, overrides in ((path, ["eval.retrieval={}"]), (child, []), (path, as_overrides({"eval.retrieval": {}}))):
        cfg = load(recipe, overrides)
        assert (cfg.eval.retrieval, cfg.eval.batch_size) == ({}, 7)
        (line,) = diff_from_base(recipe, overrides)
        assert line.startswith("eval.retrieval: {") and line.endswith(" -> {}")
    assert load(path, ["eval={}"]).eval.batch_size == 64
    assert list(load(path, ["eval.retrieval={}", "eval.retrieval.c.shards=[c.tar]"]).eval.retrieval) == ["c"]
    assert list(load(path, ["eval={}", "eval.retrieval.c.shards=[c.tar]"]).eval.retrieval) == ["c"]
    phases = ["data.train=[]", "data.phases=[{samples: 6400, train: [a.tar], patch_dropout: 0.5}]"]
    with pytest.raises(ConfigError, match=r"data\.phases\.0\.samples .*is missing"):
        load(path, [*phases, "data.phases.0={}"])


def test_a_recipe_without_a_base_is_its_own_and_only_overrides_are_told(tmp_path: Path) -> None:
    dump(load(write(tmp_path, RECIPE), ["model.vision.num_layers=3"]), tmp_path / "resolved.yaml")
    assert diff_from_base(tmp_path / "resolved.yaml") == []
    lines = diff_from_base(tmp_path / "resolved.yaml", ["model.vision.num_layers=4"])
    assert lines == ["model.vision.num_layers: 3 -> 4"]


# One mistake each: (recipe text, overrides, parts of the one message).
MISTAKES = {
    "misspelt key": (RECIPE + "sed: 1\n", (), ["sed=1 (", "r.yaml:10)", "not a known key", "did you mean seed"]),
    "misspelt deep key": (
        RECIPE.replace("total_samples", "totl_samples"), ("train.total_samples=6400",),
        ["train.totl_samples=6400", "r.yaml:8", "did you mean train.total_samples"],
    ),
    "misspelt override": (RECIPE, ("optim.vison.lr=1",), ["optim.vison", "command line", "did you mean optim.vision"]),
    "key of another section": (RECIPE, ("global_batch_size=8",), ["did you mean train.global_batch_size"]),
    "override without value": (RECIPE, ("seed",), ["'seed' (command line)", "must be key.path=value"]),
    "override with bad YAML": (RECIPE, ("seed=[1",), ["'seed=[1'", "not valid YAML"]),
    "dotted key in a file": (RECIPE + "train.seed: 1\n", (), ["r.yaml:10", "nest it"]),
    "wrong type": (RECIPE + "seed: two\n", (), ['seed="two"', "r.yaml:10", "must be an integer"]),
    "number in quotes": (RECIPE + 'seed: "2"\n', (), ['seed="2"', "must be an integer"]),
    "flag for a number": (RECIPE + "seed: true\n", (), ["seed=true", "must be an integer"]),
    "half a sample": (RECIPE, ("train.total_samples=100.5",), ["train.total_samples=100.5", "must be an integer"]),
    "section expected": (RECIPE + "save: 5\n", (), ["save=5", "must be a section of keys"]),
    "mapping taken out": (
        RECIPE, ("eval.retrieval=null",),
        ["eval.retrieval=null (command line) must be a mapping", "to drop what is inherited set eval.retrieval={}."],
    ),
    "one set taken out": (
        RECIPE, ("eval.retrieval.a=null",),
        ["eval.retrieval.a=null (command line) must be a section", "set eval.retrieval={}, then add those to keep."],
    ),
    "section taken out": (RECIPE + "save: null\n", (), ["save=null", "must be a section of keys", "set save={}."]),
    "list expected": (RECIPE, ("data.train=a.tar",), ["data.train", "must be a list"]),
    "out of range": (RECIPE, ("optim.vision.lr=0",), ["optim.vision.lr=0", "must be above 0"]),
    "empty folder": (RECIPE, ("run_dir=''",), ['run_dir="" (command line)', "must be text that is not empty"]),
    "empty path": (RECIPE, ("init.clip=''",), ['init.clip="" (command line)', "must be text that is not empty"]),
    "not finite": (RECIPE, ("optim.weight_decay=.nan",), ["optim.weight_decay=.nan", "finite"]),
    "too large": (RECIPE, ("optim.weight_decay=1e999",), ["optim.weight_decay=1e999", "finite"]),
    "unknown choice": (RECIPE, ("train.precision=fp4",), ["train.precision=fp4", "bf16", "use"]),
    "missing key": (RECIPE.replace("run_dir: runs/x\n", ""), (), ["run_dir (in ", "r.yaml:1", "is missing", "add it"]),
    "missing lr": (RECIPE.replace("{lr: 1e-3}", "{}"), (), ["optim.vision.lr (in ", "r.yaml:6", "is missing"]),
    "unknown variant": (
        RECIPE.replace("ViT-B", "VIT-b"), (), ["model.variant=VIT-b-16", "r.yaml:3", "mean ViT-B-16-quickgelu"],
    ),
    "interpolation": (RECIPE + "seed: ${SEED}\n", (), ["seed=${SEED}", "not supported"]),
    "duplicate key": (RECIPE + "task: mim\n", (), ["task (", "r.yaml:10) is written twice", "r.yaml:1; keep one"]),
    "tag": (RECIPE + "seed: !!python/name:os.system ''\n", (), ["r.yaml:10", "not supported"]),
    "bad syntax": (RECIPE + "seed: [1\n", (), ["r.yaml:", "not valid YAML"]),
    "tab": (RECIPE + "save:\n\tkeep: 1\n", (), ["r.yaml:11", "not valid YAML", "tabs"]),
    "two documents": (RECIPE + "---\nseed: 1\n", (), ["r.yaml:10", "not valid YAML"]),
    "empty": ("", (), ["is empty", "recipe"]),
    "a list": ("- 1\n", (), ["not a mapping"]),
    "recursive alias": (RECIPE + "save: &a {keep: *a}\n", (), ["save.keep", "alias"]),
    "control character": (RECIPE + "seed: \x01\n", (), ["r.yaml", "not valid YAML"]),
    "position outside a list": (RECIPE, ("data.train.4=x",), ["position 4", "1 entries"]),
    "loop given to train": ("rounds: []\n", (), ["is a loop", "megaeva loop"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_has_one_clear_message(tmp_path: Path, name: str) -> None:
    text, overrides, parts = MISTAKES[name]
    told = message(write(tmp_path, text), overrides)
    assert [part for part in parts if part not in told] == []
    assert "\n" not in told, "one mistake must not be told twice"
    assert "; " in told


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, "eval: {batch_sise: 5}\n", "b.yaml")
    text = (
        RECIPE.replace("6400", "100").replace("task:", "base: b.yaml\ntask:")
        + 'seed: "5"\nparallel: {vision: {tp: 5}}\n'
    )
    told = message(write(tmp_path, text), ("optim.warmup_steps=7", "trian.x=1"))
    for part in (
        "b.yaml:1", 'seed="5"', "trian", "parallel.vision.tp=5", "warmup_steps=7", "has 5 problems",
    ):  # fmt: skip
        assert part in told


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, RECIPE, "demo.yaml")
    told = message(tmp_path / "dmo.yaml")
    assert "dmo.yaml does not exist" in told
    assert "did you mean demo.yaml" in told
    assert "cannot be read" in message(tmp_path)


def test_a_missing_base_and_a_base_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", RECIPE, "mim.yaml")
    told = message(write(tmp_path, "base: base/min.yaml\n" + RECIPE))
    assert "base=base/min.yaml" in told
    assert "r.yaml:1" in told
    assert "did you mean base/mim.yaml" in told
    write(tmp_path, "base: other.yaml\n" + RECIPE, "middle.yaml")
    told = message(write(tmp_path, "base: middle.yaml\n"))
    assert "middle.yaml:1" in told
    assert "must not have a base" in told
    assert "name of one file" in message(write(tmp_path, "base: [a, b]\n" + RECIPE))


def test_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    assert "UTF-8" in message(path)


def test_an_error_in_the_base_is_placed_in_the_base_and_an_overridden_one_is_not(tmp_path: Path) -> None:
    write(tmp_path, "seed: two\nsave: {keep: 0}\n", "b.yaml")
    path = write(tmp_path, "base: b.yaml\n" + RECIPE)
    told = message(path)
    assert "b.yaml:1" in told
    assert "save.keep=0" in told
    assert load(path, ["seed=2", "save.keep=1"]).seed == 2


# ------------------------------------------------------------------------------------------------------------ loop

LOOP = """\
run_dir: runs/loop
teacher: {stage: {recipe: r.yaml}}
rounds:
  - name: one
    distil: {recipe: m.yaml}
    clip: {recipe: r.yaml, set: {init.vision: "{mim}"}}
    controls:
      plain: {recipe: r.yaml, set: {train.total_samples: 640}}
"""


def loop_folder(folder: Path) -> Path:
    write(folder, RECIPE)
    write(folder, MIM, "m.yaml")
    return write(folder, LOOP, "loop.yaml")


def test_a_loop_loads_takes_overrides_and_dumps(tmp_path: Path) -> None:
    path = loop_folder(tmp_path)
    cfg = load_loop(path, ["rounds.0.controls.plain.set.train.total_samples=128", "launch.num_processes=2"])
    assert cfg.launch.num_processes == 2
    assert cfg.rounds[0].clip.set == {"init.vision": "{mim}"}
    dump(cfg, tmp_path / "copy.yaml")
    assert load_loop(tmp_path / "copy.yaml") == cfg


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("teacher: {stage: {recipe: r.yaml}}", "teacher: {}", ["teacher (", "loop.yaml:2", "exactly one of"]),
        ("recipe: m.yaml", "recipe: r.yaml", ["rounds.0.distil.recipe=r.yaml", "loop.yaml:5", "mim is needed here"]),
        ("recipe: m.yaml", "recipe: n.yaml", ["rounds.0.distil", "loop.yaml:5", "does not exist"]),
        (
            "train.total_samples: 640",
            "train.totl_samples: 640",
            ["rounds.0.controls.plain", "loop.yaml:8", "train.total_samples"],
        ),
        ("distil:", "destil:", ["rounds.0.destil", "did you mean rounds.0.distil", "rounds.0.distil", "is missing"]),
        ("run_dir: runs/loop", "run_dir: 5", ["run_dir=5", "must be text"]),
    ],
)
def test_mistakes_in_a_loop(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    path = loop_folder(tmp_path)
    path.write_text(LOOP.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_loop(path)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_training_recipe_is_no_loop(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="megaeva train"):
        load_loop(write(tmp_path, RECIPE))


def test_loading_imports_nothing_slow(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    code = f"import sys; from megaeva.config import load; load({str(path)!r}); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pydantic" in run.stdout.split()
    assert not {"torch", "numpy", "matplotlib", "psutil", "typer", "PIL"} & set(run.stdout.split())


def test_config_is_what_load_returns(tmp_path: Path) -> None:
    assert isinstance(load(str(write(tmp_path, MIM))), Config)
