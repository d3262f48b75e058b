"""All layouts of a number of ranks run in one start of processes: it costs more than they do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest

from tests.helpers.layouts import LAYOUTS, Layout
from tests.helpers.parallel_runs import TASKS, VARIANTS, Case
from tests.helpers.run_differences import Difference, compare, run_references
from tests.helpers.spawn import run_ranks

Kind = Literal["step", "training", "bf16"]
Compared = list[tuple[Case, Difference]]
Results = Callable[[Kind, Layout, str], Compared]

# One layout of each kind steps with every model here; the others step with one and train with another, in turn.
# `make parity` has every layout with every model.
_EVERY_MODEL = ("accumulate4", "tp2", "tp2_sp", "pp2_vpp2_accumulate4", "dp2", "tp2_sp_pp2_accumulate4")
_TRAINING_STEPS = 3
# With these a tower is locked in one more run.
_FROZEN: dict[str, Literal["vision", "text"]] = {
    "tp2": "vision", "dp2": "vision", "pp2_accumulate4": "vision", "vision_pp2_second_tp2": "text",
}  # fmt: skip


def _cases(kind: Kind, layout: Layout, task: str) -> list[Case]:
    place = LAYOUTS.index(layout)
    mine, next_one = (VARIANTS[(place + more) % len(VARIANTS)] for more in (0, 1))
    if kind == "training":
        trained = Case(layout, task, mine, _TRAINING_STEPS)
        locked = layout.name in _FROZEN and task == "contrastive"
        return [trained, replace(trained, frozen=(_FROZEN[layout.name],))] if locked else [trained]
    # Gradients are compared, which no rank has whole under the distributed optimizer.
    layout = replace(layout, distributed_optimizer=False, overlap=False)
    if kind == "bf16":
        return [Case(layout, task, mine, precision="bf16")]
    return [Case(layout, task, variant) for variant in (VARIANTS if layout.name in _EVERY_MODEL else [next_one])]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """(kind, layout, task) -> its cases, each with its difference from the single process."""
    kinds: tuple[Kind, ...] = ("step", "training", "bf16")
    cases = [case for layout in LAYOUTS for task in TASKS for kind in kinds for case in _cases(kind, layout, task)]
    file = tmp_path_factory.mktemp("parity") / "references.pt"
    found: dict[Case, Difference] = {}
    failed: set[int] = set()

    def of(kind: Kind, layout: Layout, task: str) -> Compared:
        wanted = _cases(kind, layout, task)
        num_ranks = layout.num_ranks
        if wanted[0] not in found:
            # A layout that hangs is waited for once.
            assert num_ranks not in failed, f"an earlier test tells how the processes of {num_ranks} ranks failed"
            failed.add(num_ranks)
            if not file.exists():
                run_ranks(run_references, 1, cases, file, timeout=300)
            together = [case for case in cases if case.layout.num_ranks == num_ranks]
            differences = run_ranks(compare, num_ranks, together, file, timeout=600)[0]
            found.update(zip(together, differences, strict=True))
            failed.remove(num_ranks)
        return [(case, found[case]) for case in wanted]

    return of
