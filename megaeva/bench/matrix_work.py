"""How much of what the machine's matrix products reach a step makes use of."""

import statistics

import torch

from megaeva.bench.compare import milliseconds
from megaeva.config.schema import ModelSection, TextSection, VisionSection

# Of ../shared/performance.md: large enough for the machine's best, small enough for its caches.
PRODUCT = (2048, 1024, 2048)


def step_flops(model: ModelSection, batch_size: int, num_text_tokens: int) -> float:
    """Returns the operations of the matrix products that a training step needs, forward and backward.

    Two for each weight and token forward and four backward (two where the input wants no gradient: pixels); attention
    multiplies scores and values, of which a causal token needs half. What recomputation does again is not needed, nor
    are the optimizer, norms and the loss.

    Args:
        num_text_tokens: that a caption is computed to.
    """
    vision, text = model.vision, model.text
    patch = 4 * 3 * vision.patch_size**2 * vision.hidden_size * vision.num_patches
    heads = 6 * model.embed_dim * (vision.hidden_size + text.hidden_size)
    towers = _blocks(vision, vision.num_patches + 1, 1.0) + _blocks(text, num_text_tokens, 0.5)
    return float(batch_size * (patch + heads + towers))


def _blocks(section: VisionSection | TextSection, num_tokens: int, share_seen: float) -> float:
    width = section.hidden_size
    num_inner = 3 if section.activation == "swiglu" else 2
    weights = 4 * width**2 + num_inner * width * section.ffn_hidden_size
    scores = 12 * num_tokens**2 * width * share_seen
    return section.num_layers * (6 * weights * num_tokens + scores)


def ceiling(dtype: torch.dtype, device: torch.device, num_products: int = 7) -> float:
    """Returns how many operations a second torch.mm on PRODUCT makes: the median of several, of fewer
    where they take more than 5 s, after one that warms up."""
    rows, inner, columns = PRODUCT
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, columns, device=device).to(dtype)
    milliseconds(lambda: torch.mm(left, right), device.type)
    times: list[float] = []
    while len(times) < num_products and sum(times) < 5e3:  # one in bf16 takes half a minute where AVX2 is all
        times.append(milliseconds(lambda: torch.mm(left, right), device.type))
    return 2 * rows * inner * columns / (1e-3 * statistics.median(times))
