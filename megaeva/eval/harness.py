"""Evaluates a CLIP on every set of a recipe's `eval` section."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaeva.config.schema import Config, RetrievalSection, ZeroShotSection
from megaeva.data.tokenizer import Tokenizer, recipe_tokenizer
from megaeva.errors import DataError
from megaeva.eval.features import Features, encode_set, encode_texts, gather_shares, recipe_batches
from megaeva.eval.predictions import NUM_IMAGES, predict, write_predictions
from megaeva.eval.retrieval import retrieval
from megaeva.eval.zero_shot import accuracy, class_vectors, read_classes
from megaeva.parallel.collectives import together
from megaeva.parallel.grid import Grid


def evaluate(
    model: Any, cfg: Config, *, grid: Grid, device: torch.device, predictions: Path | None = None
) -> dict[str, dict[str, float]]:
    """The figures of every set in `cfg.eval`, as shares of 1: set name -> metric -> value.

    `retrieval/<name>`: image_to_text_r1, _r5, _r10, text_to_image_r1, _r5, _r10, mean_recall (`eval.retrieval`).
    `zero_shot/<name>`: top1, top5 (`eval.zero_shot`). Data ranks share the images; features are gathered, put in the
    order of the shards and scored in fp32, so the figures are the same on every rank and for any number of ranks.

    All ranks call it. The model is put in evaluation mode for the time, no gradient is kept.

    Args:
        model: `CLIPModel` on `device`.
        cfg: the recipe.
        grid: the data grid, see `megaeva.tasks.base.Task`.
        device: where the model is.
        predictions: file for a sample of held-out images with the captions ranked first, which the report shows;
            written by data rank 0. None: not made.

    Raises:
        DataError: a set cannot be read or has no caption or class where one is needed; on all ranks.
    """
    was_training = model.training
    model.eval()
    try:
        with together("reading data.tokenizer_subset"):
            tokenizer = recipe_tokenizer(cfg)
        results, examples = {}, {}
        for name, section in cfg.eval.retrieval.items():
            features = _encode(model, cfg, section, grid, device, tokenizer, NUM_IMAGES if predictions else 0)
            owner_X, first = images_of_samples(features)
            text_XE = _captions(features, name)
            results[f"retrieval/{name}"] = retrieval(features.image_XE[first], text_XE, owner_X)
            if predictions:
                examples[name] = predict(features, owner_X, first)
        for name, zero_shot in cfg.eval.zero_shot.items():
            results[f"zero_shot/{name}"] = _zero_shot(model, cfg, name, zero_shot, grid, device, tokenizer)
        if predictions and grid.dp_rank == 0 and grid.tp_rank == 0:
            write_predictions(predictions, examples)
        return results
    finally:
        model.train(was_training)


def images_of_samples(features: Features) -> tuple[Tensor, list[int]]:
    """(image of each sample, int64 [X]; first sample of each image).

    Samples whose json has the same `image_id` are captions of one image; without it, a sample is an image of its own.
    """
    numbers: dict[str, int] = {}
    first: list[int] = []
    owner = []
    for sample, (key, meta) in enumerate(zip(features.keys, features.metas)):
        image = str(meta["image_id"]) if "image_id" in meta else f"key:{key}"
        if image not in numbers:
            numbers[image] = len(first)
            first.append(sample)
        owner.append(numbers[image])
    return torch.tensor(owner), first


def _zero_shot(
    model: Any, cfg: Config, name: str, section: ZeroShotSection, grid: Grid, device: torch.device, tokenizer: Tokenizer
) -> dict[str, float]:
    with together(f"reading eval.zero_shot.{name}.classes"):
        classes = read_classes(section.classes)
    features = _encode(model, cfg, section, grid, device, None, 0)
    labels = [meta.get("class") for meta in features.metas]
    for key, label in zip(features.keys, labels):
        if not isinstance(label, int) or not 0 <= label < len(classes.names):
            raise DataError(
                f"sample {key} of eval.zero_shot.{name} has class={label!r} in its json.\n"
                f"It must be a whole number from 0 to {len(classes.names) - 1}, a place in {section.classes}; "
                f"mend the shards or the list of classes."
            )
    share: Tensor | None = None
    error: Exception | None = None
    try:
        names = classes.names[grid.dp_rank :: grid.dp_size]
        if names:
            share = class_vectors(
                lambda texts: encode_texts(model, tokenizer, texts, device=device, batch_size=cfg.eval.batch_size),
                classes,
                names,
            )
    except Exception as caught:
        error = caught
    shares = gather_shares(share, error, grid)
    vectors: list[Tensor | None] = [None] * len(classes.names)
    for rank, rows in enumerate(shares):
        vectors[rank :: grid.dp_size] = [] if rows is None else list(rows)
    return accuracy(features.image_XE, torch.stack([v for v in vectors if v is not None]), torch.tensor(labels))


def _encode(
    model: Any,
    cfg: Config,
    section: RetrievalSection | ZeroShotSection,
    grid: Grid,
    device: torch.device,
    tokenizer: Tokenizer | None,
    num_pictures: int,
) -> Features:
    batches = recipe_batches(cfg, section.shards, grid, tokenizer)
    return encode_set(
        model, batches, grid=grid, device=device, batch_size=cfg.eval.batch_size, num_pictures=num_pictures
    )


def _captions(features: Features, name: str) -> Tensor:
    if features.text_XE is None or len(features.text_XE) != len(features.keys):
        raise DataError(
            f"eval.retrieval.{name} has samples without a caption.\n"
            f"Each must have a .txt beside its image; write the captions, or name a set that has them."
        )
    return features.text_XE
