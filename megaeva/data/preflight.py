"""A look at the first shard, of each phase, before anything expensive starts."""

from collections import Counter
from itertools import islice

from megaeva.config.phases import run_phases
from megaeva.config.schema import Config
from megaeva.data.builder import check_enough_shards, describe_broken, open_sample, read_caption
from megaeva.data.decode_pillow import BrokenImage
from megaeva.data.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, RawSample, expand_shards, read_shard
from megaeva.data.tokenizer import recipe_tokenizer
from megaeva.errors import DataError

_NUM_SAMPLES = 64
_CAPTION_LENGTH = 80  # characters shown


def preflight(cfg: Config, data_size: int | None) -> str:
    """Two lines on the training data: shards and what the first one holds; one usable sample. For a run with
    `data.phases` those of each phase under a line on it.

    Opens the first shard and reads at most 64 of its samples, headers only. One rank is enough to call it.

    Args:
        data_size: data blocks of a new run; None for one that goes on with the streams it began with.

    Raises:
        DataError: a shard is missing or empty, there are fewer than workers, or none of these samples can be used for
            the task; then the counts by reason and the members found are named. Or the vocabulary is missing or not
            that of the model.
    """
    if _needs_caption(cfg):
        recipe_tokenizer(cfg)
    lines: list[str] = []
    for phase in run_phases(cfg):
        if phase.title:
            lines.append(phase.line())
        try:
            lines += _look_at_shards(phase.cfg, data_size)
        except DataError as error:
            if not phase.title:
                raise
            raise DataError(f"{phase.key}: {error}") from error
    return "\n".join(lines)


def _look_at_shards(cfg: Config, data_size: int | None) -> list[str]:
    paths = expand_shards(cfg.data.train)
    if data_size is not None:
        check_enough_shards(len(paths), data_size, max(1, cfg.data.num_workers))
    reasons: Counter[str] = Counter()
    first_bad: dict[str, list[str]] = {}
    usable: list[tuple[RawSample, int, int, str]] = []
    extensions: Counter[str] = Counter()
    for sample in islice(read_shard(paths[0]), _NUM_SAMPLES):
        extensions.update(sample.files.keys())
        try:
            usable.append(_look_at(sample, cfg))
        except BrokenImage as error:
            reasons[str(error)] += 1
            first_bad.setdefault(str(error), [sample.name])
    counts = describe_broken(reasons, first_bad)
    found = ", ".join(f"{extension} x {n}" for extension, n in extensions.most_common()) or "none that are known"
    if not usable:
        kind, known = ("a video", VIDEO_EXTENSIONS) if cfg.data.frames > 1 else ("an image", IMAGE_EXTENSIONS)
        wanted = f"{kind} ({', '.join(known)})" + (" and a txt caption" if _needs_caption(cfg) else "")
        raise DataError(
            f"shard {paths[0]}: none of its first {reasons.total()} samples can be used: {counts}; members: {found}; "
            f"each sample must have {wanted} side by side under the same key; pack them again, e.g. with "
            "`megaeva data folder IN OUT`"
        )
    sample, width, height, caption = usable[0]
    return [
        f"data: {len(paths)} shards, first {paths[0]}; members: {found}; "
        + (f"of {len(usable) + reasons.total()} samples broken: {counts}" if reasons else "no broken sample"),
        f"      {sample.name}: {width} x {height} pixels, {_shorten(caption)}",
    ]


def _needs_caption(cfg: Config) -> bool:
    return cfg.task == "contrastive"


def _look_at(sample: RawSample, cfg: Config) -> tuple[RawSample, int, int, str]:
    width, height = open_sample(sample, cfg.data).size
    if _needs_caption(cfg):
        caption = repr(read_caption(sample))
    else:
        caption = "captions are not used"
    return sample, width, height, caption


def _shorten(text: str) -> str:
    return text if len(text) <= _CAPTION_LENGTH else text[: _CAPTION_LENGTH - 1] + "…"
