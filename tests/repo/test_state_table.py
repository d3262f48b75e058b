"""Each cell of README's state table names a test that exists."""

import re
from pathlib import Path

from tests.helpers.layouts import LAYOUTS

ROOT = Path(__file__).parents[2]
STEP_TESTS = (ROOT / "tests/parity/test_parallel_step.py").read_text(encoding="utf-8")
FUNCTIONS = {"step": "test_step_equals_single_process", "bf16": "test_bf16_error_is_that_of_one_process"}
COLUMNS = [("step", "contrastive"), ("step", "mim"), ("bf16", "contrastive"), ("bf16", "mim")]


def test_cells_name_tests_and_stand_in_their_column() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|`]+?) \| (`\w+\[.*) \|$", readme, re.MULTILINE)
    assert {"TP", "SP", "PP", "VPP", "DP"} <= {axis for axis, _ in rows}
    layouts = {layout.name for layout in LAYOUTS}
    for _, cells in rows:
        found = re.findall(r"`(\w+)\[(\w+)-(\w+)\]`", cells)
        assert [(kind, task) for kind, _, task in found] == COLUMNS
        assert {layout for _, layout, _ in found} <= layouts, cells


def test_the_functions_behind_the_short_names_exist() -> None:
    for function in FUNCTIONS.values():
        assert f"def {function}(" in STEP_TESTS
