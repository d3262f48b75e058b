"""Where the runs of a sweep are started: on this machine, or by srun on nodes of the Slurm allocation that it is in."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megaeva.config.schema import Config, LaunchSection
from megaeva.errors import ConfigError, UserError
from megaeva.loop.launch import StageFailedError, last_error, launch, run_command

# Of this job, or of a node; a run on nodes gets its own.
_NOT_PASSED_ON = (
    "NODE_RANK", "LOCAL_ADDR", "LOG_DIR", "SLURM_RESTART_COUNT",
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
)  # fmt: skip


@dataclass(frozen=True)
class Machines:
    """What runs can be started on.

    Attributes:
        processes: most ranks of a node, one for each GPU; None: as many as are wanted, on the CPU of this machine.
        hosts: nodes of the allocation; empty: this machine.
        job_id: Slurm's.
        has_gpus: whether ranks run on GPUs.
    """

    processes: int | None
    hosts: tuple[str, ...] = ()
    job_id: int = 0
    has_gpus: bool = False

    def num_nodes(self, ranks: int) -> int:
        """How many nodes a run takes.

        Raises:
            ConfigError: more than there are, or a part of one beside whole ones.
        """
        if self.processes is None or ranks <= self.processes:
            return 1
        each = f"{self.processes} {'GPUs' if self.has_gpus else 'processes'}"
        nodes = -(-ranks // self.processes)
        if not self.hosts:
            raise ConfigError(
                f"--ranks {ranks}, but this machine has {each}, a rank must have one of its own, and there is no Slurm "
                f"allocation to start it on others; use {self.processes} or less, or run the sweep by "
                f"sbatch --nodes={nodes} (recipes/README.md)."
            )
        if nodes > len(self.hosts):
            raise ConfigError(
                f"--ranks {ranks} takes {nodes} nodes of {each}, and the allocation has {len(self.hosts)}; it must "
                f"have them; use sbatch --nodes={nodes}, or at most {len(self.hosts) * self.processes} ranks."
            )
        if ranks % self.processes:
            raise ConfigError(
                f"--ranks {ranks} must fill nodes of {each} each, or fit on one; "
                f"use {ranks // self.processes * self.processes} or {nodes * self.processes}."
            )
        return nodes

    def start(self, recipe: Path, ranks: int, number: int, *, stage: str, again: str, patience_seconds: float) -> None:
        """Returns when the recipe's run has ended well on all ranks; its output is in train.log beside the recipe.

        Args:
            number: of the run, which tells it from others of the allocation.
            patience_seconds: a run that prints nothing for so long is ended.

        Raises:
            StageFailedError: it failed or hung.
            StageInterruptedError: this process got SIGINT or SIGTERM; the run was ended.
        """
        log_path = recipe.parent / "train.log"
        if not self.hosts:
            section = LaunchSection(num_processes=ranks)
            launch(recipe, [], section, log_path, stage=stage, again=again, patience_seconds=patience_seconds)
            return
        nodes = self.num_nodes(ranks)
        # What the sweep itself runs in may be a step that holds the nodes: hence --overlap.
        command = [
            "srun", "--overlap", f"--nodes={nodes}", f"--nodelist={','.join(self.hosts[:nodes])}",
            "--ntasks-per-node=1", "--kill-on-bad-exit=1", sys.executable, "-m", "megaeva.loop.node", str(recipe),
        ]  # fmt: skip
        exit_code, tail = run_command(
            command,
            self._environment(nodes, ranks // nodes, number),
            log_path,
            stage=stage,
            again=again,
            patience_seconds=patience_seconds,
        )
        if exit_code:
            raise StageFailedError(stage, None, exit_code, last_error(tail), log_path, again)

    def _environment(self, nodes: int, processes: int, number: int) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        port = 20000 + (self.job_id + 2 * number) % 12000  # as in recipes/train_slurm.sh
        environment |= {
            "PYTHONUNBUFFERED": "1", "NNODES": str(nodes), "PROCESSES": str(processes), "MASTER_ADDR": self.hosts[0],
            "MASTER_PORT": os.environ.get("MASTER_PORT") or str(port),
            "JOB_ID": f"{self.job_id}_{number}",
            "MAX_RESTARTS": "0",  # a layout that fails is no faster the second time
        }  # fmt: skip
        if self.has_gpus and processes != self.processes:
            # Slurm sets it where it hands out GPUs; elsewhere all of the node's are seen.
            environment.setdefault("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(processes))))
        if "SLURM_CPUS_PER_TASK" in environment:
            # srun does not take it from the allocation since Slurm 22.05, and one core a node is few.
            environment.setdefault("SRUN_CPUS_PER_TASK", environment["SLURM_CPUS_PER_TASK"])
        return environment


def find_machines(cfg: Config, environ: Mapping[str, str], num_gpus: int) -> Machines:
    """What runs of a recipe can be started on: the nodes of this Slurm allocation if it has several, else here.

    Args:
        num_gpus: of this machine.

    Raises:
        ConfigError: it is not known how many ranks a node takes.
        UserError: Slurm does not name the nodes.
    """
    has_gpus = cfg.platform != "cpu" and num_gpus > 0
    if int(environ.get("SLURM_NNODES") or 1) == 1 or "SLURM_JOB_ID" not in environ:
        return Machines(num_gpus if has_gpus else None, has_gpus=has_gpus)
    processes = environ.get("PROCESSES", str(num_gpus) if has_gpus else "")
    if not processes.isdecimal() or int(processes) < 1:
        raise ConfigError(
            f"PROCESSES={processes or 'not set'} in an allocation of {environ['SLURM_NNODES']} nodes, and no GPU is "
            "seen here; it must be how many ranks a node takes; set it to the GPUs of a node."
        )
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", environ.get("SLURM_JOB_NODELIST", "")], capture_output=True, text=True
        )
        hosts, reason = listed.stdout.split(), listed.stderr.strip()
    except OSError as error:
        hosts, reason = [], str(error)
    if not hosts:
        raise UserError(
            f"scontrol names no host of SLURM_JOB_NODELIST={environ.get('SLURM_JOB_NODELIST', '')} ({reason}); the "
            "sweep must know its nodes; run it by sbatch, where scontrol and srun are."
        )
    return Machines(int(processes), tuple(hosts), int(environ["SLURM_JOB_ID"]), has_gpus)
