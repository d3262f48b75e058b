"""How well a MIM student predicts its teacher's features behind the mask, on images it was not trained on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megaeva.config.schema import Config
from megaeva.data.evaluation import EvalBatch
from megaeva.data.masking import block_mask
from megaeva.eval.features import agreed, gather_shares, key_hash, recipe_batches, to_picture
from megaeva.eval.predictions import encode_png
from megaeva.parallel.grid import Grid

NUM_EXAMPLES = 8


def evaluate_masked(
    student: Any, teacher: Any, cfg: Config, *, grid: Grid, device: torch.device, examples: Path | None = None
) -> dict[str, dict[str, float]]:
    """`mim/<name>`: `cosine`, the mean over masked patches of a set, for each set in `cfg.eval.retrieval`.

    The mask of an image is a function of the recipe's seed and its place in the set: runs of one seed are comparable.
    All ranks call it and get the same figures. Both models are put in evaluation mode for the time.

    Args:
        student: `MIMStudent` on `device`.
        teacher: `Teacher` on `device`.
        cfg: a recipe with a `mim` section.
        grid: the data grid, see `megaeva.tasks.base.Task`.
        device: where the models are.
        examples: file for a few images of the first set with mask and cosine of each patch, which the report shows;
            written by data rank 0. None: not made.
    """
    assert cfg.mim is not None, "config.validate requires it for this task"
    was_training = student.training
    student.eval()
    results: dict[str, dict[str, float]] = {}
    try:
        for number, (name, section) in enumerate(cfg.eval.retrieval.items()):
            total, count, error = 0.0, 0, None
            kept: dict[str, dict[str, Any]] = {}
            try:
                for batch in agreed(recipe_batches(cfg, section.shards, grid, tokenizer=None), grid):
                    mask_BN = masks(cfg, batch.indices)
                    cosine_M = masked_cosine(student, teacher, batch.image_BCHW.to(device), mask_BN.to(device))
                    total += float(cosine_M.double().sum())
                    count += len(cosine_M)
                    if examples and number == 0:
                        _keep(kept, batch, mask_BN, cosine_M)
            except Exception as caught:
                error = caught
            shares = gather_shares((total, count, kept), error, grid)
            results[f"mim/{name}"] = {"cosine": sum(s[0] for s in shares) / max(1, sum(s[1] for s in shares))}
            if examples and number == 0 and grid.dp_rank == 0 and grid.tp_rank == 0:
                found = {key: example for share in shares for key, example in share[2].items()}
                chosen = [found[key] for key in sorted(found, key=key_hash)[:NUM_EXAMPLES]]
                examples.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"set": name, "grid": cfg.model.vision.grid_size, "examples": chosen})
                examples.write_text(text + "\n", encoding="utf-8")
        return results
    finally:
        student.train(was_training)


def masks(cfg: Config, indices: tuple[int, ...]) -> Tensor:
    """Masks of the samples at these places of a set, bool [len(indices), N], drawn as in training."""
    assert cfg.mim is not None
    grid, section = cfg.model.vision.grid_size, cfg.mim.mask
    rows = [block_mask(np.random.default_rng([cfg.seed, index]), grid, section).reshape(-1) for index in indices]
    return torch.from_numpy(np.stack(rows))


def masked_cosine(student: Any, teacher: Any, image_BCHW: Tensor, mask_BN: Tensor) -> Tensor:
    """Cosine of prediction and target at each masked patch, fp32 [M] on the CPU, row-major order of `mask_BN`."""
    with torch.no_grad():
        predicted_ME = student.predict(image_BCHW, mask_BN)
        target_ME = teacher(image_BCHW)[mask_BN]
    return F.cosine_similarity(predicted_ME.float(), target_ME.float(), dim=-1).cpu()


def _keep(kept: dict[str, dict[str, Any]], batch: EvalBatch, mask_BN: Tensor, cosine_M: Tensor) -> None:
    """Adds this batch's examples and drops all but those with the smallest hash of their key."""
    chosen = set(sorted([*kept, *batch.keys], key=key_hash)[:NUM_EXAMPLES])
    for key in [key for key in kept if key not in chosen]:
        del kept[key]
    parts = cosine_M.split(mask_BN.sum(1).tolist())
    for image_CHW, key, caption, mask_N, part in zip(batch.image_BCHW, batch.keys, batch.captions, mask_BN, parts):
        if key in chosen:
            values = iter(part.tolist())
            cosine = [round(next(values), 3) if masked else None for masked in mask_N.tolist()]
            kept[key] = {"key": key, "caption": caption, "png": encode_png(to_picture(image_CHW)), "cosine": cosine}
