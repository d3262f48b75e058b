"""Features of an evaluation set: computed by all data ranks together, the same on each of them afterwards."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaeva.config.schema import Config
from megaeva.data.evaluation import EvalBatch, eval_batches
from megaeva.data.tokenizer import Tokenizer
from megaeva.data.transforms import MEAN, STD
from megaeva.errors import DataError
from megaeva.parallel.collectives import gather_or_raise
from megaeva.parallel.grid import Grid


class Model(Protocol):
    """What is evaluated, see `megaeva.model.CLIPModel`."""

    def encode_image(self, image_BCHW: Tensor) -> Tensor: ...
    def encode_text(self, token_BL: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Features:
    """An encoded set, in the order of its shards.

    Attributes:
        keys: sample keys.
        captions, metas: caption and json of each sample.
        image_XE: fp32 on the CPU, unnormalised.
        text_XE: the same for the captions; None when they were not asked for.
        pictures: what the model saw of a few samples, by key: uint8 [H, W, 3].
    """

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    metas: tuple[dict[str, Any], ...]
    image_XE: Tensor
    text_XE: Tensor | None
    pictures: dict[str, NDArray[np.uint8]]


def recipe_batches(cfg: Config, shards: Sequence[str], grid: Grid, tokenizer: Tokenizer | None) -> Iterator[EvalBatch]:
    """This data rank's batches of an evaluation set, resized and decoded as the recipe says."""
    return eval_batches(
        shards,
        image_size=cfg.model.vision.image_size,
        resize=cfg.eval.resize,
        crop_share=cfg.eval.crop_share,
        batch_size=cfg.eval.batch_size,
        data_rank=grid.dp_rank,
        data_size=grid.dp_size,
        tokenizer=tokenizer,
        decoder=cfg.data.decoder,
        platform=cfg.platform,
        max_image_pixels=cfg.data.max_image_pixels,
    )


def encode_set(
    model: Model, batches: Iterable[EvalBatch], *, grid: Grid, device: torch.device, batch_size: int, num_pictures: int
) -> Features:
    """The features of the samples that all data ranks read together; all ranks call it and get the same.

    Args:
        model: both towers; evaluation mode is the caller's.
        batches: this data rank's samples; each sample of the set is on exactly one data rank.
        grid: the data grid, see `megaeva.tasks.base.Task`.
        device: where the model is.
        batch_size: rows of every pass; a shorter batch is filled up, so that a sample's features do not depend on how
            many ranks share the set.
        num_pictures: samples whose picture is kept. They are the ones with the smallest hash of their key: a fixed,
            unbiased choice.

    Raises:
        DataError: the set is empty. Any error of one rank is raised on all.
    """
    records: list[tuple[int, str, str, dict[str, Any]]] = []
    images: list[Tensor] = []
    texts: list[Tensor] = []
    pictures: dict[str, NDArray[np.uint8]] = {}
    error: Exception | None = None
    try:
        for batch in agreed(batches, grid):
            records += zip(batch.indices, batch.keys, batch.captions, batch.metas)
            images.append(_encode(model.encode_image, batch.image_BCHW, device, batch_size))
            if batch.token_BL is not None:
                texts.append(_encode(model.encode_text, batch.token_BL, device, batch_size))
            _keep_pictures(pictures, batch, num_pictures)
    except Exception as caught:
        error = caught
    share = {
        "records": records,
        "image_XE": torch.cat(images) if images else None,
        "text_XE": torch.cat(texts) if texts else None,
        "pictures": pictures,
    }
    shares = gather_shares(share, error, grid)
    records = [record for share in shares for record in share["records"]]
    if not records:
        raise DataError(
            "the evaluation set has no readable sample.\n"
            "Its shards must hold images (jpg, png or webp); check eval.retrieval and eval.zero_shot in the recipe."
        )
    order = sorted(range(len(records)), key=lambda i: records[i][0])
    image_XE = torch.cat([s["image_XE"] for s in shares if s["image_XE"] is not None])[order]
    text_shares = [s["text_XE"] for s in shares if s["text_XE"] is not None]
    kept = {key: picture for s in shares for key, picture in s["pictures"].items()}
    return Features(
        keys=tuple(records[i][1] for i in order),
        captions=tuple(records[i][2] for i in order),
        metas=tuple(records[i][3] for i in order),
        image_XE=image_XE,
        text_XE=torch.cat(text_shares)[order] if text_shares else None,
        pictures={key: kept[key] for key in sorted(kept, key=key_hash)[:num_pictures]},
    )


def agreed(batches: Iterable[EvalBatch], grid: Grid) -> Iterator[EvalBatch]:
    """The batches, each once every rank of the data block has read it: a tower's collectives may follow.

    All ranks of the block call it and take batch after batch together. One that failed to read while the others went
    on into the tower would leave them waiting there until the timeout.

    Raises:
        DataError: another rank of the block failed to read, or has other samples. The failing rank raises its own
            error.
    """
    if grid.tp_size == 1:
        yield from batches
        return
    iterator = iter(batches)
    while True:
        batch, error = None, None
        try:
            batch = next(iterator, None)
        except Exception as caught:
            error = caught
        mine = batch.keys if batch is not None else None
        for rank, keys in enumerate(gather_or_raise(mine, error, _failed_to_read, grid.groups.tp)):
            if keys != mine:
                raise DataError(
                    f"rank {rank} of this data block has read {_samples(keys)} of the evaluation set where rank "
                    f"{grid.tp_rank} has read {_samples(mine)}; all must read the same shards: compare the files of "
                    f"eval.retrieval and eval.zero_shot between the nodes."
                )
        if batch is None:
            return
        yield batch


def _failed_to_read(rank: int, text: str) -> DataError:
    return DataError(f"rank {rank} of this data block failed while reading: {text}")


def _samples(keys: tuple[str, ...] | None) -> str:
    return "the end" if keys is None else f"{len(keys)} samples from {keys[0]} on"


def encode_texts(
    model: Model, tokenizer: Any, texts: Sequence[str], *, device: torch.device, batch_size: int
) -> Tensor:
    """Features of some texts on this rank, [texts, E] fp32 on the CPU, in passes of `batch_size` rows."""
    parts = [
        _encode(model.encode_text, tokenizer(list(texts[start : start + batch_size])), device, batch_size)
        for start in range(0, len(texts), batch_size)
    ]
    return torch.cat(parts)


def gather_shares(share: Any, error: Exception | None, grid: Grid) -> list[Any]:
    """What every data rank has, in rank order, on each of them; an error of one rank is raised on all.

    All data ranks call it.
    """
    if grid.dp_size == 1:
        if error is not None:
            raise error
        return [share]
    return gather_or_raise(
        share, error, lambda rank, text: DataError(f"data rank {rank} failed while evaluating: {text}"), grid.groups.dp
    )


def _encode(tower: Any, input_BX: Tensor, device: torch.device, batch_size: int) -> Tensor:
    num_rows = len(input_BX)
    filled = torch.cat([input_BX, input_BX[-1:].expand(max(0, batch_size - num_rows), *input_BX.shape[1:])])
    with torch.no_grad():
        feature_BE: Tensor = tower(filled.to(device))
    return feature_BE[:num_rows].float().cpu()


def _keep_pictures(pictures: dict[str, NDArray[np.uint8]], batch: EvalBatch, num_pictures: int) -> None:
    """Adds this batch's pictures and drops all but the `num_pictures` with the smallest hash."""
    if num_pictures == 0:
        return
    kept = set(sorted([*pictures, *batch.keys], key=key_hash)[:num_pictures])
    for key in [key for key in pictures if key not in kept]:
        del pictures[key]
    for image_CHW, key in zip(batch.image_BCHW, batch.keys):
        if key in kept:
            pictures[key] = to_picture(image_CHW)


def to_picture(image_CHW: Tensor) -> NDArray[np.uint8]:
    """What a normalised image looks like, uint8 [H, W, 3]."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    pixel_CHW = ((image_CHW.cpu().float() * std + mean) * 255).round().clamp(0, 255)
    picture: NDArray[np.uint8] = pixel_CHW.byte().permute(1, 2, 0).numpy()
    return picture


def key_hash(key: str) -> bytes:
    """Eight bytes that order samples at random, alike everywhere."""
    return hashlib.blake2b(key.encode(), digest_size=8).digest()
