"""EVA-02's rotary position embedding over the two axes of the patch grid; the cls token is not rotated."""

import torch
from torch import Tensor

_THETA = 10_000.0


def angle_table(grid_size: int, pretrain_grid: int, head_width: int) -> Tensor:
    """Returns cos and sin of the rotary angles, fp32 [2, 1 + N, K]; row 0 is the cls token's (no rotation).

    The first half of K turns by the patch's row, the second by its column; each frequency serves two neighbouring dims.
    Positions are rescaled onto the grid of pretraining. Source: VisionRotaryEmbeddingFast in shinji/eva_clip/rope.py.
    """
    axis_width = head_width // 2
    frequencies = _THETA ** -(torch.arange(0, axis_width, 2, device="cpu").float() / axis_width)
    positions = torch.arange(grid_size, device="cpu").float() / grid_size * pretrain_grid
    angles = torch.outer(positions, frequencies).repeat_interleave(2, -1)
    rows = angles[:, None, :].expand(grid_size, grid_size, axis_width)
    columns = angles[None, :, :].expand(grid_size, grid_size, axis_width)
    patches = torch.cat([rows, columns], -1).reshape(grid_size**2, head_width)
    angle_NK = torch.cat([patches.new_zeros(1, head_width), patches])
    return torch.stack([angle_NK.cos(), angle_NK.sin()])


def gather_angles(table: Tensor, keep_BK: Tensor | None) -> Tensor:
    """Returns cos and sin for each token, [2, S, B or 1, 1, K], in the layout that `ops.attention` takes.

    Args:
        table: of `angle_table`.
        keep_BK: indices of the patches that patch dropout kept, in the order they stand in the sequence; None: all.
    """
    if keep_BK is None:
        return table[:, :, None, None, :]
    token_SB = torch.nn.functional.pad(keep_BK + 1, (1, 0)).t()
    return table[:, token_SB].unsqueeze(3)
