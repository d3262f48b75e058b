"""Each cell of README's state table names a test that exists, of a layout with the axes that its row names."""

import re
from pathlib import Path

from tests.helpers.layouts import LAYOUTS, Layout

ROOT = Path(__file__).parents[2]
STEP_TESTS = (ROOT / "tests/parity/test_parallel_step.py").read_text(encoding="utf-8")
FUNCTIONS = {"step": "test_step_equals_single_process", "bf16": "test_bf16_error_is_that_of_one_process"}
COLUMNS = [("step", "contrastive"), ("step", "mim"), ("bf16", "contrastive"), ("bf16", "mim")]


def test_cells_name_tests_and_stand_in_their_column() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|`]+?) \| (`\w+\[.*) \|$", readme, re.MULTILINE)
    assert {"TP", "SP", "PP", "VPP", "DP"} <= {axis for axis, _ in rows}
    layouts = {layout.name: layout for layout in LAYOUTS}
    for axes, cells in rows:
        found = re.findall(r"`(\w+)\[(\w+)-(\w+)\]`", cells)
        assert [(kind, task) for kind, _, task in found] == COLUMNS
        for _, name, _ in found:
            layout = layouts[name]
            if axes == "towers apart":
                assert layout.vision.tp != layout.second.tp, cells
            else:
                assert _axes_of(layout) == set(re.split(r" [+x] ", axes)) - ({"TP"} if "SP" in axes else set()), cells


def _axes_of(layout: Layout) -> set[str]:
    """The axes of the vision tower, SP for TP + SP and VPP for PP + VPP."""
    vision = layout.vision
    ranks = {"TP": vision.tp > 1 and not vision.sequence_parallel, "SP": vision.tp > 1 and vision.sequence_parallel}
    stages = {"PP": vision.pp > 1 and vision.vpp == 1, "VPP": vision.vpp > 1}
    found = ranks | stages | {"DP": layout.num_ranks > vision.tp * vision.pp}
    return {axis for axis, is_there in found.items() if is_there}


def test_the_functions_behind_the_short_names_exist() -> None:
    for function in FUNCTIONS.values():
        assert f"def {function}(" in STEP_TESTS
