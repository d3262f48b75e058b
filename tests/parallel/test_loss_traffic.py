"""Bytes each rank sends in a forward and backward pass of the loss, beside open_clip's gather_with_grad."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch import Tensor

from megaeva.bench.traffic import count_traffic
from megaeva.losses.contrastive import clip_loss, sigmoid_loss, start_gather
from megaeva.parallel.runtime import Runtime
from tests.helpers.spawn import run_ranks

NUM_LOCAL, EMBED_DIM = 32, 1024
AT_MOST = 0.55


def forward_and_backward(loss: Callable[..., Tensor], dtype: torch.dtype) -> Callable[[], None]:
    image_BE, text_BE = (torch.randn(NUM_LOCAL, EMBED_DIM).to(dtype).requires_grad_() for _ in range(2))
    log_scale = torch.tensor(2.6, requires_grad=True)
    return lambda: loss(image_BE, text_BE, log_scale).backward()


def sent_bytes(runtime: Runtime) -> dict[str, int]:
    group = dist.group.WORLD
    peer = ClipLoss(gather_with_grad=True, rank=runtime.rank, world_size=runtime.world_size)
    losses: dict[str, Callable[..., Tensor]] = {
        "peer": lambda image, text, log_scale: peer(image, text, log_scale.exp()),
        "ours": lambda *leaves: clip_loss(*leaves, group=group),
        "in flight": lambda image, text, log_scale: clip_loss(
            image, text, log_scale, group=group, text_in_flight=start_gather(text.detach(), group)
        ),
        "smoothed": lambda *leaves: clip_loss(*leaves, group=group, label_smoothing=0.1),
        "sigmoid": lambda *leaves: sigmoid_loss(*leaves, torch.tensor(-10.0), group=group),
    }
    sent = {name: count_traffic(forward_and_backward(loss, torch.float32)) for name, loss in losses.items()}
    return sent | {"bf16": count_traffic(forward_and_backward(losses["ours"], torch.bfloat16))}


def uncounted() -> str:
    with pytest.raises(NotImplementedError) as caught:
        count_traffic(lambda: dist.broadcast(torch.zeros(1), 0))
    dist.broadcast(torch.zeros(1), 0)  # as before
    return str(caught.value)


def on_two(runtime: Runtime) -> tuple[dict[str, int], str]:
    return sent_bytes(runtime), uncounted()


def check(per_rank: list[dict[str, int]]) -> None:
    num_ranks = len(per_rank)
    features = 2 * NUM_LOCAL * EMBED_DIM * 4 * (num_ranks - 1)
    for sent in per_rank:
        assert sent["peer"] == 2 * features, "an all-gather and a reduce-scatter of each modality"
        for name in ("ours", "in flight", "smoothed", "sigmoid"):
            assert features < sent[name] <= AT_MOST * sent["peer"], (name, sent)
        # What is not features: numbers of each pair and the header.
        assert sent["bf16"] - features / 2 == sent["ours"] - features
    assert all(sent == per_rank[0] for sent in per_rank)


def test_two_ranks_send_half_of_what_open_clip_sends() -> None:
    sent, messages = zip(*run_ranks(on_two, 2), strict=True)
    check(list(sent))
    assert "torch.distributed.broadcast has no row" in messages[0], "a count that leaves something out is an error"


@pytest.mark.slow
def test_four_ranks_send_half_of_what_open_clip_sends() -> None:
    check(run_ranks(sent_bytes, 4))
