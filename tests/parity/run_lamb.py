"""`python -m tests.parity.run_lamb`: 20 steps of both forms of LAMB, cut over ranks, beside a single process.

The toy towers of `tests/parallel/test_optimizer_parity.py`, in fp32, with state sharded by the distributed optimizer.
The single process stands beside timm's LAMB (form lamb) and DeepSpeed's formula (form eva). Ends with 1 where a
relative difference reaches the bound.
"""

import sys

from tests.helpers.spawn import run_ranks
from tests.parallel.test_optimizer_parity import STEPS, TOLERANCE, TOPOLOGIES, differences, on_one_process, train_on_all

FORMS = {"lamb": "eva", "lamb of the paper": "lamb"}
LAYOUTS = {2: ("dp2", "tp2"), 4: ("tp2 dp2",)}


def main() -> int:
    """Prints the table and returns the exit code."""
    print(f"LAMB, {STEPS} steps in fp32: largest relative difference, bound {TOLERANCE:.0e}")
    print(f"{'form':6} {'layout':16} {'beside':16} {'gradient norm':>14} {'whole parameter':>16}", flush=True)
    single, reference = run_ranks(on_one_process, 1)[0]
    found = [("one process", differences(single, reference))]
    for num_ranks, names in LAYOUTS.items():
        results = run_ranks(train_on_all, num_ranks, {name: TOPOLOGIES[num_ranks][name] for name in names})[0]
        found += [(name, differences(results[name], single)) for name in names]
    worst = 0.0
    for variant, form in FORMS.items():
        for layout, by_variant in found:
            norm, parameter = by_variant[variant]
            peer = "one process" if layout != "one process" else "timm" if form == "lamb" else "formula"
            print(f"{form:6} {layout:16} {peer:16} {norm:14.1e} {parameter:16.1e}")
            worst = max(worst, norm, parameter)
    print(f"largest: {worst:.1e}")
    return int(worst >= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
