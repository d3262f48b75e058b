"""Every recipe in recipes/ loads, is in the table, and starts on the machine it is written for."""

import math
from pathlib import Path

import pytest

from megaeva.config import check_world, load, load_loop
from megaeva.config.phases import run_phases
from megaeva.planning.topology import topology_lines

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ALL = sorted(RECIPES.glob("*.yaml"))
LOOPS = [path for path in ALL if "\nrounds:" in path.read_text(encoding="utf-8")]
# Processes of the published run, or of the demo.
WORLD = {
    "clip_eva02_b16": 64, "clip_eva02_l14": 128, "clip_eva02_e14plus": 144, "clip_eva_8b": 384, "clip_eva_8b_448": 384,
    "clip_eva_18b": 360,
    "mim_eva01_g14": 128, "mim_eva02_b": 32, "mim_eva02_l14": 64, "mim_eva_8b": 512, "mim_eva_18b": 512,
    "demo_teacher": 2, "demo_mim": 2, "demo_clip": 2,
}  # fmt: skip


# /work/shared/facts.md 4a and 4b: learning rate and layer decay of vision and text, betas, epsilon, weight decay, patch
# dropout, batch, samples. Warm-up is 2000 steps in all.
CLIP = {
    "clip_eva02_b16": (2e-4, 0.75, 2e-5, 0.75, (0.9, 0.999), 1e-8, 0.05, 0.0, 131_072, 8e9),
    "clip_eva02_l14": (4e-4, 0.85, 4e-5, 0.75, (0.9, 0.999), 1e-8, 0.05, 0.0, 131_072, 4e9),
    "clip_eva02_e14plus": (4e-4, 0.9, 4e-5, 0.75, (0.9, 0.999), 1e-8, 0.05, 0.5, 144_000, 9e9),
    "clip_eva_8b": (4e-4, 0.9, 4e-5, 0.75, (0.9, 0.95), 1e-6, 0.0, 0.5, 178_000, 9e9),
    "clip_eva_8b_448": (2e-4, 0.85, 2e-5, 0.75, (0.9, 0.95), 1e-6, 0.0, 0.0, 24_000, 8e8),
    "clip_eva_18b": (4e-4, 0.9, 4e-5, 0.75, (0.9, 0.95), 1e-6, 0.0, 0.5, 108_000, 6.044e9),
}
ROUNDED = {"clip_eva_8b", "clip_eva_8b_448"}  # the paper's batch, in thousands; a multiple of the ranks here
# facts.md 3b: learning rate, warm-up in epochs, drop path, share of the gradient at the patches, batch, epochs,
# images; of these the 14.2 M are unconfirmed.
MIM = {
    "mim_eva01_g14": (1e-3, 2, 0.1, 1.0, 4096, 150, 30e6),
    "mim_eva02_b": (1.5e-3, 1, 0.0, 0.1, 2048, 150, 14.2e6),
    "mim_eva02_l14": (1.5e-3, 1, 0.1, 0.1, 2048, 56, 38e6),
}


@pytest.mark.parametrize("name", CLIP)
def test_a_clip_recipe_has_the_published_numbers(name: str) -> None:
    cfg = load(RECIPES / f"{name}.yaml")
    optim, text = cfg.optim, cfg.optim.text
    assert text is not None
    batch = cfg.train.global_batch_size
    assert (
        optim.vision.lr, optim.vision.layer_decay, text.lr, text.layer_decay, optim.betas, optim.epsilon,
        optim.weight_decay, cfg.model.vision.patch_dropout, batch // 1000 * 1000 if name in ROUNDED else batch,
        cfg.train.total_samples,
    ) == CLIP[name]  # fmt: skip
    assert (optim.name, optim.lamb, optim.warmup_steps, optim.min_lr_ratio, optim.clip_grad_norm) == (
        "lamb", "eva", 2000, 0.0, 5.0,
    )  # fmt: skip
    assert (cfg.train.precision, cfg.data.augment.scale, cfg.model.vision.drop_path) == ("bf16", (0.9, 1.0), 0.0)
    scale = cfg.model.logit_scale
    constant = name in ("clip_eva_8b", "clip_eva_8b_448", "clip_eva_18b")
    assert scale.trainable is not constant
    assert math.exp(scale.init) == pytest.approx(1 / 0.01 if constant else 1 / 0.07)


@pytest.mark.parametrize("name", MIM)
def test_a_mim_recipe_has_the_published_numbers(name: str) -> None:
    cfg = load(RECIPES / f"{name}.yaml")
    rate, warmup_epochs, drop_path, share, batch, epochs, images = MIM[name]
    assert cfg.mim is not None
    assert (cfg.optim.vision.lr, cfg.model.vision.drop_path, cfg.mim.stop_grad_patch_embed) == (rate, drop_path, share)
    assert (cfg.train.global_batch_size, cfg.train.total_samples) == (batch, epochs * images)
    assert cfg.optim.warmup_steps == int(warmup_epochs * images / batch)
    assert (cfg.optim.name, cfg.optim.betas, cfg.optim.epsilon, cfg.optim.weight_decay, cfg.optim.clip_grad_norm) == (
        "adamw", (0.9, 0.98), 1e-6, 0.05, 3.0,
    )  # fmt: skip
    mask = cfg.mim.mask
    assert (mask.num_masked, mask.min_block, mask.min_aspect) == (105, 16, 0.3)


@pytest.mark.parametrize("name", ["mim_eva_8b", "mim_eva_18b"])
def test_what_is_known_of_the_large_distillations(name: str) -> None:
    cfg = load(RECIPES / f"{name}.yaml")
    assert cfg.train.total_samples == 6e9
    assert cfg.teacher is not None and cfg.teacher.checkpoint == "runs/clip_eva02_e14plus"


def test_the_phases_of_18B() -> None:
    first, second, third = run_phases(load(RECIPES / "clip_eva_18b.yaml"))
    assert [phase.first_step for phase in (first, second, third)] == [0, 50_000, 55_740]
    assert [phase.cfg.model.vision.patch_dropout for phase in (first, second, third)] == [0.5, 0.0, 0.5]
    assert [phase.cfg.data.frames for phase in (first, second, third)] == [1, 1, 8]
    assert [section.samples for section in load(RECIPES / "clip_eva_18b.yaml").data.phases] == [5.4e9, 620e6, 24e6]


@pytest.mark.parametrize("name", [*CLIP, *MIM, "mim_eva_8b", "mim_eva_18b"])
def test_the_head_of_a_recipe_tells_its_origin(name: str) -> None:
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("\nbase:")[0].splitlines()
    told = [line.split()[1] for line in lines if line.startswith("#   ") and line[4] != " "]
    assert told == ["hardware", "batch", "samples", "expected", "source"]


def test_there_are_recipes() -> None:
    assert len(ALL) >= 16
    assert {path.stem for path in LOOPS} == {"demo", "bench_demo", "weak_to_strong"}


@pytest.mark.parametrize("path", [p for p in ALL if p not in LOOPS], ids=lambda p: p.stem)
def test_recipe_loads_and_fits_its_machine(path: Path) -> None:
    check_world(load(path), WORLD[path.stem])


@pytest.mark.parametrize("path", [p for p in ALL if p not in LOOPS], ids=lambda p: p.stem)
def test_its_topology_is_drawn(path: Path) -> None:
    lines = topology_lines(load(path), WORLD[path.stem])
    assert lines[0].startswith(f"topology: {WORLD[path.stem]} ranks in ")
    assert len(lines) < 24 and max(map(len, lines)) < 100


@pytest.mark.parametrize("path", LOOPS, ids=lambda p: p.stem)
def test_loop_and_its_stages_load(path: Path) -> None:
    cfg = load_loop(path)
    assert cfg.rounds


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_recipe_is_in_the_table(path: Path) -> None:
    assert f"`{path.name}`" in (RECIPES / "README.md").read_text(encoding="utf-8")


def test_controls_see_the_samples_they_claim() -> None:
    teacher, mim, clip = (load(RECIPES / f"demo_{n}.yaml").train.total_samples for n in ("teacher", "mim", "clip"))
    controls = load_loop(RECIPES / "bench_demo.yaml").rounds[0].controls
    assert controls["fresh_text"].set["train.total_samples"] == mim + clip
    assert controls["long_teacher"].set["train.total_samples"] == teacher + mim + clip
    assert "train.total_samples" not in controls["scratch"].set
