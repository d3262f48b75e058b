"""Every recipe in recipes/ loads, is in the table, and starts on the machine it is written for."""

from pathlib import Path

import pytest

from megaeva.config import check_world, load, load_loop
from megaeva.planning import topology_lines

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ALL = sorted(RECIPES.glob("*.yaml"))
LOOPS = [path for path in ALL if "\nrounds:" in path.read_text(encoding="utf-8")]
# Processes of the published run, or of the demo.
WORLD = {
    "clip_eva02_b16": 64, "clip_eva02_l14": 128, "clip_eva02_e14plus": 144, "clip_eva_8b": 384, "clip_eva_18b": 360,
    "mim_eva01_g14": 128, "mim_eva02_b": 32, "mim_eva02_l14": 64, "mim_eva_8b": 512, "mim_eva_18b": 512,
    "demo_teacher": 2, "demo_mim": 2, "demo_clip": 2,
}  # fmt: skip


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
