"""`megaeva bench loss`: what it refuses, what it checks before it times, what it counts and what it prints."""

import dataclasses
import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from megaeva import cli
from megaeva.bench import loss, loss_errors, loss_memory, loss_ranks, loss_sides
from megaeva.bench.compare import take_turns
from megaeva.bench.loss_sides import Features, Outcome, draw, engine, plain_formula
from megaeva.errors import UserError

COMMAND = "megaeva bench loss ..."


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "loss", *arguments])


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(text: str) -> list[list[str]]:
    """Cells of the rows for the log, which begin with a date."""
    return [cells(line) for line in text.splitlines() if line.startswith("| 2")]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--batch", "16", "--ranks", "3"), "--batch 16 is of all ranks together"),
        (("--batch", "18", "--batch", "16", "--ranks", "3"), "use --batch 18"),
        (("--batch", "100000000"), "use a smaller batch or --peer none"),
        (("--batch", "1"), "--batch"),
        (("--peer", "openclip"), "'open_clip'"),
        (("--precision", "fp16"), "'bf16'"),
    ],
)
def test_what_cannot_be_run_is_explained(arguments: tuple[str, ...], expected: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "Traceback" not in result.output


def test_a_peer_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("--batch", "16")
    assert result.exit_code == 2
    assert "pip install 'megaeva[eval]'" in result.stderr and "--peer none" in result.stderr


@pytest.mark.slow
def test_a_measuring_process_that_dies_is_explained() -> None:
    with pytest.raises(UserError, match=r"measures no such side with 8 pairs ended with exit code 1.* smaller --batch"):
        loss_memory.measure_alone(loss_memory.Job("no such side", 8, 4, "fp32", 1, 1))


# ----------------------------------------------------------------------------------------------------------- the sides


def test_features_are_unit_rows_with_paired_cosines() -> None:
    features = draw(512, 256)
    torch.testing.assert_close(features.image_BE.norm(dim=1), torch.ones(512))
    torch.testing.assert_close(features.text_BE.norm(dim=1), torch.ones(512))
    cosine_B = (features.image_BE * features.text_BE).sum(1)
    assert abs(cosine_B.mean().item() - loss_sides.PAIR_COSINE) < 0.02
    assert torch.equal(features.text_BE, draw(512, 256).text_BE)
    assert draw(4, 8, precision="bf16").image_BE.dtype == torch.bfloat16
    assert draw(4, 8, precision="bf16").log_scale.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sides_compute_the_same(precision: Any) -> None:
    features = draw(37, 16, precision=precision)
    losses, apart = loss.check_sides(features, precision)
    assert set(losses) == {"fp32", "engine", "clip_loss", "open_clip"}
    assert losses["engine"] == pytest.approx(losses["fp32"], rel=1e-6)
    assert apart <= loss.GRADIENT_TOLERANCE[precision]


@pytest.mark.parametrize("part", ["loss", "image_BE", "text_BE", "log_scale"])
@pytest.mark.parametrize("side", ["engine", "whole_loss"])
def test_a_side_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, side: str, part: str
) -> None:
    right = getattr(loss, side)

    def wrong(features: Features) -> Outcome:
        outcome = right(features)
        return dataclasses.replace(outcome, **{part: getattr(outcome, part) * (1 + 1e-4)})

    monkeypatch.setattr(loss, side, wrong)
    with pytest.raises(AssertionError, match="differ"):
        loss.check_sides(draw(37, 16), "fp32")


def test_through_normalisation_is_what_autograd_gives() -> None:
    features = draw(9, 5).to(torch.float64)
    normalised = loss_sides.differentiate(
        lambda image_BE, text_BE, log_scale: _formula(
            torch.nn.functional.normalize(image_BE), torch.nn.functional.normalize(text_BE), log_scale
        ),
        features,
    )
    _, apart = loss_sides.difference(loss_sides.through_normalisation(plain_formula(features), features), normalised)
    assert apart < 1e-6  # the rows are of length 1 to fp32 only


def _formula(image_BE: torch.Tensor, text_BE: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    logits_BB = log_scale.exp() * (image_BE @ text_BE.T)
    target_B = torch.arange(len(image_BE))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits_BB, target_B) + cross_entropy(logits_BB.T, target_B)) / 2


def test_the_difference_is_relative_and_of_the_worst_gradient() -> None:
    outcome = engine(draw(9, 5))
    other = dataclasses.replace(outcome, loss=outcome.loss * 1.01, text_BE=outcome.text_BE * 1.5)
    assert loss_sides.difference(other, outcome) == pytest.approx((0.01, 0.5), rel=1e-3)
    zero = torch.zeros(3)
    assert loss_sides.relative(zero, zero) == 0
    assert loss_sides.relative(torch.ones(3), zero) == float("inf")


# ---------------------------------------------------------------------------------------------------- what is measured


def test_three_sides_take_turns() -> None:
    order: list[str] = []
    times = take_turns([lambda name=name: order.append(name) for name in "abc"], device="cpu", num_rounds=2)
    assert "".join(order) == "abccba"
    assert [len(of_one) for of_one in times] == [2, 2, 2]


@pytest.mark.parametrize("shape", [(16, 32), (64, None), (None, 16), (256, 256)])
@pytest.mark.parametrize("way", ["mm", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_products_alone_are_the_four(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int | None, int | None], way: str, dtype: torch.dtype
) -> None:
    if way == "onednn" and not loss.onednn_multiplies(dtype):
        pytest.skip(f"oneDNN has no products of {dtype} on this CPU")
    features = draw(70, 8).to(dtype)
    monkeypatch.setattr(loss.MatrixProducts, "SHAPES", (shape,))
    products = loss.MatrixProducts(features.image_BE, features.text_BE)
    multiply, count = {"mm": torch.mm, "onednn": loss._onednn}[way], 0

    def counted(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += one.shape[0] * one.shape[1] * other.shape[1]
        return multiply(one, other)

    products.ways = {name: dataclasses.replace(way, multiply=counted) for name, way in products.ways.items()}
    products._weights.fill_(1.0)
    products()
    assert count == 4 * 70 * 70 * 8
    # Weights of 1: every gradient row is the sum of the other side's rows, whatever was there before.
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    text_E, image_E = features.text_BE.float().sum(0), features.image_BE.float().sum(0)
    torch.testing.assert_close(products.grad_image_BE.float(), text_E.expand(70, -1), **close)
    torch.testing.assert_close(products.grad_text_BE.float(), image_E.expand(70, -1), **close)


def test_onednn_multiplies_in_full_fp32() -> None:
    features = draw(70, 256)
    product = loss._onednn(features.image_BE, features.text_BE.T)
    exact = features.image_BE.double() @ features.text_BE.T.double()
    assert loss_sides.relative(product, exact) < 1e-6


_PEAKS = """
import torch
from megaeva.bench.loss_memory import MIB, peak_resident_bytes

def one_after_the_other():
    for _ in range(2):
        torch.ones(64 * MIB, dtype=torch.uint8)

def together():
    _ = torch.ones(64 * MIB, dtype=torch.uint8), torch.ones(64 * MIB, dtype=torch.uint8)

print(peak_resident_bytes(one_after_the_other) / MIB, peak_resident_bytes(together) / MIB)
"""


def test_the_peak_is_of_what_was_resident_at_once() -> None:
    # In a process that did nothing else, as it is meant: here, what other tests left is freed meanwhile.
    done = subprocess.run([sys.executable, "-c", _PEAKS], capture_output=True, text=True, check=True)
    one, both = map(float, done.stdout.split())
    assert one == pytest.approx(64, rel=0.1)
    assert both == pytest.approx(128, rel=0.1)


@pytest.mark.slow
def test_the_peer_alone_keeps_four_matrices_of_logits() -> None:
    """That the measuring process sees them: two of logits and two of log-softmax, fp32."""
    alone = loss_memory.measure_alone(loss_memory.Job("open_clip", 2048, 16, "fp32", 2, 1))
    assert len(alone.times_ms) == 2 and min(alone.times_ms) > 0
    assert 4 * 16 * 0.95 < alone.peak_mib < 5 * 16 * 1.1


def test_errors_find_a_loss_that_loses_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(features: Features) -> Outcome:
        outcome = plain_formula(features)
        return dataclasses.replace(outcome, loss=outcome.loss * (1 + 1e-5))

    monkeypatch.setattr(loss_errors, "engine", plain_formula)
    assert all(
        errors.ratio(name) <= 1 for errors in loss_errors.measure_errors(32, 16) for name in loss_errors.QUANTITIES
    )
    monkeypatch.setattr(loss_errors, "engine", coarse)
    measured = loss_errors.measure_errors(32, 16)
    assert {(errors.inputs, errors.scale) for errors in measured} == {
        (inputs, scale)
        for inputs in ("random pairs", "all pairs equal", "text = image", "one huge logit")
        for scale in (1.0, 14.3, 100.0)
    }
    assert next(errors for errors in measured if errors.inputs == "random pairs").ratio("loss") > 10
    assert "of the loss" in list(loss_errors.error_lines(measured))[-1]


def test_the_table_of_errors_prints_what_it_divides_by() -> None:
    ours, plain, reference = (dict.fromkeys(loss_errors.QUANTITIES, x) for x in (1e-20, 4.7e-26, 1e-12))
    ours["loss"], plain["loss"], reference["loss"] = 3e-6, 2e-6, 2.0
    ours["log_scale"], plain["log_scale"], reference["log_scale"] = 1.2e-7, 1e-9, 4.0
    *_, row, star, worst = loss_errors.error_lines([loss_errors.Errors("some", 2.0, ours, plain, reference)])
    assert cells(row)[2:] == [
        "3.0e-06 / 2.0e-06 = 1.5",
        "1.0e-20 / 1.8e-15* = 5.63e-06",  # 2^-50 of the scale
        "1.0e-20 / 1.8e-15* = 5.63e-06",
        "1.2e-07 / 2.4e-07* = 0.503",  # 2^-24 of the exact value
    ]
    assert star.startswith("* plain fp32 is off by less than this floor")
    assert worst.startswith("worst: 3.0e-06 / 2.0e-06 = 1.5 times")


@pytest.mark.parametrize(
    ("value", "expected"), [(0.01234, "0.0123"), (9.5, "9.5"), (26.04, "26"), (999.4, "999"), (123456.7, "123457")]
)
def test_small_figures_keep_three_digits(value: float, expected: str) -> None:
    assert loss.figure(value) == expected


def test_hard_inputs_are_hard() -> None:
    inputs = dict(loss_errors.hard_inputs(8, 16, 100.0, 0))
    logits = {
        name: features.log_scale.exp() * features.image_BE @ features.text_BE.T for name, features in inputs.items()
    }
    assert logits["all pairs equal"].std() < 1e-4
    torch.testing.assert_close(logits["text = image"].diagonal(), torch.full((8,), 100.0))
    assert logits["one huge logit"].max() > 80_000 and logits["one huge logit"].argmax() == 7


# ----------------------------------------------------------------------------------------------------- what is printed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_command_beside_open_clip(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(loss, "measure_alone", loss_memory.run)
    result = run("--batch", "48", "--dim", "8", "--precision", precision, "--rounds", "2", "--threads", "1")
    assert result.exit_code == 0, result.output
    command = (
        f"megaeva bench loss --batch 48 --dim 8 --precision {precision} --peer open_clip --ranks 1 --rounds 2 "
        "--threads 1"
    )
    assert result.stdout.splitlines()[0] == command
    engine_row, whole_row = rows(result.stdout)
    for row, side in ((engine_row, "engine"), (whole_row, "clip_loss")):
        assert row[2:4] == [f"`{command}`", side]
        assert len(row) == 12
        assert all(float(row[index].split()[0]) >= 0 for index in (4, 5, 6, 7, 8, 9, 10))
    assert ("error against fp64" in result.stdout) == (precision == "fp32")


def test_the_command_at_several_sizes_says_how_memory_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {64: loss_memory.Alone((3.0, 5.0, 4.0), 2**20), 256: loss_memory.Alone((40.0,), 2**23)}
    monkeypatch.setattr(loss, "measure_alone", lambda job: measured[job.num_pairs])
    result = run("--batch", "64", "--batch", "256", "--dim", "16", "--peer", "none", "--rounds", "3")
    assert result.exit_code == 0, result.output
    small, large = rows(result.stdout)
    assert small[3:5] == ["engine, 64 pairs", "4"] and small[9] == "1"
    assert large[3:5] == ["engine, 256 pairs", "40"] and large[9] == "8"
    assert len(small) == len(large) == 12
    assert "from 64 to 256 pairs memory grows as B^1.50" in result.stdout


def test_the_report_says_who_is_faster() -> None:
    times = {"engine": (10.0, 11.0), "clip_loss": (20.0, 20.0), "products": (9.0, 10.0), "open_clip": (30.0, 22.0)}
    alone = {
        side: loss_memory.Alone((1.0,), mib * loss_memory.MIB)
        for side, mib in (("engine", 3), ("clip_loss", 4), ("open_clip", 100))
    }
    losses = {"engine": 9.7, "clip_loss": 9.7, "open_clip": 9.5, "fp32": 9.7}
    lines = list(loss.LossTimes(times, alone, losses, 1e-7).report(COMMAND))
    assert "open_clip 9.50000 (-0.2 to itself in fp32" in lines[0]
    assert (
        "the bounds on time, products and memory are this line's) 10.5 ms" in lines[1]
        and "2.5 (2-3)x as fast" in lines[1]
        and lines[1].endswith(": 3.0 %")
    )
    assert lines[3].startswith("clip_loss (") and "no bound is this line's) 20 ms" in lines[3]
    assert cells(lines[2])[2:11] == [
        f"`{COMMAND}`",
        "engine",
        "10.5",
        "9.5",
        "26",
        "2.5 (2-3)",
        "1.11 (1.1-1.11)",
        "3",
        "100",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_agree_with_one_and_send_less(precision: str) -> None:
    result = run("--batch", "64", "--dim", "32", "--precision", precision, "--ranks", "2", "--rounds", "2")
    assert result.exit_code == 0, result.output
    found = rows(result.stdout)
    assert [row[3] for row in found] == ["local_loss=True", "local_loss=False"]
    assert {len(row) for row in found} == {11}
    assert "the loss is the same number on all 2 ranks" in result.stdout


def test_ranks_that_differ_from_one_process_are_not_timed(runtime: Any) -> None:
    features = draw(12, 8)
    job = loss_ranks.RanksJob(1, 12, 8, "fp32", with_peers=False, num_rounds=1, num_threads=1)
    assert loss_ranks._check(0, {"clip_loss": loss_ranks._ours}, features, features, job) == (0, 0)
    for part in ("loss", "image_BE", "text_BE", "log_scale"):

        def wrong(features: Features, part: str = part) -> Outcome:
            outcome = loss_ranks._ours(features)
            return dataclasses.replace(outcome, **{part: getattr(outcome, part) * (1 + 1e-4)})

        with pytest.raises(AssertionError, match="differ"):
            loss_ranks._check(0, {"clip_loss": wrong}, features, features, job)


def test_the_report_of_ranks_has_a_row_for_each_peer() -> None:
    times = {"clip_loss": (10.0, 12.0), "local_loss=True": (20.0, 30.0), "local_loss=False": (30.0, 30.0)}
    sent = {"clip_loss": 2**20, "local_loss=True": 2**22, "local_loss=False": 2**22}
    report = loss_ranks.RankTimes(2, times, sent, 0.0, 1e-7).report(COMMAND)
    first, second = rows("\n".join(report))
    assert first[2:10] == [f"`{COMMAND}`", "local_loss=True", "11", "25", "2.25 (2-2.5)", "1.00", "4.00", "0.250"]
    assert second[3] == "local_loss=False" and len(second) == len(first) == 11
    alone = loss_ranks.RankTimes(2, {"clip_loss": (10.0,)}, {"clip_loss": 2**20}, 0.0, 1e-7).report(COMMAND)
    (row,) = rows("\n".join(alone))
    assert row[3] == "none" and row[7] == "1.00" and len(row) == 11
