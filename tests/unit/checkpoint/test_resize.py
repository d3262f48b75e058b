"""Resized positions and patch kernels are those of EVA-CLIP's scripts and of timm."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch.nn import functional

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.resize import Method, resize_patches, resize_positions, resized
from megaeva.checkpoint.convert.rules import StateSource
from megaeva.errors import CheckpointError
from tests.helpers.tiny import tiny

D = 6


def _positions(grid: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, 1 + grid * grid, D, generator=torch.Generator().manual_seed(grid)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("old", "new"), [(16, 24), (16, 14), (3, 7)])
def test_positions_as_upstream(old: int, new: int, dtype: torch.dtype) -> None:
    """interpolate_patch14_224to336.py line by line: cls kept, bicubic, corners not aligned, no antialiasing."""
    pos = _positions(old, dtype)
    extra, tokens = pos[:, :1], pos[:, 1:]
    tokens = tokens.reshape(-1, old, old, D).permute(0, 3, 1, 2)
    tokens = functional.interpolate(tokens.float(), size=(new, new), mode="bicubic", align_corners=False)
    expected = torch.cat((extra, tokens.permute(0, 2, 3, 1).flatten(1, 2).to(dtype)), dim=1)
    ours = resize_positions(pos, new, method="upstream", ln_pre=False)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)


def test_positions_of_clip_towers_as_upstream() -> None:
    """Corner patches keep their positions exactly: eva_clip's resize_clip_pos_embed aligns corners."""
    pos = _positions(4)
    ours = resize_positions(pos, 6, method="upstream", ln_pre=True)
    corners = [(0, 0), (3, 5), (12, 30), (15, 35)]
    for old, new in corners:
        torch.testing.assert_close(ours[0, 1 + new], pos[0, 1 + old], atol=1e-6, rtol=0)
    assert not torch.allclose(ours, resize_positions(pos, 6, method="upstream", ln_pre=False), atol=1e-2)


@pytest.mark.parametrize("ln_pre", [False, True])
@pytest.mark.parametrize(("old", "new"), [(16, 24), (16, 14), (8, 3)])
def test_positions_as_timm(old: int, new: int, ln_pre: bool) -> None:
    pos = _positions(old)
    expected = resample_abs_pos_embed(pos, [new, new])
    assert torch.equal(resize_positions(pos, new, method="timm", ln_pre=ln_pre), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("old", "new"), [(14, 16), (16, 14), (4, 7)])
def test_patch_kernels(old: int, new: int, dtype: torch.dtype) -> None:
    """Upstream's 14-to-16 script resizes the kernel like an image in fp32; timm uses a pseudo-inverse."""
    kernel = torch.randn(5, 3, old, old, generator=torch.Generator().manual_seed(0)).to(dtype)
    upstream = functional.interpolate(kernel.float(), size=(new, new), mode="bicubic", align_corners=False).to(dtype)
    assert torch.equal(resize_patches(kernel, new, method="upstream"), upstream)
    timm = resample_patch_embed(kernel, [new, new])
    ours = resize_patches(kernel, new, method="timm")
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, timm, atol=1e-6 if dtype == torch.float32 else 1e-3, rtol=0)
    assert not torch.allclose(timm, upstream, atol=1e-2)


@pytest.mark.parametrize("method", ["upstream", "timm"])
def test_a_source_seen_at_another_size(method: Method) -> None:
    model = tiny("EVA02-CLIP-B-16")
    vision, width = model.vision, model.vision.hidden_size
    state = {
        "vision.pos_embed": torch.randn(1, 1 + vision.num_patches, width),
        "vision.patch_embed.weight": torch.randn(width, 3, vision.patch_size, vision.patch_size),
        "vision.cls_token": torch.randn(1, 1, width),
    }
    source, contents = StateSource(state), Contents("vision", model)
    same, unchanged = resized(source, contents, vision.image_size, vision.patch_size, method)
    assert same is source and unchanged is contents

    image, patch = 2 * vision.image_size, vision.patch_size // 2
    seen, what = resized(source, contents, image, patch, method)
    assert (what.model.vision.image_size, what.model.vision.patch_size) == (image, patch)
    assert what.model.text == model.text
    for name, info in seen.infos.items():
        tensor = seen.read(name)
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype)
    assert seen.infos["vision.pos_embed"].shape[1] == 1 + (image // patch) ** 2
    assert torch.equal(seen.read("vision.cls_token"), state["vision.cls_token"])


def test_an_image_of_broken_patches_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"100 px in patches of 16 px; .* use 96 or 112 px"):
        resized(StateSource({}), Contents("vision", tiny("EVA02-CLIP-B-16")), 100, 16, "upstream")
