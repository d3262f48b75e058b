"""From a stream of raw samples to training batches: what each sample is made into, and what becomes of broken ones."""

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaeva.config.schema import Config
from megaeva.data.batch import Batch
from megaeva.data.decode import Decoder, EncodedImage
from megaeva.data.decode_pillow import BrokenImage, open_image
from megaeva.data.masking import block_mask, keep_indices
from megaeva.data.shards import Cursor, RawSample, SampleStream, sample_rng
from megaeva.data.tokenizer import Tokenizer
from megaeva.data.transforms import Crop, train_crop
from megaeva.errors import DataError

logger = logging.getLogger(__name__)

MAX_CACHED_BYTES = 256 * 2**20  # undecoded shards kept in memory by one data rank, if all of them fit
MIN_SEEN = 1000  # samples; before that many, a dropped share is too rough to stop a run in the middle of an epoch
_CACHED_CAPTIONS = 1 << 16

# What the short names that broken samples are counted by do not say themselves.
_MEANINGS = {
    "bad_caption": "not UTF-8",
    "damaged_shard": "the tar ends early",
    "decompression_bomb": "more pixels than data.max_image_pixels",
    "unsafe_name": "a member that is absolute, has `..` or is a link",
    "unsupported_mode": "no 8-bit image",
}


def describe_broken(by_reason: Counter[str], first: Mapping[str, Sequence[str]]) -> str:
    """`3 bad_caption (not UTF-8; first: a, b), 1 truncated_image (first: c)`: counts, meaning and first keys."""
    parts = []
    for reason, count in by_reason.most_common():
        meaning = f"{_MEANINGS[reason]}; " if reason in _MEANINGS else ""
        parts.append(f"{count} {reason} ({meaning}first: {', '.join(first[reason])})")
    return ", ".join(parts)


def read_caption(sample: RawSample) -> str:
    """The caption of `sample`, stripped.

    Raises:
        BrokenImage: "missing_caption", "bad_caption" (not UTF-8) or "empty_caption".
    """
    encoded = sample.files.get("txt")
    if encoded is None:
        raise BrokenImage("missing_caption")
    try:
        caption = encoded.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BrokenImage("bad_caption") from None
    if not caption:
        raise BrokenImage("empty_caption")
    return caption


class CaptionTokens:
    """Token rows of captions; the latest 65,536 are remembered, so a small set is tokenised once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rows: OrderedDict[str, NDArray[np.int32]] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """`token_BL` of `captions`, int64."""
        rows = self._rows
        fresh = list(dict.fromkeys(c for c in captions if c not in rows))
        if fresh:
            rows.update(zip(fresh, self._tokenizer(fresh).numpy().astype(np.int32)))
        token_BL = torch.from_numpy(np.stack([rows[c] for c in captions]).astype(np.int64))
        while len(rows) > _CACHED_CAPTIONS:
            rows.popitem(last=False)
        return token_BL


class DropCount:
    """What was seen and dropped by one worker, and the rule that stops a run with too many broken samples."""

    def __init__(self, max_share: float, state: dict[str, Any] | None = None) -> None:
        self._max_share = max_share
        self.seen: int = state["seen"] if state else 0
        self.by_reason: Counter[str] = Counter(state["dropped"] if state else {})
        self.first: dict[str, list[str]] = dict(state["first_dropped"]) if state else {}

    def as_dict(self) -> dict[str, Any]:
        """The counts, for JSON."""
        return {"seen": self.seen, "dropped": dict(self.by_reason), "first_dropped": self.first}

    def drop(self, name: str, reason: str) -> None:
        """Counts one dropped sample.

        Raises:
            DataError: more than the allowed share was dropped.
        """
        if not self.by_reason[reason]:
            logger.warning("sample %s is skipped: %s (later ones of this kind are only counted)", name, reason)
        self.by_reason[reason] += 1
        names = self.first.get(reason, [])
        if len(names) < 3:
            self.first = {**self.first, reason: [*names, name]}
        self.check(MIN_SEEN)

    def check(self, min_seen: int = 0) -> None:
        """Does nothing while the dropped share, of at least `min_seen` samples, is allowed.

        Raises:
            DataError: it is not.
        """
        dropped = self.by_reason.total()
        if dropped > self._max_share * max(self.seen, min_seen):
            reasons = describe_broken(self.by_reason, self.first)
            raise DataError(
                f"{dropped} of {self.seen} samples are broken: {reasons}; "
                f"at most data.max_dropped_share={self._max_share:g} may be; mend the shards, or raise that share"
            )


class _Ready(NamedTuple):
    sample: RawSample
    image: EncodedImage
    crop: Crop
    caption: str | None
    rng: np.random.Generator


class Spec(NamedTuple):
    """What a builder needs to know; picklable."""

    cfg: Config
    shards: tuple[Path, ...]
    data_rank: int
    data_size: int
    num_patches: int
    num_workers: int  # streams of this data rank

    @property
    def batch_size(self) -> int:
        """Samples of this data rank in a step."""
        return self.cfg.train.global_batch_size // self.data_size


class BatchBuilder:
    """Batches of one stream: worker `worker` of data rank `spec.data_rank`."""

    def __init__(self, spec: Spec, worker: int, decoder: Decoder, state: dict[str, Any] | None = None) -> None:
        cfg = spec.cfg
        self._spec, self._decoder = spec, decoder
        self._stream = SampleStream(
            spec.shards,
            seed=cfg.seed,
            worker=spec.data_rank * spec.num_workers + worker,
            num_workers=spec.data_size * spec.num_workers,
            shuffle_buffer=cfg.data.shuffle_buffer,
            cursor=Cursor(**state["cursor"]) if state else Cursor(),
            max_cached_bytes=MAX_CACHED_BYTES // spec.num_workers,
        )
        self.drops = DropCount(cfg.data.max_dropped_share, state)
        self._epoch: int = state["epoch"] if state else 0
        self._grid = round(spec.num_patches**0.5)
        self._tokens: CaptionTokens | None = None
        if cfg.task == "contrastive":
            subset = cfg.data.tokenizer_subset
            self._tokens = CaptionTokens(
                Tokenizer(cfg.model.text.context_length, None if subset is None else Path(subset))
            )

    def state(self) -> dict[str, Any]:
        """The position after the last batch, JSON-able; give it to a new builder."""
        return {"cursor": self._stream.cursor.as_dict(), "epoch": self._epoch, **self.drops.as_dict()}

    def build(self) -> Batch:
        """The next batch; a broken sample is replaced by the next one of the stream.

        Raises:
            DataError: too many are broken, or a shard cannot be read.
        """
        good: list[_Ready] = []
        images: list[Tensor] = []
        while len(good) < self._spec.batch_size:
            waiting = [self._next_ready() for _ in range(self._spec.batch_size - len(good))]
            decoded = self._decoder.decode([r.image for r in waiting], [r.crop for r in waiting])
            images.append(decoded.image_BCHW)
            for place, ready in enumerate(waiting):
                if place in decoded.broken:
                    self.drops.drop(ready.sample.name, decoded.broken[place])
                else:
                    good.append(ready)
        return self._collate(images[0] if len(images) == 1 else torch.cat(images), good)

    def _next_ready(self) -> _Ready:
        cfg = self._spec.cfg
        while True:
            epoch, sample = next(self._stream)
            if epoch != self._epoch:
                self.drops.check()
                self._epoch = epoch
            self.drops.seen += 1
            try:
                if sample.problem is not None:
                    raise BrokenImage(sample.problem)
                if sample.image is None:
                    raise BrokenImage("missing_image")
                caption = read_caption(sample) if self._tokens is not None else None
                image = open_image(sample.image, cfg.data.max_image_pixels)
            except BrokenImage as error:
                self.drops.drop(sample.name, str(error))
                continue
            rng = sample_rng(cfg.seed, epoch, sample.shard, sample.index)
            width, height = image.header.size
            crop = train_crop(rng, width, height, cfg.data.augment, cfg.model.vision.image_size)
            return _Ready(sample, image, crop, caption, rng)

    def _collate(self, image_BCHW: Tensor, samples: Sequence[_Ready]) -> Batch:
        cfg, num_patches = self._spec.cfg, self._spec.num_patches
        token_BL = mask_BN = keep_BK = None
        if self._tokens is not None:
            token_BL = self._tokens([s.caption for s in samples if s.caption is not None])
        if cfg.task == "mim":
            assert cfg.mim is not None  # checked with the recipe
            masks = [block_mask(s.rng, self._grid, cfg.mim.mask).reshape(-1) for s in samples]
            mask_BN = torch.from_numpy(np.stack(masks))
        elif cfg.model.vision.patch_dropout > 0:
            keeps = [keep_indices(s.rng, num_patches, cfg.model.vision.patch_dropout) for s in samples]
            keep_BK = torch.from_numpy(np.stack(keeps))
        return Batch(image_BCHW, tuple(s.sample.name for s in samples), token_BL, mask_BN, keep_BK)


def check_enough_shards(cfg: Config, num_shards: int, data_size: int) -> None:
    """Nothing, when every worker of every data rank can have a shard of its own.

    Raises:
        DataError: there are fewer shards.
    """
    needed = data_size * max(1, cfg.data.num_workers)
    if num_shards < needed:
        raise DataError(
            f"data.train names {num_shards} shards; {data_size} data ranks x {max(1, cfg.data.num_workers)} workers "
            f"(data.num_workers={cfg.data.num_workers}) must have one each, {needed} in all; "
            "write more, smaller shards, or lower data.num_workers"
        )
