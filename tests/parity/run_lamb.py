"""`python -m tests.parity.run_lamb`: 20 steps of both forms of LAMB, cut over ranks, beside a single process.

The toy towers of `tests/parallel/test_optimizer_parity.py`, in fp32, with state sharded by the distributed optimizer.
The single process stands beside timm's LAMB (form lamb) and DeepSpeed's formula (form eva). Ends with 1 where a
relative difference reaches the bound.
"""

import sys

from tests.helpers.spawn import run_ranks
from tests.parallel.test_optimizer_parity import (
    LONG,
    LONG_TOPOLOGIES,
    TOLERANCE,
    TOPOLOGIES,
    differences,
    on_one_process,
    train_on_all,
)


def main() -> int:
    """Prints the table and returns the exit code."""
    print(f"LAMB in fp32: largest relative difference, bound {TOLERANCE:.0e}")
    print(f"{'form':16} {'layout':16} {'beside':16} {'gradient norm':>14} {'whole parameter':>16}", flush=True)
    single, reference = run_ranks(on_one_process, 1)[0]
    found = [("one process", differences(single, reference))]
    for num_ranks, topologies in TOPOLOGIES.items():
        long = {name: axes for name, axes in topologies.items() if name in LONG_TOPOLOGIES}
        results = run_ranks(train_on_all, num_ranks, long)[0]
        found += [(name, differences(result, single)) for name, result in results.items()]
    worst = 0.0
    for variant in LONG:
        for layout, by_variant in found:
            norm, parameter = by_variant[variant]
            peer = "one process" if layout != "one process" else "formula" if variant.startswith("eva") else "timm"
            print(f"{variant:16} {layout:16} {peer:16} {norm:14.1e} {parameter:16.1e}")
            worst = max(worst, norm, parameter)
    print(f"largest: {worst:.1e}")
    return int(worst >= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
