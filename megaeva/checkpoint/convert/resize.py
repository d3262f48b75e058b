"""Position embeddings and patch kernels between image and patch sizes, as EVA-CLIP's scripts or as timm.

Rotary angles have no weights: they follow from the sizes. Sources: EVA-CLIP training/interpolate_patch14_224to336.py
and interpolate_patch_14to16.py, eva_clip/utils.py (`resize_*_pos_embed`); timm layers/pos_embed.py and patch_embed.py.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.tensors import TensorInfo, TensorSource
from megaeva.errors import CheckpointError

Method = Literal["upstream", "timm"]
POSITIONS = "vision.pos_embed"
PATCHES = "vision.patch_embed.weight"


def resize_positions(positions: Tensor, grid: int, *, method: Method, ln_pre: bool) -> Tensor:
    """Position embeddings [1, 1 + N, D] for `grid` x `grid` patches; cls is kept, the rest is bicubic in fp32.

    Args:
        method: upstream: without antialiasing. timm: antialiased.
        ln_pre: of a tower in OpenAI's layout, whose corners upstream aligns. timm does not.
    """
    old = isqrt(positions.shape[1] - 1)
    if old == grid:
        return positions
    cls, patches = positions[:, :1], positions[:, 1:]
    square = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    antialias = method == "timm"
    corners = ln_pre and method == "upstream"
    square = functional.interpolate(square, (grid, grid), mode="bicubic", align_corners=corners, antialias=antialias)
    patches = square.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(positions.dtype)
    return torch.cat([cls, patches], dim=1)


def resize_patches(kernel: Tensor, patch: int, *, method: Method) -> Tensor:
    """A patch kernel [D, 3, P, P] for patches of `patch` pixels, computed in fp32.

    Args:
        method: upstream: bicubic like an image, without antialiasing. timm: FlexiViT's pseudo-inverse, by which an
            embedded patch changes least when kernel and patch are resized together.
    """
    old = kernel.shape[-1]
    if old == patch:
        return kernel
    if method == "upstream":
        resized = functional.interpolate(kernel.float(), (patch, patch), mode="bicubic", align_corners=False)
        return resized.to(kernel.dtype)
    basis = torch.eye(old * old).reshape(old * old, 1, old, old)
    basis = functional.interpolate(basis, (patch, patch), mode="bicubic", align_corners=False, antialias=True)
    resize = basis.squeeze(1).permute(1, 2, 0).reshape(patch * patch, old * old)
    resized = kernel.float().flatten(2) @ torch.linalg.pinv(resize)
    return resized.reshape(*kernel.shape[:2], patch, patch).to(kernel.dtype)


def resized(
    source: TensorSource, contents: Contents, image_size: int, patch_size: int, method: Method
) -> tuple[TensorSource, Contents]:
    """A source in our names, seen at another image and patch size, and what it is then.

    Tensors are resized as they are read. With the sizes that it has, the source itself comes back.

    Raises:
        CheckpointError: the image is no whole number of patches.
    """
    if image_size % patch_size:
        lower = max(1, image_size // patch_size) * patch_size
        raise CheckpointError(
            f"{source.path} cannot be resized to images of {image_size} px in patches of {patch_size} px; the image "
            f"must be a whole number of patches; use {lower} or {lower + patch_size} px."
        )
    vision = contents.model.vision
    if (vision.image_size, vision.patch_size) == (image_size, patch_size):
        return source, contents
    new = vision.model_copy(update={"image_size": image_size, "patch_size": patch_size})
    wanted = replace(contents, model=contents.model.model_copy(update={"vision": new}))
    return Resized(source, new.grid_size, patch_size, method, vision.ln_pre), wanted


class Resized:
    """A `TensorSource` in our names with positions and patch kernel of another size."""

    def __init__(self, source: TensorSource, grid: int, patch: int, method: Method, ln_pre: bool) -> None:
        """See `resized`; `grid` is in patches, `patch` in pixels."""
        self.path: Path = source.path
        self._source, self._grid, self._patch = source, grid, patch
        self._method, self._ln_pre = method, ln_pre
        infos = dict(source.infos)
        if (positions := infos.get(POSITIONS)) is not None:
            infos[POSITIONS] = TensorInfo((1, 1 + grid * grid, positions.shape[2]), positions.dtype)
        if (kernel := infos.get(PATCHES)) is not None:
            infos[PATCHES] = TensorInfo((*kernel.shape[:2], patch, patch), kernel.dtype)
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> Tensor:
        """See `TensorSource.read`."""
        tensor = self._source.read(name)
        if name == POSITIONS:
            return resize_positions(tensor, self._grid, method=self._method, ln_pre=self._ln_pre)
        if name == PATCHES:
            return resize_patches(tensor, self._patch, method=self._method)
        return tensor

    def close(self) -> None:
        """See `TensorSource.close`."""
        self._source.close()
