"""Errors a user can cause, and how a process of a job ends with them: their text without a traceback, exit code 2.

Every message has three parts: what is (path = value, file:line), what must be, what to do.
"""

import errno
import os
import re
import sys
import time
from collections.abc import Callable, Sequence

EXPLAINED = 2  # exit code of a process that told its user what to mend
LOST_PEER = 3  # exit code of a rank that stopped because another one is gone
INTERRUPTED = 130

LOST_CONTACT = "lost contact: "  # how the message of a LostRankError begins; the launcher looks for it

_LOST_PEER = re.compile(
    r"onnection (closed|reset|refused).*peer|roken pipe|remote process exited|connectFullMesh failed|gloo/transport/",
    re.DOTALL,
)
_TIMED_OUT = re.compile(
    r"Timed out waiting \d+ms for \w+ operation|wait timeout after \d+ms|Application timeout caused pair closure|"
    r"collective operation timeout"
)
_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG))
_OTHER_KIND = frozenset((errno.EISDIR, errno.ENOTDIR, errno.EEXIST))
_PATIENCE_SECONDS = 10.0


class UserError(Exception):
    """A mistake in a recipe, a file, the data or the installation, explained to its author.

    Attributes:
        status: exit code of a command that ends with it.
        is_told: whether the mistake is on the terminal already, as an `error:` line that needs no second one.
    """

    status: int = EXPLAINED
    is_told: bool = False


class ConfigError(UserError):
    """A recipe that cannot be run; carries every problem found, one per line."""


class DataError(UserError):
    """Shards, captions or images that cannot be trained on."""


class FeatureError(UserError, ValueError):
    """Features that no contrastive loss can be computed from; raised with the same text on every rank."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class ParameterRuleError(UserError, LookupError):
    """A parameter that no rule, or more than one, of megaeva/optim/param_groups.py covers."""


class LostRankError(UserError):
    """Another rank hangs or is gone, so this one stops.

    Attributes:
        speaks: whether this rank's process is the one that tells it.
    """

    status = LOST_PEER

    def __init__(self, text: str, *, speaks: bool) -> None:
        self.speaks = speaks
        super().__init__(LOST_CONTACT + text)

    def tell(self) -> None:
        """Print it, on the one rank that speaks."""
        if self.speaks:
            _print_last(f"error: {self}")


def listed(lines: Sequence[str], most: int = 20) -> str:
    """The first lines of a message's list, each on one of its own, and how many more there are."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join(f"  {line}" for line in [*lines[:most], *more])


def is_timeout(text: str) -> bool:
    """Whether a collective's error says that it waited too long; the words are gloo's, the store's and NCCL's."""
    return _TIMED_OUT.search(text) is not None


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank hangs or is gone; the words are gloo's and NCCL's."""
    return isinstance(error, RuntimeError) and (_LOST_PEER.search(str(error)) is not None or is_timeout(str(error)))


def explain_disk_error(error: OSError) -> str | None:
    """The message of a disk that refuses a file (full, read-only, forbidden, a folder of its name); None for any other
    error."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in _OTHER_KIND:
        return (
            f"{where}{error.strerror}; files and folders of a run must be able to take their names; move away what has "
            "this one, or write elsewhere (run_dir=...)"
        )
    if error.errno not in _DISK_ERRORS:
        return None
    return (
        f"{where}{error.strerror}; the folder of a run must be writable and its disk must have space left; "
        "free some, or write elsewhere (run_dir=...)"
    )


def explain(error: BaseException) -> tuple[str, int] | None:
    """The text and exit code that a process ends with; None for an error that only its traceback explains."""
    if isinstance(error, UserError):
        return f"error: {error}", error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, OSError) and (explained := explain_disk_error(error)) is not None:
        return f"error: {explained}", EXPLAINED
    if is_lost_peer(error):
        return "stopped: another rank hangs or is gone; what follows, or its own output, says which and why", LOST_PEER
    return None


def explain_end(run: Callable[[], int]) -> int:
    """The exit code of `run`, or of the mistake it ended with, which is told once over all ranks of a torchrun job.

    Rank 0 speaks. The others wait for torchrun to stop them, which it does when rank 0 has exited, and speak only when
    it does not: then the mistake was theirs alone (a file missing on one node). A lost rank is told by the rank that
    the ranks agreed on. Any other exception is passed on.
    """
    rank = os.environ.get("RANK", "0")
    try:
        return run()
    except LostRankError as error:
        error.tell()
        return error.status
    except BaseException as error:
        explanation = explain(error)
        if explanation is None:
            raise
    text, status = explanation
    if rank != "0":
        time.sleep(_PATIENCE_SECONDS)
        text = f"rank {rank}: {text}"
    _print_last(text)
    return status


def _print_last(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")  # in one piece, as ranks share a pipe
    sys.stderr.flush()
