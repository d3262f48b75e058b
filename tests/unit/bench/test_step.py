"""What a comparison of steps checks before it times, and what it prints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megaeva.bench.captions import end_tokens, typical_tokens
from megaeva.bench.compare import Comparison, alternate
from megaeva.bench.step import StepTimes, assert_same_embeddings, benchmark_step, full_length, only
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.model.text_tower import TextTower
from tests.helpers.tiny import load_full, random_state, single_grid, tiny

LOG = (Path(__file__).parents[3] / "benchmarks" / "log.md").read_text(encoding="utf-8")


def text_tower() -> TextTower:
    model = tiny("EVA02-CLIP-B-16")
    grid = single_grid()
    tower = TextTower(model.text, model.embed_dim, grid=grid)
    load_full(tower, random_state({name: p.shape for name, p in tower.named_parameters()}), grid)
    return tower


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("peer", ["plain", "padded", "none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_row_fits_the_logs_table(peer: Any, precision: Any) -> None:
    times = benchmark_step(
        tiny("EVA02-CLIP-B-16"), batch_size=4, precision=precision, peer=peer, part="both", num_rounds=3
    )
    assert len(times.timed.ours_ms) == len(times.timed.peer_ms) == 3
    sentence, row = times.report("megaeva bench step ...")
    header = next(line for line in LOG.splitlines() if "| command | ours ms | peer ms |" in line)
    assert len(cells(row)) == len(cells(header))
    assert cells(row)[cells(header).index("command")] == "`megaeva bench step ...`"
    assert times.captions in sentence


def test_the_ratio_is_of_rounds_and_says_its_range() -> None:
    timed = Comparison((10.0, 12.0, 33.0), (10.0, 10.0, 30.0))
    assert str(timed.ours_per_peer) == "1.1 (1-1.2)"
    assert timed.peer_per_ours.median == pytest.approx(30 / 33)
    sentence, row = StepTimes("plain", "captions", timed).report("c")
    assert "ours / peer 1.1 (1-1.2)" in sentence
    assert cells(row)[3:6] == ["12", "10", "1.1 (1-1.2)"]


def test_the_sides_take_turns_in_being_first() -> None:
    order: list[str] = []
    alternate(lambda: order.append("o"), lambda: order.append("p"), device="cpu", num_rounds=3)
    assert "".join(order) == "oppoop"


def test_full_length_computes_every_token_and_ends() -> None:
    tower = text_tower()
    lengths: list[int] = []
    tower.blocks.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[0]))
    token_BL, _ = typical_tokens(tower.cfg, 4)
    longest = int(token_BL.argmax(-1).max()) + 1
    token_BL[:, longest - 2] = tower.cfg.vocab_size - 1  # shorten all by one
    token_BL[:, longest - 1 :] = 0
    tower(token_BL)
    with full_length(tower):
        tower(token_BL)
    tower(token_BL)
    assert lengths == [longest - 1, tower.cfg.context_length, longest - 1]
    assert_same_embeddings(tower, token_BL, 1e-5)


def test_a_text_tower_that_cuts_too_much_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = text_tower()
    token_BL, _ = end_tokens(tower.cfg, 4)
    whole = TextTower.forward
    monkeypatch.setattr(TextTower, "forward", lambda self, token: whole(self, token[:, 1:]))
    with pytest.raises(AssertionError, match="differ by"):
        assert_same_embeddings(tower, token_BL, 1e-5)


@pytest.mark.parametrize("variant", ["EVA02-CLIP-B-16", "Demo-Student"])
def test_captions(variant: str) -> None:
    cfg = ModelSection.model_validate(VARIANTS[variant]).text
    token_BL, text = end_tokens(cfg, 5)
    assert (token_BL.argmax(-1) == cfg.context_length - 1).all() and str(cfg.context_length) in text
    token_BL, text = typical_tokens(cfg, 300)
    length_B = token_BL.argmax(-1) + 1
    assert token_BL.shape == (300, cfg.context_length)
    assert f"the longest {int(length_B.max())}, context {cfg.context_length}" in text
    if variant == "EVA02-CLIP-B-16":
        assert (length_B.min(), length_B.max()) == (10, 20)
    assert (token_BL.gather(1, (length_B - 1)[:, None]) == token_BL.max()).all()
    assert not (torch.arange(cfg.context_length) >= length_B[:, None]).logical_and(token_BL != 0).any()


def test_only_one_tower_is_left() -> None:
    model = ModelSection.model_validate(VARIANTS["EVA02-CLIP-B-16"])
    assert only(model, "both") == model
    assert only(model, "vision").vision == model.vision and only(model, "vision").text.num_layers == 1
    assert only(model, "text").text == model.text and only(model, "text").vision.num_layers == 1
