"""The status line of a run: one live line on a terminal, one plain line for each log on a pipe."""

import sys
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

_MARK = "· step "


class StatusLine:
    """Shows where a run stands.

    On a terminal the line is redrawn in place and stays after `close`. On a pipe or a file each `update` prints one
    plain line without escape codes.

    Args:
        stream: where to print; stdout by default.
        enabled: True on the main rank; elsewhere nothing is shown.
    """

    def __init__(self, stream: TextIO | None = None, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stdout
        self._live: Live | None = None

    def update(
        self,
        stage: str,
        step: int,
        total_steps: int,
        loss: float,
        lr: float,
        logit_scale: float | None = None,
        samples_per_second: float | None = None,
        data_wait_share: float | None = None,
        memory_gib: float | None = None,
        eta_seconds: float | None = None,
    ) -> None:
        """Shows the newest figures; what is None is left out.

        Args:
            stage: what runs, e.g. the task or the loop's stage.
            step: optimizer steps done, of `total_steps`.
            loss: of the last logged step.
            lr: learning rate of the vision tower.
            logit_scale: the scale itself, exp of the parameter; None in MIM.
            samples_per_second: of the whole job.
            data_wait_share: share of the time, 0 to 1, that the trainer waited for data.
            memory_gib: peak memory of this rank's device (host memory on a CPU).
            eta_seconds: time left.
        """
        if not self._enabled:
            return
        parts = [
            f"{stage} {_MARK}{step:,}/{total_steps:,} ({100 * step / max(1, total_steps):.0f} %)",
            f"ETA {format_duration(eta_seconds)}" if eta_seconds is not None else "",
            f"loss {loss:.4f}",
            f"lr {lr:.2e}",
            f"scale {logit_scale:.1f}" if logit_scale is not None else "",
            f"{samples_per_second:,.0f} samples/s" if samples_per_second is not None else "",
            f"data wait {100 * data_wait_share:.0f} %" if data_wait_share is not None else "",
            f"{memory_gib:.1f} GiB" if memory_gib is not None else "",
        ]
        text = " · ".join(part for part in parts if part)
        if not self._stream.isatty():
            print(text, file=self._stream, flush=True)
            return
        if self._live is None:
            console = Console(file=self._stream, highlight=False)
            self._live = Live(Text(""), console=console, auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def say(self, text: str) -> None:
        """Prints a line above the live one."""
        if not self._enabled:
            return
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last line standing and gives the cursor back; a second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "StatusLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_status_line(text: str) -> bool:
    """True for a plain line of `StatusLine.update`: whoever relays a child's output may redraw it in place."""
    return _MARK in text


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 07 s`, `5 h 12 min` or `3 d 04 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
