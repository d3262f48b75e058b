"""What a comparison of steps checks before it times, and what it prints."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megaeva.bench import matrix_work, plain
from megaeva.bench.captions import end_tokens, real_tokens, typical_tokens
from megaeva.bench.command import find_model
from megaeva.bench.compare import Comparison, alternate
from megaeva.bench.matrix_work import step_flops
from megaeva.bench.open_clip_peer import OpenClipStep, converted_weights
from megaeva.bench.step import (
    MegatronStep,
    StepTimes,
    Work,
    assert_same_embeddings,
    benchmark_step,
    example_batch,
    full_length,
    only,
    recipe,
)
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.model.text_tower import TextTower
from megaeva.parallel.runtime import start, stop
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
def test_the_row_fits_the_logs_table(peer: Any, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_work, "PRODUCT", (64, 64, 64))  # the ceiling's; in bf16 minutes where AVX2 is all
    times = benchmark_step(
        tiny("EVA02-CLIP-B-16"), batch_size=4, precision=precision, peer=peer, part="both", num_rounds=3
    )
    assert len(times.timed.ours_ms) == len(times.timed.peer_ms) == 3
    sentence, *_, row = times.report("megaeva bench step ...")
    header = next(line for line in LOG.splitlines() if "| command | ours ms | peer ms |" in line)
    assert len(cells(row)) == len(cells(header))
    assert cells(row)[cells(header).index("command")] == "`megaeva bench step ...`"
    assert times.captions in sentence


def test_the_ratio_is_of_rounds_and_says_its_range() -> None:
    timed = Comparison((10.0, 12.0, 33.0), (10.0, 10.0, 30.0))
    assert str(timed.ours_per_peer) == "1.1 (1-1.2)"
    assert timed.peer_per_ours.median == pytest.approx(30 / 33)
    times = StepTimes("plain", "captions", timed, batch_size=6, work=Work(ours=3e9, peer=4e9, ceiling=1e12))
    sentence, samples, products, row = times.report("c")
    assert "ours / peer 1.1 (1-1.2)" in sentence
    assert samples == "samples/s: ours 500.00, peer 600.00, ours / peer 0.909 (0.833-1)"
    assert "ours 0.00 TFLOP a step, 25 % of the 1000 GFLOP/s" in products and "peer 0.00 TFLOP a step, 40 %" in products
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


def test_real_captions_are_neither_lucky_nor_unlucky() -> None:
    cfg = find_model("EVA02-CLIP-B-16").text
    token_BL, text = real_tokens(cfg, 16)
    length_B = token_BL.argmax(-1) + 1
    assert (length_B[1:] >= length_B[:-1]).all() and "CuPL captions of 14." in text
    assert 25 <= length_B.max() <= 35


def test_operations_of_a_step_are_those_that_torch_counts() -> None:
    model = tiny("EVA02-CLIP-B-16")
    peer = plain.CLIP(model)
    token_BL, _ = end_tokens(model.text, 4)
    image_BCHW = example_batch(model, token_BL).image_BCHW
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        peer(image_BCHW, token_BL).backward()
    expected = step_flops(model, 4, model.text.context_length)
    text = model.text
    unseen = 4 * text.num_layers * 6 * text.context_length**2 * text.hidden_size  # torch multiplies masked scores too
    loss = 3 * 2 * 4 * 4 * model.embed_dim
    assert counted.get_total_flops() == pytest.approx(expected + unseen + loss)


def test_open_clips_step_is_ours() -> None:
    model = tiny("ViT-B-16")
    vision, text = model.vision, model.text
    theirs = open_clip.model.CLIP(
        model.embed_dim,
        {
            "layers": vision.num_layers, "width": vision.hidden_size, "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_heads, "image_size": vision.image_size,
            "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size,
        },
        {
            "context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.hidden_size,
            "heads": text.num_heads, "layers": text.num_layers,
        },
    )  # fmt: skip
    runtime = start("auto")
    try:
        batch = example_batch(model, typical_tokens(model.text, 4)[0])
        cfg = recipe(model, 4, "fp32")
        ours = MegatronStep(cfg, runtime, batch, converted_weights(theirs, model))
        peer = OpenClipStep(theirs, cfg, batch)
        losses = [(ours(), peer()) for _ in range(3)]
    finally:
        stop()
    for mine, other in losses:
        assert mine == pytest.approx(other, rel=1e-5)
    assert losses[2][0] < losses[0][0]


def test_only_one_tower_is_left() -> None:
    model = ModelSection.model_validate(VARIANTS["EVA02-CLIP-B-16"])
    assert only(model, "both") == model
    assert only(model, "vision").vision == model.vision and only(model, "vision").text.num_layers == 1
    assert only(model, "text").text == model.text and only(model, "text").vision.num_layers == 1
