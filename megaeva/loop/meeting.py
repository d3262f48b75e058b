"""The nodes of a job meet before torch is loaded: is each there once, and do they agree?

Node 0 listens at the port after MASTER_PORT, which itself is torchrun's, and greets every node with what it runs. The
node compares that with its own, tells node 0 its place and what differs, and is answered when all are there. A node
that does not fit ends the start on all nodes at once. A node's connection stays open while it lives; so node 0 knows
whose place is free when one comes back, for which it listens until the job ends. Messages are lines of JSON.
"""

import hashlib
import json
import platform
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaeva.config.schema import Config
from megaeva.errors import UserError, listed

if TYPE_CHECKING:
    from megaeva.loop.node import Node

_PACKAGE = Path(__file__).parents[1]
_MARK = Path("logs") / "meeting"  # in the run's folder: what node 0 writes and the others must see
_SAME_MACHINE_SECONDS = 30.0  # for a node 0 on this machine to open its port
_GREETING_SECONDS = 20.0
_SHARED_SECONDS = 60.0  # for which NFS may remember that a file was not there
_FREE_SECONDS = 20.0  # until a connection whose machine lost its power counts as closed
_CLOCK_SECONDS = 10.0  # torchrun takes a node for lost whose heartbeat is 15 s old by its own clock
_MOST_BYTES = 2**20


@contextmanager
def meeting(node: "Node", cfg: Config) -> Iterator[None]:
    """Begins when all nodes are there and agree; this node's place is taken until it ends.

    Raises:
        UserError: node 0's ports are in use, it is not reached, a node does not come within JOIN_SECONDS, two have the
            same number, or they do not agree on the recipe, the code, the run's folder or the time.
    """
    if node.rank:
        connection = _join(node, cfg)
        with connection:
            yield
        return
    host = Host(node, cfg)
    try:
        host.wait_for_all()
        yield
    finally:
        host.close()


class Host:
    """Node 0's side of the meeting."""

    def __init__(self, node: "Node", cfg: Config) -> None:
        self._node = node
        if not _is_own(node.address):
            raise UserError(
                f"NODE_RANK=0, but {node.address} is no address of this machine ({socket.gethostname()}); MASTER_ADDR "
                "must lead to node 0; number the nodes from 0, one number each, or set LOCAL_ADDR where node 0 has "
                "another address for itself."
            )
        self._listener = _listen(node)
        mark = Path(cfg.run_dir) / _MARK
        mark.parent.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(8)
        mark.write_text(token, encoding="utf-8")
        self._greeting = {"host": socket.gethostname(), "token": token, **_statement(node, cfg)}
        self._changed = threading.Condition()
        self._present: dict[int, str] = {}  # host of each node
        self._verdict: str | None = None  # "": all are there; else why the start ended
        self._threads: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def wait_for_all(self) -> None:
        """Returns when all nodes are there and fit.

        Raises:
            UserError: one does not, or does not come within JOIN_SECONDS. The others are told before.
        """
        node = self._node
        with self._changed:
            self._changed.wait_for(
                lambda: self._verdict is not None or len(self._present) == node.nnodes - 1, node.join_seconds
            )
            if self._verdict is None:
                missing = ", ".join(str(rank) for rank in range(1, node.nnodes) if rank not in self._present)
                self._verdict = missing and (
                    f"of {node.nnodes} nodes these did not come to {node.master}:{node.port + 1} within JOIN_SECONDS="
                    f"{node.join_seconds}: {missing}; all must start with the same MASTER_ADDR and MASTER_PORT and "
                    "numbers of their own; look at their output and start all again."
                )
            self._changed.notify_all()
        if self._verdict:
            for thread in self._threads:
                thread.join(2)
            raise UserError(self._verdict)

    def close(self) -> None:
        """Hears no further node."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        # Whoever hangs up or speaks otherwise is no node.
        with connection, suppress(OSError, ValueError, KeyError, TypeError):
            _keep_alive(connection)
            _send(connection, {"code": _code(), **self._greeting})
            claim = _receive(connection, _SHARED_SECONDS + _GREETING_SECONDS)
            skew = float(claim["time"]) - time.time()
            faults = list(claim["faults"])
            if abs(skew) > _CLOCK_SECONDS:
                faults.append(f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} node 0's (NTP)")
            rank, where = int(claim["rank"]), str(claim["host"])
            refusal = self._take(rank, where, faults, foreign=bool(claim["foreign"]))
            if refusal:
                _send(connection, {"refused": refusal})
                return
            try:
                if not self._await_verdict(connection):
                    return
                _send(connection, {"refused": self._verdict})
                connection.settimeout(None)
                connection.recv(1)  # nothing comes until it ends
            finally:
                with self._changed:
                    del self._present[rank]
                    self._changed.notify_all()

    def _take(self, rank: int, where: str, faults: list[str], *, foreign: bool) -> str:
        """Gives a node its place; else why it gets none, which ends a start, but no job that runs."""
        with self._changed:
            patience = 2.0 if self._verdict is None else _FREE_SECONDS
            if not self._changed.wait_for(lambda: rank not in self._present, patience):
                faults = [*faults, f"NODE_RANK={rank} is taken by a node on {self._present[rank]}, which is running"]
            if not faults:
                self._present[rank] = where
                self._changed.notify_all()
                return ""
            refusal = (
                f"node {rank} of {self._node.nnodes} on {where} does not fit node 0 on {self._greeting['host']}:\n"
                f"{listed(faults)}\nAll nodes must start the same recipe with the same code, settings and clock, in a "
                "run_dir that they share, with numbers of their own; mend that and start all again."
            )
            if self._verdict is None and not foreign:
                self._verdict = refusal
                self._changed.notify_all()
            return refusal

    def _await_verdict(self, connection: socket.socket) -> bool:
        """False when the node is gone before."""
        with self._changed:
            while self._verdict is None:
                if select.select([connection], [], [], 0)[0]:
                    return False
                self._changed.wait(0.5)
        return True


def _join(node: "Node", cfg: Config) -> socket.socket:
    """The connection of a node other than 0 that has its place."""
    connection = reach(node, node.port + 1)
    where = f"{node.master}:{node.port + 1}"
    try:
        greeting = _receive(connection, min(_GREETING_SECONDS, node.join_seconds))
        foreign, faults = _compare(node, cfg, greeting, connection)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"what answers at {where} is no node 0 of recipes/train.sh ({type(error).__name__}); the port after "
            f"MASTER_PORT={node.port} of MASTER_ADDR={node.master} must be node 0's; look at both, on all nodes alike."
        ) from None
    try:
        host, now = socket.gethostname(), time.time()
        _send(connection, {"rank": node.rank, "host": host, "time": now, "faults": faults, "foreign": foreign})
        refused = _receive(connection, node.join_seconds + _FREE_SECONDS)["refused"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"node 0 at {where} ended or fell silent before all nodes had come, seen from node {node.rank} of "
            f"{node.nnodes}; it must wait for all; look at its output and start all again."
        ) from None
    if refused:
        raise UserError(refused)
    _keep_alive(connection)
    return connection


def reach(node: "Node", port: int, *, met: bool = False) -> socket.socket:
    """A connection from this node to a port of node 0.

    Args:
        met: node 0 is known to be there, and what it starts is awaited.

    Raises:
        UserError: there is none within JOIN_SECONDS; or this machine is not node 0, yet MASTER_ADDR leads to itself.
    """
    same_machine = not met and _is_own(node.master)
    patience = min(_SAME_MACHINE_SECONDS, node.join_seconds) if same_machine else node.join_seconds
    until = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection((node.master, port), timeout=5)
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > until:
            break
        time.sleep(0.5)
    where = f"MASTER_ADDR={node.master} MASTER_PORT={node.port}"
    if same_machine:
        raise UserError(
            f"{where} is this machine itself ({resolve(node.master)}), where no node 0 listens, seen from node "
            f"{node.rank} of {node.nnodes}; on all nodes it must lead to node 0; give an address of node 0 that the "
            "others reach, not localhost or a name that /etc/hosts maps to 127.*."
        )
    raise UserError(
        f"node 0 does not answer at {where} (port {port}) after {patience:.0f} s ({reason}), seen from node "
        f"{node.rank} of {node.nnodes} on {socket.gethostname()}; it must be started and reachable; look at node 0's "
        "output, at a firewall, and at the address."
    )


def resolve(host: str) -> str:
    """Its IPv4 address as this machine knows it, else `host` itself."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError:
        return host


def address_towards(host: str) -> str:
    """This machine's address on the way to `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])


def _statement(node: "Node", cfg: Config) -> dict[str, Any]:
    """What all nodes must have alike, and where node 0's ranks are found."""
    packages = {}
    for name in ("megaeva", "torch", "megatron-core"):
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "job": node.job_id,
        "address": node.address,
        "settings": {"NNODES": node.nnodes, "PROCESSES": node.processes, "MAX_RESTARTS": node.max_restarts},
        "versions": {"Python": ".".join(platform.python_version_tuple()[:2]), **packages},
        "recipe": dict(_flat(cfg.model_dump(mode="json"))),
    }


def _code() -> str:
    """Tells apart what is on the disk now, which is what ranks load whenever they start."""
    code = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        code.update(str(path.relative_to(_PACKAGE)).encode() + path.read_bytes())
    return code.hexdigest()


def _compare(node: "Node", cfg: Config, theirs: Mapping[str, Any], connection: socket.socket) -> tuple[bool, list[str]]:
    """Whether node 0 belongs to another job, and what this node has otherwise than node 0."""
    ours = json.loads(json.dumps(_statement(node, cfg)))
    if theirs["job"] != ours["job"]:
        return True, [f"JOB_ID={ours['job']}, node 0 is of JOB_ID={theirs['job']}"]
    faults = []
    for part in ("settings", "versions", "recipe"):
        for key in [*ours[part], *(key for key in theirs[part] if key not in ours[part])]:
            here, there = ours[part].get(key), theirs[part].get(key)
            if here != there:
                faults.append(f"{key}={here}, on node 0 {there}")
    if theirs["code"] != _code():
        faults.append(f"the code in {_PACKAGE} is not that of node 0; use the same commit")
    if not _sees(Path(cfg.run_dir) / _MARK, theirs["token"], min(_SHARED_SECONDS, node.join_seconds / 2)):
        faults.append(f"run_dir={Path(cfg.run_dir).absolute()} is not the folder that node 0 writes to")
    if resolve(theirs["address"]).startswith("127.") and not connection.getpeername()[0].startswith("127."):
        faults.append(
            f"node 0 has MASTER_ADDR or LOCAL_ADDR {theirs['address']}, here that is this machine; its ranks would not "
            f"be found; set it to {connection.getpeername()[0]} there"
        )
    return False, faults


def _sees(path: Path, token: str, patience: float) -> bool:
    until = time.monotonic() + patience
    while True:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.5)


def _listen(node: "Node") -> socket.socket:
    """Open for the nodes; MASTER_PORT is only tried, as torchrun opens it."""
    for port in (node.port, node.port + 1):
        try:
            opened = socket.create_server(("", port), backlog=node.nnodes)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port} of node 0 ({socket.gethostname()}) cannot be opened ({error}); MASTER_PORT={node.port} "
                "and the port after it must be free there, and no other node 0 started; look at `ss -ltnp`, or set "
                "another MASTER_PORT on all nodes."
            ) from None
        if port == node.port:
            opened.close()
    return opened


def _is_own(host: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 3), (socket.TCP_KEEPCNT, 3)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.settimeout(_GREETING_SECONDS)
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, seconds: float) -> Any:
    """The next line.

    Raises:
        OSError, ValueError: there is none within about `seconds`, or it is no JSON.
    """
    until = time.monotonic() + seconds
    line = bytearray()
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.01, until - time.monotonic()))
        part = connection.recv(2**16)
        if not part or len(line) > _MOST_BYTES:
            raise ValueError("no message")
        line += part
    return json.loads(line)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
