"""What this rank is doing, so that a rank that hangs or dies can be named with its host, place and step."""

_step: int | None = None
_position: str = "starting"
_place: str = ""


def at(text: str, step: int | None = None) -> None:
    """Note what this rank begins to do; costs an assignment.

    Args:
        text: e.g. "pass (i), vision, microbatch 2 of 4".
        step: the optimizer step that this text and those after it belong to; None: the one named last.
    """
    global _step, _position
    if step is not None:
        _step = step
    _position = text


def place(text: str) -> None:
    """Note which part of the towers this rank holds, e.g. "vision tp rank 0 of 2"."""
    global _place
    _place = text
