"""The rows of a token embedding at CLIP's own ids, for formats whose tokenizers know all 49,408 of them."""

from torch import Tensor

from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.rules import SAME, Tensors, Transform
from megaeva.config.schema import TextSection

CLIP_VOCABULARY = 49408


def embedding_rows(what: Contents) -> Transform:
    """Returns the transform of the token embedding between our vocabulary and the whole of CLIP's.

    A tower over a part of the vocabulary (`what.clip_ids`) has row i for CLIP's id `clip_ids[i]`, and padding behind.
    Theirs has zeros where ours has nothing: tokens never seen in training. Otherwise nothing changes.
    """
    if what.clip_ids is None:
        return SAME
    ids, num_rows = list(what.clip_ids), what.model.text.vocab_size

    def to_ours(theirs: Tensor) -> Tensors:
        ours = theirs.new_zeros(num_rows, theirs.shape[1])
        ours[: len(ids)] = theirs[ids]
        return (ours,)

    def to_theirs(ours: Tensor) -> Tensors:
        theirs = ours.new_zeros(CLIP_VOCABULARY, ours.shape[1])
        theirs[ids] = ours[: len(ids)]
        return (theirs,)

    return Transform(to_ours, to_theirs)


def exported_text(what: Contents) -> TextSection:
    """Returns the text tower as the destination sees it: with all of CLIP's vocabulary in place of a part."""
    if what.clip_ids is None:
        return what.model.text
    return what.model.text.model_copy(update={"vocab_size": CLIP_VOCABULARY})


def vocabulary_notes(what: Contents) -> list[str]:
    """Returns what the report of an export says about tokens that training never saw."""
    if what.clip_ids is None:
        return []
    return [
        f"vocabulary: {len(what.clip_ids):,} of CLIP's {CLIP_VOCABULARY:,} tokens were trained; "
        "the other rows of the token embedding are zeros"
    ]
