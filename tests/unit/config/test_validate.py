"""Each rule between sections, broken alone."""

from pathlib import Path

import pytest

from megaeva.config import VARIANTS, dump, load
from megaeva.config.layout import teacher_problems
from megaeva.config.schema import VisionSection
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
BIG = CLIP.replace("EVA02-CLIP-L-14", "EVA-CLIP-18B")
TP35 = ("parallel.vision.tp=3", "parallel.text.tp=5")

BROKEN = [
    (CLIP, ("parallel.vision.tp=4", "parallel.text.tp=4"),
     ["parallel.vision.tp=4 (command line) must divide model.vision.ffn_hidden_size=2730; use 1 or 2."]),
    (CLIP, TP35, [
        "parallel.vision.tp=3 (command line) must divide model.vision.num_heads=16; use 1 or 2.",
        "parallel.text.tp=5 (command line) must divide model.text.num_heads=12 and model.text.ffn_hidden_size=3072; "
        "use 1, 2, 3, 4, 6 or 12.",
    ]),
    (BIG, ("parallel.text.tp=8",),
     ["parallel.text.tp=8 (command line) must divide model.text.num_heads=20; use 1, 2, 4, 5, 10 or 20."]),
    (CLIP, ("parallel.text.pp=2",), ["parallel.text.pp=2 (command line) must be 1", "whole on every pipeline rank"]),
    (CLIP, ("parallel.text.vpp=2",), ["parallel.text.vpp=2 (command line) must be 1"]),
    (CLIP, ("parallel.text.layers_per_stage=[12]",), ["parallel.text.layers_per_stage=[12]", "must be absent"]),
    (MIM, ("parallel.teacher.pp=2",), ["parallel.teacher.pp=2 (command line) must be 1", "parallel.teacher.tp"]),
    (MIM, ("parallel.teacher.recompute=full",), ["parallel.teacher.recompute=full", "no backward pass"]),
    (CLIP, ("parallel.teacher.tp=2",), ["parallel.teacher (command line) must be absent in task=contrastive"]),
    (MIM, ("parallel.text.tp=2",), ["parallel.text (command line) must be absent in task=mim, which has no text"]),
    (CLIP, ("parallel.vision.pp=25",),
     ["parallel.vision.pp=25 (command line) must leave each of the pp=25 x vpp=1 = 25 stages a layer",
      "model.vision.num_layers=24; use parallel.vision.pp=24."]),
    (CLIP, ("parallel.vision.pp=5", "parallel.vision.vpp=5"), ["use parallel.vision.pp=4 or parallel.vision.vpp=4."]),
    (CLIP, ("parallel.vision.pp=30", "parallel.vision.vpp=30"),
     ["use parallel.vision.pp=1 parallel.vision.vpp=1."]),
    (CLIP, ("parallel.vision.vpp=2",), ["parallel.vision.vpp=2 (command line) must be 1 at parallel.vision.pp=1"]),
    (CLIP, ("parallel.vision.pp=2", "parallel.vision.layers_per_stage=[12, 11]"),
     ["parallel.vision.layers_per_stage=[12, 11]", "2 entries that sum to model.vision.num_layers=24", "[12, 12]"]),
    (CLIP, ("parallel.vision.pp=5", "parallel.vision.layers_per_stage=[12, 12]"),
     ["pp x vpp = 5 entries", "it has 2 that sum to 24; use [5, 5, 5, 5, 4]"]),
    (CLIP, ("parallel.vision.pp=2", "parallel.vision.recompute=13"),
     ["parallel.vision.recompute=13", "at most the layers of the largest stage", "=12; use `full`"]),
    (CLIP, ("parallel.vision.recompute=25",), ["at most model.vision.num_layers=24; use `full`"]),
    (CLIP, ("parallel.overlap_param_gather=true", "parallel.distributed_optimizer=false"),
     ["parallel.overlap_param_gather=true (command line) needs parallel.distributed_optimizer=true"]),
    (CLIP, ("parallel.text.recompute=13",),
     ["parallel.text.recompute=13", "at most model.text.num_layers=12", "use `full`"]),
    (CLIP, ("parallel.vision.recompute=0",),
     ["parallel.vision.recompute=0 (command line) must be none, selective, full or a number of layers above 0;"]),
    (CLIP, ("model.vision.image_size=230",), ["model.vision.image_size=230", "patch_size=14", "use 224 or 238"]),
    (CLIP, ("model.vision.num_heads=15",), ["model.vision.num_heads=15", "must divide model.vision.hidden_size=1024"]),
    (CLIP, ("model.text.num_heads=7",), ["model.text.num_heads=7", "must divide model.text.hidden_size=768"]),
    (CLIP, ("model.vision.num_heads=512",), ["model.vision.rope=true (by model.variant at", "divisible by 4"]),
    (CLIP, ("model.logit_scale.init=5",), ["model.logit_scale.init=5", "4.60517"]),
    (CLIP, ("loss.name=sigmoid",),
     ["model.logit_scale.bias (in ", "is needed by loss.name=sigmoid; SigLIP starts at bias=-10."]),
    (CLIP, ("loss.name=sigmoid", "model.logit_scale.bias=-10", "loss.label_smoothing=0.1"),
     ["loss.label_smoothing=0.1 (command line) must be 0 with loss.name=sigmoid"]),
    (CLIP, ("model.logit_scale.bias=-10",),
     ["model.logit_scale.bias=-10 (command line) must be absent with loss.name=infonce"]),
    (CLIP, ("loss.label_smoothing=1",), ["loss.label_smoothing=1", "below 1"]),
    (CLIP, ("loss.name=siglip",), ["loss.name=siglip (command line) must be infonce or sigmoid"]),
    (MIM, ("loss.label_smoothing=0.1",), ["loss (command line) must be absent in task=mim"]),
    (CLIP, ("optim.frozen=[vision]", "init.text=runs/t"),
     ['optim.frozen=["vision"] (command line) holds vision, and a tower that is never trained needs weights; '
      "set init.vision or init.clip."]),
    (CLIP, ("optim.frozen=[text, vision]", "init.clip=runs/t", "model.logit_scale.trainable=false"),
     ['optim.frozen=["text", "vision"] (command line) leaves nothing to train, as model.logit_scale.trainable=false']),
    (MIM, ("optim.frozen=[vision]", "init.vision=runs/t"),
     ['optim.frozen=["vision"] (command line) must be empty in task=mim']),
    (CLIP, ("teacher.checkpoint=x",), ["teacher (command line) must be absent in task=contrastive"]),
    (CLIP, ("mim.mask={num_masked: 5, min_block: 1}",), ["mim (command line) must be absent"]),
    (CLIP, ("model.text.vocab_size=2048",), ["model.text.vocab_size=2048", "49408", "tokenizer_subset"]),
    (CLIP, ("data.train=[]",), ["data.train=[]", "at least one shard"]),
    (CLIP, ("data.phases=[{samples: 6400, train: [a.tar]}]",),
     ["data.phases=[{", "(command line) must be absent beside data.train; remove one of the two"]),
    (CLIP, ("data.train=[]", "data.phases=[{samples: 6400, train: []}]"),
     ["data.phases.0.train=[] (in command line) must name at least one shard"]),
    (CLIP, ("data.train=[]", "data.phases=[{samples: 6390, train: [a.tar]}, {samples: 9, train: [b.tar]}]"),
     ["train.total_samples=6400", "must be the sum of data.phases.*.samples, 6399; set it to 6399"]),
    (CLIP, ("data.train=[]", "data.phases=[{samples: 6390, train: [a.tar]}, {samples: 9, train: [b.tar]}, "
            "{samples: 1, train: [c.tar]}]"),
     ["data.phases.1.samples=9 (in command line) must make a whole step of train.global_batch_size=64"]),
    (CLIP, ("data.train=[]", "data.phases=[{samples: 6400, train: [a.tar]}]", "data.frames=8"),
     ["data.frames=8 (command line) must be 1 beside data.phases"]),
    (MIM, ("data.train=[]", "data.phases=[{samples: 6400, train: [a.tar], patch_dropout: 0.5}]"),
     ["data.phases.0.patch_dropout=0.5 (in command line) must be 0 in task=mim"]),
    (MIM, ("data.train=[]", "data.phases=[{samples: 6400, train: [a.tar], frames: 8}]"),
     ["data.phases.0.frames=8 (in command line) must be 1 in task=mim"]),
    (MIM, ("data.frames=8",), ["data.frames=8 (command line) must be 1 in task=mim"]),
    (CLIP, ("eval.retrieval.a.shards=[]",), ["eval.retrieval.a.shards=[]", "at least one shard"]),
    (CLIP, ("data.augment.scale=[0.9, 1.1]",), ["data.augment.scale=[0.9, 1.1]"]),
    (CLIP, ("data.augment.ratio=[2, 1]",), ["data.augment.ratio=[2, 1]"]),
    (CLIP, ("optim.betas=[0.9, 1]",), ["optim.betas=[0.9, 1]"]),
    (CLIP, ("optim.clip_grad_norm=0",), ["optim.clip_grad_norm=0", "null"]),
    (CLIP, ("optim.epsilon=0",), ["optim.epsilon=0", "must be above 0"]),
    (CLIP, ("optim.weight_decay=-0.1",), ["optim.weight_decay=-0.1", "must be at least 0"]),
    (CLIP, ("optim.logit_scale_lr=-1",), ["optim.logit_scale_lr=-1", "must be at least 0"]),
    (CLIP, ("train.fp16.initial_scale=8589934592",), ["train.fp16.initial_scale=8589934592", "at most 4.29497e+09"]),
    (CLIP, ("model.vision.norm_epsilon=0",), ["model.vision.norm_epsilon=0", "must be at least 1e-12"]),
    (CLIP, ("model.text.norm_epsilon=-1e-5",), ["model.text.norm_epsilon=-1e-05", "must be at least 1e-12"]),
    (CLIP, ("model.text.norm_epsilon=1",), ["model.text.norm_epsilon=1", "must be at most 0.1"]),
    (CLIP, ("model.vision.rope_pretrain_grid=0",), ["model.vision.rope_pretrain_grid=0", "must be above 0"]),
    (CLIP, ("model.text.context_length=1",), ["model.text.context_length=1", "must be at least 2"]),
    (CLIP, ("model.logit_scale.max=1000",), ["model.logit_scale.max=1000", "must be at most 88", "exp(88.7)"]),
    (CLIP, ("loss.name=sigmoid", "model.logit_scale.bias=-10000"), ["logit_scale.bias=-10000", "at least -1000"]),
    (CLIP, ("train.fp8.margin=1000",), ["train.fp8.margin=1000", "must be at most 16"]),
    (CLIP, ("train.fp8.margin=-1",), ["train.fp8.margin=-1", "must be at least 0"]),
    (CLIP, ("train.fp8.amax_history=10000000000",), ["train.fp8.amax_history=10000000000", "at most 65536"]),
    (CLIP, ("train.timeout_minutes=43201",), ["train.timeout_minutes=43201", "at most 43200"]),
    (CLIP, ("train.timeout_minutes=1e-9",), ["train.timeout_minutes=1e-09", "at least 0.01"]),
    (CLIP, ("data.num_workers=100000",), ["data.num_workers=100000", "at most 1024"]),
    (CLIP, ("seed=-1",), ["seed=-1", "must be at least 0"]),
    (CLIP, ("seed=9223372036854775808",), ["seed=9223372036854775808", "must be below 9.22337e+18"]),
    (CLIP, ("train.profile.ranks=al",), ["train.profile.ranks=al (command line) must be all or a list of ranks"]),
    (CLIP, ("train.profile.ranks=[0, x]",), ["must be all or a list of ranks, e.g. [0, 8]"]),
    (CLIP, ("train.profile.ranks=[]",), ["train.profile.ranks=[] (command line) must name a rank"]),
    (CLIP, ("optim.warmup_steps=100",), ["optim.warmup_steps=100", "below the 100 steps"]),
    (CLIP, ("train.micro_batch_size=48",), ["train.micro_batch_size=48", "global_batch_size=64", "use 32"]),
    (CLIP, ("save.every_steps=0",), ["save.every_steps=0", "above 0"]),
    (CLIP, ("train.fp16.min_scale=8", "train.fp16.initial_scale=4"),
     ["train.fp16.min_scale=8", "must not exceed train.fp16.initial_scale=4"]),
    (CLIP, ("train.spike_guard.action=roll_back", "save.every_minutes=null"),
     ["train.spike_guard.action=roll_back", "none is saved on the way", "or use skip"]),
    (CLIP, ("train.spike_guard.action=roll_back", "save.enabled=false"), ["none is saved on the way"]),
    (MIM, ("mim=null",), ["mim (command line) is needed by task=mim"]),
    (MIM, ("teacher=null",), ["teacher (command line) is needed by task=mim"]),
    (MIM, ("init.clip=x",), ["init.clip=x (command line) must be absent in task=mim", "set init.vision"]),
    (MIM, ("init.text=x",), ["init.text=x", "no text tower"]),
    (MIM, ("optim.text.lr=1",), ["optim.text (command line) must be absent in task=mim, which has no text tower"]),
    (MIM, ("optim.logit_scale_lr=1e-3",), ["optim.logit_scale_lr=0.001 (command line) must be absent in task=mim"]),
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
    # A run's own config.yaml spells out the rate of a logit scale that it does not have.
    dump(load(path), tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == load(path)


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(CLIP, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path, ["parallel.vision.tp=3", "parallel.text.tp=5", "parallel.text.pp=2", "parallel.vision.pp=40"])
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize("tp", [1, 2, 4, 5, 10, 20])
def test_the_text_tower_of_18B_is_cut_by_its_heads(tmp_path: Path, tp: int) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BIG, encoding="utf-8")
    assert load(path, [f"parallel.text.tp={tp}", "parallel.vision.tp=8"]).parallel.text.tp == tp


def test_a_teacher_is_checked_against_its_own_heads() -> None:
    teacher = VisionSection.model_validate(VARIANTS["EVA02-CLIP-bigE-14-plus"]["vision"])
    assert teacher_problems(8, teacher) == []
    (problem,) = teacher_problems(5, teacher)
    assert problem.key == "parallel.teacher.tp"
    assert problem.must == "must divide the teacher's num_heads=16"
    assert problem.do == "use 1, 2, 4, 8 or 16"
