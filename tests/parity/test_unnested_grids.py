"""A step whose towers' ranks do not nest: loss and all gradients equal the single process's.

The data block is then larger than either tower's data rank: 6 ranks read the same 12 samples, of which tp=2 leaves 4
for each of three data ranks and tp=3 leaves 6 for each of two.
"""

from pathlib import Path

import pytest

from megaeva.config.schema import AxesSection
from megaeva.parallel import grid as grid_module
from megaeva.parallel.runtime import Runtime
from tests.helpers.layouts import Layout
from tests.helpers.parallel_runs import TASKS, Case
from tests.helpers.run_differences import compare, run_references
from tests.helpers.spawn import run_ranks

_TP2, _TP3 = AxesSection(tp=2), AxesSection(tp=3)
_SP3 = AxesSection(tp=3, sequence_parallel=True)
# Six heads divide by both.
LAYOUTS = (
    Layout("vision_tp2_second_tp3", 6, _TP2, _TP3, num_samples=12, num_heads=6),
    Layout("vision_tp3_sp_second_tp2", 6, _SP3, _TP2, num_samples=12, num_heads=6),
    Layout("vision_pp3_second_tp2", 6, AxesSection(pp=3), _TP2, microbatches=2, num_samples=12, num_heads=6),
)
CASES = [Case(layout, task, "EVA02-CLIP-L-14") for layout in LAYOUTS for task in TASKS]


def test_step_equals_single_process(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "build_grid", grid_module.build_grid)  # puts back what the references replace
    file = tmp_path / "references.pt"
    run_references(runtime, CASES, file)
    for case, found in zip(CASES, run_ranks(compare, 6, CASES, file)[0], strict=True):
        assert case.layout.num_blocks == 1 and case.layout.num_ranks == 6
        assert found.gradient is not None
        assert not found.beyond_bounds(), (case.layout.name, case.task, found)
