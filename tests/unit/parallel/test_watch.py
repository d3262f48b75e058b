"""Whom a lost rank's peers blame, from what each rank noted and answered."""

import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from megaeva.config.schema import AxesSection
from megaeva.errors import is_lost_peer, is_timeout
from megaeva.parallel import watch
from megaeva.parallel.grid import build_grid
from megaeva.parallel.watch import Seen, judge, place_of
from tests.helpers.tiny import single_grid

TIMED_OUT = "[unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete"
CLOSED = "[pair.cc:554] Connection closed by peer [10.0.0.2]:4711"
WAITS = ("waits", "")
NOW = 1_000_000.0


def notes(rank: int, position: str = "step 17, pass (i)", ago: float = 720) -> Seen:
    return Seen(f"n{rank // 2}", 70 + rank, f"vision tp rank {rank % 2} of 2", position, NOW - ago)


SEEN = {rank: notes(rank) for rank in range(4)}


@pytest.mark.parametrize(
    ("text", "timeout"),
    [
        (TIMED_OUT, True),
        ("[unbound_buffer.cc:129] Timed out waiting 8000ms for send operation to complete", True),
        ("wait timeout after 8000ms, keys: /default_pg/0//3//cpu//0/1", True),
        (CLOSED, False),
        ("Read error [127.0.0.1]:20: Connection reset by peer", False),
        (
            "[enforce fail at gloo/gloo/transport/tcp/pair.cc:809] state_ >= CONNECTED. 1 vs 4. Pair is not connected",
            False,
        ),
        ("writev [10.0.0.2]:9: Broken pipe", False),
        ("Gloo connectFullMesh failed with [pair.cc:144] no error", False),
    ],
)
def test_words_of_a_lost_peer(text: str, timeout: bool) -> None:
    """As torch 2.14 says it with gloo."""
    assert is_lost_peer(RuntimeError(text))
    assert is_timeout(text) == timeout
    assert not is_lost_peer(ValueError(text))


def test_other_errors_are_not_a_lost_peer() -> None:
    assert not is_lost_peer(RuntimeError("DataLoader timed out after 30 seconds"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_silent_rank_after_a_timeout() -> None:
    blamed, text = judge(TIMED_OUT, SEEN, {0: WAITS, 1: WAITS, 2: WAITS}, 10, NOW)
    assert blamed == [3]
    assert text == (
        "rank 3 (host n1, pid 73, vision tp rank 1 of 2): no answer for 10 min; last seen in step 17, pass (i) "
        "(12 min ago). Ranks must answer within train.timeout_minutes=10; look at that process and host, and continue "
        "with --resume."
    )


def test_silent_rank_after_a_closed_connection_is_gone() -> None:
    blamed, text = judge(CLOSED, SEEN, {0: WAITS, 1: ("stands", "forward (x.py:1)"), 2: WAITS}, 10, NOW)
    assert blamed == [3], "a rank that computes when another dies is not to blame"
    assert "its process is gone" in text


def test_rank_that_stands_elsewhere_is_blamed_only_where_all_answer() -> None:
    stands = ("stands", "read (loader.py:88)")
    blamed, text = judge(TIMED_OUT, SEEN, {0: WAITS, 1: stands, 2: WAITS, 3: WAITS}, 0.5, NOW)
    assert blamed == [1]
    assert "no answer for 0.5 min, it stands in read (loader.py:88); last seen in" in text
    assert judge(TIMED_OUT, SEEN, {0: WAITS, 1: stands, 2: WAITS}, 0.5, NOW)[0] == [3]


@pytest.mark.parametrize("error", [TIMED_OUT, CLOSED])
def test_rank_that_left_comes_first(error: str) -> None:
    blamed, text = judge(error, SEEN, {0: WAITS, 1: ("left", "ValueError: x"), 2: WAITS}, 10, NOW)
    assert blamed == [1]
    assert "left the job: ValueError: x" in text


def test_nobody_is_blamed_where_all_wait() -> None:
    seen = SEEN | {3: notes(3, "step 17, pass (iii)")}
    blamed, text = judge(TIMED_OUT, seen, dict.fromkeys(range(4), WAITS), 10, NOW)
    assert blamed == []
    assert "rank 0, 1, 2 in step 17, pass (i); rank 3 in step 17, pass (iii)." in text


def test_a_lost_host_is_told_in_one_line() -> None:
    seen = {rank: Seen(f"n{rank // 8}", rank, "", "step 1, x", NOW) for rank in range(16)}
    blamed, text = judge(TIMED_OUT, seen, dict.fromkeys(range(8), WAITS), 10, NOW)
    assert blamed == list(range(8, 16))
    assert "rank 8 (host n1, pid 8): " in text
    assert "and rank 11, 12, 13, 14, 15 (host n1)" in text
    assert "\n" not in text


def test_notes_keep_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_step", None)
    monkeypatch.setattr(watch, "_note", ("", 0.0))
    watch.at("starting")
    assert watch._note[0] == "starting"
    watch.at("reading data", step=17)
    watch.at("pass (i)")
    assert watch._note[0] == "step 17, pass (i)"


def test_place() -> None:
    grid = single_grid()
    assert place_of("text", grid, 12) == "text"
    split = replace(grid, axes=AxesSection(tp=2, pp=2, vpp=2), tp_size=2, tp_rank=1, pp_size=2, pp_rank=1, dp_size=3)
    expected = "vision tp rank 1 of 2, pp rank 1 of 2 (layers 3-5, 9-11), data rank 0 of 3"
    assert place_of("vision", split, 12) == expected


def test_where_a_thread_stands() -> None:
    ready, go = threading.Event(), threading.Event()

    def stand() -> None:
        ready.set()
        go.wait()

    thread = threading.Thread(target=stand)
    thread.start()
    ready.wait()
    stands = watch._standing(thread.ident or 0)
    go.set()
    thread.join()
    assert stands is not None and "threading.py" in stands


def test_every_group_of_a_grid_has_the_timeout() -> None:
    """torch gives a new group half an hour, whatever the first group has."""
    from megaeva.parallel import runtime

    this = replace(runtime.start("cpu"), timeout=timedelta(seconds=77))
    groups = [g for g in vars(build_grid(AxesSection(), this).groups).values() if isinstance(g, dist.ProcessGroup)]
    assert len(groups) > 10
    assert {g._get_backend(this.device).options._timeout for g in groups} == {this.timeout}
