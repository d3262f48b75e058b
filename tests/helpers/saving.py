"""A checkpoint in one call, as the trainer saves it without `save.asynchronous`."""

from pathlib import Path
from typing import Any

from megaeva.checkpoint.background import Saves
from megaeva.checkpoint.layout import step_name
from megaeva.checkpoint.store import CheckpointStore


def save_now(store: CheckpointStore, step: int, *args: Any, **kwargs: Any) -> Path:
    """Returns the folder of the finished checkpoint; arguments and errors are `CheckpointStore.begin`'s and `Saves`'s.

    All ranks call it.
    """
    saves = Saves(store, step=0, asynchronous=False)
    try:
        saves.start(store.begin(step, *args, **kwargs))
    finally:
        saves.close()
    return store.folder / step_name(step)
