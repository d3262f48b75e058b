"""Saves that are written while training goes on: what they hold, what waits for them, how they fail and end."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.checkpoint import background
from megaeva.checkpoint.background import Saves
from megaeva.checkpoint.store import CheckpointStore, Save
from megaeva.checkpoint.torch_dist import FileWriter
from megaeva.errors import CheckpointError
from megaeva.optim.build import build_optimizer
from megaeva.parallel.runtime import Runtime
from tests.helpers.toy_towers import build_towers, compute_gradients, make_config


class Run:
    """Toy towers in training, and their saves."""

    def __init__(self, runtime: Runtime, folder: Path, *, asynchronous: bool = True) -> None:
        self.cfg = make_config(str(folder))
        self.towers = build_towers(runtime, self.cfg, seed=0)
        self.optimizer, self.rate = build_optimizer(self.towers, self.cfg)
        self.store = CheckpointStore(folder, keep=2)
        self.saves = Saves(self.store, step=0, asynchronous=asynchronous)
        self.folder = self.store.folder

    def step(self, number: int) -> None:
        self.rate.set(number)
        compute_gradients(self.towers, number)
        self.saves.gate()
        assert self.optimizer.step()[0]

    def begin(self, step: int) -> Save:
        return self.store.begin(
            step,
            self.towers,
            self.optimizer,
            config=self.cfg,
            loader_state={"at": step},
            extra={},
            data_grid=self.towers[2].grid,
        )

    def save(self, step: int) -> None:
        self.saves.finish()
        self.saves.start(self.begin(step))

    def tensors(self) -> list[Tensor]:
        return [t.detach().clone() for tower in self.towers for t in tower.module.parameters()]

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def run(runtime: Runtime, tmp_path: Path) -> Iterator[Run]:
    made = Run(runtime, tmp_path)
    yield made
    made.saves.close()


class Held:
    """A method that waits, in whichever thread calls it, until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self.released = threading.Event(), threading.Event()
        original = getattr(owner, name)

        def held(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.released.wait(20)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, held)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_is_saved_is_what_was_there_at_the_start(
    run: Run, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(3):  # the second uses the first one's memory
        run.step(step)
        run.save(step + 1)
        run.saves.finish()
    run.step(3)
    at_save = run.tensors()
    writing = Held(monkeypatch, FileWriter, "write")
    run.save(4)
    run.step(4)
    run.step(5)
    assert not equal(run.tensors(), at_save)
    assert run.saves.in_flight
    assert not run.saves.is_over
    assert (run.saves.begun, run.saves.finished) == (4, 3)
    writing.released.set()
    run.saves.finish()
    assert (run.saves.begun, run.saves.finished) == (4, 4)
    assert run.names() == ["step_00000003", "step_00000004"]

    other = Run(runtime, tmp_path)
    newest = other.store.newest()
    assert newest is not None
    state = other.store.load(newest, other.towers, other.optimizer, config=other.cfg)
    assert (state.step, state.loader_states) == (4, [{"at": 4}])
    assert equal(other.tensors(), at_save)
    other.step(4)
    other.step(5)
    assert equal(other.tensors(), run.tensors()), "the optimizer's state is that of the start, too"


def test_the_gate_waits_for_the_copy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.step(0)
    copying = Held(monkeypatch, background, "host_memory")
    run.save(1)
    assert copying.reached.wait(20)
    passed = threading.Event()
    thread = threading.Thread(target=lambda: (run.saves.gate(), passed.set()))
    thread.start()
    assert not passed.wait(0.2)
    copying.released.set()
    assert passed.wait(20)
    thread.join()
    run.saves.finish()


def test_parts_follow_when_they_are_over(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    completing = Held(monkeypatch, CheckpointStore, "complete")
    run.save(1)
    while not run.saves.is_over:
        pass
    assert run.names() == [".writing_step_00000001"], "no name before every rank's file is whole"
    run.saves.advance()
    assert completing.reached.wait(20)
    assert run.saves.in_flight
    assert not run.saves.is_over
    completing.released.set()
    while not run.saves.is_over:
        pass
    run.saves.advance()
    assert not run.saves.in_flight
    assert run.names() == ["step_00000001"]


def test_a_synchronous_save_has_its_name_at_once_and_copies_nothing(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "host_memory", None)
    run = Run(runtime, tmp_path, asynchronous=False)
    run.save(1)
    assert run.saves.finished == 1
    assert not run.saves.in_flight
    assert run.names() == ["step_00000001"]
    run.saves.close()


def save_and_finish(run: Run, step: int) -> None:
    run.save(step)
    run.saves.gate()
    run.saves.finish()


FAILURES: dict[str, tuple[str, Exception, str]] = {
    "disk": ("torch_dist.FileWriter.write", OSError(28, os.strerror(28)), "No space left on device"),
    "memory": ("background.host_memory", RuntimeError("can't allocate"), r"no host memory .*save.asynchronous=false"),
    "index": ("store.write_index", OSError(28, os.strerror(28)), "No space left on device"),
}


@pytest.mark.parametrize(
    ("failure", "asynchronous"),
    [("disk", True), ("memory", True), ("index", True), ("disk", False), ("index", False)],
)
def test_a_failure_is_told_when_ranks_meet_and_leaves_nothing(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, asynchronous: bool
) -> None:
    run = Run(runtime, tmp_path, asynchronous=asynchronous)
    run.save(1)
    run.saves.finish()
    run.saves._copies = []  # as if it were the first
    place, error, words = FAILURES[failure]

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"megaeva.checkpoint.{place}", fail)
    with pytest.raises(CheckpointError, match=rf"cannot write checkpoint .*step_00000002: {words}.*step_00000001$"):
        save_and_finish(run, 2)
    assert run.names() == ["step_00000001"]
    assert (run.saves.begun, run.saves.finished) == (2, 1)
    assert not run.saves.in_flight
    monkeypatch.undo()
    run.save(3)
    run.saves.finish()
    assert run.names() == ["step_00000001", "step_00000003"]
    run.saves.close()


def test_a_run_that_ends_leaves_no_half_save_and_no_thread(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writing = Held(monkeypatch, FileWriter, "write")
    run.save(1)
    assert writing.reached.wait(20)
    closing = threading.Thread(target=run.saves.close)
    closing.start()
    writing.released.set()
    closing.join(20)
    assert not closing.is_alive()
    assert run.names() == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save")]
