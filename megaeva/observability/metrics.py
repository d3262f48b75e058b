"""The record of a run: metrics.jsonl is the truth, TensorBoard a view of it."""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from megaeva.errors import DataError

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"


class MetricLog:
    """Appends one JSON object a line to `<run_dir>/metrics.jsonl` and the same scalars to `<run_dir>/tensorboard/`.

    A line is `{"step": int, "wall_time": unix seconds, "<name>": float, ...}`. A value that is not finite is written as
    the string "nan", "inf" or "-inf", because JSON has no such numbers. Each line is flushed as it is written, so a
    killed process loses none that it logged.

    Of a training run, every `train.log_every_steps` steps, of that step:

    - `loss`; `lr/<tower>`, before layer decay; `grad_norm` over all towers and `grad_norm/<tower>`, before clipping and
      without the loss scale; `logit_scale`, after the step.
    - `update_rms/<tower>`: the root of the mean square, over all parameters of the tower, of what the step changed them
      by: in their fp32 main copies, learning rate and weight decay included.
    - `skipped_steps`: of the whole run so far, with fp16 or a spike guard; such a step has no figures by tower.
      `loss_scale`: by which it was computed. `fp8_amax/<tower>/<role>` and `fp8_filled`: see `model.fp8.fp8_figures`.

    There is no collective inside: any rank may construct it, one rank writes.

    Args:
        run_dir: the run's folder; made when missing.
        first_step: optimizer steps the run has already done, 0 for a fresh one. Lines of later steps, written by a
            process that died after its last checkpoint, are removed, and so is a line cut off half way: the file of a
            resumed run lists the same steps and values as that of an uninterrupted one.
        enabled: True on the main rank; elsewhere nothing is opened or written.
        tensorboard: False leaves TensorBoard out.
    """

    def __init__(
        self, run_dir: Path | str, *, first_step: int = 0, enabled: bool = True, tensorboard: bool = True
    ) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self._file: TextIO | None = None
        self._writer: Any = None
        if not enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_up_to(first_step)
        self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            self._writer = self._open_tensorboard(first_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line. `values`: plain floats (call `.item()` first); names with a `/` group in TensorBoard."""
        if self._file is None:
            return
        line: dict[str, Any] = {"step": step, "wall_time": round(time.time(), 3)}
        line |= {name: _jsonable(float(value)) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, float(value), step)

    def flush(self) -> None:
        """Brings both files to the disk, past the system's cache; for the moment before a checkpoint is written."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes both files; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep_up_to(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [json.dumps(line) + "\n" for line in _parse(self.path) if line["step"] <= step]
        # Rename over the old file, so that a kill during the rewrite leaves one of the two whole.
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _open_tensorboard(self, first_step: int) -> Any:
        try:
            # Imported here: it takes a second or two, which readers of the JSON lines need not spend.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("no TensorBoard files: `pip install tensorboard` to have them; %s is complete", self.path)
            return None
        # purge_step hides the events that a dead process wrote after its last checkpoint.
        return SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=first_step + 1)  # type: ignore[no-untyped-call]


def read_metrics(run_dir: Path | str) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl in file order, non-finite values as floats; empty when there is no file."""
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        return []
    return [{name: float(value) for name, value in line.items()} for line in _parse(path)]


def _parse(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a last line that a kill cut short is left out. DataError: any other line is broken."""
    lines = path.read_bytes().split(b"\n")
    parsed = []
    for number, text in enumerate(lines, 1):
        if not text:
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not line.keys() >= {"step", "wall_time"}:
                raise ValueError("it has no step and wall_time")
            parsed.append(line)
        except ValueError as error:
            if number == len(lines):  # the writer ends each line with a newline: only an unfinished one has none
                continue
            raise DataError(
                f"{path}:{number} is no line of figures ({error}); each must be a JSON object as a run writes it; "
                "delete that line, or move the file away (the run goes on and begins another)."
            ) from error
    return parsed


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
