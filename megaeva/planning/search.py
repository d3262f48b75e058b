"""`megaeva plan --search`: layouts that keep the rules of a recipe, by the days they take, and why others are none."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice, product
from typing import Any

from megaeva.config.layout import text_tp_choices, vision_tp_choices
from megaeva.config.problem import divisors
from megaeva.config.schema import Config, ModelSection, ParallelSection
from megaeva.config.topology import microbatches, sharing_ranks, virtual_stages
from megaeva.config.validate import RULES, problems
from megaeva.config.world import world_fault
from megaeva.planning.estimate import Plan, StageBytes, plan
from megaeva.planning.formulae import GIB
from megaeva.planning.gpus import GPUS, Gpu, Precision
from megaeva.planning.table import columns, in_bytes

_NUM_SHOWN = 5
_HOST_GIB = 256  # of a GPU's part of its node's memory: a DGX of 8 has 2 TB


@dataclass
class Family:
    """Layouts of one tp x pp.

    Attributes:
        nearest: the plan that takes least memory; None where the rules refuse all.
        refusal: of the rules.
        fits: whether one of its plans does.
    """

    tp: int
    pp: int
    nearest: Plan | None = None
    refusal: str = ""
    fits: bool = False


@dataclass
class Search:
    """What a search found.

    Attributes:
        fitting: plans that fit, the fewest days first.
        best: the first of those that differ much.
        tried: layouts that were planned or refused.
        left_out: why sizes and precisions were not tried, a line each.
    """

    cfg: Config
    num_gpus: int
    gpu: Gpu
    teacher: ModelSection | None = None
    fitting: list[Plan] = field(default_factory=list)
    best: list[Plan] = field(default_factory=list)
    families: list[Family] = field(default_factory=list)
    tried: int = 0
    left_out: list[str] = field(default_factory=list)


def search(cfg: Config, num_gpus: int, gpu: Gpu, teacher: ModelSection | None = None) -> Search:
    """Every tp, pp, vpp, second tower's tp, micro batch, recompute and precision that makes sense, planned.

    tp stays within a node; sequence parallelism goes with it; the text tower's tp divides the vision tower's. Global
    batch and samples are the recipe's. Sizes of a micro batch are the smallest, those nearest to 8, 16, ... 1024 and
    the largest, which without a pipeline is one pass; they grow until one does not fit. Of each the least recomputation
    that fits: none, of attention, of the fewest first layers of a stage, of all; more costs time and gains nothing.
    """
    found = Search(cfg, num_gpus, gpu, teacher, left_out=_left_out(cfg, gpu))
    for tp, pp in product(_tp_choices(vision_tp_choices(cfg), gpu), _pp_choices(cfg)):
        family = Family(tp, pp)
        found.families.append(family)
        if num_gpus % (tp * pp):
            found.tried += 1
            family.refusal = f"tp x pp does not divide {num_gpus} GPUs"
            continue
        for candidate in _layouts(cfg, tp, pp, gpu):
            fault = _refusal(_with(candidate, "train", micro_batch_size=1), num_gpus)
            if fault is not None:
                found.tried += 1
                family.refusal = family.refusal or fault
                continue
            for micro in _micro_batches(candidate, num_gpus):
                sized = _with(candidate, "train", micro_batch_size=micro)
                if world_fault(sized, num_gpus) is not None:  # the other rules know no micro batch that divides
                    found.tried += 1
                    continue
                fitting = _least_recompute(found, family, sized)
                if fitting is None:
                    break  # a larger one takes more
                found.fitting.append(fitting)
    found.fitting.sort(key=lambda one: one.days)
    found.best = _distinct(found.fitting)
    return found


def _least_recompute(found: Search, family: Family, cfg: Config) -> Plan | None:
    """The plan that fits with least computed again; None if none does."""

    def tried(recompute: Any) -> Plan:
        found.tried += 1
        one = plan(_recomputing(cfg, recompute), found.num_gpus, found.gpu, found.teacher)
        if family.nearest is None or one.worst.total < family.nearest.worst.total:
            family.nearest = one
        family.fits = family.fits or one.fits
        return one

    for recompute in ("none", "selective"):
        if (one := tried(recompute)).fits:
            return one
    best = tried("full")
    if not best.fits:
        return None
    axes = cfg.parallel.vision
    few, enough = 0, max(len(stage) for stage in virtual_stages(axes, cfg.model.vision.num_layers))
    while enough - few > 1:
        middle = (few + enough) // 2
        if (one := tried(middle)).fits:
            best, enough = one, middle
        else:
            few = middle
    return best


def _recomputing(cfg: Config, recompute: Any) -> Config:
    parallel = _updated(cfg.parallel, "vision", {"recompute": recompute})
    if cfg.task == "contrastive":
        parallel = _updated(parallel, "text", {"recompute": recompute if isinstance(recompute, str) else "full"})
    return cfg.model_copy(update={"parallel": parallel})


def _distinct(plans: Sequence[Plan]) -> list[Plan]:
    """The first few, one of each tp, pp and precision, with and without layers recomputed."""
    seen: set[tuple[Any, ...]] = set()
    chosen = []
    for one in plans:
        axes = one.cfg.parallel.vision
        key = (axes.tp, axes.pp, axes.recompute in ("none", "selective"), one.cfg.train.precision)
        if key not in seen:
            seen.add(key)
            chosen.append(one)
    return chosen[:_NUM_SHOWN]


def _tp_choices(choices: Sequence[int], gpu: Gpu) -> list[int]:
    return [tp for tp in choices if tp <= gpu.gpus_per_node and gpu.gpus_per_node % tp == 0]


def _pp_choices(cfg: Config) -> range:
    return range(1, cfg.model.vision.num_layers + 1)


def _precisions(cfg: Config, gpu: Gpu) -> list[Precision]:
    """The recipe's, and of bf16 and FP8 the other if the GPU has it."""
    also: tuple[Precision, ...] = ("bf16", "fp8") if cfg.train.precision in ("bf16", "fp8") else ()
    return [one for one in dict.fromkeys((cfg.train.precision, *also)) if one in gpu.peak_tflops]


def _left_out(cfg: Config, gpu: Gpu) -> list[str]:
    choices = vision_tp_choices(cfg)
    beyond = [tp for tp in choices if tp not in _tp_choices(choices, gpu)]
    lines = []
    if beyond:
        lines.append(f"tp={','.join(map(str, beyond))}: a node of {gpu.gpus_per_node} GPUs is not made of such groups")
    others = [str(tp) for tp in range(2, gpu.gpus_per_node + 1) if gpu.gpus_per_node % tp == 0 and tp not in choices]
    if others:
        vision = cfg.model.vision
        lines.append(
            f"tp={','.join(others)}: must divide num_heads={vision.num_heads} and "
            f"ffn_hidden_size={vision.ffn_hidden_size} of the vision tower"
        )
    if cfg.train.precision not in ("bf16", "fp8"):
        lines.append(
            f"precision: {cfg.train.precision} as in the recipe; bf16 and FP8 are tried of recipes in one of them"
        )
    elif "fp8" not in gpu.peak_tflops:
        lines.append(f"fp8: {gpu.name} does not multiply in it")
    return lines


def _layouts(cfg: Config, tp: int, pp: int, gpu: Gpu) -> Iterator[Config]:
    """Recipes with these axes, not checked, of every vpp, second tp and precision."""
    layers = cfg.model.vision.num_layers
    vpps = [1] if pp == 1 else [vpp for vpp in (1, 2, 3, 4, 6) if layers % (pp * vpp) == 0] or [1]
    for vpp, second, precision in product(vpps, _second_choices(cfg, tp, gpu), _precisions(cfg, gpu)):
        vision = {"tp": tp, "sequence_parallel": tp > 1, "pp": pp, "vpp": vpp, "recompute": "none"}
        if cfg.parallel.vision.tp_comm_overlap and tp == 1:
            vision["tp_comm_overlap"] = False
        parallel = _updated(cfg.parallel, "vision", vision | {"layers_per_stage": None})
        if cfg.task == "contrastive":
            values = {"tp": second, "sequence_parallel": second > 1, "recompute": "none"}
            parallel = _updated(parallel, "text", values)
        else:
            parallel = _updated(parallel, "teacher", {"tp": second})
        yield _with(cfg.model_copy(update={"parallel": parallel}), "train", precision=precision)


def _second_choices(cfg: Config, tp: int, gpu: Gpu) -> list[int]:
    """tp of the text tower that divides the vision tower's, of a teacher the recipe's own and 1."""
    if cfg.task == "mim":
        return sorted({1, cfg.parallel.teacher.tp})
    return [second for second in _tp_choices(text_tp_choices(cfg), gpu) if tp % second == 0]


def _micro_batches(cfg: Config, num_gpus: int) -> list[int]:
    """Sizes of a micro batch, ascending."""
    share, _ = microbatches(_with(cfg, "train", micro_batch_size=None), cfg.parallel.vision, num_gpus)
    rounds = cfg.parallel.vision.pp if cfg.parallel.vision.vpp > 1 else 1
    sizes = [size for size in divisors(share) if share // size % rounds == 0]
    if cfg.parallel.vision.pp > 1:  # a pipeline wants several times its depth
        sizes = [size for size in sizes if share // size >= 2 * cfg.parallel.vision.pp] or sizes[:1]
    wanted = (8, 16, 32, 64, 128, 256, 512, 1024)
    near = {min(sizes, key=lambda size: abs(size - want)) for want in wanted}
    return sorted({sizes[0], sizes[-1], *near})


def _refusal(cfg: Config, num_gpus: int) -> str | None:
    """The first rule that the recipe breaks."""
    for problem in problems(cfg, RULES):
        return f"{problem.key} {problem.must}"
    fault = world_fault(cfg, num_gpus)
    return None if fault is None else fault.text


def _with(cfg: Config, section: str, **values: Any) -> Config:
    return cfg.model_copy(update={section: getattr(cfg, section).model_copy(update=values)})


def _updated(parallel: ParallelSection, name: str, values: dict[str, Any]) -> ParallelSection:
    return parallel.model_copy(update={name: getattr(parallel, name).model_copy(update=values)})


# ------------------------------------------------------------------------------------------------------------ report


def overrides(cfg: Config, recipe: Config) -> list[str]:
    """`key.path=value` that make of the recipe this layout of it."""
    old, new = (_leaves(one.model_dump(include={"parallel", "train", "data"})) for one in (recipe, cfg))
    return [f"{key}={json.dumps(value)}".replace('"', "") for key, value in new.items() if value != old[key]]


def _leaves(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def search_lines(found: Search) -> list[str]:
    """The best layouts, the overrides of the first, and why families of layouts are not among them."""
    head = f"{found.tried:,} layouts of {found.num_gpus} x {found.gpu.name} ({found.gpu.memory_gib:g} GiB)"
    lines = [head] if found.best else [*_nothing_fits(found), "", head]
    if found.best:
        titles = (
            "", "tp", "pp", "vpp", "dp", "second tp", "micro", "recompute", "precision", "GiB", "samples/s",
            "MFU", "days",
        )  # fmt: skip
        rows: list[tuple[str, ...]] = [titles]
        rows += [_row(place, one) for place, one in enumerate(found.best, 1)]
        lines += ["", *columns(rows, right=(1, 2, 3, 4, 5, 6, 9, 10, 11, 12)), ""]
        changes = overrides(found.best[0].cfg, found.cfg)
        lines += ["the first, to paste:", *_wrapped(changes)] if changes else ["the first is the recipe's own layout"]
    if rejected := rejected_lines(found):
        lines += ["", "not possible:", *(f"  {line}" for line in rejected)]
    return lines


def rejected_lines(found: Search) -> list[str]:
    """Of each family that is not possible the reason, and what was not tried."""
    rejected = [family for family in found.families if not family.fits]
    return [*_reasons(rejected, found.gpu), *_advice(rejected), *found.left_out]


def _row(place: int, one: Plan) -> tuple[str, ...]:
    axes, train = one.cfg.parallel.vision, one.cfg.train
    second = one.cfg.parallel.text if one.cfg.task == "contrastive" else one.cfg.parallel.teacher
    numbers = (axes.tp, axes.pp, axes.vpp, one.num_gpus // (axes.tp * axes.pp), second.tp, train.micro_batch_size)
    return (
        f"{place}.", *map(str, numbers), str(axes.recompute), train.precision, f"{one.worst.total / GIB:.1f}",
        f"{one.samples_per_second:,.0f}", f"{100 * one.mfu:.1f} %", f"{one.days:.1f}",
    )  # fmt: skip


def _wrapped(words: Sequence[str]) -> list[str]:
    lines, line = [], " "
    for word in words:
        if len(line) + len(word) > 96:
            lines.append(line + " \\")
            line = " "
        line += f" {word}"
    return [*lines, line]


def _reasons(rejected: Sequence[Family], gpu: Gpu) -> list[str]:
    """One line a tp: its pp that are too large for the memory, or refused by a rule."""
    lines = []
    for tp in dict.fromkeys(family.tp for family in rejected):
        memory = [family for family in rejected if family.tp == tp and family.nearest is not None]
        for family in memory:
            assert family.nearest is not None
            worst = family.nearest.worst
            part = max(worst.parts, key=lambda name: worst.parts[name])
            lines.append(
                f"tp={tp} pp={family.pp}: {worst.total / GIB:.1f} GiB of {gpu.memory_gib:g} at the least, "
                f"{worst.parts[part] / GIB:.1f} of it {part}"
            )
        by_rule: dict[str, list[int]] = {}
        for family in rejected:
            if family.tp == tp and family.nearest is None:
                by_rule.setdefault(family.refusal or "no micro batch divides the share", []).append(family.pp)
        lines += [f"tp={tp} pp={_spans(pps)}: {text}" for text, pps in by_rule.items()]
    return lines


def _advice(rejected: Sequence[Family]) -> list[str]:
    """What else would make room."""
    plans = [family.nearest for family in rejected if family.nearest is not None]
    if any(one.worst.parts["images"] > one.worst.total - one.capacity for one in plans):
        return ["images: of all ranks that share samples, decoded on the GPU; with data.decoder=pillow on the host"]
    return []


def _spans(numbers: Sequence[int]) -> str:
    """The text "2,4-8" of ascending numbers."""
    places = enumerate(numbers)
    parts = [[n for _, n in group] for _, group in groupby(places, key=lambda entry: entry[1] - entry[0])]
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _nothing_fits(found: Search) -> list[str]:
    planned = [family.nearest for family in found.families if family.nearest is not None]
    if not planned:
        batch = found.cfg.train.global_batch_size
        near = sorted(divisors(batch), key=lambda number: abs(number - found.num_gpus))[:2]
        return [
            f"No layout keeps the rules on {found.num_gpus} GPUs; each must have a share of the batch of {batch}; use "
            f"--gpus {' or '.join(map(str, sorted(near)))}, or change train.global_batch_size."
        ]
    nearest = min(planned, key=lambda one: one.worst.total)
    worst, gpu = nearest.worst, found.gpu
    part = max(worst.parts, key=lambda name: worst.parts[name])
    number = _enough_gpus(found)
    return [
        f"Nothing fits: the least is {in_bytes(worst.total)} on {gpu.memory_gib:g} GiB, "
        f"{in_bytes(worst.total - nearest.capacity)} too many, with:",
        *_wrapped(overrides(nearest.cfg, found.cfg)),
        f"Most of it is {part} ({in_bytes(worst.parts[part])}). On {found.num_gpus} GPUs of "
        f"{worst.total / GIB:.0f} GiB it would fit ({_larger(worst.total)}).",
        *_on_host(found, worst),
        f"It fits on {number} GPUs, the fewest found: use --gpus {number} --search."
        if number
        else "No larger number of GPUs was found on which it fits.",
    ]


def _enough_gpus(found: Search) -> int | None:
    """The fewest GPUs, more than were asked for, that hold a layout which a search tries there; None: none was found.

    Of each tp x pp those that take least, with all computed again and micro batches of 1. One that does not fit is
    taken not to fit on fewer GPUs either.
    """
    best: int | None = None
    for family in found.families:
        for cfg in _layouts(found.cfg, family.tp, family.pp, found.gpu):
            least = _recomputing(_with(cfg, "train", micro_batch_size=1), "full")
            if cfg.parallel.vision.vpp > 1 or any(problems(least, RULES)):
                continue

            def fits(number: int, cfg: Config = least) -> bool:
                return plan(cfg, number, found.gpu, found.teacher).fits

            numbers = (sharing_ranks(cfg) * share for share in divisors(cfg.train.global_batch_size))
            larger = [number for number in numbers if found.num_gpus < number < (best or number + 1)]
            larger = [number for number in larger if world_fault(least, number) is None]
            place = bisect_left(larger, True, key=fits)
            best = larger[place] if place < len(larger) else best
    return best


def _on_host(found: Search, worst: StageBytes) -> list[str]:
    """What fits when the host's memory holds the decoded images."""
    if not worst.parts["images"]:
        return []
    plans = search(_decoded_on_host(found.cfg), found.num_gpus, found.gpu, found.teacher).fitting
    if not plans:
        return ["It does not fit with data.decoder=pillow either, which keeps decoded images in the host's memory."]
    one = next((one for one in plans if _has_host_room(one)), None)
    if one is None:
        least = min(plans, key=lambda one: one.host_image_bytes)
        return [f"With data.decoder=pillow it would fit{_without_host_room(least)}."]
    return [f"With data.decoder=pillow it would fit{_host_room(one)}, with:", *_wrapped(overrides(one.cfg, found.cfg))]


def _has_host_room(one: Plan) -> bool:
    return one.host_image_bytes <= _HOST_GIB * GIB


def _host_room(one: Plan) -> str:
    return f", where a node has {in_bytes(one.host_image_bytes)} of memory for images for each GPU"


def _without_host_room(one: Plan) -> str:
    taken = in_bytes(one.host_image_bytes)
    return f", but images take {taken} of the host's memory for each GPU; 8 GPUs with 2 TB have {_HOST_GIB} GiB each"


def _decoded_on_host(cfg: Config) -> Config:
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"decoder": "pillow"})})


def _larger(total: int) -> str:
    names = [name for name, gpu in GPUS.items() if gpu.memory_gib * GIB >= total]
    return f"--gpu {' or '.join(names)}" if names else "none of the known ones"


def remedies(one: Plan, teacher: ModelSection | None) -> list[str]:
    """What to do about a plan that does not fit: single changes that make it; nothing for one that does."""
    if one.fits:
        return []

    def fits(cfg: Config) -> bool:
        return _refusal(cfg, one.num_gpus) is None and plan(cfg, one.num_gpus, one.gpu, teacher).fits

    axes = one.cfg.parallel.vision
    cuts: list[dict[str, Any]] = [
        {"recompute": "full"}, {"tp": 2 * axes.tp, "sequence_parallel": True}, {"pp": 2 * axes.pp},
    ]  # fmt: skip
    layouts = (one.cfg.model_copy(update={"parallel": _updated(one.cfg.parallel, "vision", values)}) for values in cuts)
    share, _ = microbatches(one.cfg, axes, one.num_gpus)
    smaller = (_with(one.cfg, "train", micro_batch_size=size) for size in reversed(divisors(share)) if size < share)
    ways = [*filter(fits, layouts), *islice(filter(fits, smaller), 1)]
    lines = [f"it would fit with: {' '.join(overrides(cfg, one.cfg))}" for cfg in ways]
    lines = lines or ["no single change makes it fit; try --search"]
    decoded = _decoded_on_host(one.cfg)
    if not one.worst.parts["images"] or not fits(decoded):
        return lines
    on_host = plan(decoded, one.num_gpus, one.gpu, teacher)
    head = "with data.decoder=pillow it would fit"
    if _has_host_room(on_host):
        return [head + _host_room(on_host), *(lines if ways else [])]
    return [*lines, head + _without_host_room(on_host)]
