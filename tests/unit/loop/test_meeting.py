"""Nodes that meet as threads of this process, over sockets of this machine."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaeva.config.schema import Config
from megaeva.errors import UserError
from megaeva.loop import meeting as meeting_module
from megaeva.loop.meeting import Host, meeting, reach
from megaeva.loop.node import Node, read_node
from tests.helpers.ports import two_free_ports
from tests.integration.test_training import write_recipe


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return Config.model_validate(yaml.safe_load(write_recipe(tmp_path, str(tmp_path / "*.tar")).read_text()))


@pytest.fixture
def place(cfg: Config) -> Callable[..., Node]:
    """A node's place in a job of two."""
    port = str(two_free_ports())

    def make(rank: int, nnodes: int = 2, **other: str) -> Node:
        environment = {
            "NNODES": str(nnodes), "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "PROCESSES": "1", "JOIN_SECONDS": "60", **other,
        }  # fmt: skip
        return read_node(cfg, environment, 0)

    return make


@contextmanager
def _nodes(*places: tuple[Node, Config]) -> Iterator[list["Future[str]"]]:
    """Each node's thread: what it is refused with, "" when it met the others and was let go at the end of the block."""
    over = threading.Event()

    def run(node: Node, cfg: Config) -> str:
        try:
            with meeting(node, cfg):
                over.wait()
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(places)) as pool:
        try:
            yield [pool.submit(run, node, cfg) for node, cfg in places]
        finally:
            over.set()


def _refusals(*places: tuple[Node, Config]) -> list[str]:
    with _nodes(*places) as ends:
        return [end.result(90) for end in ends]


def test_nodes_that_agree_meet_and_one_comes_back(
    cfg: Config, place: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    with meeting_of_two(cfg, place) as connect:
        gone = connect()
        with monkeypatch.context() as patched:
            patched.setattr(meeting_module, "_FREE_SECONDS", 0.5)
            with pytest.raises(UserError, match=r"NODE_RANK=1 is taken by a node on .*, which is running"):
                connect()
        gone.close()
        connect().close()
        # One that does not fit is refused and disturbs nobody.
        with pytest.raises(UserError, match="PROCESSES=4, on node 0 1"):
            connect(PROCESSES="4")
        connect().close()


@contextmanager
def meeting_of_two(cfg: Config, place: Callable[..., Node]) -> Iterator[Callable[..., socket.socket]]:
    """A job that has met; gives what connects node 1 again."""
    host = Host(place(0), cfg)
    first = threading.Thread(target=lambda: meeting_module._join(place(1), cfg).close())
    first.start()
    host.wait_for_all()
    first.join()
    try:
        yield lambda **other: meeting_module._join(place(1, **other), cfg)
    finally:
        host.close()


def test_a_node_that_differs_ends_the_start_of_all(cfg: Config, place: Callable[..., Node]) -> None:
    other = cfg.model_copy(update={"seed": cfg.seed + 1})
    started = time.monotonic()
    refusals = _refusals((place(0, 3), cfg), (place(1, 3, PROCESSES="2"), other))
    assert time.monotonic() - started < 50, "not JOIN_SECONDS"
    for said in refusals:
        assert "node 1 of 3 on" in said
        assert "PROCESSES=2, on node 0 1" in said
        assert f"seed={cfg.seed + 1}, on node 0 {cfg.seed}" in said


@pytest.mark.parametrize(
    ("part", "value", "text"),
    [
        ("code", "other", "the code in .*megaeva is not that of node 0; use the same commit"),
        ("token", "other", "run_dir=.* is not the folder that node 0 writes to"),
        ("versions", {"torch": "1.0"}, "torch=.*, on node 0 1.0"),
    ],
)
def test_what_node_0_says_otherwise(
    cfg: Config, place: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, part: str, value: Any, text: str
) -> None:
    monkeypatch.setattr(meeting_module, "_SHARED_SECONDS", 1.0)
    host = Host(place(0), cfg)
    host._greeting[part] = value
    with pytest.raises(UserError, match=text):
        meeting_module._join(place(1), cfg)
    with pytest.raises(UserError, match=text):
        host.wait_for_all()
    host.close()


def test_a_node_of_another_job_is_refused_and_ends_nothing(cfg: Config, place: Callable[..., Node]) -> None:
    stray = place(1, JOB_ID="other")
    with _nodes((place(0), cfg)) as (zero,):
        with pytest.raises(UserError, match="JOB_ID=other, node 0 is of JOB_ID=megaeva"):
            meeting_module._join(stray, cfg)
        assert not zero.done()
        meeting_module._join(place(1), cfg).close()
    assert zero.result() == ""


@pytest.mark.parametrize(("ahead", "words"), [(60.0, "s ahead of"), (-60.0, "s behind"), (5.0, "")])
def test_a_clock_that_is_wrong(cfg: Config, place: Callable[..., Node], ahead: float, words: str) -> None:
    with _nodes((place(0), cfg)) as (zero,), reach(place(1), place(1).port + 1) as connection:
        meeting_module._receive(connection, 60)
        claim = {"rank": 1, "host": "here", "time": time.time() + ahead, "faults": [], "foreign": False}
        meeting_module._send(connection, claim)
        refused = meeting_module._receive(connection, 60)["refused"]
        # A busy machine reads it late.
        assert re.search(rf"its clock is (5|6)\d {words} node 0's", refused) if words else refused == ""
    assert zero.result() == refused


def test_nodes_that_do_not_come_are_named(cfg: Config, place: Callable[..., Node]) -> None:
    places = [(place(0, 4, JOIN_SECONDS="6"), cfg), (place(2, 4, JOIN_SECONDS="6"), cfg)]
    for said in _refusals(*places):
        assert "of 4 nodes these did not come" in said
        assert "within JOIN_SECONDS=6: 1, 3;" in said


def test_noise_at_the_port_is_no_node(cfg: Config, place: Callable[..., Node]) -> None:
    with _nodes((place(0), cfg)) as (zero,):
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[1]\n", b""):
            with reach(place(1), place(1).port + 1) as connection:
                connection.sendall(words)
        assert not zero.done()
        meeting_module._join(place(1), cfg).close()
    assert zero.result() == ""


@pytest.mark.parametrize("answer", [b"", b"hello\n", b"{}\n", json.dumps([1]).encode() + b"\n"])
def test_what_answers_in_place_of_node_0(cfg: Config, place: Callable[..., Node], answer: bytes) -> None:
    node = place(1)
    with socket.create_server(("127.0.0.1", node.port + 1)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(answer)).start()
        with pytest.raises(UserError, match=r"is no node 0 of recipes/train.sh"):
            meeting_module._join(node, cfg)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_port_in_use(cfg: Config, place: Callable[..., Node], offset: int) -> None:
    node = place(0)
    with (
        socket.create_server(("", node.port + offset)),
        pytest.raises(UserError, match=rf"port {node.port + offset} of node 0 .* cannot be opened"),
    ):
        Host(node, cfg)


def test_a_node_0_elsewhere(cfg: Config, place: Callable[..., Node]) -> None:
    with pytest.raises(UserError, match=r"NODE_RANK=0, but 192\.0\.2\.77 is no address of this machine"):
        Host(place(0, MASTER_ADDR="192.0.2.77"), cfg)


@pytest.mark.parametrize("master", ["127.0.0.1", "127.0.1.1", "localhost"])
def test_a_master_that_is_this_machine_without_a_node_0(
    cfg: Config, place: Callable[..., Node], master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting_module, "_SAME_MACHINE_SECONDS", 0.0)
    node = place(1, MASTER_ADDR=master)
    with pytest.raises(UserError, match=r"is this machine itself .* from node 1 of 2.* not localhost"):
        reach(node, node.port + 1)


def test_a_master_that_does_not_answer(
    cfg: Config, place: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", refuse)
    node = place(1, MASTER_ADDR="192.0.2.77", LOCAL_ADDR="10.1.2.4", JOIN_SECONDS="1")
    with pytest.raises(UserError, match=r"node 0 does not answer at MASTER_ADDR=192.0.2.77 .*\(timed out\).*firewall"):
        reach(node, node.port + 1)
