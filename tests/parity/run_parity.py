"""`make parity`: every layout, model and task for 20 steps beside the single process, as a table.

Ends with 1 where the bound of `tests.helpers.run_differences` is broken. What is compared, and how, is told there.
"""

import sys
import tempfile
from pathlib import Path

from tests.helpers.layouts import LAYOUTS
from tests.helpers.parallel_runs import NUM_STEPS, TASKS, VARIANTS, Case
from tests.helpers.run_differences import BOUND, HEADER, compare, run_references
from tests.helpers.spawn import run_ranks


def main() -> int:
    """Prints the table and returns the exit code."""
    cases = [Case(layout, task, variant, NUM_STEPS) for layout in LAYOUTS for variant in VARIANTS for task in TASKS]
    print(HEADER, flush=True)
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "references.pt"
        run_ranks(run_references, 1, cases, file, timeout=1800)
        for num_ranks in sorted({layout.num_ranks for layout in LAYOUTS}):
            together = [case for case in cases if case.layout.num_ranks == num_ranks]
            differences = run_ranks(compare, num_ranks, together, file, True, timeout=3600)[0]
            for case, found in zip(together, differences, strict=True):
                where = f"{case.layout.name}, {case.variant}, {case.task}"
                broken += [f"{where}: {words}" for words in found.beyond_bounds()]
    print(
        f"{len(cases)} runs of {NUM_STEPS} steps beside the single process: losses and whole parameters, relative "
        f"differences, bound {BOUND:.0e}. {len(broken) or 'None'} broken."
    )
    print(*broken, sep="\n", end="\n" if broken else "")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
