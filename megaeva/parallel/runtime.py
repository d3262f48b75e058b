"""Start and stop of the distributed process, and the seeds of what it draws."""

import hashlib
import os
import resource
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from megaeva.parallel import platform as platform_module


@dataclass(frozen=True)
class Runtime:
    """This process among all: ranks, device and backend.

    Attributes:
        rank: 0..world_size-1 over all nodes.
        local_rank: on this node; selects the GPU.
        backend: "nccl" or "gloo".
        timeout: of a collective. A new group does not inherit it: it must be passed to each, or the group waits 30 min.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    timeout: timedelta = timedelta(minutes=10)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and talks."""
        return self.rank == 0

    @property
    def layer_spec(self) -> Literal["local", "te"]:
        """Transformer Engine's layers on a GPU, mcore's own on a CPU."""
        return "te" if self.device.type == "cuda" else "local"

    def memory_gib(self) -> float:
        """Peak memory of this process so far: the GPU's allocator, or resident host memory on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def start(platform: Literal["auto", "cpu", "cuda"] = "auto", timeout_minutes: float = 10) -> Runtime:
    """Returns this process's place in the job, with torch.distributed initialised.

    Reads torchrun's environment; without it (no RANK and WORLD_SIZE) the process is a job of one, needing no port and
    no environment. All ranks must call it. On cpu it applies the Megatron-core shim. Where torch.distributed is already
    initialised it joins that.

    Args:
        timeout_minutes: a collective that waits longer raises.

    Raises:
        UserError: platform=cuda without a GPU.
    """
    kind = platform_module.choose(platform)
    backend = "nccl" if kind == "cuda" else "gloo"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        platform_module.apply_cpu_shim()
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return Runtime(dist.get_rank(), dist.get_world_size(), local_rank, device, backend, timeout)


def stop() -> None:
    """Destroys all process groups of this process; does nothing where none exist."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_pass(seed: int, step: int, microbatch: int) -> None:
    """Seeds torch's default generators, as a pure function of the arguments.

    `microbatch` counts over the global batch, so that the same samples draw the same on any number of data ranks.

    The model draws nothing from them: drop path draws from generators derived from this seed and the layer's number,
    alike on all ranks of a data rank. A resumed run and a replayed forward pass therefore need no saved generator
    state.
    """
    key = f"{seed}/{step}/{microbatch}".encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1)
