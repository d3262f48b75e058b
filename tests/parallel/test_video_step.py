"""A step on videos: the loss and gradients of clips that are the mean of their frames' embeddings, on any layout."""

import torch
from torch import Tensor
from torch.nn import functional

from megaeva.config.schema import AxesSection
from megaeva.data.batch import Batch
from megaeva.parallel.runtime import Runtime, seed_pass
from megaeva.parallel.shards import gather_full
from megaeva.tasks.contrastive import Contrastive
from tests.helpers.parallel_runs import contrastive_task
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import example_images, example_tokens, tiny

NUM_SAMPLES, FRAMES = 8, 3
MODEL = tiny("EVA02-CLIP-L-14", num_layers=4, drop_path=0.0, patch_dropout=0.5)
ONE = AxesSection()
LAYOUTS = {
    "dp2": (ONE, 8),
    "dp2, a clip at a time": (ONE, 2),
    "tp2_sp": (AxesSection(tp=2, sequence_parallel=True), 8),
    "pp2": (AxesSection(pp=2), 8),
    "pp2_vpp2_recompute": (AxesSection(pp=2, vpp=2, recompute="full"), 4),
}


def whole_batch() -> Batch:
    rng = torch.Generator().manual_seed(4)
    num_patches = MODEL.vision.num_patches
    keep_BK = torch.stack([torch.randperm(num_patches, generator=rng)[: num_patches // 2] for _ in range(24)])
    return Batch(
        example_images(MODEL, NUM_SAMPLES * FRAMES),
        tuple(map(str, range(NUM_SAMPLES))),
        example_tokens(MODEL, NUM_SAMPLES),
        keep_BK=keep_BK,
    )


def plain(task: Contrastive) -> tuple[float, dict[str, Tensor]]:
    """Loss and whole gradients by definition, of one graph on a task whose towers are whole."""
    model, batch = task.model, whole_batch()
    assert batch.keep_BK is not None
    images, keeps = (value.unflatten(0, (NUM_SAMPLES, FRAMES)) for value in (batch.image_BCHW, batch.keep_BK))
    image_BE = sum(model.vision(images[:, f], keeps[:, f]) for f in range(FRAMES)) / FRAMES
    text_BE = model.text(batch.token_BL)
    logits = model.scale.log_scale.exp() * functional.normalize(image_BE) @ functional.normalize(text_BE).t()
    target = torch.arange(NUM_SAMPLES)
    loss = (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.t(), target)) / 2
    named = {f"{t.name}.{n}": p for t in task.towers for n, p in t.module.named_parameters()}
    return loss.item(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def differences(runtime: Runtime) -> dict[str, tuple[float, float, set[int], int]]:
    """{layout: difference of the loss, worst of the gradients, sizes of vision passes in clips, passes}."""
    exact, gradients = plain(contrastive_task(runtime, MODEL, ONE, num_samples=NUM_SAMPLES, micro_batch_size=8))
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    found = {}
    for name, (axes, micro_batch_size) in LAYOUTS.items():
        task = contrastive_task(runtime, MODEL, axes, num_samples=NUM_SAMPLES, micro_batch_size=micro_batch_size)
        batch = whole_batch().split(NUM_SAMPLES // task.grid.dp_size)[task.grid.dp_rank]
        passes = task._vision_part(batch).batches
        loss = task.step(batch, lambda index: seed_pass(0, 0, index)).item()
        worst = 0.0
        for tower in task.towers:
            for key, parameter in tower.module.named_parameters():
                expected = gradients[f"{tower.name}.{key}"]
                ours = gather_full(parameter.main_grad, parameter, tower.grid)
                worst = max(worst, ((ours - expected).norm() / max(expected.norm(), 1e-3 * whole)).item())
        found[name] = (abs(loss - exact) / abs(exact), worst, {len(part) for part in passes}, len(passes))
    return found


def test_a_step_on_videos_equals_its_definition_on_every_layout() -> None:
    for of_rank in run_ranks(differences, 2):
        for name, (loss, gradient, _, _) in of_rank.items():
            assert loss < 1e-6, name
            assert gradient < 1e-5, name
        # A microbatch of 8 images is 2 clips of 3 frames, as parts are of one size; one of 2 images is a clip.
        assert {name: passes for name, (_, _, *passes) in of_rank.items()} == {
            "dp2": [{2}, 2],
            "dp2, a clip at a time": [{1}, 4],
            "tp2_sp": [{2}, 4],
            "pp2": [{2}, 4],
            "pp2_vpp2_recompute": [{1}, 8],
        }
