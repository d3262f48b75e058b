"""Shares of the distillation loss."""

import torch

from megaeva.losses.feature_distill import negative_cosine_share


def test_shares_sum_to_the_mean_over_all_masked_tokens() -> None:
    predicted, target = torch.randn(10, 6), torch.randn(10, 6)
    whole = -torch.nn.functional.cosine_similarity(predicted, target).mean()
    shares = [negative_cosine_share(predicted[a:b], target[a:b], 10.0) for a, b in ((0, 3), (3, 10))]
    torch.testing.assert_close(sum(shares), whole)


def test_target_gets_no_gradient_and_its_scale_does_not_matter() -> None:
    predicted, target = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = negative_cosine_share(predicted, target, 4.0)
    loss.backward()
    assert target.grad is None
    assert predicted.grad is not None
    torch.testing.assert_close(loss, negative_cosine_share(predicted, 7 * target, 4.0))
