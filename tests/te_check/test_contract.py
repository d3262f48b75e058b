"""Every name and argument of Transformer Engine that megaeva writes down is there, and the check sees what is not."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from tests.te_check import without_gpu
from tests.te_check.contract import faults, imported

ROOT = Path(__file__).parents[2]
BACKEND = ROOT / "megaeva" / "model" / "transformer_engine.py"


def test_everything_that_the_backend_uses_is_there() -> None:
    assert len(imported(ast.parse(BACKEND.read_text()))) >= 13
    assert faults(BACKEND.read_text()) == []


def test_what_stands_in_for_kernels_takes_what_they_take() -> None:
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.module import linear

    pairs = [
        (without_gpu._linear, te.Linear.forward),
        (without_gpu._attention, te.DotProductAttention.forward),
        (without_gpu._product, linear._linear_eager),
    ]
    for ours, theirs in pairs:
        taken, there = (inspect.signature(function).parameters for function in (ours, theirs))
        assert len(taken) <= len(there)
        named = {p.name for p in taken.values() if p.kind is p.KEYWORD_ONLY or p.default is not p.empty}
        assert named <= set(there), theirs


def _changed(old: str, new: str) -> str:
    source = BACKEND.read_text()
    assert old in source, f"{old!r} is no longer in {BACKEND.name}: change this test with it"
    return source.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    check_mxfp8_support,\n", "    check_mxfp9_support,\n", "check_mxfp9_support"),
        ("from transformer_engine.pytorch import autocast", "from transformer_engine.pytorch import cast", "cast"),
        ("recipes.Format.HYBRID", "recipes.Format.HYBRD", "Format.HYBRD does not exist"),
        ("amax_compute_algo=", "amax_algo=", "unexpected keyword argument 'amax_algo'"),
        ("amax_reduction_group=", "group=", "unexpected keyword argument 'group'"),
        ("bootstrap_backend=", "backend=", "unexpected keyword argument 'backend'"),
        ("shape=[rows, hidden_size], ", "", "missing a required argument: 'shape'"),
        ("quantization_state.is_first", "state.is_first", "FP8GlobalStateManager.state does not exist"),
        (
            "            attention_type=",
            "            kind=",
            "TEDotProductAttention.__init__(...): missing a required argument: 'attention_type'",
        ),
        (
            "attention_mask=None, attn_mask_type",
            "attention_mask=None, mask_type",
            "TEDotProductAttention.forward(...): missing a required argument: 'attn_mask_type'",
        ),
    ],
)
def test_a_wrong_name_or_argument_is_seen(old: str, new: str, message: str) -> None:
    found = faults(_changed(old, new))
    assert any(re.search(re.escape(message), fault) for fault in found), found
