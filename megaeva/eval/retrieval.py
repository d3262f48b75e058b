"""Image-text retrieval: recall at k in both directions."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

KS: tuple[int, ...] = (1, 5, 10)
# Cosines closer than this are a tie: identical inputs in different batches differ by about 1e-7 in fp32.
TIE = 1e-6
_CHUNK_SCORES = 1 << 24  # scores held at once, 64 MiB in fp32

Direction = Literal["image_to_text", "text_to_image"]


def retrieval(image_XE: Tensor, text_YE: Tensor, image_of_text_Y: Tensor) -> dict[str, float]:
    """Recalls at 1, 5 and 10 in both directions as shares of 1, and `mean_recall`, the mean of the six.

    A query is a hit at k when any of its positives is among the k best of the whole gallery; an image may have several
    captions. A gallery item that scores as high as the best positive (within 1e-6) counts as ahead of it: figures do
    not depend on the order of the gallery, and a model that maps everything to one point scores 0. Two images with the
    same caption are two items; neither's caption is a positive of the other.

    Args:
        image_XE: one row for each image; any float type, normalised here in fp32.
        text_YE: one row for each caption.
        image_of_text_Y: int64, row of `image_XE` that each caption belongs to; every image has a caption.

    Source: recall as in CLIP papers ("1 if any positive is in the top k"), equal to clip_benchmark's
    `zeroshot_retrieval` when no scores tie. Memory is bounded: scores are computed in chunks of queries.
    """
    results = {}
    for direction in ("image_to_text", "text_to_image"):
        ahead_Q = num_ahead(image_XE, text_YE, image_of_text_Y, direction)
        for k in KS:
            results[f"{direction}_r{k}"] = int((ahead_Q < k).sum()) / len(ahead_Q)
    return results | {"mean_recall": sum(results.values()) / len(results)}


def num_ahead(image_XE: Tensor, text_YE: Tensor, image_of_text_Y: Tensor, direction: Direction) -> Tensor:
    """How many wrong items stand before (or level with) each query's best positive, int64; 0 is a hit at 1.

    Arguments as for `retrieval`; queries are images (X) or captions (Y) by `direction`.
    """
    image_XE, text_YE = normalized(image_XE), normalized(text_YE)
    if direction == "image_to_text":
        query_QE, gallery_GE = image_XE, text_YE
        owner_Q, owner_G = torch.arange(len(image_XE), device=image_XE.device), image_of_text_Y
    else:
        query_QE, gallery_GE = text_YE, image_XE
        owner_Q, owner_G = image_of_text_Y, torch.arange(len(image_XE), device=image_XE.device)
    counts = []
    size = max(1, _CHUNK_SCORES // max(1, len(gallery_GE)))
    for start in range(0, len(query_QE), size):
        score_QG = query_QE[start : start + size] @ gallery_GE.T
        positive_QG = owner_Q[start : start + size, None] == owner_G[None]
        best_Q1 = score_QG.masked_fill(~positive_QG, -torch.inf).amax(1, keepdim=True)
        # `not (score < best)`: a feature that is not a number must count against its query.
        counts.append((~(score_QG < best_Q1 - TIE) & ~positive_QG).sum(1))
    return torch.cat(counts)


def normalized(feature_XE: Tensor) -> Tensor:
    """Rows of length 1, fp32."""
    return F.normalize(feature_XE.float(), dim=-1)
