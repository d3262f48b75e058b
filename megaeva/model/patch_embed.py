"""Image to patch embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel = patch, computed as one matrix product (faster than conv2d on CPU)."""

    def __init__(self, patch_size: int, hidden_size: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(hidden_size, 3, patch_size, patch_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=dtype)) if bias else None

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Returns [N, B, D], patches in row-major order."""
        batch, channels, height, width = image_BCHW.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        patches = image_BCHW.to(self.weight.dtype).view(batch, channels, rows, size, columns, size)
        patches = patches.permute(2, 4, 0, 1, 3, 5).reshape(rows * columns, batch, channels * size * size)
        return F.linear(patches, self.weight.flatten(1), self.bias)
