"""Pipeline stages, run one after the other by hand, are the whole tower to the last bit."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import AxesSection
from megaeva.model import MIMStudent, VisionTower, init_weights, set_recompute
from megaeva.parallel.grid import Grid
from megaeva.parallel.runtime import seed_pass
from tests.helpers.tiny import example_images, full_shapes, load_full, random_state, tiny
from tests.helpers.tiny import single_grid as build_single_grid

single_grid = functools.cache(build_single_grid)  # a dozen process groups each

SHRUNKEN = ("EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14-plus", "EVA-CLIP-8B", "EVA-CLIP-18B", "ViT-H-14")
# Of 5 layers.
LAYOUTS = {
    "pp2": AxesSection(pp=2),
    "pp2 uneven": AxesSection(pp=2, layers_per_stage=(1, 4)),
    "pp2 vpp2": AxesSection(pp=2, vpp=2),
    "pp3": AxesSection(pp=3),
    "pp2 vpp2 uneven": AxesSection(pp=2, vpp=2, layers_per_stage=(1, 2, 1, 1)),
}
KEEP_BK = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row))[:8] for row in range(3)])
MASK_BN = torch.rand(3, 16, generator=torch.Generator().manual_seed(4)) < 0.4


def _stage_grids(axes: AxesSection) -> list[Grid]:
    """What each pipeline rank's grid says; the process group of one rank is that of all."""
    return [dataclasses.replace(single_grid(), axes=axes, pp_size=axes.pp, pp_rank=rank) for rank in range(axes.pp)]


def _run(towers: list[Any], axes: AxesSection, image: Tensor, samples: Tensor) -> Tensor:
    """The last virtual stage's output; every pass is seeded as a schedule would."""
    hidden = None
    for stage in range(axes.pp * axes.vpp):
        seed_pass(0, 0, 0)
        tower = towers[stage % axes.pp]
        hidden = tower(image if stage == 0 else None, samples, hidden=hidden, chunk=stage // axes.pp)
        if stage < axes.pp * axes.vpp - 1:
            assert hidden.shape[0] == getattr(tower, "vision", tower).num_stage_tokens(
                None if samples is MASK_BN else samples
            )
            assert hidden._base is None  # mcore's schedules free the storage of what they have sent
    assert hidden is not None
    return hidden


def _results(towers: list[Any], output: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(99)  # what is computed again draws as it did, whatever has been seeded since
    output.square().sum().backward()
    found = {"output": output.detach()}
    for tower in towers:
        for name, param in tower.named_parameters():
            assert name not in found, f"{name} is on two stages"
            assert param.grad is not None, name
            found[name] = param.grad
    return found


@pytest.mark.parametrize(
    ("variant", "layout"),
    [*(("EVA02-CLIP-L-14", layout) for layout in LAYOUTS), *((variant, "pp2 vpp2 uneven") for variant in SHRUNKEN[1:])],
)
def test_stages_are_the_whole_tower(variant: str, layout: str) -> None:
    cfg = tiny(variant, num_layers=5, drop_path=0.5)
    whole = VisionTower(cfg.vision, 20, grid=single_grid())
    state = random_state(full_shapes(whole))
    load_full(whole, state, single_grid())
    expected = _results([whole], _run([whole], AxesSection(), example_images(cfg), KEEP_BK))
    axes = LAYOUTS[layout]
    for mode in ("none", "full", 1):
        towers = [VisionTower(cfg.vision, 20, grid=grid) for grid in _stage_grids(axes)]
        for tower in towers:
            set_recompute(tower, mode)  # type: ignore[arg-type]
            load_full(tower, {name: state[name] for name, _ in tower.named_parameters()}, single_grid())
        found = _results(towers, _run(towers, axes, example_images(cfg), KEEP_BK))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_are_the_whole_student(layout: str) -> None:
    cfg = tiny("EVA02-CLIP-L-14", num_layers=5)

    def student(grid: Grid) -> MIMStudent:
        return MIMStudent(cfg.vision, 20, grid=grid, stop_grad_patch_embed=0.1)

    whole = student(single_grid())
    state = random_state(full_shapes(whole))
    load_full(whole, state, single_grid())
    expected = _results([whole], _run([whole], AxesSection(), example_images(cfg), MASK_BN))
    axes = LAYOUTS[layout]
    parts = [student(grid) for grid in _stage_grids(axes)]
    for part in parts:
        load_full(part, {name: state[name] for name, _ in part.named_parameters()}, single_grid())
    found = _results(parts, _run(parts, axes, example_images(cfg), MASK_BN))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_each_stage_holds_its_own_parameters_under_their_global_names() -> None:
    cfg = tiny("ViT-H-14", num_layers=5).vision
    first, last = (MIMStudent(cfg, 20, grid=grid) for grid in _stage_grids(LAYOUTS["pp2 vpp2 uneven"]))

    def kinds(student: MIMStudent) -> set[str]:
        names = [name.removeprefix("vision.") for name, _ in student.named_parameters()]
        return {".".join(name.split(".")[:3]) if name.startswith("blocks") else name.split(".")[0] for name in names}

    assert kinds(first) == {"patch_embed", "cls_token", "pos_embed", "ln_pre", "mask_token"} | {
        f"blocks.layers.{i}" for i in (0, 3)
    }
    assert kinds(last) == {"norm", "lm_head"} | {f"blocks.layers.{i}" for i in (1, 2, 4)}


def test_layers_know_their_place_in_the_whole_tower() -> None:
    cfg = tiny("EVA02-CLIP-L-14", num_layers=5, drop_path=0.4).vision
    layers = {
        int(number): layer
        for grid in _stage_grids(LAYOUTS["pp2 vpp2"])
        for number, layer in VisionTower(cfg, 20, grid=grid).blocks.layers.items()
    }
    assert {number: layer.layer_number for number, layer in layers.items()} == {i: i + 1 for i in range(5)}
    assert [layers[i].drop_rate for i in range(5)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("task", ["contrastive", "mim"])
def test_fresh_weights_do_not_depend_on_the_stages(task: Any) -> None:
    cfg = tiny("EVA02-CLIP-bigE-14", num_layers=5).vision

    def fresh(grid: Grid) -> dict[str, Tensor]:
        module = MIMStudent(cfg, 20, grid=grid) if task == "mim" else VisionTower(cfg, 20, grid=grid)
        init_weights(module, seed=0, task=task, grid=grid)
        return {name: param.detach() for name, param in module.named_parameters()}

    whole = fresh(single_grid())
    staged = {name: value for grid in _stage_grids(LAYOUTS["pp2 vpp2"]) for name, value in fresh(grid).items()}
    assert staged.keys() == whole.keys()
    assert all(torch.equal(staged[name], value) for name, value in whole.items())


def test_a_chunk_follows_training_and_evaluation() -> None:
    """mcore's blocks are in no registered module and ask themselves whether to recompute."""
    cfg = tiny("EVA02-CLIP-L-14", num_layers=5)
    (first, _) = (VisionTower(cfg.vision, 20, grid=grid) for grid in _stage_grids(LAYOUTS["pp2 vpp2"]))
    load_full(first, random_state(full_shapes(first)), single_grid())
    set_recompute(first, "full")
    passes: list[int] = []
    first.blocks.layers["0"].register_forward_hook(lambda *_: passes.append(1))
    for training, expected in ((True, 2), (False, 1), (True, 2)):
        passes.clear()
        first.train(training)(example_images(cfg)).sum().backward()
        assert len(passes) == expected
