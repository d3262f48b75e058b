"""One rank's share of a full-size model, rehearsed without memory, and small ones for real, against the planner."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from megaeva.cli import app
from megaeva.config import check_world, load
from megaeva.config.schema import ModelSection
from megaeva.config.variants import VARIANTS
from megaeva.errors import ConfigError, UserError
from megaeva.ops import attention, native_devices
from megaeva.planning import rehearse as rehearsal
from megaeva.planning.command import _teacher, run_rehearsal
from megaeva.planning.meter import Meter, Products16, allocations
from megaeva.planning.rehearse import Rehearsal, rehearsal_lines, rehearse

RECIPES = Path(__file__).parents[3] / "recipes"
RECIPE_NAMES = [path.name for path in sorted(RECIPES.glob("*.yaml")) if "\nrounds:" not in path.read_text("utf-8")]

# Of each recipe one share with few layers, mostly a stage in the middle: (world size, rank, what is set).
SHARES: dict[str, tuple[int, int, list[str]]] = {
    "clip_eva02_b16.yaml": (16, 5, ["parallel.vision.pp=4"]),
    "clip_eva02_e14plus.yaml": (144, 77, ["parallel.vision.pp=8"]),
    "clip_eva02_l14.yaml": (32, 9, ["parallel.vision.pp=4"]),
    "clip_eva_18b.yaml": (288, 25, ["parallel.vision.pp=12", "train.micro_batch_size=1"]),
    "clip_eva_8b.yaml": (96, 37, ["parallel.vision.pp=4"]),
    "clip_eva_8b_448.yaml": (96, 95, ["parallel.vision.pp=4"]),
    "demo_clip.yaml": (2, 1, ["parallel.vision.pp=2"]),
    "demo_mim.yaml": (2, 0, ["parallel.vision.tp=2", "parallel.vision.sequence_parallel=true"]),
    "demo_teacher.yaml": (2, 1, []),
    "mim_eva01_g14.yaml": (32, 13, ["parallel.vision.pp=8"]),
    "mim_eva02_b.yaml": (16, 15, ["parallel.vision.pp=4"]),
    "mim_eva02_l14.yaml": (32, 0, ["parallel.vision.pp=4"]),
    "mim_eva_18b.yaml": (64, 40, ["parallel.vision.pp=8"]),
    "mim_eva_8b.yaml": (64, 63, ["parallel.vision.pp=8"]),
}


def rehearsed(name: str, world_size: int, rank: int, overrides: list[str], *, meta: bool = True) -> Rehearsal:
    cfg = load(RECIPES / name, overrides)
    check_world(cfg, world_size)
    return rehearse(cfg, world_size, rank, _teacher(cfg, RECIPES / name, None), meta=meta)


def check(one: Rehearsal) -> None:
    predicted, measured = one.model_bytes
    assert predicted == pytest.approx(measured, rel=0.002)
    for piece in one.pieces:
        if piece.flops is not None:
            assert piece.flops[0] == pytest.approx(piece.flops[1], rel=0.01), piece.name
        # Without memory the loss's tile, inside an operator, is predicted and not seen.
        if not (one.meta and piece.name == "loss"):
            assert piece.work_bytes[0] == pytest.approx(piece.work_bytes[1], rel=0.05), piece.name


@pytest.mark.parametrize("name", ["demo_clip.yaml", "demo_mim.yaml"])
def test_without_memory_as_with_it(name: str) -> None:
    real, meta = (rehearsed(name, 2, 1, ["parallel.vision.tp=2"], meta=meta) for meta in (False, True))
    check(real)
    check(meta)
    # Without values nobody can agree on them: 26 numbers of the loss.
    agreement = {("all-gather", 2): 26 * 8} if real.cfg.task == "contrastive" else {}
    assert real.meter.sent - meta.meter.sent == agreement
    assert meta.model_bytes == pytest.approx(real.model_bytes, rel=0.002)
    assert [piece.flops for piece in meta.pieces] == [piece.flops for piece in real.pieces]
    for piece, twin in zip(meta.pieces, real.pieces, strict=True):
        if piece.name != "loss":
            assert piece.work_bytes[1] == pytest.approx(twin.work_bytes[1], rel=0.01)
    assert any("values mean nothing" in line for line in rehearsal_lines(real))
    assert any(line.startswith("all-reduce") for line in rehearsal_lines(real))
    hidden = [any("inside of operators" in line for line in rehearsal_lines(one)) for one in (real, meta)]
    assert hidden == [False, True]


def test_what_is_allocated_within_an_operator_and_given_back_is_counted() -> None:
    x = torch.ones(256, 256)
    with allocations() as found:
        kept = (x @ x).add_(1)
        torch.linalg.inv(x + torch.eye(256))
    assert found.kept == kept.nbytes == 4 * 256 * 256
    assert 3 * kept.nbytes <= found.peak < 8 * kept.nbytes


@pytest.mark.parametrize(("m", "k", "n"), [(3, 5, 7), (0, 4, 2), (3000, 17, 2900), (2, 1 << 22, 3)])
def test_products_in_pieces(m: int, k: int, n: int) -> None:
    a, b, bias = torch.rand(m, k).bfloat16(), torch.rand(n, k).bfloat16().T, torch.rand(n).bfloat16()
    with Products16():
        product, biased = a @ b, torch.addmm(bias, a, b)
    exact = a.float() @ b.float()
    torch.testing.assert_close(product.float(), exact, rtol=0.01, atol=0)
    torch.testing.assert_close(biased, product + bias)


@pytest.mark.parametrize("recompute", ["full", "none"])
def test_each_pass_takes_what_was_predicted(recompute: str) -> None:
    """For real, in 16 bits: sequence parallelism gathers a gradient, recomputed layers are gone when they are done."""
    cut = [f"parallel.{tower}.{key}" for tower in ("vision", "text") for key in ("tp=2", "sequence_parallel=true")]
    again = [f"parallel.{tower}.recompute={recompute}" for tower in ("vision", "text")]
    check(rehearsed("demo_clip.yaml", 2, 1, [*cut, *again, "train.precision=bf16"], meta=False))


@pytest.mark.skipif("cpu" not in native_devices("attention"), reason="the operator is not built")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(17, 4, 6, 32), (50, 2, 3, 64)])
def test_the_operators_flops_are_those_of_its_definition(shape: tuple[int, int, int, int], causal: bool) -> None:
    """PyTorch's own count of its products, mask or none, is what the rehearsal counts of the native operator."""
    length, batch, heads, width = shape
    qkv = torch.randn(length, batch, 3 * heads * width, requires_grad=True)
    flops = []
    with Meter(rehearsal._attention_flops()) as meter:
        out = attention.attention(qkv, heads, causal=causal)
        flops.append(meter.flops)
        out.sum().backward()
        flops.append(meter.flops - flops[0])
    # Of PyTorch's ways to multiply the one that is made of products which FlopCounterMode knows on a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            plain = attention.reference(qkv, heads, causal=causal)
        with FlopCounterMode(display=False) as backward:
            plain.sum().backward()
    assert flops == [forward.get_total_flops(), backward.get_total_flops()]
    assert flops[0] == 4 * length**2 * batch * heads * width
    assert flops[1] == 2 * flops[0]


@pytest.mark.parametrize("emulated", [True, False])
def test_fp8(emulated: bool) -> None:
    fp8 = ["train.precision=fp8", f"train.fp8.rehearse={str(emulated).lower()}"]
    one = rehearsed("demo_clip.yaml", 2, 1, fp8, meta=False)
    assert one.cfg.train.precision == ("fp8" if emulated else "bf16")
    note = "note: in bf16 in place of FP8, whose own copies of the weights are in neither figure"
    assert (note in rehearsal_lines(one)) is not emulated
    if not emulated:
        check(one)
        return
    # Scales and histories are no parameters; bytes of emulated passes are not predicted.
    assert [piece.flops for piece in one.pieces] == [None, None, None]
    predicted, measured = one.model_bytes
    assert predicted < measured < 1.02 * predicted


def test_fp8_without_memory_is_bf16_and_says_so() -> None:
    fp8 = ["train.precision=fp8", "train.fp8.rehearse=true"]
    one, twin = (rehearsed("demo_clip.yaml", 2, 1, more) for more in (fp8, ["train.precision=bf16"]))
    assert [line for line in rehearsal_lines(one) if line not in rehearsal_lines(twin)] == [
        "note: in bf16 in place of FP8, whose own copies of the weights are in neither figure"
    ]


@pytest.mark.parametrize("rank", [0, 9, 95])
def test_18b_in_twelve_stages(rank: int) -> None:
    """First, middle and last; a stage is four layers."""
    one = rehearsed("clip_eva_18b.yaml", 96, rank, ["parallel.vision.pp=12", "train.micro_batch_size=2"])
    check(one)
    vision, text, loss = one.pieces
    assert text.parameters > 0
    assert (vision.shapes == "[2, 3, 224, 224] -> [17, 2, 5120]") == (rank == 0)
    assert vision.shapes.endswith("-> [2, 1536]") == (rank == 95)
    assert loss.work_bytes[0] == pytest.approx(loss.work_bytes[1], rel=0.05)
    assert one.between_stages == (0 if rank == 0 else 17 * 2 * 5120 * 2)
    # Two gathers and scatters of a layer and pass; the recomputed forward pass is a third.
    assert one.meter.calls["all-gather", 8] >= 4 * 4
    assert one.meter.sent["reduce-scatter", 24] == pytest.approx(4 * text.parameters * 23 / 24, rel=0.01)


def test_every_recipe_has_a_share() -> None:
    assert sorted(SHARES) == RECIPE_NAMES


@pytest.mark.parametrize("name", SHARES)
def test_a_share_of_every_recipe(name: str) -> None:
    check(rehearsed(name, *SHARES[name]))


@pytest.mark.parametrize(
    ("student", "tp", "precision", "teacher", "teacher_tp"),
    [
        ("EVA01-CLIP-g-14", 4, "bf16", "EVA02-CLIP-B-16", 2),
        ("EVA-CLIP-18B", 2, "bf16", "EVA-CLIP-18B", 2),
        ("ViT-B-16", 4, "fp32", "ViT-B-16-quickgelu", 4),
        ("ViT-B-16", 1, "bf16", "EVA02-CLIP-bigE-14", 1),
    ],
)
def test_students_and_teachers(student: str, tp: int, precision: str, teacher: str, teacher_tp: int) -> None:
    """Last stages and passes without gradients: inner norms that are cut, post-norm, RMSNorm, QuickGELU, and targets
    that are wider than the student."""
    section = ModelSection.model_validate({"variant": teacher} | VARIANTS[teacher])
    vision = section.vision.model_copy(update={"num_layers": 2})
    section = section.model_copy(update={"vision": vision, "embed_dim": 2048})
    cut = [
        f"parallel.{key}.sequence_parallel={str(n == 4).lower()}"
        for key, n in [("vision", tp), ("teacher", teacher_tp)]
    ]
    sizes = ["train.micro_batch_size=8", "train.global_batch_size=64", "model.vision.num_layers=4"]
    layout = [f"parallel.vision.tp={tp}", "parallel.vision.pp=2", f"parallel.teacher.tp={teacher_tp}", *cut]
    cfg = load(
        RECIPES / "mim_eva02_b.yaml", [f"model.variant={student}", f"train.precision={precision}", *sizes, *layout]
    )
    check_world(cfg, 8)
    check(rehearse(cfg, 8, 2 * tp - 1, section, meta=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize("rank", [0, 7, 15])
def test_shares_as_the_recipe_is_written(name: str, rank: int) -> None:
    check(rehearsed(name, 16, rank, []))


def test_a_rank_outside_the_world() -> None:
    with pytest.raises(ConfigError, match=r"--rank 16 is not in a world of --gpus 16; it must be 0 to 15"):
        run_rehearsal(RECIPES / "clip_eva_18b.yaml", [], 16, 16, meta=True)


def test_a_share_larger_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_free_memory", lambda: 4 << 30)
    with pytest.raises(UserError, match=r"rank 3's share takes .* GiB here, and 4.0 GiB .*; add --meta"):
        run_rehearsal(RECIPES / "clip_eva_18b.yaml", [], 16, 3)


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (["--rank", "3"], "without --rehearse does nothing with --rank"),
        (["--meta", "--search"], "without --rehearse does nothing with --meta"),
        (["--rehearse", "--search"], "--rehearse does nothing with --search"),
        (["--rehearse", "--json", "x.json"], "--rehearse does nothing with --json"),
        (["--rehearse", "--gpu", "h200"], "--rehearse does nothing with --gpu"),
        (["--calibration", "--plot", "x.svg"], "--calibration does nothing with --plot and recipe"),
    ],
)
def test_no_option_is_ignored(options: list[str], idle: str) -> None:
    done = CliRunner().invoke(app, ["plan", str(RECIPES / "demo_clip.yaml"), *options])
    assert done.exit_code == 2
    assert idle in done.output
