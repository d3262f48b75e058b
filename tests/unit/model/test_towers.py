"""What towers promise beyond the numbers of published models: masking, dropping, precision, names."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import LogitScaleSection
from megaeva.config.variants import VARIANTS
from megaeva.model import (
    LogitScale,
    MIMStudent,
    Teacher,
    TextTower,
    VisionTower,
    build_clip,
    init_weights,
    set_recompute,
)
from megaeva.model.layer import Pass
from megaeva.model.rope2d import angle_table, gather_angles
from megaeva.ops.attention import rotate
from megaeva.parallel.runtime import seed_pass
from tests.helpers.tiny import (
    example_images,
    example_tokens,
    full_shapes,
    load_full,
    random_state,
    single_grid,
    tiny,
)

MASK_BN = torch.rand(3, 16, generator=torch.Generator().manual_seed(4)) < 0.4


def _student(variant: str = "EVA02-CLIP-L-14", share: float = 1.0) -> MIMStudent:
    student = MIMStudent(tiny(variant).vision, 20, grid=single_grid(), stop_grad_patch_embed=share)
    load_full(student, random_state(full_shapes(student)), single_grid())
    return student


def _vision(variant: str, **keys: float) -> VisionTower:
    tower = VisionTower(tiny(variant, **keys).vision, 20, grid=single_grid())
    load_full(tower, random_state(full_shapes(tower)), single_grid())
    return tower


def test_student_predicts_masked_patches_in_row_major_order() -> None:
    student = _student()
    image = example_images(tiny("EVA02-CLIP-L-14"))
    tokens_BSD = student.vision.tokens(image, mask_BN=MASK_BN, mask_token=student.mask_token)
    expected = torch.stack([student.lm_head(tokens_BSD[b, 1 + n]) for b, n in MASK_BN.nonzero().tolist()])
    predicted_ME = student(image, MASK_BN)
    assert predicted_ME.shape == (int(MASK_BN.sum()), 20)
    assert (predicted_ME - expected).abs().max() < 1e-5


def test_student_does_not_see_what_is_masked() -> None:
    student = _student()
    image = example_images(tiny("EVA02-CLIP-L-14"))
    hidden = MASK_BN.view(3, 1, 4, 1, 4, 1).expand(3, 3, 4, 4, 4, 4).reshape(image.shape)
    changed = torch.where(hidden, torch.randn(image.shape), image)
    assert torch.equal(student(changed, MASK_BN), student(image, MASK_BN))
    seen = torch.where(hidden, image, torch.randn(image.shape))
    assert not torch.allclose(student(seen, MASK_BN), student(image, MASK_BN))


def test_share_of_the_patch_embeddings_gradient() -> None:
    image = example_images(tiny("EVA02-CLIP-L-14"))
    whole, tenth = _student(share=1.0), _student(share=0.1)
    for student in (whole, tenth):
        student(image, MASK_BN).square().sum().backward()
    for name, param in whole.named_parameters():
        other = dict(tenth.named_parameters())[name].grad
        assert param.grad is not None and other is not None, name
        scale = 0.1 if "patch_embed" in name else 1.0
        assert (other - scale * param.grad).norm() <= 1e-5 * param.grad.norm(), name


def test_teacher_shows_projected_patch_tokens_without_gradient() -> None:
    tower = _vision("ViT-H-14")
    image = example_images(tiny("ViT-H-14"))
    expected = tower.project(tower.tokens(image)[:, 1:])
    teacher = Teacher(tower).train()
    target_BNE = teacher(image)
    assert target_BNE.shape == (3, 16, 20) and torch.equal(target_BNE, expected)
    assert not target_BNE.requires_grad and not tower.training
    assert not any(param.requires_grad for param in teacher.parameters())


@pytest.mark.parametrize("variant", ["EVA02-CLIP-L-14", "EVA-CLIP-18B", "ViT-H-14"])
def test_keeping_all_patches_in_another_order_changes_nothing(variant: str) -> None:
    tower = _vision(variant)
    image = example_images(tiny(variant))
    keep_BK = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row)) for row in range(3)])
    assert (tower(image, keep_BK) - tower(image)).abs().max() < 1e-5
    assert (tower(image, keep_BK[:, :8]) - tower(image)).abs().max() > 1e-3


def test_drop_path_is_replayed_and_only_in_training() -> None:
    tower = _vision("EVA02-CLIP-L-14", drop_path=0.9)
    image = example_images(tiny("EVA02-CLIP-L-14"))

    def run(step: int) -> Tensor:
        seed_pass(0, step, 0)
        return tower(image).detach()

    assert torch.equal(run(1), run(1))
    assert len({run(step).sum().item() for step in range(6)}) > 1
    rates = [layer.drop_rate for layer in tower.blocks.layers.values()]
    assert rates == pytest.approx([0.0, 0.45, 0.9])
    tower.eval()
    assert torch.equal(run(1), run(2))
    assert (run(1) - _vision("EVA02-CLIP-L-14")(image)).abs().max() < 1e-6


def test_drop_path_keeps_the_mean() -> None:
    layer = _vision("EVA02-CLIP-L-14", drop_path=0.5).blocks.layers["2"]
    dropped = layer._drop_path(torch.ones(2, 4000, 3), Pass(num_tokens=2, seed=0), 0)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.1)
    assert (dropped == dropped[:1, :, :1]).all()  # whole samples


def test_text_stops_at_the_end_token() -> None:
    cfg = tiny("ViT-H-14")
    tower = TextTower(cfg.text, cfg.embed_dim, grid=single_grid())
    load_full(tower, random_state(full_shapes(tower)), single_grid())
    token_BL = example_tokens(cfg)
    text_BE = tower(token_BL)
    # Each caption alone (another truncation), and with rubbish behind its end.
    for row in range(3):
        assert (tower(token_BL[row : row + 1])[0] - text_BE[row]).abs().max() < 1e-5
        end = int(token_BL[row].argmax())
        noisy = token_BL[row : row + 1].clone()
        noisy[:, end + 1 :] = 7
        assert (tower(noisy)[0] - text_BE[row]).abs().max() < 1e-5


def test_rotary_angles_leave_cls_and_lengths_alone() -> None:
    table = angle_table(4, 16, 8)
    x = torch.randn(17, 2, 3, 8)
    turned = rotate(x, gather_angles(table, None))
    assert torch.equal(turned[0], x[0]) and not torch.allclose(turned[1:], x[1:])
    lengths = x.unflatten(-1, (4, 2)).norm(dim=-1)
    assert torch.allclose(turned.unflatten(-1, (4, 2)).norm(dim=-1), lengths, atol=1e-5)
    # The first half of a head turns by the row, the second by the column.
    angle_NK = torch.atan2(table[1], table[0])
    assert torch.equal(angle_NK[1, :4], angle_NK[4, :4]) and not torch.equal(angle_NK[1, 4:], angle_NK[4, 4:])
    assert torch.equal(angle_NK[1, 4:], angle_NK[5, 4:]) and not torch.equal(angle_NK[1, :4], angle_NK[5, :4])


def test_logit_scale() -> None:
    scale = LogitScale(LogitScaleSection(init=1.5))
    assert scale().item() == 1.5 and scale().dtype == torch.float32 and scale().requires_grad
    with torch.no_grad():
        scale.log_scale.fill_(7.0)
    scale.clamp_()
    assert scale().item() == pytest.approx(4.6051702)
    with torch.no_grad():
        scale.log_scale.fill_(-1.0)
    scale.clamp_()
    assert scale().item() == 0.0
    assert scale.logit_bias is None
    assert [name for name, _ in scale.named_parameters()] == ["log_scale"]
    with_bias = LogitScale(LogitScaleSection(bias=-10))
    assert (
        with_bias.logit_bias is not None and with_bias.logit_bias.item() == -10 and with_bias.logit_bias.requires_grad
    )
    with_bias.clamp_()
    assert with_bias.logit_bias.item() == -10
    frozen = LogitScale(LogitScaleSection(trainable=False, bias=-10))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("variant", ["EVA02-CLIP-L-14", "EVA-CLIP-18B", "EVA-CLIP-8B", "ViT-L-14-quickgelu"])
def test_bf16_is_close_to_fp32(variant: str) -> None:
    cfg = tiny(variant)
    grid = single_grid()
    outputs = {}
    for precision in ("fp32", "bf16"):
        model = build_clip(cfg, vision_grid=grid, text_grid=grid, precision=precision)  # type: ignore[arg-type]
        load_full(model, random_state(full_shapes(model)), grid)
        image_BE, text_BE = model.encode_image(example_images(cfg)), model.encode_text(example_tokens(cfg))
        (image_BE.float().sum() + text_BE.float().sum()).backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n != "scale.log_scale")
        outputs[precision] = (image_BE.detach(), text_BE.detach())
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        assert {p.dtype for n, p in model.named_parameters() if n != "scale.log_scale"} == {dtype}
        assert model.scale().dtype == torch.float32
    for exact, rounded in zip(outputs["fp32"], outputs["bf16"]):
        assert rounded.dtype == torch.bfloat16
        assert 0 < (rounded.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(("mode", "layer_passes", "attention_passes"), [("selective", 3, 6), ("full", 6, 6), (2, 5, 5)])
@pytest.mark.parametrize("variant", ["EVA02-CLIP-L-14", "ViT-H-14", "EVA-CLIP-18B"])
def test_recomputation_gives_the_same_gradients(
    variant: str, mode: Any, layer_passes: int, attention_passes: int
) -> None:
    """Rotary angles and drop path are replayed, and what the mode names is really computed twice."""
    cfg = tiny(variant, drop_path=0.5)
    image = example_images(cfg)
    grads = []
    for recompute in ("none", mode):
        tower = VisionTower(cfg.vision, 20, grid=single_grid())
        load_full(tower, random_state(full_shapes(tower)), single_grid())
        set_recompute(tower, recompute)
        passes = {"layer": 0, "attention": 0}
        for layer in tower.blocks.layers.values():
            for part, module in (("layer", layer), ("attention", layer.self_attention.core_attention)):
                module.register_forward_hook(lambda *_, seen=passes, part=part: seen.update({part: seen[part] + 1}))
        seed_pass(0, 0, 0)
        tower(image).square().sum().backward()
        grads.append({name: param.grad for name, param in tower.named_parameters()})
    assert passes == {"layer": layer_passes, "attention": attention_passes}
    for name, plain in grads[0].items():
        assert plain is not None and torch.allclose(grads[1][name], plain, rtol=0, atol=0), name


def test_every_parameter_says_how_it_is_cut() -> None:
    for variant in VARIANTS:
        cfg = tiny(variant)
        grid = single_grid()
        model = build_clip(cfg, vision_grid=grid, text_grid=grid)
        for name, param in model.named_parameters():
            cut = (param.tensor_model_parallel, param.partition_dim, param.partition_stride)  # type: ignore
            if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                assert cut == (True, 1, 1), name
            elif "linear_fc1" in name:
                gated = name.startswith("vision") and cfg.vision.activation == "swiglu"
                assert cut == (True, 0, 2 if gated else 1), name
            elif any(part in name for part in ("linear_qkv", "q_bias", "v_bias", "inner_norm", "token_embedding")):
                assert cut == (True, 0, 1), name
            else:
                assert cut == (False, -1, 1), name


def test_towers_have_the_fixed_parameter_names() -> None:
    names = set(full_shapes(_vision("EVA02-CLIP-L-14")))
    layer = {
        "input_layernorm.weight", "input_layernorm.bias", "pre_mlp_layernorm.weight", "pre_mlp_layernorm.bias",
        "self_attention.linear_qkv.weight", "self_attention.q_bias", "self_attention.v_bias",
        "self_attention.inner_norm.weight", "self_attention.inner_norm.bias", "self_attention.linear_proj.weight",
        "self_attention.linear_proj.bias", "mlp.linear_fc1.weight", "mlp.linear_fc1.bias", "mlp.inner_norm.weight",
        "mlp.inner_norm.bias", "mlp.linear_fc2.weight", "mlp.linear_fc2.bias",
    }  # fmt: skip
    rest = {"patch_embed.weight", "patch_embed.bias", "cls_token", "pos_embed", "norm.weight", "norm.bias",
            "head.weight", "head.bias"}  # fmt: skip
    assert names == rest | {f"blocks.layers.{i}.{name}" for i in range(3) for name in layer}
    post = set(full_shapes(_vision("EVA-CLIP-18B")))
    assert "blocks.layers.2.post_attention_layernorm.weight" in post
    assert not any("input_layernorm" in name for name in post)


def test_a_fresh_demo_model_trains() -> None:
    cfg = tiny("Demo-Student")
    grid = single_grid()
    model = build_clip(cfg, vision_grid=grid, text_grid=grid)
    init_weights(model, seed=0, task="contrastive", grid=grid)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    image, token = example_images(cfg, 6), example_tokens(cfg, 6)
    losses = []
    for _ in range(60):
        image_BE = torch.nn.functional.normalize(model.encode_image(image), dim=-1)
        text_BE = torch.nn.functional.normalize(model.encode_text(token), dim=-1)
        loss = torch.nn.functional.cross_entropy(model.scale().exp() * image_BE @ text_BE.T, torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
