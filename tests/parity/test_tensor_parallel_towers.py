"""Towers cut over two tensor-parallel ranks give the single process's outputs and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import AxesSection, ModelSection, VisionSection
from megaeva.config.variants import VARIANTS
from megaeva.model import MIMStudent, build_clip, init_weights
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
    single_grid,
    tiny,
)

SHRUNKEN = ("EVA02-CLIP-L-14", "EVA02-CLIP-bigE-14-plus", "EVA-CLIP-8B", "EVA-CLIP-18B", "ViT-H-14")
CASES = [*SHRUNKEN, "Demo-Teacher", "Demo-Student", "EVA02-CLIP-L-14 rms", "EVA02-CLIP-L-14 dropped", "mim", "mim post"]


def _config(case: str) -> ModelSection:
    if case.startswith("Demo"):
        return ModelSection.model_validate(VARIANTS[case])
    if case == "EVA02-CLIP-L-14 rms":  # a sub-LN of the other kind, which no published model has
        return tiny("EVA02-CLIP-L-14", norm="rmsnorm")
    if case == "EVA02-CLIP-L-14 dropped":  # patch dropout and drop path
        return tiny("EVA02-CLIP-L-14", drop_path=0.5)
    return tiny({"mim": "EVA02-CLIP-L-14", "mim post": "EVA-CLIP-18B"}.get(case, case))


def _pass(case: str, grid: Grid) -> dict[str, Tensor]:
    """Outputs and tp=1 gradients of one forward and backward."""
    cfg = _config(case)
    image = example_images(cfg)
    seed_pass(0, 0, 0, 0)
    if case.startswith("mim"):
        student = MIMStudent(cfg.vision, 20, grid=grid, stop_grad_patch_embed=0.1)
        load_full(student, random_state(full_shapes(student, grid.tp_size)), grid)
        mask_BN = torch.rand(3, 16, generator=torch.Generator().manual_seed(4)) < 0.4
        outputs = {"predicted_ME": student(image, mask_BN)}
        model: torch.nn.Module = student
    else:
        clip = build_clip(cfg, vision_grid=grid, text_grid=grid)
        load_full(clip, random_state(full_shapes(clip, grid.tp_size)), grid)
        keep_BK = None
        if case.endswith("dropped"):
            keep_BK = torch.stack([torch.arange(row, 14, 2)[:6] for row in range(3)])
        outputs = {
            "image_BE": clip.encode_image(image, keep_BK),
            "text_BE": clip.encode_text(example_tokens(cfg)),
            "scale": clip.scale().view(1, 1),
        }
        model = clip
    generator = torch.Generator().manual_seed(6)
    loss = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    return {name: out.detach() for name, out in outputs.items()} | full_gradients(model, grid)


def _two_ranks(runtime: Runtime, cases: list[str]) -> dict[str, dict[str, Tensor]]:
    grid = build_grid(AxesSection(tp=2), runtime)
    return {case: _pass(case, grid) for case in cases}


@pytest.fixture(scope="module")
def both_ranks() -> list[dict[str, dict[str, Tensor]]]:
    """Every case on two ranks, in one start of two processes."""
    return run_ranks(_two_ranks, 2, CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case: str, both_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    single = _pass(case, single_grid())
    for result in both_ranks:
        assert result[case].keys() == single.keys()
        for name, expected in single.items():
            got = result[case][name]
            assert got.shape == expected.shape, name
            assert expected.norm() > 0, f"{name} is zero: it proves nothing"
            assert (got - expected).norm() <= 1e-5 * expected.norm(), name


def _initialised(runtime: Runtime, axes: AxesSection) -> dict[str, Any]:
    grid = build_grid(axes, runtime)
    cfg = tiny("EVA02-CLIP-L-14")
    clip = build_clip(cfg, vision_grid=grid, text_grid=grid)
    init_weights(clip, seed=3, task="contrastive", grid=grid)
    return {name: gather_full(param, param, grid) for name, param in clip.named_parameters()}


def test_initial_weights_do_not_depend_on_tp() -> None:
    first, second = run_ranks(_initialised, 2, AxesSection(tp=2))
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
