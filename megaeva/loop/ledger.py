"""The loop's memory on disk: which stage ran from which recipe, with what result."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from megaeva.config.schema import Config
from megaeva.errors import UserError

FILE_NAME = "ledger.json"


class LedgerError(UserError):
    """The loop cannot continue from what is on disk."""


class Entry(BaseModel):
    """One stage's line in the ledger.

    Attributes:
        stage: its name, unique in the loop.
        status: "running" also covers a stage whose process died with the loop's.
        recipe_hash: SHA-256 of the resolved recipe.
        recipe: the resolved recipe itself, so that a later change can be named key by key.
        changes: what it sets on top of its base, for the report.
        run_dir: the stage's run folder.
        inputs: for each earlier stage whose weights this one starts from, when that stage finished.
        started_at, finished_at: unix seconds.
        seconds: wall time over all attempts.
        results: what its eval.json says: set name -> metric -> value.
    """

    model_config = ConfigDict(extra="forbid")

    stage: str
    status: Literal["running", "failed", "finished"]
    recipe_hash: str
    recipe: dict[str, Any]
    changes: tuple[str, ...] = ()
    run_dir: str
    inputs: dict[str, float] = {}
    started_at: float
    finished_at: float | None = None
    seconds: float = 0.0
    results: dict[str, dict[str, float]] = {}


class Ledger:
    """The entries of one loop, written whole after each change: a kill leaves the old file or the new one.

    Args:
        run_dir: the loop's folder; `ledger.json` in it is read when it exists.

    Raises:
        LedgerError: the file is damaged.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME
        self.entries: dict[str, Entry] = {}
        if self.path.exists():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self.entries = {e["stage"]: Entry.model_validate(e) for e in stored["stages"]}
            except (ValueError, KeyError, TypeError) as error:
                raise LedgerError(
                    f"{self.path} cannot be read ({error}).\n"
                    f"It must be the file this loop wrote. Restore it, or delete {run_dir} to start the loop again."
                ) from error

    def start(self, stage: str, config: Config, inputs: dict[str, float], changes: tuple[str, ...] = ()) -> None:
        """Notes that a stage begins or is taken up again."""
        known = self.entries.get(stage)
        self.entries[stage] = Entry(
            stage=stage,
            status="running",
            recipe_hash=recipe_hash(config),
            recipe=_plain(config),
            changes=changes,
            run_dir=config.run_dir,
            inputs=inputs,
            started_at=known.started_at if known else time.time(),
            seconds=known.seconds if known else 0.0,
        )
        self._write()

    def finish(self, stage: str, seconds: float, results: dict[str, dict[str, float]]) -> None:
        """Notes that a stage is done; `seconds` of this attempt."""
        entry = self.entries[stage]
        entry.status, entry.finished_at, entry.results = "finished", time.time(), results
        entry.seconds += seconds
        self._write()

    def fail(self, stage: str, seconds: float) -> None:
        """Notes that an attempt ended early; the stage can be taken up again."""
        entry = self.entries[stage]
        entry.status = "failed"
        entry.seconds += seconds
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"stages": [e.model_dump() for e in self.entries.values()]}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def recipe_hash(config: Config) -> str:
    """SHA-256 in hex of a resolved recipe, independent of the order of keys in its file."""
    return hashlib.sha256(json.dumps(_plain(config), sort_keys=True).encode()).hexdigest()


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key.path: old -> new` for each leaf that differs between two recipes, sorted; absent leaves read `(unset)`."""
    before, after = _flatten(old), _flatten(new)
    absent = "(unset)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
    ]


def _plain(config: Config) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(config.model_dump_json())
    return plain


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {
            k: v for key, sub in tree.items() for k, v in _flatten(sub, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: tree}
