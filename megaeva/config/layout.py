"""Rules of the `parallel` section; `world.py` checks what depends on the number of processes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any

from megaeva.config.problem import Problem, choices, divisors
from megaeva.config.schema import AxesSection, Config, VisionSection
from megaeva.config.topology import virtual_stages

Change = Mapping[str, Any]
"""Keys to set on top of a recipe, by their dotted names."""


def overrides(change: Change) -> list[str]:
    """The keys as `key.path=value`."""
    return [f"{key}={'null' if value is None else value}" for key, value in change.items()]


@dataclass(frozen=True)
class Remedies(Problem):
    """A problem that values mend, not all of which other rules or the number of processes allow.

    `world.with_remedies` writes those that do into `do`. Each of `ways` is one remedy: changes, the nearest first, of
    which one is named.
    """

    do: str = field(init=False)
    ways: tuple[tuple[Change, ...], ...]
    form: str = "use {}"
    say: Callable[[Change], str] = field(default=lambda change: " ".join(overrides(change)))

    def __post_init__(self) -> None:
        object.__setattr__(self, "do", self.naming([way[0] for way in self.ways if way]))

    def naming(self, changes: list[Change]) -> str:
        """What to do, with these changes as the choice."""
        return self.form.format(choices([self.say(change) for change in changes]))


def _value(change: Change) -> str:
    (value,) = change.values()
    return str(value)


# ------------------------------------------------------------------------------------------------ tensor parallel


def vision_tp_choices(cfg: Config) -> list[int]:
    """The tensor-parallel sizes that split the vision tower evenly (heads and MLP), ascending."""
    return divisors(gcd(cfg.model.vision.num_heads, cfg.model.vision.ffn_hidden_size))


def text_tp_choices(cfg: Config) -> list[int]:
    """The tensor-parallel sizes that split the text tower evenly (heads and MLP), ascending.

    The vocabulary does not count: where tp does not divide it, each rank holds the whole token embedding.
    """
    return divisors(gcd(cfg.model.text.num_heads, cfg.model.text.ffn_hidden_size))


def _tp_splits(key: str, tp: int, sizes: dict[str, int], allowed: list[int]) -> Iterator[Problem]:
    broken = [f"{name}={size}" for name, size in sizes.items() if size % tp]
    if broken:
        ways = tuple(({f"parallel.{key}.tp": size},) for size in allowed)
        yield Remedies(f"parallel.{key}.tp", f"must divide {' and '.join(broken)}", ways=ways, say=_value)


def micro_batch_problems(cfg: Config) -> Iterator[Problem]:
    """A micro batch size that no number of processes could use."""
    key, micro, batch = "train.micro_batch_size", cfg.train.micro_batch_size, cfg.train.global_batch_size
    if micro is not None and (micro < 1 or batch % micro):
        near = sorted(divisors(batch), key=lambda size: abs(size - micro))  # the smaller of two as near
        yield Remedies(
            key, f"must divide train.global_batch_size={batch}", ways=(tuple({key: size} for size in near),), say=_value
        )


def _vision_tp(cfg: Config) -> Iterator[Problem]:
    vision = cfg.model.vision
    sizes = {
        "model.vision.num_heads": vision.num_heads,
        "model.vision.ffn_hidden_size": vision.ffn_hidden_size,
    }
    yield from _tp_splits("vision", cfg.parallel.vision.tp, sizes, vision_tp_choices(cfg))


def _text_tp(cfg: Config) -> Iterator[Problem]:
    if cfg.task != "contrastive":
        return
    text = cfg.model.text
    sizes = {
        "model.text.num_heads": text.num_heads,
        "model.text.ffn_hidden_size": text.ffn_hidden_size,
    }
    yield from _tp_splits("text", cfg.parallel.text.tp, sizes, text_tp_choices(cfg))


def teacher_problems(tp: int, teacher: VisionSection) -> list[Problem]:
    """What is wrong with `parallel.teacher.tp` for the tower in the teacher's checkpoint, which no recipe knows."""
    sizes = {"the teacher's num_heads": teacher.num_heads, "the teacher's ffn_hidden_size": teacher.ffn_hidden_size}
    return list(_tp_splits("teacher", tp, sizes, divisors(gcd(teacher.num_heads, teacher.ffn_hidden_size))))


# ------------------------------------------------------------------------------------------------------- pipelines


def _whole_towers(cfg: Config) -> Iterator[Problem]:
    reasons = {
        "text": "the text tower lives whole on every pipeline rank of the vision tower",
        "teacher": "the teacher is not cut into stages",
    }
    for name, axes in (("text", cfg.parallel.text), ("teacher", cfg.parallel.teacher)):
        for key, value in (("pp", axes.pp), ("vpp", axes.vpp)):
            if value != 1:
                do, whole = f"remove it, or raise parallel.{name}.tp", {f"parallel.{name}.{key}": 1}
                yield Remedies(f"parallel.{name}.{key}", f"must be 1: {reasons[name]}", ways=((whole,),), form=do)
        if axes.layers_per_stage is not None:
            yield Problem(f"parallel.{name}.layers_per_stage", f"must be absent: {reasons[name]}", "remove it")


def _stages(cfg: Config) -> Iterator[Problem]:
    axes, num_layers = cfg.parallel.vision, cfg.model.vision.num_layers
    sizes = axes.layers_per_stage

    def stages(pp: int, vpp: int) -> Change:
        new: dict[str, Any] = {"parallel.vision.pp": pp} if pp != axes.pp else {}
        new |= {"parallel.vision.vpp": vpp} if vpp != axes.vpp else {}
        unfit = sizes is not None and (len(sizes), sum(sizes)) != (pp * vpp, num_layers)
        return new | ({"parallel.vision.layers_per_stage": None} if unfit else {})

    if axes.vpp > 1 and axes.pp == 1:
        yield Remedies(
            "parallel.vision.vpp",
            "must be 1 at parallel.vision.pp=1: virtual stages interleave the stages of a pipeline",
            ways=((stages(1, 1),), tuple(stages(pp, axes.vpp) for pp in range(2, num_layers // axes.vpp + 1))),
        )
    elif axes.pp * axes.vpp > num_layers:
        least = 1 if axes.vpp == 1 else 2
        fewer_ranks = [stages(pp, axes.vpp) for pp in range(num_layers // axes.vpp, least - 1, -1)]
        fewer_chunks = [stages(axes.pp, vpp) for vpp in range(num_layers // axes.pp, 0, -1)] if axes.vpp > 1 else []
        total = f"pp={axes.pp} x vpp={axes.vpp} = {axes.pp * axes.vpp} stages"
        yield Remedies(
            "parallel.vision.pp",
            f"must leave each of the {total} a layer, model.vision.num_layers={num_layers}",
            ways=((*fewer_ranks, stages(1, 1)), tuple(fewer_chunks)),
        )


def _layers_per_stage(cfg: Config) -> Iterator[Problem]:
    axes, num_layers = cfg.parallel.vision, cfg.model.vision.num_layers
    sizes = axes.layers_per_stage
    if sizes is None or axes.pp * axes.vpp > num_layers or (len(sizes), sum(sizes)) == (axes.pp * axes.vpp, num_layers):
        return
    if axes.vpp > 1 and axes.pp == 1:
        return  # `_stages` tells it
    even = [len(stage) for stage in virtual_stages(AxesSection(pp=axes.pp, vpp=axes.vpp), num_layers)]
    key = "parallel.vision.layers_per_stage"
    yield Remedies(
        key,
        f"must have pp x vpp = {axes.pp * axes.vpp} entries that sum to model.vision.num_layers={num_layers}, "
        f"it has {len(sizes)} that sum to {sum(sizes)}",
        ways=(({key: even},),),
        form="use {}, or remove it for that",
        say=_value,
    )


# ------------------------------------------------------------------------------------------------------------ rest


def _recompute(cfg: Config) -> Iterator[Problem]:
    vision, text = cfg.parallel.vision, cfg.parallel.text
    if isinstance(text.recompute, int) and text.recompute > cfg.model.text.num_layers:
        yield Problem(
            "parallel.text.recompute",
            f"must be at most model.text.num_layers={cfg.model.text.num_layers}",
            "use `full` for all layers",
        )
    if isinstance(vision.recompute, int):
        num_layers = cfg.model.vision.num_layers
        if vision.pp * vision.vpp > num_layers or (vision.vpp > 1 and vision.pp == 1):
            return  # `_stages` tells it
        largest = max(len(stage) for stage in virtual_stages(vision, num_layers))
        if vision.recompute > largest:
            limit = "model.vision.num_layers" if vision.pp == 1 else "the layers of the largest stage, as each counts"
            yield Problem(
                "parallel.vision.recompute", f"must be at most {limit}={largest}", "use `full` for all layers"
            )
    if cfg.task == "mim" and cfg.parallel.teacher.recompute != "none":
        yield Problem("parallel.teacher.recompute", "must be none: the teacher has no backward pass", "remove it")


def _second_tower_of_the_task(cfg: Config) -> Iterator[Problem]:
    name, tower, axes = ("text", "text tower", cfg.parallel.text)
    if cfg.task == "contrastive":
        name, tower, axes = ("teacher", "teacher", cfg.parallel.teacher)
    default = AxesSection()
    if any(getattr(axes, key) != getattr(default, key) for key in AxesSection.model_fields):
        yield Problem(f"parallel.{name}", f"must be absent in task={cfg.task}, which has no {tower}", "remove it")


def _overlap(cfg: Config) -> Iterator[Problem]:
    if cfg.parallel.overlap_param_gather and not cfg.parallel.distributed_optimizer:
        yield Problem(
            "parallel.overlap_param_gather",
            "needs parallel.distributed_optimizer=true: without it no rank has to gather parameters",
            "remove one of the two",
        )


def _transfer_overlap(cfg: Config) -> Iterator[Problem]:
    name, axes = ("text", cfg.parallel.text) if cfg.task == "contrastive" else ("teacher", cfg.parallel.teacher)
    if axes.tp_comm_overlap:
        reason = {"text": "captions end with a batch's longest", "teacher": "the teacher has no backward pass"}[name]
        yield Problem(
            f"parallel.{name}.tp_comm_overlap",
            f"must be false: Transformer Engine has buffers of one shape for one tower, and {reason}",
            "set parallel.vision.tp_comm_overlap=true alone, or remove it",
        )
    key, vision = "parallel.vision.tp_comm_overlap", cfg.parallel.vision
    if not vision.tp_comm_overlap:
        return
    if vision.tp == 1 or not vision.sequence_parallel:
        yield Problem(
            key,
            f"needs parallel.vision.tp above 1, it is {vision.tp}, and parallel.vision.sequence_parallel=true",
            "set both, or remove it",
        )
    if cfg.platform == "cpu":
        yield Problem(key, "must be false with platform=cpu: it is Transformer Engine's, on GPUs", "remove it")
    if cfg.train.precision == "fp8" and cfg.train.fp8.recipe == "blockwise":
        yield Problem(
            key,
            "must be false with train.fp8.recipe=blockwise, which Transformer Engine's buffers do not take",
            "remove it, or use train.fp8.recipe=delayed, current or mxfp8",
        )


LAYOUT_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _vision_tp, _text_tp, _whole_towers, _stages, _layers_per_stage, _recompute, _second_tower_of_the_task, _overlap,
    _transfer_overlap,
)  # fmt: skip
