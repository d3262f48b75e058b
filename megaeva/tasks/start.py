"""Where a task's weights come from: opened on every rank, and held against the recipe before anything is read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megaeva.checkpoint.convert.start import Part, Weights, for_tower, open_weights
from megaeva.checkpoint.weights import agreed_path
from megaeva.config.schema import Config
from megaeva.config.validate import CLIP_VOCAB_SIZE
from megaeva.data.tokenizer import read_subset
from megaeva.errors import CheckpointError
from megaeva.parallel.collectives import together


@contextmanager
def opened_start(path: str, cfg: Config, parts: Sequence[Part]) -> Iterator[Weights]:
    """The weights at `path` as the start of these towers of the recipe. All ranks call it.

    Raises:
        CheckpointError: on every rank: they cannot be read, have no such tower, or one of another kind.
    """
    newest = agreed_path(path)
    with together("opening weights"):
        subset = cfg.data.tokenizer_subset if "text" in parts else None
        clip_ids = None if subset is None else tuple(read_subset(Path(subset)))
        weights = open_weights(newest, model=cfg.model, parts=parts, clip_ids=clip_ids)
        for part in parts:
            weights = for_tower(weights, cfg.model, part)
        if "text" in parts:
            _check_vocabulary(weights, cfg, clip_ids)
    try:
        yield weights
    finally:
        weights.close()


def opened_teacher(path: str) -> Weights:
    """The weights at `path`, which have a vision tower with its head. All ranks call it.

    Raises:
        CheckpointError: on every rank: they cannot be read, or have no head.
    """
    newest = agreed_path(path)
    with together("opening the teacher"):
        weights = open_weights(newest)
        if weights.contents.kind == "mim":
            raise CheckpointError(
                f"teacher.checkpoint={path} ({weights.form}) is a tower out of distillation, without projection head; "
                "a teacher must have one, as its projected features are the target; name a CLIP trained from it."
            )
    return weights


def _check_vocabulary(weights: Weights, cfg: Config, clip_ids: tuple[int, ...] | None) -> None:
    """Rows of a token embedding mean nothing under another numbering of tokens, of however many."""
    contents = weights.contents
    if contents.clip_ids is None and contents.model.text.vocab_size < CLIP_VOCAB_SIZE:
        return  # a run of a megaeva that did not write it down
    if contents.clip_ids != clip_ids:
        raise CheckpointError(
            f"{weights.path} has embeddings of another vocabulary than data.tokenizer_subset="
            f"{cfg.data.tokenizer_subset}; a text tower must go on with the tokens that it knows; use the vocab.json "
            "of the run that made it."
        )
