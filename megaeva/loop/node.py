"""One node of a job, checked before torch is loaded, then torchrun: what recipes/train.sh calls on every node.

python -m megaeva.loop.node [--dry-run] RECIPE [--resume] [key.path=value ...], with these environment variables:

NNODES        nodes of the job; 1
NODE_RANK     this one's number from 0; Slurm's SLURM_NODEID
MASTER_ADDR   a name or address of node 0 by which all nodes reach it, and
MASTER_PORT   a free port there, the next one free too; 29500
LOCAL_ADDR    this node's address for the others; node 0's MASTER_ADDR, else that of the interface towards it
PROCESSES     ranks of each node; with one node the number of its GPUs, else 1
MAX_RESTARTS  how often the ranks are started again after one died or a node came back; 3, with one node 0
JOIN_SECONDS  how long a node waits for the others, also for one that has to come back; 600
LOG_DIR       for the output of the ranks; RUN/logs/node_N
JOB_ID        tells jobs apart that meet at the same port; megaeva

Why a job of N nodes cannot become N jobs of one: the number of nodes is fixed, so torchrun starts no rank before all
are there; only node 0 opens the meeting point, the others must reach it and agree with it (loop/meeting.py); and a rank
refuses a world of another size (`check_world_size` in config/world.py).
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaeva.checkpoint.layout import FOLDER_NAME, complete_checkpoints
from megaeva.config import check_world, load
from megaeva.config.schema import Config
from megaeva.config.world import EXPECTED_WORLD_SIZE
from megaeva.errors import ConfigError, UserError, explain_end
from megaeva.loop.launch import describe_exit, threads_of_each
from megaeva.loop.meeting import address_towards, meeting, reach, resolve

_WHOLE = re.compile(r"[0-9]{1,9}")
_SAVE_SECONDS = 240  # between SIGTERM and SIGKILL; torchrun's own 30 are too few for a large checkpoint


@dataclass(frozen=True)
class Node:
    """This node's place in the job.

    Attributes:
        processes: ranks of each node.
        address: of this node for the others.
    """

    nnodes: int
    rank: int
    processes: int
    master: str
    port: int
    address: str
    max_restarts: int
    join_seconds: int
    log_dir: Path
    job_id: str

    def torchrun_arguments(self, recipe: str, overrides: Sequence[str], *, resume: bool) -> list[str]:
        """What torchrun is called with. Ranks that are started again have to resume, so then all do from the start."""
        if self.nnodes == 1:
            meet = ["--standalone"]
        else:
            # Without is_host torchrun guesses it from the names of the machine; without local-addr the ranks meet at
            # whatever node 0 calls itself, which may be localhost.
            meet = [
                f"--nnodes={self.nnodes}",
                "--rdzv-backend=c10d",
                f"--rdzv-id={self.job_id}",
                f"--rdzv-endpoint={self.master}:{self.port}",
                f"--rdzv-conf=is_host={int(self.rank == 0)},join_timeout={self.join_seconds},"
                f"read_timeout={min(60, self.join_seconds)}",
                f"--local-addr={self.address}",
            ]
        return [
            *meet,
            f"--nproc-per-node={self.processes}",
            f"--max-restarts={self.max_restarts}",
            f"--shutdown-timeout={_SAVE_SECONDS}",
            f"--log-dir={self.log_dir}", "--redirects=3", "--tee=3", "--log-line-prefix-template=[${rank}] ",
            "-m", "megaeva.train", recipe, *(["--resume"] if resume or self.max_restarts else []), *overrides,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """What is set for the ranks."""
        return {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads_of_each(self.processes)),
            "PYTHONUNBUFFERED": "1",
            EXPECTED_WORLD_SIZE: str(self.nnodes * self.processes),
            # torchrun keeps the address of the ranks' store from the first start on, also when another node is first
            # in the order after one came back; ranks that make it anew agree.
            **({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if self.nnodes > 1 and self.max_restarts else {}),
        }


def read_node(cfg: Config, environ: Mapping[str, str], num_gpus: int) -> Node:
    """This node's place, from the environment.

    Raises:
        ConfigError: a variable is missing or wrong, or contradicts what started this process.
    """
    nnodes = _number(environ, "NNODES", 1, least=1)
    lonely = [name for name in ("NODE_RANK", "MASTER_ADDR") if name in environ and "NNODES" not in environ]
    if lonely:
        raise ConfigError(
            f"{' and '.join(lonely)} set, but not NNODES, so each node would be a job of its own; the number of "
            "nodes must be known; set NNODES=... on all nodes, NNODES=1 for this one alone."
        )
    started_on = environ.get("SLURM_STEP_NUM_NODES", str(nnodes))
    if started_on != str(nnodes):
        raise ConfigError(
            f"NNODES={nnodes}, but Slurm started this on {started_on} nodes, each of which would be a job of its own; "
            f"both must be the same; use recipes/train_slurm.sh, or set NNODES={started_on} and MASTER_ADDR."
        )
    rank = _number(environ, "SLURM_NODEID" if _by_slurm(environ) else "NODE_RANK", 0 if nnodes == 1 else None)
    if rank >= nnodes:
        raise ConfigError(f"NODE_RANK={rank} must be 0 to {nnodes - 1} with NNODES={nnodes}; number the nodes from 0.")
    master = environ.get("MASTER_ADDR", "127.0.0.1" if nnodes == 1 else "")
    if not master:
        raise ConfigError(
            f"MASTER_ADDR {_lack(environ, 'MASTER_ADDR')} with NNODES={nnodes}; it must be a name or address of node "
            "0 that every node reaches; set it to the same value on all nodes."
        )
    if nnodes > 1 and "PROCESSES" not in environ:
        raise ConfigError(
            f"PROCESSES is not set with NNODES={nnodes}; every node must start the same number of ranks, also one that "
            "has lost a GPU; set it to the GPUs of a node."
        )
    run_dir = Path(cfg.run_dir)
    return Node(
        nnodes=nnodes,
        rank=rank,
        processes=_number(environ, "PROCESSES", max(1, num_gpus), least=1),
        master=master,
        port=_number(environ, "MASTER_PORT", 29500, least=1, most=65534),
        address=environ.get("LOCAL_ADDR") or (master if rank == 0 else address_towards(master)),
        max_restarts=_number(environ, "MAX_RESTARTS", 0 if nnodes == 1 else 3),
        join_seconds=_number(environ, "JOIN_SECONDS", 600, least=1),
        log_dir=Path(environ.get("LOG_DIR", run_dir / "logs" / f"node_{rank}")),
        job_id=environ.get("JOB_ID", "megaeva"),
    )


def machine_faults(node: Node, cfg: Config, environ: Mapping[str, str], num_gpus: int) -> list[str]:
    """What this machine lacks for its part, each as one message; empty when nothing."""
    faults = []
    on_gpus = cfg.platform != "cpu"
    wanted = environ.get("SLURM_GPUS_ON_NODE", "")
    if on_gpus and _WHOLE.fullmatch(wanted) and int(wanted) != num_gpus:
        faults.append(
            f"nvidia-smi sees {num_gpus} GPUs, Slurm gave {wanted}; all must be there; exclude the node "
            f"(sbatch --exclude={socket.gethostname()}) and look at its GPUs (dmesg)."
        )
    elif on_gpus and num_gpus and node.processes != num_gpus and "CUDA_VISIBLE_DEVICES" not in environ:
        faults.append(
            f"PROCESSES={node.processes}, but this node has {num_gpus} GPUs; each rank must have one and each GPU a "
            f"rank; set PROCESSES={num_gpus} on all nodes, or choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    elif (cfg.platform == "cuda" and not num_gpus) or (on_gpus and not num_gpus and node.nnodes > 1):
        faults.append(
            f"platform={cfg.platform}, but nvidia-smi sees no GPU on this node; nodes must be alike; look at its "
            "driver (nvidia-smi), or set platform=cpu for ranks on the CPU."
        )
    if node.nnodes == 1:
        return faults
    interfaces = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        for name in filter(None, environ.get(variable, "").split(",")):
            exact = variable.startswith("GLOO") or name.startswith("=")
            name = name.lstrip("=")
            if not name.startswith("^") and not any(i == name if exact else i.startswith(name) for i in interfaces):
                faults.append(
                    f"{variable}={environ[variable]} names no interface of this node; it must be one of "
                    f"{', '.join(interfaces)}; set it to the one that leads to the other nodes."
                )
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "127.0.0.1"
    # Gloo tells the others the address of the machine's name; NCCL looks for an interface that is no loopback.
    if not on_gpus and own.startswith("127.") and "GLOO_SOCKET_IFNAME" not in environ and not _is_loopback(node.master):
        faults.append(
            f"this node's name {socket.gethostname()} means {own}, where gloo would tell the other nodes to find it; "
            f"they must reach it; set GLOO_SOCKET_IFNAME to the interface of {node.address} ({', '.join(interfaces)})."
        )
    return faults


def run(node: Node, arguments: Sequence[str]) -> int:
    """Runs this node's ranks; the exit code: 0, 1 after a rank died, 128 + signal after a signal and a save.

    Raises:
        UserError: node 0 is gone, or another node was lost and did not come back in time.
    """
    # torch is loaded here, after all that can be said without it.
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError

    from megaeva.loop import agent

    os.environ.update(node.environment())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of the nodes; torchrun sets those of the ranks
    node.log_dir.mkdir(parents=True, exist_ok=True)
    failure_file = node.log_dir / "failure.json"
    failure_file.unlink(missing_ok=True)
    try:
        code = agent.main([str(failure_file), *arguments])
    except RendezvousConnectionError as error:
        raise UserError(
            f"node 0 at {node.master}:{node.port} is gone ({error}), seen from node {node.rank} of {node.nnodes}; it "
            "must run as long as the job; look at its output and start all nodes again with --resume."
        ) from None
    except RendezvousError as error:
        raise UserError(
            f"node {node.rank} of {node.nnodes} does not find all others at {node.master}:{node.port} within "
            f"JOIN_SECONDS={node.join_seconds} ({type(error).__name__}: {error}); all {node.nnodes} nodes must run, a "
            "lost one be started again in that time; look at their output and start all again with --resume."
        ) from None
    if code == 1 and failure_file.exists():
        failure = json.loads(failure_file.read_text(encoding="utf-8"))
        print(
            f"error: node {node.rank}: rank {failure['rank']} {describe_exit(failure['exit_code'])}, and "
            f"MAX_RESTARTS={node.max_restarts} is used up; every rank must end with exit code 0; read {node.log_dir}, "
            "mend the cause and start all nodes again with --resume.",
            file=sys.stderr,
        )
    return code


def main(argv: Sequence[str]) -> int:
    """The exit code of this node; see the head of this file."""
    dry_run = "--dry-run" in argv
    restarts = _number(os.environ, "SLURM_RESTART_COUNT", 0) if os.environ.get("SLURM_RESTART_COUNT") else 0
    resume = "--resume" in argv or restarts > 0
    named = [argument for argument in argv if argument not in ("--dry-run", "--resume")]
    if not named:
        raise ConfigError(
            "no RECIPE is given; a YAML file must be; usage: recipes/train.sh RECIPE [key.path=value ...]."
        )
    recipe, *overrides = named
    cfg = load(recipe, overrides)
    num_gpus = count_gpus()
    node = read_node(cfg, os.environ, num_gpus)
    check_world(cfg, node.nnodes * node.processes)
    run_dir = Path(cfg.run_dir)
    if not resume and (done := complete_checkpoints(run_dir / FOLDER_NAME)):
        raise ConfigError(
            f"run_dir={run_dir} holds {done[-1].name} of an earlier run, a fresh run needs a folder of its own; "
            "add --resume to continue it, or set run_dir=... to another folder."
        )
    faults = machine_faults(node, cfg, os.environ, num_gpus)
    arguments = node.torchrun_arguments(recipe, overrides, resume=resume)
    what = f"{num_gpus} GPUs" if num_gpus and cfg.platform != "cpu" else "CPU"
    print(
        f"node {node.rank} of {node.nnodes} ({socket.gethostname()}, {what}): {node.processes} of "
        f"{node.nnodes * node.processes} ranks, node 0 at {node.master}:{node.port}, output of the ranks in "
        f"{node.log_dir}",
        flush=True,
    )
    if dry_run:
        settings = [f"{name}={value}" for name, value in node.environment().items()]
        print(shlex.join([*settings, sys.executable, "-m", "torch.distributed.run", *arguments]))
        for fault in faults:
            print(f"would be refused on this machine: {fault}")
        # FIRST_NODE stands in recipes/train_slurm.sh for a name that Slurm gives.
        if node.nnodes > 1 and node.master != "FIRST_NODE" and (unknown := _unknown(node.master)):
            print(f"warning: {unknown}")
        return 0
    if faults:
        raise ConfigError("\n".join(faults))
    if node.nnodes == 1:
        return run(node, arguments)
    with meeting(node, cfg):
        if node.rank:
            reach(node, node.port, met=True).close()  # node 0 loads torch before it opens torchrun's port
        return run(node, arguments)


def _number(environ: Mapping[str, str], name: str, default: int | None, least: int = 0, most: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not _WHOLE.fullmatch(text) or int(text) < least or (most is not None and int(text) > most):
        shown = f"{name}={text}" if text else f"{name} {_lack(environ, name)} and"
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ConfigError(f"{shown} must be a whole number {bounds}; set {name}=... on this node.")
    return int(text)


def _lack(environ: Mapping[str, str], name: str) -> str:
    return "is empty" if name in environ else "is not set"


def _by_slurm(environ: Mapping[str, str]) -> bool:
    return "NODE_RANK" not in environ and "SLURM_NODEID" in environ


def count_gpus() -> int:
    """Of this machine, as nvidia-smi lists them."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _unknown(host: str) -> str | None:
    """Only a dry run says it: a name may come with node 0, so a start looks for it until JOIN_SECONDS are over."""
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        return (
            f"MASTER_ADDR={host} does not resolve on this machine ({reason}); every node must find node 0 by it, or "
            "stops after JOIN_SECONDS; look at the name, or set an address."
        )
    return None


def _is_loopback(host: str) -> bool:
    return resolve(host).startswith("127.")


if __name__ == "__main__":
    sys.exit(explain_end(lambda: main(sys.argv[1:])))
