"""Time and traffic of `clip_loss` on several processes, beside open_clip's ClipLoss that gathers with gradients.

Every rank has an equal part of the same unit rows. `clip_loss` has one mode; ClipLoss has two that are exact, and in
both its gradients are as many times too large as there are ranks, which DDP's mean undoes.
"""

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megaeva.bench.compare import Comparison, row, take_turns
from megaeva.bench.loss import GRADIENT_TOLERANCE, LOSS_TOLERANCE, figure
from megaeva.bench.loss_memory import MIB
from megaeva.bench.loss_sides import (
    Features,
    Outcome,
    Precision,
    Side,
    difference,
    differentiate,
    draw,
    engine,
    whole_loss,
)
from megaeva.bench.traffic import count_traffic
from megaeva.errors import UserError
from megaeva.losses.contrastive import clip_loss
from megaeva.parallel.collectives import all_gather_rows

# open_clip's names of its two exact modes; both with gather_with_grad=True.
PEERS = {"local_loss=True": True, "local_loss=False": False}


@dataclass(frozen=True)
class RankTimes:
    """What `benchmark_ranks` measured on rank 0; traffic is the most of any rank.

    Attributes:
        times_ms: by round, of "clip_loss" and of each of PEERS.
        sent_bytes: by the same names, of one call with its backward.
        loss_difference: of `clip_loss` on all ranks from one process, relative.
        gradient_difference: the largest of the three, relative to the norm.
    """

    num_ranks: int
    times_ms: dict[str, tuple[float, ...]]
    sent_bytes: dict[str, int]
    loss_difference: float
    gradient_difference: float

    def report(self, command: str) -> Iterator[str]:
        """Sentences, and rows of the log's table of losses on ranks, one for each peer."""
        yield (
            f"the loss is the same number on all {self.num_ranks} ranks; loss and gradients differ from one process by "
            f"{self.loss_difference:.1e} and {self.gradient_difference:.1e}"
        )
        sent = self.sent_bytes["clip_loss"]
        times = self.times_ms["clip_loss"]
        peers = [name for name in self.times_ms if name != "clip_loss"]
        if not peers:
            timed = Comparison(times, times)
            yield f"clip_loss {figure(timed.ours)} ms, each rank sends {sent / MIB:.2f} MiB"
            yield row(f"`{command}`", "none", figure(timed.ours), "", "", f"{sent / MIB:.2f}", "", "")
        for name in peers:
            timed = Comparison(times, self.times_ms[name])
            theirs = self.sent_bytes[name]
            yield (
                f"clip_loss {figure(timed.ours)} ms, ClipLoss({name}, gather_with_grad=True) {figure(timed.peer)} ms: "
                f"{timed.peer_per_ours}x as fast; each rank sends {sent / MIB:.2f} MiB, the peer's "
                f"{theirs / MIB:.2f} MiB: {sent / theirs:.3f}"
            )
            yield row(
                f"`{command}`",
                name,
                figure(timed.ours),
                figure(timed.peer),
                str(timed.peer_per_ours),
                f"{sent / MIB:.2f}",
                f"{theirs / MIB:.2f}",
                f"{sent / theirs:.3f}",
            )


@dataclass(frozen=True)
class RanksJob:
    """What is measured. `num_pairs` is of all ranks together, a multiple of `num_ranks`; threads are of each rank."""

    num_ranks: int
    num_pairs: int
    embed_dim: int
    precision: Precision
    with_peers: bool
    num_rounds: int
    num_threads: int


def benchmark_ranks(job: RanksJob) -> RankTimes:
    """Runs `job` on processes of its own over gloo, after checking both sides against `clip_loss` on one process.

    Raises:
        UserError: a process was killed, which is what the kernel does to one that wants too much memory.
    """
    with tempfile.TemporaryDirectory(prefix="megaeva-") as folder:
        try:
            mp.spawn(_run, args=(job, folder), nprocs=job.num_ranks)
        except mp.ProcessExitedException as error:
            raise UserError(
                f"rank {error.error_index} of {job.num_ranks} ended with exit code {error.exit_code}, all must end by "
                "themselves (-9: the system ran out of memory); free memory or give a smaller --batch."
            ) from None
        measured = json.loads((Path(folder) / "measured.json").read_text(encoding="utf-8"))
    measured["times_ms"] = {name: tuple(times) for name, times in measured["times_ms"].items()}
    return RankTimes(**measured)


def _run(rank: int, job: RanksJob, folder: str) -> None:
    # ClipLoss gathers by a function that torch wants to drop, and every rank would say so.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"open_clip\.")
    torch.set_num_threads(job.num_threads)
    store = dist.FileStore(f"{folder}/store", job.num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.num_ranks)
    try:
        measured = _measure(rank, job)
        if rank == 0:
            (Path(folder) / "measured.json").write_text(json.dumps(asdict(measured)), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _measure(rank: int, job: RanksJob) -> RankTimes:
    whole = draw(job.num_pairs, job.embed_dim, precision=job.precision)
    num_local = job.num_pairs // job.num_ranks
    here = slice(rank * num_local, (rank + 1) * num_local)
    local = Features(whole.image_BE[here], whole.text_BE[here], whole.log_scale)
    sides: dict[str, Side] = {"clip_loss": _ours}
    if job.with_peers:
        sides |= {name: _peer(rank, job.num_ranks, local_loss) for name, local_loss in PEERS.items()}
    loss_apart, gradients_apart = _check(rank, sides, whole, local, job)
    sent = {name: _most(count_traffic(partial(side, local))) for name, side in sides.items()}

    def together(side: Side) -> None:
        side(local)
        dist.barrier()  # the call lasts until the slowest rank has done it, and all begin the next one together

    dist.barrier()
    times = take_turns([partial(together, side) for side in sides.values()], device="cpu", num_rounds=job.num_rounds)
    return RankTimes(job.num_ranks, dict(zip(sides, times, strict=True)), sent, loss_apart, gradients_apart)


def _ours(features: Features) -> Outcome:
    group = dist.group.WORLD
    return differentiate(
        lambda image_BE, text_BE, log_scale: clip_loss(image_BE, text_BE, log_scale, group=group), features
    )


def _peer(rank: int, num_ranks: int, local_loss: bool) -> Side:
    from open_clip.loss import ClipLoss

    loss = ClipLoss(local_loss=local_loss, gather_with_grad=True, rank=rank, world_size=num_ranks)
    return lambda features: differentiate(
        lambda image_BE, text_BE, log_scale: loss(image_BE, text_BE, log_scale.exp()), features
    )


def _check(rank: int, sides: dict[str, Side], whole: Features, local: Features, job: RanksJob) -> tuple[float, float]:
    """How far ours is from one process, as rank 0 finds. Holds the peers in fp32 to one process too; warms all up."""
    apart = (0.0, 0.0)
    for name, side in sides.items():
        ours = name == "clip_loss"
        outcome = side(local)
        if not ours and job.precision != "fp32":
            outcome = side(local.to(torch.float32))
        joined, loss_R = _join(outcome)
        if ours:
            assert (loss_R == loss_R[0]).all(), f"the ranks' losses differ: {loss_R.tolist()}"
        else:
            # The mean over ranks, as DDP takes it of every parameter.
            joined = Outcome(*(part / job.num_ranks for part in vars(joined).values()))
        if rank == 0:
            expected = whole_loss(whole) if ours else engine(whole.to(torch.float32))
            found = difference(dataclasses.replace(joined, loss=loss_R.mean()), expected)
            assert found[0] <= LOSS_TOLERANCE, f"{name}: the loss differs from one process by {found[0]:.1e}"
            assert found[1] <= GRADIENT_TOLERANCE[job.precision], f"{name}: gradients differ by {found[1]:.1e}"
            apart = found if ours else apart
    return apart


def _join(outcome: Outcome) -> tuple[Outcome, Tensor]:
    """The gradients of all rows, the sums of the loss and of the scale's gradient; and the loss of each rank."""
    loss_R = all_gather_rows(outcome.loss[None], dist.group.WORLD)
    log_scale_R = all_gather_rows(outcome.log_scale[None], dist.group.WORLD)
    image_GE = all_gather_rows(outcome.image_BE, dist.group.WORLD)
    text_GE = all_gather_rows(outcome.text_BE, dist.group.WORLD)
    return Outcome(loss_R.sum(), image_GE, text_GE, log_scale_R.sum()), loss_R


def _most(sent_bytes: int) -> int:
    most = torch.tensor(sent_bytes)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)
