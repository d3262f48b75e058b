"""Grids: who neighbours whom, and that a process without torchrun is a job of one. And the helper that starts ranks."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from megaeva.config.schema import AxesSection
from megaeva.errors import UserError
from megaeva.parallel import runtime
from megaeva.parallel.grid import Grid, build_grid, grid_of_one
from megaeva.parallel.runtime import Runtime, seed_pass
from tests.helpers.spawn import run_ranks


def _places(this: Runtime) -> dict[str, object]:
    grid = build_grid(AxesSection(tp=2), this)
    groups = {
        name: dist.get_process_group_ranks(getattr(grid.groups, name))
        for name in ("tp", "dp", "dp_cp", "mp", "pp", "intra_dist_opt", "expt_dp", "ep")
    }
    return {"place": (grid.tp_rank, grid.dp_rank, grid.tp_size, grid.dp_size, grid.pp_size), "groups": groups}


@pytest.mark.slow  # real processes, as below
def test_neighbours_differ_in_tp() -> None:
    results = run_ranks(_places, 4)
    assert [r["place"] for r in results] == [(0, 0, 2, 2, 1), (1, 0, 2, 2, 1), (0, 1, 2, 2, 1), (1, 1, 2, 2, 1)]
    assert results[3]["groups"] == {
        "tp": [2, 3], "dp": [1, 3], "dp_cp": [1, 3], "mp": [2, 3], "pp": [3],
        "intra_dist_opt": [0, 1, 2, 3], "expt_dp": [1, 3], "ep": [3],
    }  # fmt: skip


def test_axes_must_divide_the_world() -> None:
    this = Runtime(0, 3, 0, torch.device("cpu"), "gloo")
    with pytest.raises(UserError, match="tp=2 x pp=1 = 2 must divide the 3"):
        build_grid(AxesSection(tp=2), this)


def test_a_single_process_needs_no_environment() -> None:
    assert "RANK" not in os.environ
    this = runtime.start("cpu")
    assert (this.rank, this.world_size, this.is_main, this.backend) == (0, 1, True, "gloo")
    grid = build_grid(AxesSection(), this)
    assert isinstance(grid, Grid) and grid.groups.tp.size() == 1
    assert runtime.start("cpu") == this  # a second start joins the first
    assert grid_of_one().groups.tp is None


def test_seeds_are_a_function_of_their_arguments() -> None:
    def draw(*args: int) -> float:
        seed_pass(*args)
        return torch.rand(()).item()

    first = draw(1, 2, 3)
    assert first == draw(1, 2, 3)
    others = [draw(1, 2, 4), draw(1, 3, 3), draw(2, 2, 3), draw(12, 3, 0)]
    assert len({first, *others}) == 5


def _fails_on_one(this: Runtime) -> None:
    if this.rank == 1:
        raise ValueError("rank one does not like this")
    dist.barrier()  # the other waits for it in vain


def _waits(this: Runtime) -> None:
    if this.rank == 1:
        time.sleep(600)
    dist.barrier()


def _dies(this: Runtime) -> None:
    os._exit(3)


@pytest.mark.slow
def test_a_failing_rank_fails_the_test_with_its_traceback() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 of 2(.|\n)*ValueError: rank one does not like this"):
        run_ranks(_fails_on_one, 2)
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_ranks_that_hang_or_die_do_not_hang_the_test() -> None:
    with pytest.raises(AssertionError, match="did not end within 5 s"):
        run_ranks(_waits, 2, timeout=5)
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(_dies, 2)
