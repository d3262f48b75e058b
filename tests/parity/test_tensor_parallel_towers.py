"""Towers cut over two tensor-parallel ranks, their sequence too or not, give the single process's numbers.

Outputs and every gradient to 1e-5 of their norm: the ranks add partial sums in another order, in fp32, over three
layers. What that leaves is up to 1.2e-6, and 6e-6 where a post-norm divides by a small number; cutting the sequence too
adds nothing.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaeva.config.schema import AxesSection, ModelSection, VisionSection
from megaeva.config.variants import VARIANTS
from megaeva.model import MIMStudent, Teacher, VisionTower, build_clip, init_weights, set_recompute
from megaeva.parallel.grid import Grid, build_grid
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.parallel.shards import gather_full
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import (
    example_images,
    example_tokens,
    full_gradients,
    full_shapes,
    load_full,
    random_state,
    tiny,
)
from tests.helpers.tiny import single_grid as build_single_grid

single_grid = functools.cache(build_single_grid)  # a dozen process groups each

SHRUNKEN = ("EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14-plus", "EVA-CLIP-8B", "EVA-CLIP-18B", "ViT-H-14")
TP = AxesSection(tp=2)
SP = AxesSection(tp=2, sequence_parallel=True)
LAYOUTS = {"tp": TP, "tp+sp": SP}
# A variant and flags. "drop": half of the patches and drop path 0.5; "even": as many tokens as tp divides.
CASES = [
    *SHRUNKEN,
    *(f"{variant} drop" for variant in SHRUNKEN),
    *(f"{variant} drop {mode}" for variant in SHRUNKEN for mode in ("selective", "full", "2")),
    *("Demo-Teacher", "Demo-Student", "EVA02-CLIP-L-14 rms", "EVA02-CLIP-L-14 even"),
    *(
        "EVA02-CLIP-L-14 mim",
        "EVA-CLIP-18B mim",
        "EVA-CLIP-8B mim drop full",
        "ViT-H-14 mim",
        "EVA02-CLIP-L-14 teacher",
    ),
]
MODES: dict[str, Any] = {"selective": "selective", "full": "full", "2": 2}


def _config(case: str) -> ModelSection:
    variant, *flags = case.split()
    if variant.startswith("Demo"):
        return ModelSection.model_validate(VARIANTS[variant])
    keys: dict[str, Any] = {"drop_path": 0.5} if "drop" in flags else {}
    if "rms" in flags:  # a sub-LN of the other kind, which no published model has
        keys["norm"] = "rmsnorm"
    return tiny(variant, **keys)


def _keep(flags: Iterable[str]) -> Tensor | None:
    """8 of 16 patches in another order for each row, 9 tokens with cls; or 5, 6 tokens with cls."""
    count = 8 if "drop" in flags else 5 if "even" in flags else None
    rows = [torch.randperm(16, generator=torch.Generator().manual_seed(row))[:count] for row in range(3)]
    return None if count is None else torch.stack(rows)


def _gradients(model: nn.Module, grid: Grid) -> dict[str, Tensor]:
    """Whole gradients, those marked `sequence_parallel` added up over tp as mcore's finalize_model_grads does."""
    for param in model.parameters():
        if getattr(param, "sequence_parallel", False):
            assert param.grad is not None
            dist.all_reduce(param.grad, group=grid.groups.tp)
    return full_gradients(model, grid)


def _pass(case: str, grid: Grid) -> dict[str, Tensor]:
    """Outputs and tp=1 gradients of one forward and backward."""
    cfg = _config(case)
    flags = case.split()[1:]
    mode = next((MODES[flag] for flag in flags if flag in MODES), "none")
    image = example_images(cfg)
    seed_pass(0, 0, 0)
    if "teacher" in flags:
        tower = VisionTower(cfg.vision, cfg.embed_dim, grid=grid)
        load_full(tower, random_state(full_shapes(tower, grid.tp_size)), grid)
        return {"target_BNE": Teacher(tower)(image)}
    model: nn.Module
    if "mim" in flags:
        model = student = MIMStudent(cfg.vision, 20, grid=grid, stop_grad_patch_embed=0.1)
        set_recompute(student.vision, mode)
    else:
        model = clip = build_clip(cfg, vision_grid=grid, text_grid=grid)
        set_recompute(clip.vision, mode)
        set_recompute(clip.text, mode)
    load_full(model, random_state(full_shapes(model, grid.tp_size)), grid)
    if "mim" in flags:
        mask_BN = torch.rand(3, 16, generator=torch.Generator().manual_seed(4)) < 0.4
        outputs = {"predicted_ME": student(image, mask_BN)}
    else:
        outputs = {
            "image_BE": clip.vision(image, _keep(flags)),
            "text_BE": clip.text(example_tokens(cfg)),
            "scale": clip.scale().view(1, 1),
        }
    generator = torch.Generator().manual_seed(6)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs.values())
    assert isinstance(loss, Tensor)
    torch.manual_seed(99)  # what is computed again in backward draws as before, whatever has been seeded since
    loss.backward()
    return {name: out.detach() for name, out in outputs.items()} | _gradients(model, grid)


def _two_ranks(runtime: Runtime, layouts: dict[str, AxesSection]) -> dict[tuple[str, str], dict[str, Tensor]]:
    grids = {layout: build_grid(axes, runtime) for layout, axes in layouts.items()}
    return {(layout, case): _pass(case, grid) for layout, grid in grids.items() for case in CASES}


@pytest.fixture(scope="module")
def both_ranks() -> list[dict[tuple[str, str], dict[str, Tensor]]]:
    """Every case in every layout on two ranks, in one start of two processes."""
    return run_ranks(_two_ranks, 2, LAYOUTS)


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert value.norm() > 0, f"{name} is zero: it proves nothing"
        assert (got[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case: str, both_ranks: list[dict[tuple[str, str], dict[str, Tensor]]]) -> None:
    single = _pass(case, single_grid())
    for result in both_ranks:
        for layout in LAYOUTS:
            _assert_close(result[layout, case], single)


def test_recomputation_changes_no_bit(both_ranks: list[dict[tuple[str, str], dict[str, Tensor]]]) -> None:
    for result in both_ranks:
        for layout in LAYOUTS:
            for variant in SHRUNKEN:
                kept = result[layout, f"{variant} drop"]
                for mode in MODES:
                    again = result[layout, f"{variant} drop {mode}"]
                    assert all(torch.equal(again[name], value) for name, value in kept.items()), (variant, mode)


def test_drop_path_drops_in_these_cases() -> None:
    for variant in SHRUNKEN:
        cfg = tiny(variant, drop_path=0.5)
        tower = VisionTower(cfg.vision, cfg.embed_dim, grid=single_grid())
        load_full(tower, random_state(full_shapes(tower)), single_grid())
        seed_pass(0, 0, 0)
        dropped = tower(example_images(cfg))
        assert not torch.allclose(dropped, tower.eval()(example_images(cfg))), variant


# --------------------------------------------------------------------------------------- stages of a cut tower by hand


def _stage_grids(grid: Grid, **axes: Any) -> list[Grid]:
    """`grid` as it would be on each of two pipeline ranks."""
    section = grid.axes.model_copy(update={"pp": 2} | axes)
    return [dataclasses.replace(grid, axes=section, pp_size=2, pp_rank=rank) for rank in range(2)]


def _staged(runtime: Runtime, variants: list[str]) -> dict[str, tuple[dict[str, Tensor], list[tuple[int, int]]]]:
    grid = build_grid(SP, runtime)
    return {variant: _staged_pass(variant, grid) for variant in variants}


def _stage_state(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Weights whose scores are of order one in five layers without a norm before them (18B), too.

    With `random_state` as it is the softmax is saturated, and a relative change of the image by 1e-7 moves 18B's
    gradients by 5e-5; with these by 4e-6.
    """
    state = random_state(shapes)
    return {name: 0.5 * value if name.endswith("linear_qkv.weight") else value for name, value in state.items()}


def _staged_pass(variant: str, grid: Grid) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """Output and gradients of two stages of two chunks, the four run one after the other; (told, real) lengths."""
    cfg = tiny(variant, num_layers=5, drop_path=0.5)
    whole = VisionTower(cfg.vision, 20, grid=grid)
    state = _stage_state(full_shapes(whole, grid.tp_size))
    towers = []
    for stage in _stage_grids(grid, vpp=2):
        tower = VisionTower(cfg.vision, 20, grid=stage)
        set_recompute(tower, "full")
        load_full(tower, {name: state[name] for name, _ in tower.named_parameters()}, grid)
        towers.append(tower)
    seed_pass(0, 0, 1)
    keep_BK = _keep(["drop"])
    hidden = towers[0](example_images(cfg), keep_BK)
    lengths = [(towers[0].num_stage_tokens(keep_BK), len(hidden))]
    for stage, chunk in ((1, 0), (0, 1), (1, 1)):
        hidden = towers[stage](None, keep_BK, hidden=hidden, chunk=chunk)
        lengths.append((towers[stage].num_stage_tokens(keep_BK), len(hidden)))
    hidden.square().sum().backward()
    found = {"image_BE": hidden.detach()}
    for tower in towers:
        found |= _gradients(tower, grid)
    return found, lengths[:-1]


def test_stages_with_a_cut_sequence_equal_the_single_process() -> None:
    variants = ["EVA02-CLIP-L-14", "EVA-CLIP-18B", "ViT-H-14"]
    results = run_ranks(_staged, 2, variants)
    for variant in variants:
        cfg = tiny(variant, num_layers=5, drop_path=0.5)
        tower = VisionTower(cfg.vision, 20, grid=single_grid())
        load_full(tower, _stage_state(full_shapes(tower)), single_grid())
        seed_pass(0, 0, 1)
        image_BE = tower(example_images(cfg), _keep(["drop"]))
        image_BE.square().sum().backward()
        single = {"image_BE": image_BE.detach()} | full_gradients(tower, single_grid())
        for result in results:
            found, lengths = result[variant]
            assert lengths == [(10, 5)] * 3  # 9 tokens, padded for two ranks
            _assert_close(found, single)


# ------------------------------------------------------------------------------------------------------------ the rest


def _marked(runtime: Runtime) -> dict[str, set[str]]:
    grid = build_grid(SP, runtime)
    found = {}
    for variant in SHRUNKEN:
        clip = build_clip(tiny(variant), vision_grid=grid, text_grid=grid)
        found[variant] = {name for name, param in clip.named_parameters() if getattr(param, "sequence_parallel", False)}
    return found


def test_what_acts_on_a_ranks_own_tokens_is_marked_and_nothing_else() -> None:
    for found in run_ranks(_marked, 2):
        for variant, marked in found.items():
            clip = build_clip(tiny(variant), vision_grid=single_grid(), text_grid=single_grid())
            own = ("layernorm.weight", "layernorm.bias", "linear_proj.bias", "linear_fc2.bias")
            assert marked == {
                name for name, _ in clip.named_parameters() if name.endswith(own) or name.startswith("vision.ln_pre")
            }


def _initialised(runtime: Runtime, axes: AxesSection) -> dict[str, Any]:
    grid = build_grid(axes, runtime)
    cfg = tiny("EVA02-CLIP-L-14")
    clip = build_clip(cfg, vision_grid=grid, text_grid=grid)
    init_weights(clip, seed=3, task="contrastive", grid=grid)
    return {name: gather_full(param, param, grid) for name, param in clip.named_parameters()}


def test_initial_weights_do_not_depend_on_tp() -> None:
    first, second = run_ranks(_initialised, 2, SP)
    grid = single_grid()
    cfg = tiny("EVA02-CLIP-L-14")
    clip = build_clip(cfg, vision_grid=grid, text_grid=grid)
    init_weights(clip, seed=3, task="contrastive", grid=grid)
    for name, param in clip.named_parameters():
        assert torch.equal(first[name], param) and torch.equal(second[name], param), name


def test_every_case_uses_what_it_names() -> None:
    flags: dict[str, VisionSection] = {case: _config(case).vision for case in CASES}
    assert flags["EVA02-CLIP-L-14"].rope and flags["EVA02-CLIP-L-14"].sub_ln_mlp
    assert flags["EVA-CLIP-18B"].norm_position == "post" and flags["EVA-CLIP-8B"].norm == "rmsnorm"
    assert flags["ViT-H-14"].ln_pre and flags["EVA02-CLIP-bigE-14-plus"].qkv_bias == "qv"
