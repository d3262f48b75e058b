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

from megaeva.config.schema import Config, DataSection
from megaeva.data.batch import Batch
from megaeva.data.decode import Decoder, EncodedImage
from megaeva.data.decode_pillow import BrokenImage, open_image
from megaeva.data.masking import block_mask, keep_indices
from megaeva.data.shards import Cursor, RawSample, SampleStream, ShardReader, sample_rng
from megaeva.data.tokenizer import Tokenizer, recipe_tokenizer
from megaeva.data.transforms import Crop, train_crop
from megaeva.data.video import MAX_VIDEO_FRAMES, EncodedVideo, VideoDecoder, open_video
from megaeva.errors import DataError

logger = logging.getLogger(__name__)

MAX_CACHED_BYTES = 256 * 2**20  # undecoded shards kept in memory by one data rank, if all of them fit
MIN_SEEN = 1000  # samples; before that many, a dropped share is too rough to stop a run in the middle of an epoch
_CACHED_CAPTIONS = 1 << 16

# What the short names that broken samples are counted by do not say themselves.
_MEANINGS = {
    "bad_caption": "not UTF-8",
    "changing_size": "the frames of a video differ in size",
    "damaged_shard": "the tar ends early",
    "decompression_bomb": "more pixels than data.max_image_pixels",
    "long_video": f"more than {MAX_VIDEO_FRAMES} frames; cut it into clips",
    "truncated_video": "frames that its index names are missing",
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


def open_sample(sample: RawSample, data: DataSection) -> EncodedImage | EncodedVideo:
    """The image or, with `data.frames` above 1, the video of `sample`, its header read.

    Raises:
        BrokenImage: the sample's own problem, "missing_image", "missing_video", or as of `open_image` or `open_video`.
        UserError: a package that videos need is missing.
    """
    if sample.problem is not None:
        raise BrokenImage(sample.problem)
    if data.frames > 1:
        if sample.video is None:
            raise BrokenImage("missing_video")
        return open_video(sample.video, data.max_image_pixels)
    if sample.image is None:
        raise BrokenImage("missing_image")
    return open_image(sample.image, data.max_image_pixels)


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
    """What was seen and dropped of one stream, and the rule that stops a run with too many broken samples."""

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
    image: EncodedImage | EncodedVideo
    crop: Crop
    caption: str | None
    rng: np.random.Generator


class Spec(NamedTuple):
    """Which samples a data block gets; picklable.

    The streams belong to the run, whatever the number of blocks that read them: `rows` x `turns` of them, fixed when it
    starts. Step k takes the samples of turn k % turns, as many of each row; in the order of the rows they are the
    global batch, of which block b of N takes the b-th of N equal parts.
    """

    cfg: Config
    shards: tuple[Path, ...]
    data_rank: int
    data_size: int
    num_patches: int
    rows: int  # data blocks at the start of the run
    turns: int  # max(1, data.num_workers) then

    @property
    def row_size(self) -> int:
        """Samples of a row in a step."""
        return self.cfg.train.global_batch_size // self.rows

    @property
    def own(self) -> range:
        """Places in the global batch that this block gets."""
        size = self.cfg.train.global_batch_size // self.data_size
        return range(self.data_rank * size, (self.data_rank + 1) * size)

    @property
    def own_rows(self) -> range:
        """Rows that they are in; the first and the last may be shared with other blocks."""
        return range(self.own.start // self.row_size, -(-self.own.stop // self.row_size))

    @property
    def num_decoded(self) -> int:
        """Images that this block decodes in a step."""
        return len(self.own_rows) * self.row_size

    @property
    def kept(self) -> slice:
        """Of the samples of `own_rows` in a step, those of this block."""
        before = self.own_rows.start * self.row_size
        return slice(self.own.start - before, self.own.stop - before)

    @property
    def counted_rows(self) -> range:
        """Rows whose streams this block answers for: of the blocks that share a row, the first does."""
        return range(-(-self.own.start // self.row_size), self.own_rows.stop)


class Tools(NamedTuple):
    """What the streams of one process share."""

    decoder: Decoder | VideoDecoder
    reader: ShardReader
    tokens: CaptionTokens | None


def make_tools(spec: Spec, decoder: Decoder | VideoDecoder, num_processes: int) -> Tools:
    """`num_processes`: of this data block; they share MAX_CACHED_BYTES."""
    cfg = spec.cfg
    tokens = None
    if cfg.task == "contrastive":
        tokens = CaptionTokens(recipe_tokenizer(cfg))
    return Tools(decoder, ShardReader(spec.shards, MAX_CACHED_BYTES // num_processes), tokens)


class _Stream:
    """The usable samples of one stream, and the count of the others."""

    def __init__(self, spec: Spec, tools: Tools, row: int, turn: int, state: dict[str, Any] | None) -> None:
        self._cfg, self._needs_caption = spec.cfg, tools.tokens is not None
        self._samples = SampleStream(
            spec.shards,
            seed=spec.cfg.seed,
            worker=row * spec.turns + turn,
            num_workers=spec.rows * spec.turns,
            shuffle_buffer=spec.cfg.data.shuffle_buffer,
            cursor=Cursor(**state["cursor"]) if state else Cursor(),
            reader=tools.reader,
        )
        self.drops = DropCount(spec.cfg.data.max_dropped_share, state)
        self._epoch: int = state["epoch"] if state else 0

    def state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {"cursor": self._samples.cursor.as_dict(), "epoch": self._epoch, **self.drops.as_dict()}

    def next_ready(self) -> _Ready:
        """The next sample whose caption and header are good.

        Raises:
            DataError: too many are broken, or a shard cannot be read.
        """
        cfg = self._cfg
        while True:
            epoch, sample = next(self._samples)
            if epoch != self._epoch:
                self.drops.check()
                self._epoch = epoch
            self.drops.seen += 1
            try:
                image = open_sample(sample, cfg.data)
                caption = read_caption(sample) if self._needs_caption else None
            except BrokenImage as error:
                self.drops.drop(sample.name, str(error))
                continue
            rng = sample_rng(cfg.seed, epoch, sample.shard, sample.index)
            crop = train_crop(rng, *image.size, cfg.data.augment, cfg.model.vision.image_size)
            return _Ready(sample, image, crop, caption, rng)


class BatchBuilder:
    """The batches of one turn of a data block."""

    def __init__(self, spec: Spec, tools: Tools, turn: int, states: Mapping[str, dict[str, Any]]) -> None:
        """`states`: from `state`, of all streams that have given a sample."""
        self._spec, self._tools = spec, tools
        self._grid = round(spec.num_patches**0.5)
        self._streams = {
            stream_name(row, turn): _Stream(spec, tools, row, turn, states.get(stream_name(row, turn)))
            for row in spec.own_rows
        }

    def state(self) -> dict[str, dict[str, Any]]:
        """The positions of its streams after the last batch, JSON-able."""
        return {name: stream.state() for name, stream in self._streams.items()}

    def build(self) -> Batch:
        """The next batch; a broken sample is replaced by the next one of its stream.

        Raises:
            DataError: too many are broken, or a shard cannot be read.
        """
        streams, size = list(self._streams.values()), self._spec.row_size
        good: list[list[tuple[int, _Ready]]] = [[] for _ in streams]  # of each row, with the place in `images`
        images: list[Tensor] = []
        num_images = 0
        while missing := [row for row in range(len(streams)) for _ in range(size - len(good[row]))]:
            waiting = [streams[row].next_ready() for row in missing]
            encoded: list[Any] = [ready.image for ready in waiting]  # of the kind that the decoder is for
            decoded = self._tools.decoder.decode(encoded, [ready.crop for ready in waiting])
            images.append(decoded.image_BCHW)
            for place, (row, ready) in enumerate(zip(missing, waiting)):
                if place in decoded.broken:
                    streams[row].drops.drop(ready.sample.name, decoded.broken[place])
                else:
                    good[row].append((num_images, ready))
                    num_images += 1
        # Of a shared row too every sample was decoded: only so is it known which were broken, and what replaced them.
        kept = [entry for row in good for entry in row][self._spec.kept]
        places = [place for place, _ in kept]
        image_BCHW = images[0] if len(images) == 1 else torch.cat(images)
        if places != list(range(num_images)):
            of_sample = image_BCHW.unflatten(0, (num_images, self._spec.cfg.data.frames))
            image_BCHW = of_sample[torch.tensor(places, device=image_BCHW.device)].flatten(0, 1)
        return self._collate(image_BCHW, [ready for _, ready in kept])

    def _collate(self, image_BCHW: Tensor, samples: Sequence[_Ready]) -> Batch:
        cfg, num_patches = self._spec.cfg, self._spec.num_patches
        token_BL = mask_BN = keep_BK = None
        if self._tools.tokens is not None:
            token_BL = self._tools.tokens([s.caption for s in samples if s.caption is not None])
        if cfg.task == "mim":
            assert cfg.mim is not None  # checked with the recipe
            masks = [block_mask(s.rng, self._grid, cfg.mim.mask).reshape(-1) for s in samples]
            mask_BN = torch.from_numpy(np.stack(masks))
        elif cfg.model.vision.patch_dropout > 0:
            # Each frame of a video keeps patches of its own, as open_clip draws them for each row of a batch of images.
            rngs = (s.rng for s in samples for _ in range(cfg.data.frames))
            keeps = [keep_indices(rng, num_patches, cfg.model.vision.patch_dropout) for rng in rngs]
            keep_BK = torch.from_numpy(np.stack(keeps))
        return Batch(image_BCHW, tuple(s.sample.name for s in samples), token_BL, mask_BN, keep_BK)


def stream_name(row: int, turn: int) -> str:
    """The key of a stream's state."""
    return f"{row}.{turn}"


def check_enough_shards(num_shards: int, rows: int, turns: int) -> None:
    """Nothing, when every stream of a run can have a shard of its own.

    Args:
        rows: data blocks at the start of the run.
        turns: max(1, data.num_workers) then.

    Raises:
        DataError: there are fewer shards.
    """
    if num_shards < rows * turns:
        raise DataError(
            f"the training data names {num_shards} shards; {rows} data ranks x {turns} workers (data.num_workers) "
            f"must have one each, {rows * turns} in all; write more, smaller shards, or lower data.num_workers"
        )
