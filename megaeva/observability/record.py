"""The record of one training run: figures with their rates, messages, JSON files, and what the run was made with."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megaeva.observability.metrics import MetricLog
from megaeva.observability.progress import StatusLine

_PACKAGES = ("megaeva", "torch", "megatron-core", "transformer-engine", "webdataset", "numpy", "pillow")
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


class RunRecord:
    """Writes a run's files and shows its status; on ranks other than the first, every call does nothing.

    Args:
        run_dir: the run's folder.
        enabled: True on rank 0.
        stage: shown on the status line.
        total_steps: length of the run.
        global_batch_size: samples of one step.
        first_step: the step the run continues from.
    """

    def __init__(
        self, run_dir: Path, *, enabled: bool, stage: str, total_steps: int, global_batch_size: int, first_step: int
    ) -> None:
        self.run_dir, self.enabled, self.stage = run_dir, enabled, stage
        self.total_steps, self.global_batch_size = total_steps, global_batch_size
        self._started_at = self._logged_at = time.monotonic()
        self._first_step = self._logged_step = first_step
        self._waited_seconds = 0.0
        if enabled:
            self._metrics = MetricLog(run_dir, first_step=first_step)
            self._status = StatusLine()

    def say(self, text: str) -> None:
        """Print a message for the reader of the terminal."""
        if self.enabled and text:
            print(text, flush=True)

    def step(self, step: int, figures: dict[str, float], *, waited_seconds: float, memory_gib: float) -> None:
        """Log the figures of `step` with rates since the last log; `waited_seconds` counts from the run's start."""
        if not self.enabled:
            return
        now = time.monotonic()
        seconds, steps = max(now - self._logged_at, 1e-9), step - self._logged_step
        wait_share = min(1.0, (waited_seconds - self._waited_seconds) / seconds)
        self._logged_at, self._logged_step, self._waited_seconds = now, step, waited_seconds
        rate = steps * self.global_batch_size / seconds
        self._metrics.write(
            step, figures | {"samples_per_second": rate, "data_wait_share": wait_share, "memory_gib": memory_gib}
        )
        mean_step_seconds = (now - self._started_at) / max(1, step - self._first_step)
        self._status.update(
            self.stage,
            step,
            self.total_steps,
            figures["loss"],
            next(value for name, value in figures.items() if name.startswith("lr/")),
            figures.get("logit_scale"),
            rate,
            wait_share,
            memory_gib,
            mean_step_seconds * (self.total_steps - step),
        )
        if wait_share > 0.5 and steps > 1:
            self.say(
                f"input-bound: {100 * wait_share:.0f} % of the time went into waiting; try data.num_workers=2 or more"
            )

    def results(self, step: int, results: dict[str, dict[str, float]]) -> None:
        """Write evaluation results to eval.json and to the metrics of `step`."""
        if self.enabled:
            self.write_json("eval.json", results)
            flat = {f"{name}/{key}": value for name, values in results.items() for key, value in values.items()}
            self._metrics.write(step, flat)

    def write_json(self, name: str, value: Any) -> None:
        """Write `<run_dir>/<name>` atomically."""
        if self.enabled:
            temporary = self.run_dir / f".{name}.tmp"
            temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.run_dir / name)

    def add_json(self, name: str, entry: Any) -> None:
        """Add `entry` to the list in `<run_dir>/<name>`, unless it has it from before the run was cut off."""
        if self.enabled:
            path = self.run_dir / name
            entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            if entry not in entries:
                self.write_json(name, [*entries, entry])

    def flush(self) -> None:
        """Bring the metrics to the disk, past the system's cache: a resumed run lists all steps of its checkpoint."""
        if self.enabled:
            self._metrics.flush()

    def go_back(self, step: int) -> None:
        """Remove the figures of the steps after `step`, which are made again."""
        self._started_at = self._logged_at = time.monotonic()
        self._first_step = self._logged_step = step
        if self.enabled:
            self._metrics.close()
            self._metrics = MetricLog(self.run_dir, first_step=step)

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self.enabled:
            self._status.close()
            self._metrics.close()


def manifest(
    *,
    world_size: int,
    gpu: str | None,
    shards: Sequence[Path],
    phases: Sequence[dict[str, Any]],
    starts: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What a run was made with: versions, machine, commit, command, shards with sizes, phases, sources of weights.

    Args:
        gpu: name of this rank's; None: it computes on the CPU.
    """
    return {
        "command": sys.argv,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in (*_PACKAGES, *_DALI) if (version := _version(name))},
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(_memory_gib(), 1),
            "gpu": gpu,
        },
        "world_size": world_size,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "shards": {str(path): path.stat().st_size for path in shards},
        "phases": list(phases),
        "starts": list(starts),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def git_commit() -> str | None:
    """Of the checkout that this code is in, with "-dirty" where files of it are changed; None where it is in none."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def _memory_gib() -> float:
    return psutil.virtual_memory().total / 2**30
