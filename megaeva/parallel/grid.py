"""The process groups of one tower."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

# Before megatron.core: it guards that import against a broken Transformer Engine.
from megaeva.parallel import platform as _platform  # noqa: F401  isort: skip
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from megaeva.config.schema import AxesSection
from megaeva.errors import UserError
from megaeva.parallel.runtime import Runtime


@dataclass(frozen=True)
class Grid:
    """One tower's parallel axes and this rank's place on them.

    Attributes:
        axes: what the recipe asks of it.
        groups: every group that Megatron-core 0.16 asks for when groups are passed explicitly.
    """

    axes: AxesSection
    groups: ProcessGroupCollection
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    dp_size: int
    dp_rank: int

    @property
    def sequence_parallel(self) -> bool:
        """Whether hidden states are cut over tp along the sequence, between the linears."""
        return self.axes.sequence_parallel and self.tp_size > 1

    @property
    def vpp_size(self) -> int:
        """Chunks of the tower on each pipeline rank."""
        return self.axes.vpp

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the tower's output."""
        return self.pp_rank == self.pp_size - 1

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the tower, tp x pp: neighbours, and the ranks of `groups.mp`."""
        return self.tp_size * self.pp_size

    @property
    def model_rank(self) -> int:
        """This rank's place among them."""
        return self.pp_rank * self.tp_size + self.tp_rank


def build_grid(axes: AxesSection, runtime: Runtime) -> Grid:
    """Returns the tower's groups over all ranks, order tp-cp-pp-dp: neighbouring ranks differ in tp.

    All ranks must call it, for the same towers in the same order.

    Raises:
        UserError: tp x pp does not divide the number of ranks.
    """
    model_size = axes.tp * axes.pp
    if runtime.world_size % model_size:
        raise UserError(
            f"parallel axes tp={axes.tp} x pp={axes.pp} = {model_size} must divide the {runtime.world_size} started "
            f"processes; start a multiple of {model_size} (torchrun --nproc-per-node) or lower tp or pp."
        )
    data_size = runtime.world_size // model_size
    comm = HyperCommGrid([axes.tp, 1, axes.pp, data_size], ["tp", "cp", "pp", "dp"], backend=runtime.backend)
    # A new group takes torch's default of 30 minutes, not that of the process's first group.
    create = partial(comm.create_pg, timeout=runtime.timeout)
    groups = ProcessGroupCollection(
        tp=create("tp"),
        cp=create("cp"),
        pp=create("pp"),
        dp=create("dp"),
        mp=create(["tp", "pp"]),
        tp_dp_cp=create(["tp", "cp", "dp"]),
        intra_dist_opt=create(["tp", "cp", "pp", "dp"]),
    )
    # The context axis has size one.
    groups.tp_cp, groups.dp_cp = groups.tp, groups.dp
    # One optimizer instance over the whole tower.
    groups.intra_dp_cp = groups.dp_cp
    groups.inter_dist_opt = None
    # No experts: their groups are the dense ones, and the expert axis has size one.
    groups.ep = groups.cp
    groups.expt_tp = groups.tp
    groups.tp_ep = groups.tp
    groups.tp_ep_pp = groups.mp
    groups.expt_dp = groups.dp
    groups.intra_expt_dp = groups.dp
    groups.hcp = None
    # Towers tie no weights between stages.
    groups.embd = groups.pos_embd = None
    return Grid(
        axes=axes,
        groups=groups,
        tp_size=axes.tp,
        tp_rank=groups.tp.rank(),
        pp_size=axes.pp,
        pp_rank=groups.pp.rank(),
        dp_size=data_size,
        dp_rank=groups.dp.rank(),
    )


def build_grids(axes: Mapping[str, AxesSection], runtime: Runtime) -> dict[str, Grid]:
    """Returns a grid for each name; those of equal sizes share their groups. All ranks must call it alike.

    Raises:
        UserError: as `build_grid`.
    """
    built: dict[tuple[int, int], Grid] = {}
    for section in axes.values():
        if (section.tp, section.pp) not in built:
            built[section.tp, section.pp] = build_grid(section, runtime)
    return {name: replace(built[section.tp, section.pp], axes=section) for name, section in axes.items()}


def grid_of_one() -> Grid:
    """Returns a grid without process groups, enough to build a tower (on any device, meta too) but not to run it."""
    names = ("tp", "cp", "pp", "dp", "mp", "tp_cp", "dp_cp", "tp_dp_cp", "expt_dp", "tp_ep_pp", "intra_dist_opt")
    groups = ProcessGroupCollection(**dict.fromkeys(names))
    return Grid(axes=AxesSection(), groups=groups, tp_size=1, tp_rank=0, pp_size=1, pp_rank=0, dp_size=1, dp_rank=0)
