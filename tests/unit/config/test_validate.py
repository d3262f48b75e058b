"""Each rule between sections, broken alone."""

from pathlib import Path

import pytest

from megaeva.config import check_world, load
from megaeva.errors import ConfigError

CLIP = """\
task: contrastive
run_dir: runs/x
model: {variant: EVA02-CLIP-L-14}
data: {train: [a.tar]}
optim: {vision: {lr: 0.001}}
train: {total_samples: 6400, global_batch_size: 64}
"""
MIM = CLIP.replace("contrastive", "mim") + (
    "teacher: {checkpoint: runs/t}\nmim: {mask: {num_masked: 105, min_block: 16}}\n"
)
TP3 = ("parallel.vision.tp=3", "parallel.text.tp=3")

BROKEN = [
    (CLIP, ("parallel.vision.tp=4", "parallel.text.tp=4"),
     ["parallel.vision.tp=4 (command line) must divide model.vision.ffn_hidden_size=2730; use 1 or 2."]),
    (CLIP, TP3, [
        "parallel.vision.tp=3 (command line) must divide model.vision.num_heads=16; use 1 or 2.",
        "parallel.text.tp=3 (command line) must divide model.text.vocab_size=49408; use 1, 2 or 4.",
    ]),
    (CLIP, ("parallel.vision.tp=2",),
     ["parallel.text.tp=1 (default) must equal parallel.vision.tp=2", "set both to 1 or 2"]),
    (CLIP, ("parallel.vision.pp=2",), ["parallel.vision.pp=2", "must be 1 in this version"]),
    (CLIP, ("parallel.text.recompute=13",),
     ["parallel.text.recompute=13", "at most model.text.num_layers=12", "use `full`"]),
    (CLIP, ("parallel.vision.recompute=0",),
     ["parallel.vision.recompute=0 (command line) must be none, selective, full or a number of layers above 0;"]),
    (CLIP, ("model.vision.image_size=230",), ["model.vision.image_size=230", "patch_size=14", "use 224 or 238"]),
    (CLIP, ("model.vision.num_heads=15",), ["model.vision.num_heads=15", "must divide model.vision.hidden_size=1024"]),
    (CLIP, ("model.text.num_heads=7",), ["model.text.num_heads=7", "must divide model.text.hidden_size=768"]),
    (CLIP, ("model.vision.num_heads=512",), ["model.vision.rope=true (by model.variant at", "divisible by 4"]),
    (CLIP, ("model.logit_scale.init=5",), ["model.logit_scale.init=5", "4.60517"]),
    (CLIP, ("teacher.checkpoint=x",), ["teacher (command line) must be absent in task=contrastive"]),
    (CLIP, ("mim.mask={num_masked: 5, min_block: 1}",), ["mim (command line) must be absent"]),
    (CLIP, ("model.text.vocab_size=2048",), ["model.text.vocab_size=2048", "49408", "tokenizer_subset"]),
    (CLIP, ("data.train=[]",), ["data.train=[]", "at least one shard"]),
    (CLIP, ("eval.retrieval.a.shards=[]",), ["eval.retrieval.a.shards=[]", "at least one shard"]),
    (CLIP, ("data.augment.scale=[0.9, 1.1]",), ["data.augment.scale=[0.9, 1.1]"]),
    (CLIP, ("data.augment.ratio=[2, 1]",), ["data.augment.ratio=[2, 1]"]),
    (CLIP, ("optim.betas=[0.9, 1]",), ["optim.betas=[0.9, 1]"]),
    (CLIP, ("optim.clip_grad_norm=0",), ["optim.clip_grad_norm=0", "null"]),
    (CLIP, ("optim.warmup_steps=100",), ["optim.warmup_steps=100", "below the 100 steps"]),
    (CLIP, ("train.micro_batch_size=48",), ["train.micro_batch_size=48", "global_batch_size=64", "use 32"]),
    (CLIP, ("save.every_steps=0",), ["save.every_steps=0", "above 0"]),
    (MIM, ("mim=null",), ["mim (command line) is needed by task=mim"]),
    (MIM, ("teacher=null",), ["teacher (command line) is needed by task=mim"]),
    (MIM, ("init.text=x",), ["init.text=x", "no text tower"]),
    (MIM, ("mim.mask.num_masked=256",), ["mim.mask.num_masked=256", "below the 256 patches"]),
    (MIM, ("mim.mask.min_block=106",), ["mim.mask.min_block=106", "num_masked=105"]),
    (MIM, ("model.vision.patch_dropout=0.5",), ["model.vision.patch_dropout=0.5", "must be 0 in task=mim"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "parts"), BROKEN, ids=lambda v: v[0] if isinstance(v, tuple) else None)
def test_a_broken_rule_is_told_with_its_numbers(
    tmp_path: Path, text: str, overrides: tuple[str, ...], parts: list[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    load(path)  # whole without the overrides
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_rules_that_do_not_apply_are_silent(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MIM, encoding="utf-8")
    # MIM has no text tower: its sizes bind nothing.
    assert load(path, ["parallel.vision.tp=2", "model.text.vocab_size=5"]).parallel.vision.tp == 2


@pytest.mark.parametrize(
    ("world", "overrides", "expected"),
    [
        (3, ["parallel.vision.tp=2", "parallel.text.tp=2"], "3 processes must be a multiple of parallel.vision.tp=2"),
        (3, [], "global_batch_size=64 must be a multiple of the 3 data-parallel ranks"),
        (2, ["train.micro_batch_size=64"], "use 128 or 256"),
    ],
)
def test_the_world_must_fit(tmp_path: Path, world: int, overrides: list[str], expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(CLIP, encoding="utf-8")
    cfg = load(path, overrides)
    with pytest.raises(ConfigError, match=expected):
        check_world(cfg, world)
    check_world(load(path, ["parallel.vision.tp=2", "parallel.text.tp=2", "train.micro_batch_size=32"]), 4)
