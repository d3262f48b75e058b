"""Rules between sections: what pydantic cannot say about one field alone.

Each rule is a small generator of `Problem`. `megaeva.config.load` runs all of them, also over a recipe whose fields are
partly wrong, so that everything is reported at once; a rule that needs an unreadable field is skipped then.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import TypeVar

from megaeva.config.fp8 import FP8_RULES
from megaeva.config.layout import LAYOUT_RULES, Change, Remedies, micro_batch_problems, teacher_problems
from megaeva.config.phases import PHASE_RULES
from megaeva.config.problem import Problem
from megaeva.config.schema import Config, LoopConfig, OptimSection, Section, TextSection, VisionSection
from megaeva.config.world import describe_layouts, nearest_layouts, with_keys, with_remedies, world_fault
from megaeva.errors import ConfigError

CLIP_VOCAB_SIZE = 49408
_FOLDER_NAME = re.compile(r"\w[\w.-]*")
_ConfigT = TypeVar("_ConfigT", bound=Section)


class UnknownValue(Exception):
    """A rule asked for a field that could not be read; control flow between the rules and `load`, never shown."""


# ------------------------------------------------------------------------------------------------------ one tower


def _head_width(key: str, tower: VisionSection | TextSection) -> Iterator[Problem]:
    if tower.hidden_size % tower.num_heads:
        yield Problem(
            f"{key}.num_heads",
            f"must divide {key}.hidden_size={tower.hidden_size}",
            f"change one of the two, e.g. num_heads={gcd(tower.hidden_size, tower.num_heads)}",
        )


def _vision_heads(cfg: Config) -> Iterator[Problem]:
    yield from _head_width("model.vision", cfg.model.vision)


def _text_heads(cfg: Config) -> Iterator[Problem]:
    yield from _head_width("model.text", cfg.model.text)


def _patches(cfg: Config) -> Iterator[Problem]:
    vision = cfg.model.vision
    if vision.image_size % vision.patch_size:
        lower = max(1, vision.image_size // vision.patch_size) * vision.patch_size
        yield Problem(
            "model.vision.image_size",
            f"must be a multiple of model.vision.patch_size={vision.patch_size}",
            f"use {lower} or {lower + vision.patch_size}",
        )


def _rope(cfg: Config) -> Iterator[Problem]:
    vision = cfg.model.vision
    if vision.rope and vision.hidden_size % vision.num_heads == 0 and (vision.hidden_size // vision.num_heads) % 4:
        yield Problem(
            "model.vision.rope",
            f"needs a head width divisible by 4 (rows and columns in pairs), it is hidden_size / num_heads = "
            f"{vision.hidden_size // vision.num_heads}",
            "change hidden_size or num_heads, or set model.vision.rope=false",
        )


def _logit_scale(cfg: Config) -> Iterator[Problem]:
    scale = cfg.model.logit_scale
    if not 0 <= scale.init <= scale.max:
        yield Problem(
            "model.logit_scale.init",
            f"must lie in [0, model.logit_scale.max={scale.max:.6g}]",
            "give the logarithm of the inverse temperature, e.g. 2.6592600369327783 for 1/0.07",
        )


# ------------------------------------------------------------------------------------------------ tasks and starts


def _loss(cfg: Config) -> Iterator[Problem]:
    loss, bias = cfg.loss, cfg.model.logit_scale.bias
    if cfg.task == "mim":
        if loss.name != "infonce" or loss.label_smoothing:
            yield Problem(
                "loss", "must be absent in task=mim, which distils features", "remove it, or set it in a clip recipe"
            )
        return
    if loss.name == "sigmoid":
        if bias is None:
            yield Problem("model.logit_scale.bias", "is needed by loss.name=sigmoid", "SigLIP starts at bias=-10")
        if loss.label_smoothing:
            yield Problem(
                "loss.label_smoothing", "must be 0 with loss.name=sigmoid", "remove it, or set loss.name=infonce"
            )
    elif bias is not None:
        yield Problem(
            "model.logit_scale.bias",
            "must be absent with loss.name=infonce, which no bias of all logits changes",
            "remove it, or set loss.name=sigmoid",
        )


def _task_sections(cfg: Config) -> Iterator[Problem]:
    if cfg.task == "mim":
        if cfg.mim is None:
            yield Problem(
                "mim", "is needed by task=mim", "add mim.mask.num_masked and mim.mask.min_block (EVA: 105 and 16)"
            )
        if cfg.teacher is None:
            yield Problem("teacher", "is needed by task=mim", "set teacher.checkpoint to the run folder of a CLIP")
        if cfg.init.clip is not None:
            yield Problem("init.clip", "must be absent in task=mim, which trains a vision tower", "set init.vision")
        if cfg.init.text is not None:
            yield Problem("init.text", "must be absent in task=mim, which has no text tower", "remove it")
        if cfg.optim.text is not None:
            yield Problem("optim.text", "must be absent in task=mim, which has no text tower", "remove it")
        # Not whether it is written: a run's own config.yaml spells out defaults.
        if cfg.optim.logit_scale_lr != OptimSection.model_fields["logit_scale_lr"].default:
            yield Problem("optim.logit_scale_lr", "must be absent in task=mim, which has no logit scale", "remove it")
    else:
        for name in ("mim", "teacher"):
            if getattr(cfg, name) is not None:
                yield Problem(name, "must be absent in task=contrastive", "remove it, or set task=mim")


def _mask(cfg: Config) -> Iterator[Problem]:
    if cfg.mim is None:
        return
    mask, num_patches = cfg.mim.mask, cfg.model.vision.num_patches
    if mask.num_masked >= num_patches:
        yield Problem(
            "mim.mask.num_masked",
            f"must be below the {num_patches} patches of an image",
            f"EVA masks 41 %: use {round(0.41 * num_patches)}",
        )
    if mask.min_block > mask.num_masked:
        yield Problem(
            "mim.mask.min_block", f"must not exceed mim.mask.num_masked={mask.num_masked}", "use a smaller block"
        )


def _mim_sees_all(cfg: Config) -> Iterator[Problem]:
    if cfg.task == "mim" and cfg.model.vision.patch_dropout > 0:
        yield Problem(
            "model.vision.patch_dropout",
            "must be 0 in task=mim, whose encoder runs on all tokens",
            "remove it here and set it in the contrastive recipe",
        )


def _vocabulary(cfg: Config) -> Iterator[Problem]:
    if cfg.task == "contrastive" and cfg.data.tokenizer_subset is None and cfg.model.text.vocab_size < CLIP_VOCAB_SIZE:
        yield Problem(
            "model.text.vocab_size",
            f"must be at least {CLIP_VOCAB_SIZE}, the CLIP vocabulary",
            "set data.tokenizer_subset to the vocab.json that `megaeva data` wrote, or enlarge the vocabulary",
        )


# ---------------------------------------------------------------------------------------------- data and schedule


def _eval_data(cfg: Config) -> Iterator[Problem]:
    sets = {f"eval.retrieval.{k}": v.shards for k, v in cfg.eval.retrieval.items()}
    sets |= {f"eval.zero_shot.{k}": v.shards for k, v in cfg.eval.zero_shot.items()}
    for key, shards in sets.items():
        if not shards:
            yield Problem(f"{key}.shards", "must name at least one shard", "name the shards or remove the set")


def _augment(cfg: Config) -> Iterator[Problem]:
    low, high = cfg.data.augment.scale
    if not 0 < low <= high <= 1:
        yield Problem("data.augment.scale", "must be 0 < low <= high <= 1 (share of the area)", "e.g. [0.9, 1.0]")
    low, high = cfg.data.augment.ratio
    if not 0 < low <= high:
        yield Problem("data.augment.ratio", "must be 0 < low <= high (width / height)", "e.g. [0.75, 1.3333]")


def _optimizer(cfg: Config) -> Iterator[Problem]:
    if not all(0 <= beta < 1 for beta in cfg.optim.betas):
        yield Problem("optim.betas", "must each lie in [0, 1)", "e.g. [0.9, 0.98]")
    if cfg.optim.clip_grad_norm is not None and cfg.optim.clip_grad_norm <= 0:
        yield Problem("optim.clip_grad_norm", "must be above 0", "use null for no clipping")


def _frozen(cfg: Config) -> Iterator[Problem]:
    frozen, init = set(cfg.optim.frozen), cfg.init
    if not frozen:
        return
    if cfg.task == "mim":
        yield Problem("optim.frozen", "must be empty in task=mim, which trains its one tower", "remove it")
        return
    if frozen == {"vision", "text"} and not cfg.model.logit_scale.trainable:
        yield Problem(
            "optim.frozen",
            "leaves nothing to train, as model.logit_scale.trainable=false too",
            "leave a tower or the logit scale trained, or measure the weights with `megaeva eval`",
        )
    for tower in sorted(frozen):
        if init.clip is None and getattr(init, tower) is None:
            yield Problem(
                "optim.frozen",
                f"holds {tower}, and a tower that is never trained needs weights",
                f"set init.{tower} or init.clip",
            )


def _warmup(cfg: Config) -> Iterator[Problem]:
    steps = max(1, cfg.train.total_samples // cfg.train.global_batch_size)
    if cfg.optim.warmup_steps >= steps:
        yield Problem(
            "optim.warmup_steps",
            f"must be below the {steps} steps of the run (train.total_samples={cfg.train.total_samples} / "
            f"train.global_batch_size={cfg.train.global_batch_size})",
            f"use e.g. {steps // 10}, or train longer",
        )


def _saving(cfg: Config) -> Iterator[Problem]:
    for key, every in (
        ("save.every_steps", cfg.save.every_steps),
        ("save.every_minutes", cfg.save.every_minutes),
        ("eval.every_steps", cfg.eval.every_steps),
    ):
        if every is not None and every <= 0:
            yield Problem(key, "must be above 0", "use null for never")


def _guarded(cfg: Config) -> Iterator[Problem]:
    fp16, guard = cfg.train.fp16, cfg.train.spike_guard
    if fp16.min_scale > fp16.initial_scale:
        yield Problem(
            "train.fp16.min_scale",
            f"must not exceed train.fp16.initial_scale={fp16.initial_scale:g}",
            "use a smaller one, e.g. 1",
        )
    saves = cfg.save.enabled and (cfg.save.every_steps is not None or cfg.save.every_minutes is not None)
    if guard and guard.action == "roll_back" and not saves:
        yield Problem(
            "train.spike_guard.action",
            "needs checkpoints to go back to, and none is saved on the way",
            "set save.every_steps or save.every_minutes, or use skip",
        )


def _profiled(cfg: Config) -> Iterator[Problem]:
    window, steps = cfg.train.profile, cfg.train.total_steps
    if window and not window.ranks:
        yield Problem("train.profile.ranks", "must name a rank", "use [0], or leave train.profile out to trace nothing")
    if window and window.first_step + window.num_steps > steps:
        yield Problem(
            "train.profile.first_step",
            f"and train.profile.num_steps={window.num_steps} must end within the {steps} steps of the run",
            f"use {max(0, steps - window.num_steps)} or less" if window.num_steps <= steps else "train longer",
        )


RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _vision_heads, _text_heads, _patches, _rope, _logit_scale, *LAYOUT_RULES,
    _task_sections, _loss, _mask, _mim_sees_all, _vocabulary, *PHASE_RULES, _eval_data, _augment, _optimizer, _frozen,
    _warmup, micro_batch_problems, _saving, _guarded, _profiled, *FP8_RULES,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ loop


def _loop_teacher(cfg: LoopConfig) -> Iterator[Problem]:
    if (cfg.teacher.checkpoint is None) == (cfg.teacher.stage is None):
        yield Problem(
            "teacher",
            "must have exactly one of teacher.checkpoint and teacher.stage",
            "name the run folder of a CLIP, or the recipe that trains one",
        )


def _loop_rounds(cfg: LoopConfig) -> Iterator[Problem]:
    if not cfg.rounds:
        yield Problem("rounds", "must hold at least one round", "add a round with name, distil and clip")
    for i, part in enumerate(cfg.rounds):
        # They name folders that the loop makes and, when a stage is begun anew, deletes.
        for key, name in [(f"rounds.{i}.name", part.name), *((f"rounds.{i}.controls.{c}", c) for c in part.controls)]:
            if not _FOLDER_NAME.fullmatch(name):
                yield Problem(key, "must be a plain folder name: letters, digits, '_', '-' and '.'", "rename it")
    names = [r.name for r in cfg.rounds]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield Problem(f"rounds.{i}.name", "must differ from the other rounds' names", "rename it")


LOOP_RULES: tuple[Callable[[LoopConfig], Iterator[Problem]], ...] = (_loop_teacher, _loop_rounds)


def problems(cfg: _ConfigT, rules: Sequence[Callable[[_ConfigT], Iterator[Problem]]]) -> list[Problem]:
    """Every broken rule of `cfg`, in the order of `rules`. `cfg` may be `load`'s partial view of a broken recipe."""
    found: list[Problem] = []
    for rule in rules:
        try:
            found.extend(rule(cfg))
        except UnknownValue:
            continue
    return found


def with_working_values(cfg: Config, found: list[Problem], processes: int | None) -> list[Problem]:
    """`found`, what `problems` says of `cfg`, where values that it names keep all rules, also on `processes` if known.

    A mistake whose remedy is no such value stays out of it: it is told for itself.
    """
    apart = {problem.key for problem in found if not isinstance(problem, Remedies)}

    def why_not(change: Change) -> str | None:
        changed = with_keys(cfg, change)
        try:
            fault = world_fault(changed, processes) if processes is not None else None
        except UnknownValue:  # of the key that is unreadable, `load` tells
            fault = None
        if fault is not None:
            return fault.text
        return next((f"{one.key} {one.must}" for one in problems(changed, RULES) if one.key not in apart), None)

    return with_remedies(found, why_not)


# ------------------------------------------------------------------------------------------------------- run time


def check_world(cfg: Config, world_size: int) -> None:
    """Nothing; checks what depends on the number of processes, which no recipe states.

    Args:
        cfg: a loaded recipe.
        world_size: processes of the run, all nodes together.

    Raises:
        ConfigError: the processes cannot be arranged, or the global batch cannot be dealt to them; it names the nearest
            layouts that work. A rank that is to be traced is none of them.
    """
    fault = world_fault(cfg, world_size)
    if fault is not None:
        layouts = nearest_layouts(cfg, world_size, fault, allowed=lambda changed: not problems(changed, RULES))
        raise ConfigError(f"{fault.text}; {describe_layouts(layouts, world_size)}.")
    traced = cfg.train.profile.ranks if cfg.train.profile else ()
    if traced != "all" and any(not 0 <= rank < world_size for rank in traced):
        raise ConfigError(
            f"train.profile.ranks={list(traced)} must be ranks of the run, 0 to {world_size - 1}; use those, or all."
        )


def check_teacher(cfg: Config, teacher: VisionSection, processes: int | None = None) -> None:
    """Nothing; checks `parallel.teacher` against the tower that the teacher's checkpoint turns out to hold.

    Raises:
        ConfigError: it cannot be cut that way.
    """
    tp = cfg.parallel.teacher.tp
    for problem in with_working_values(cfg, teacher_problems(tp, teacher), processes):
        raise ConfigError(f"{problem.key}={tp} {problem.must}; {problem.do}.")
