"""Nodes with networks, host files and disks of their own: a start that cannot become one job ends soon, and says why.

Two network namespaces with a cable between them, for which root is needed. Nothing here loads torch.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.test_training import write_recipe

ROOT = Path(__file__).parents[2]
HOSTS = "127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n"
JOIN_SECONDS = 6


@dataclass
class Machine:
    """One namespace; `hosts` is its /etc/hosts."""

    namespace: str
    name: str
    hosts: Path

    def start(self, recipe: Path, *arguments: str, before: str = "", **environment: str) -> "subprocess.Popen[str]":
        setup = f"mount --bind {self.hosts} /etc/hosts; hostname {self.name}; {before}\n"
        place = {"NNODES": "2", "PROCESSES": "1", "MASTER_ADDR": "node0", "JOIN_SECONDS": str(JOIN_SECONDS)}
        return subprocess.Popen(
            [*_inside(self.namespace), "bash", "-ec", f'{setup}exec "$@"',
             "bash", "bash", "recipes/train.sh", str(recipe), *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | place | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    if not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("no network namespaces here: ip (iproute2), unshare and hostname are needed")
    names = [f"megaeva{os.getpid()}{side}" for side in "ab"]
    commands = [["ip", "netns", "add", name] for name in names]
    ends = [["eva0", "netns", name] for name in names]
    commands.append(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]])
    for number, name in enumerate(names, 1):
        commands.append(["ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eva0"])
        commands += [["ip", "-n", name, "link", "set", link, "up"] for link in ("lo", "eva0")]
    all_of_it = "mount --bind /etc/hosts /etc/hosts; hostname node0; mount -t tmpfs none /mnt"
    commands.append([*_inside(names[0]), "bash", "-ec", all_of_it])
    try:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here, root is needed: {' '.join(command)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _inside(namespace: str) -> list[str]:
    """What runs a command there, with mounts and a host's name of its own."""
    return ["ip", "netns", "exec", namespace, "unshare", "--mount", "--uts"]


@pytest.fixture
def machines(tmp_path: Path, namespaces: list[str]) -> list[Machine]:
    made = [Machine(namespace, f"node{k}", tmp_path / f"hosts{k}") for k, namespace in enumerate(namespaces)]
    for machine in made:
        machine.hosts.write_text(HOSTS)
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, str(tmp_path / "absent-*.tar"))


def _ends(*nodes: "subprocess.Popen[str]") -> list[str]:
    """What each said; all end with a mistake explained."""
    try:
        said = [node.communicate(timeout=150)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    for text, node in zip(said, nodes, strict=True):
        assert node.returncode == 2, text
        assert "Traceback" not in text, text
    return said


def test_a_master_that_is_localhost_on_another_node(recipe: Path, machines: list[Machine]) -> None:
    node0 = machines[0].start(recipe, NODE_RANK="0")
    node1 = machines[1].start(recipe, NODE_RANK="1", MASTER_ADDR="localhost")
    zero, one = _ends(node0, node1)
    assert "MASTER_ADDR=localhost MASTER_PORT=29500 is this machine itself (127.0.0.1), where no node 0 listens" in one
    assert f"of 2 nodes these did not come to node0:29501 within JOIN_SECONDS={JOIN_SECONDS}: 1;" in zero


def test_what_nodes_have_otherwise_is_listed_and_ends_both(
    recipe: Path, machines: list[Machine], tmp_path: Path
) -> None:
    """A run's folder on a disk of its own, another recipe and other settings, all at once."""
    (tmp_path / "run").mkdir()
    disk = f"mount -t tmpfs none {tmp_path}/run"
    # The folder is looked for in half of it, in the other half node 1 must have come.
    node0 = machines[0].start(recipe, NODE_RANK="0", JOIN_SECONDS="20")
    settings = {"NODE_RANK": "1", "MAX_RESTARTS": "1", "JOIN_SECONDS": "20"}
    node1 = machines[1].start(recipe, "optim.vision.lr=0.5", before=disk, **settings)
    for said in _ends(node0, node1):
        for part in (
            "node 1 of 2 on node1 does not fit node 0 on node0:", "optim.vision.lr=0.5, on node 0 0.001",
            "MAX_RESTARTS=1, on node 0 3", f"run_dir={tmp_path}/run is not the folder that node 0 writes to",
        ):  # fmt: skip
            assert part in said


def test_a_node_0_that_takes_itself_for_localhost(recipe: Path, machines: list[Machine]) -> None:
    interface = {"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "eva0"}
    node0 = machines[0].start(recipe, NODE_RANK="0", JOIN_SECONDS="60", **interface)
    node1 = machines[1].start(recipe, NODE_RANK="1", JOIN_SECONDS="60")
    for said in _ends(node0, node1):
        assert "node 0 has MASTER_ADDR or LOCAL_ADDR localhost" in said
        assert "set it to 10.77.0.1 there" in said


@pytest.mark.exhaustive
def test_a_host_file_that_maps_node_0_to_localhost(recipe: Path, machines: list[Machine]) -> None:
    machines[1].hosts.write_text("127.0.0.1 localhost\n127.0.1.1 node0\n10.77.0.2 node1\n")
    _, one = _ends(machines[0].start(recipe, NODE_RANK="0"), machines[1].start(recipe, NODE_RANK="1"))
    assert "is this machine itself (127.0.1.1), where no node 0 listens" in one


@pytest.mark.exhaustive
def test_two_nodes_0(recipe: Path, machines: list[Machine]) -> None:
    zero, other = _ends(machines[0].start(recipe, NODE_RANK="0"), machines[1].start(recipe, NODE_RANK="0"))
    assert "NODE_RANK=0, but node0 is no address of this machine (node1)" in other
    assert "these did not come" in zero


@pytest.mark.exhaustive
def test_a_number_given_twice(recipe: Path, machines: list[Machine]) -> None:
    batch, three = "train.global_batch_size=12", {"NNODES": "3", "JOIN_SECONDS": "30"}
    nodes = [machines[k].start(recipe, batch, NODE_RANK=str(k), **three) for k in (0, 1, 1)]
    for said in _ends(*nodes):
        assert "NODE_RANK=1 is taken by a node on node1, which is running" in said


@pytest.mark.exhaustive
def test_a_wrong_address_of_node_0(recipe: Path, machines: list[Machine]) -> None:
    (said,) = _ends(machines[1].start(recipe, NODE_RANK="1", MASTER_ADDR="10.77.0.9", GLOO_SOCKET_IFNAME="eva0"))
    assert "node 0 does not answer at MASTER_ADDR=10.77.0.9 MASTER_PORT=29500 (port 29501) after 6 s" in said


@pytest.mark.exhaustive
def test_ports_of_something_else(recipe: Path, machines: list[Machine]) -> None:
    mute = "import socket, time; server = socket.create_server(('', 29501)); time.sleep(40)"
    other = subprocess.Popen(["ip", "netns", "exec", machines[0].namespace, sys.executable, "-c", mute])
    try:
        zero, one = _ends(machines[0].start(recipe, NODE_RANK="0"), machines[1].start(recipe, NODE_RANK="1"))
    finally:
        other.kill()
    assert "port 29501 of node 0 (node0) cannot be opened" in zero
    assert "what answers at node0:29501 is no node 0 of recipes/train.sh" in one
