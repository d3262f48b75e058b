"""Batches for evaluation: every sample once, in file order, dealt out to the data ranks."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from megaeva.data.builder import read_caption
from megaeva.data.decode import Decoder, DecoderName, EncodedImage, make_decoder
from megaeva.data.decode_pillow import BrokenImage, open_image
from megaeva.data.shards import RawSample, expand_shards, read_shard
from megaeva.data.tokenizer import Tokenizer
from megaeva.data.transforms import Crop, eval_crop
from megaeva.errors import DataError


@dataclass(frozen=True)
class EvalBatch:
    """Samples of one data rank for evaluation.

    Attributes:
        image_BCHW: fp32, normalised with the CLIP mean and deviation.
        token_BL: int64 token ids padded with 0; None when no tokenizer was given.
        keys: "shard-name/sample-key".
        captions: the txt files, stripped; without a tokenizer "" where there is none.
        metas: the json files; {} where there is none.
        indices: place of each sample in the whole set, counted over all shards, the same for any number of ranks.
    """

    image_BCHW: Tensor
    token_BL: Tensor | None
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    metas: tuple[dict[str, Any], ...]
    indices: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)


def eval_batches(
    shards: Sequence[str | Path],
    *,
    image_size: int,
    resize: Literal["crop", "squash"],
    batch_size: int,
    data_rank: int,
    data_size: int,
    tokenizer: Tokenizer | None,
    decoder: DecoderName = "auto",
    platform: Literal["auto", "cpu", "cuda"] = "auto",
    max_image_pixels: int = 64_000_000,
    crop_share: float = 1.0,
) -> Iterator[EvalBatch]:
    """Batches of up to `batch_size` in file order; sample i of the set goes to rank i % data_size, each once.

    Ranks may get a different number of batches, or none: put no collective inside the loop.

    Raises:
        DataError: a shard is missing or damaged, or a sample is broken: unlike in training none is skipped, because a
            score over fewer samples would not say so.
    """
    paths = expand_shards(shards)
    decode = make_decoder(decoder, image_size, batch_size=batch_size, platform=platform)
    waiting: list[_Eval] = []
    mine = (
        (place, path, sample)
        for place, (path, sample) in enumerate((path, sample) for path in paths for sample in read_shard(path))
        if place % data_size == data_rank
    )
    for place, path, sample in mine:
        crop_of = partial(eval_crop, image_size=image_size, resize=resize, crop_share=crop_share)
        waiting.append(_read_eval(place, path, sample, crop_of, max_image_pixels, tokenizer is not None))
        if len(waiting) == batch_size:
            yield _eval_batch(waiting, decode, tokenizer)
            waiting = []
    if waiting:
        yield _eval_batch(waiting, decode, tokenizer)


class _Eval(NamedTuple):
    place: int
    path: Path
    sample: RawSample
    image: EncodedImage
    crop: Crop
    caption: str
    meta: dict[str, Any]


def _read_eval(
    place: int,
    path: Path,
    sample: RawSample,
    crop_of: Callable[[int, int], Crop],
    max_pixels: int,
    needs_caption: bool,
) -> _Eval:
    try:
        if sample.problem is not None:
            raise BrokenImage(sample.problem)
        if sample.image is None:
            raise BrokenImage("missing_image")
        caption = (
            read_caption(sample) if needs_caption else sample.files.get("txt", b"").decode(errors="replace").strip()
        )
        image = open_image(sample.image, max_pixels)
        meta = json.loads(sample.files.get("json", b"{}"))
        if not isinstance(meta, dict):
            raise BrokenImage("bad_json")
    except BrokenImage as error:
        raise _broken_eval(path, sample, str(error)) from None
    except ValueError:
        raise _broken_eval(path, sample, "bad_json") from None
    return _Eval(place, path, sample, image, crop_of(*image.header.size), caption, meta)


def _broken_eval(path: Path, sample: RawSample, reason: str) -> DataError:
    return DataError(
        f"sample {sample.key} of the evaluation shard {path} is broken: {reason}; every one must be readable, "
        "or scores would not be comparable; write the shard again without it"
    )


def _eval_batch(samples: Sequence[_Eval], decoder: Decoder, tokenizer: Tokenizer | None) -> EvalBatch:
    decoded = decoder.decode([s.image for s in samples], [s.crop for s in samples])
    for place, reason in decoded.broken.items():
        raise _broken_eval(samples[place].path, samples[place].sample, reason)
    captions = tuple(s.caption for s in samples)
    return EvalBatch(
        image_BCHW=decoded.image_BCHW,
        token_BL=None if tokenizer is None else tokenizer(captions),
        keys=tuple(s.sample.name for s in samples),
        captions=captions,
        metas=tuple(s.meta for s in samples),
        indices=tuple(s.place for s in samples),
    )
