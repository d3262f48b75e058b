"""Recall against clip_benchmark's own code, and what it does where that leaves the answer open."""

import pytest
import torch
from torch import Tensor

from megaeva.eval import retrieval as retrieval_module
from megaeva.eval.retrieval import num_ahead, retrieval


def _random(num_images: int, captions_each: int, seed: int, noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image_XE = torch.randn(num_images, 16, generator=generator)
    owner_Y = torch.arange(num_images).repeat_interleave(captions_each)
    owner_Y = owner_Y[torch.randperm(len(owner_Y), generator=generator)]
    text_YE = image_XE[owner_Y] + noise * torch.randn(len(owner_Y), 16, generator=generator)
    return image_XE * torch.rand(num_images, 1, generator=generator), text_YE, owner_Y


@pytest.mark.parametrize("captions_each", [1, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_clip_benchmark(captions_each: int, seed: int) -> None:
    oracle = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    image_XE, text_YE, owner_Y = _random(80, captions_each, seed)
    ours = retrieval(image_XE, text_YE, owner_Y)
    scores = torch.nn.functional.normalize(text_YE, dim=-1) @ torch.nn.functional.normalize(image_XE, dim=-1).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owner_Y] = True
    for k in (1, 5, 10):
        image_recall = (oracle.recall_at_k(scores, positive, k) > 0).float().mean().item()
        text_recall = (oracle.recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
        assert ours[f"text_to_image_r{k}"] == pytest.approx(image_recall, abs=1e-6)
        assert ours[f"image_to_text_r{k}"] == pytest.approx(text_recall, abs=1e-6)
        assert 0.02 < ours[f"text_to_image_r{k}"] < 0.98 or k > 1  # the comparison is not of trivial values


def test_mean_recall_is_the_mean_of_the_six() -> None:
    results = retrieval(*_random(50, 2, 3))
    assert len(results) == 7
    assert results["mean_recall"] == pytest.approx(sum(v for n, v in results.items() if n != "mean_recall") / 6)


def test_perfect_and_wrong_models() -> None:
    eye, owner = torch.eye(12), torch.arange(12)
    assert set(retrieval(eye, eye, owner).values()) == {1.0}
    shifted = retrieval(eye, -eye, owner)  # every positive is last
    assert shifted["image_to_text_r10"] == 0.0


def test_chunks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    features = _random(60, 3, 4)
    whole = retrieval(*features)
    monkeypatch.setattr(retrieval_module, "_CHUNK_SCORES", 7 * 180)
    assert retrieval(*features) == whole


def test_collapsed_model_scores_nothing() -> None:
    same = torch.ones(20, 8)
    assert set(retrieval(same, same, torch.arange(20)).values()) == {0.0}


def test_nan_scores_nothing() -> None:
    image_XE, text_YE, owner_Y = _random(20, 1, 5, noise=0.01)
    image_XE[3] = torch.nan
    assert num_ahead(image_XE, text_YE, owner_Y, "image_to_text")[3] == 19
    assert retrieval(image_XE, text_YE, owner_Y)["image_to_text_r1"] == 0.95


def test_twin_captions_are_two_items_in_any_order() -> None:
    eye = torch.eye(4)
    text_YE, owner_Y = eye.clone(), torch.arange(4)
    text_YE[1] = text_YE[0]  # images 0 and 1 share a caption: image 0 finds a wrong one level with its own
    first = num_ahead(eye, text_YE, owner_Y, "image_to_text").tolist()
    assert first == [1, 3, 0, 0]
    flipped = num_ahead(eye, text_YE.flip(0), owner_Y.flip(0), "image_to_text").tolist()
    assert flipped == first


def test_noise_below_the_tie_does_not_matter() -> None:
    image_XE, text_YE, owner_Y = _random(40, 1, 6)
    image_XE[1] = image_XE[0]  # exact duplicate pictures, as in OpenMoji
    before = retrieval(image_XE, text_YE, owner_Y)
    image_XE[1] *= 1 + 3e-8
    image_XE[0] += 1e-8
    assert retrieval(image_XE, text_YE, owner_Y) == before


def test_any_of_several_captions_is_a_hit() -> None:
    image_XE = torch.eye(3)
    text_YE = torch.stack([-image_XE[0], image_XE[0], image_XE[1], image_XE[2]])
    owner_Y = torch.tensor([0, 0, 1, 2])
    results = retrieval(image_XE, text_YE, owner_Y)
    assert results["image_to_text_r1"] == 1.0
    assert results["text_to_image_r1"] == 0.75
