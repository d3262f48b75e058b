"""The status line: complete on a pipe, redrawn on a terminal."""

import io

from megaeva.observability.progress import StatusLine, format_duration, is_status_line


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _update(line: StatusLine, step: int = 120) -> None:
    line.update(
        "contrastive", step, 1250, 1.83456, 9.8e-4,
        logit_scale=21.44, samples_per_second=1043.2, data_wait_share=0.031, memory_gib=1.24, eta_seconds=131,
    )  # fmt: skip


def test_pipe_gets_one_plain_line_with_every_figure() -> None:
    stream = io.StringIO()
    with StatusLine(stream) as line:
        _update(line)
        _update(line, 130)
    first, second = stream.getvalue().splitlines()
    for part in ("contrastive", "120/1,250", "2 min 11 s", "1.8346", "9.80e-04", "21.4", "1,043", "3 %", "1.2 GiB"):
        assert part in first
    assert "\x1b" not in first
    assert "130/1,250" in second


def test_absent_figures_are_left_out() -> None:
    stream = io.StringIO()
    StatusLine(stream).update("mim", 1, 10, -0.5, 1e-3)
    assert "scale" not in stream.getvalue()
    assert "None" not in stream.getvalue()


def test_terminal_redraws_in_place() -> None:
    stream = _Terminal()
    with StatusLine(stream) as line:
        for step in (10, 20, 30):
            _update(line, step)
    assert "\x1b[" in stream.getvalue()
    assert stream.getvalue().count("\n") <= 2  # three updates, not three lines


def test_other_ranks_show_nothing() -> None:
    stream = io.StringIO()
    line = StatusLine(stream, enabled=False)
    _update(line)
    line.say("saved")
    assert stream.getvalue() == ""


def test_relayed_lines_are_recognised() -> None:
    stream = io.StringIO()
    _update(StatusLine(stream))
    assert is_status_line(stream.getvalue())
    assert not is_status_line("saved checkpoint step_00000100")


def test_durations() -> None:
    assert [format_duration(s) for s in (0.4, 59, 187, 18_720, 273_600)] == [
        "0 s", "59 s", "3 min 07 s", "5 h 12 min", "3 d 04 h",
    ]  # fmt: skip
