"""Masked feature distillation."""

from torch import Tensor
from torch.nn.functional import cosine_similarity


def negative_cosine_share(predicted_ME: Tensor, target_ME: Tensor, num_global_tokens: float) -> Tensor:
    """This call's share of the mean negative cosine over all masked tokens of the global batch (0-dim, fp32).

    Shares sum over microbatches and data ranks to the loss; `num_global_tokens` counts masked tokens of the whole
    global batch, so rows with few masked patches weigh no more than others. No gradient reaches the target.
    Source: EVA-02 asuka engine_for_pretraining.py (loss in fp32, no target normalisation: cosine is scale-free).
    """
    return -cosine_similarity(predicted_ME.float(), target_ME.detach().float(), dim=-1).sum() / num_global_tokens
