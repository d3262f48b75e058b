"""`make plan-check` in small: the planner's peak of a rank is what its tensors take, to the limit that is promised."""

from dataclasses import replace

from megaeva.bench.plan_check import RUNS, Run, furthest, peak_bytes, within_limit
from megaeva.parallel.runtime import Runtime
from tests.helpers.spawn import run_ranks

# With few rows, so that the state is most of it; all of them, larger: make plan-check.
CONTRASTIVE = [replace(run, layers=3, batch=8) for run in RUNS if run.ranks == 2 and run.micro_batch is None][:2]
DISTILLED = [replace(run, layers=3, batch=8, micro_batch=2) for run in RUNS if run.task == "mim" and run.ranks == 2][:1]
SMALL = CONTRASTIVE + DISTILLED


def peak(this: Runtime, run: Run) -> int:
    return peak_bytes(run, this)


def test_the_peak_of_two_ranks() -> None:
    for run in SMALL:
        ranks = run_ranks(peak, 2, run)
        figure = furthest(run, ranks)
        assert within_limit([figure]), figure
        # A tower's layer forgotten, or one counted twice, is more.
        assert not within_limit([furthest(replace(run, layers=4), ranks)])
