"""Whether a recipe can be spread over a given number of processes, and the nearest layouts where it cannot.

A suggestion is only made when all of it would be accepted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, product
from math import gcd, lcm, log2, prod
from typing import Any, Literal

from megaeva.config.layout import Change, Remedies, overrides, text_tp_choices, vision_tp_choices
from megaeva.config.problem import Problem, divisors
from megaeva.config.schema import AxesSection, Config, Section
from megaeva.config.topology import PARALLEL_KEYS, data_ranks, microbatches, sharing_ranks, step_axes
from megaeva.config.variants import VARIANTS
from megaeva.errors import ConfigError

EXPECTED_WORLD_SIZE = "MEGAEVA_WORLD_SIZE"  # set by megaeva/loop/node.py for its ranks


def check_world_size(environ: Mapping[str, str]) -> None:
    """Returns when this rank's world is the whole job, and not one node's part that took itself for all of it.

    Args:
        environ: of a rank, set by torchrun, by megaeva/loop/node.py, and by Slurm where srun started torchrun.

    Raises:
        ConfigError: it is smaller or larger.
    """
    size = environ.get("WORLD_SIZE", "1")
    expected = environ.get(EXPECTED_WORLD_SIZE, size)
    if size != expected:
        raise ConfigError(
            f"WORLD_SIZE={size} on this rank, but the job was started with {expected} ranks on all nodes; every rank "
            "must see all others; start the nodes with recipes/train.sh and the same MASTER_ADDR."
        )
    nodes, started_on = environ.get("GROUP_WORLD_SIZE", "1"), environ.get("SLURM_STEP_NUM_NODES", "1")
    if int(nodes) < int(started_on):
        raise ConfigError(
            f"GROUP_WORLD_SIZE={nodes}, but srun started this on SLURM_STEP_NUM_NODES={started_on} nodes; they must be "
            "one job and not one for each node; use recipes/train_slurm.sh, or torchrun with --nnodes and one "
            "--rdzv-endpoint that is not localhost."
        )


@dataclass(frozen=True)
class Fault:
    """Why a recipe cannot run on a number of processes: what is and what must be; `kind` says what would mend it."""

    kind: Literal["processes", "batch", "microbatch"]
    text: str


def world_fault(cfg: Config, world_size: int) -> Fault | None:
    """The first thing that keeps `cfg`, whose recipe rules hold, from running on `world_size` processes."""
    towers = step_axes(cfg)
    batch = cfg.train.global_batch_size
    if world_size % sharing_ranks(cfg):
        sizes = " and ".join(_size(name, axes) for name, axes in towers.items())
        return Fault("processes", f"{_processes(world_size)} must be a multiple of {sharing_ranks(cfg)}, for {sizes}")
    if cfg.task == "contrastive" and batch % world_size:
        return Fault(
            "batch",
            f"train.global_batch_size={batch} must be a multiple of the {world_size} processes, "
            "which share the rows of the loss",
        )
    for name, axes in towers.items():
        if batch % data_ranks(axes, world_size):
            return Fault(
                "batch",
                f"train.global_batch_size={batch} must be a multiple of the {data_ranks(axes, world_size)} data ranks "
                f"of the {name} ({world_size} processes / {_size(name, axes)})",
            )
    axes, micro = cfg.parallel.vision, cfg.train.micro_batch_size
    name = next(iter(towers))
    share = batch // data_ranks(axes, world_size)
    if micro is not None and share % micro:
        return Fault(
            "microbatch",
            f"train.micro_batch_size={micro} must divide the {share} samples of a {name} data rank "
            f"(train.global_batch_size={batch} / ({world_size} processes / {_size(name, axes)}))",
        )
    _, count = microbatches(cfg, axes, world_size)
    if axes.vpp > 1 and count % axes.pp:
        return Fault(
            "microbatch",
            f"train.micro_batch_size={'null' if micro is None else micro} cuts the {share} samples of a {name} "
            f"data rank into {count}; with parallel.vision.vpp={axes.vpp} the number of microbatches must be a "
            f"multiple of parallel.vision.pp={axes.pp}",
        )
    return None


def _processes(number: int) -> str:
    return f"{number} process{'' if number == 1 else 'es'}"


def _size(name: str, axes: AxesSection) -> str:
    key = f"parallel.{PARALLEL_KEYS[name]}"
    return f"{key}.tp={axes.tp} x pp={axes.pp}" if axes.pp > 1 else f"{key}.tp={axes.tp}"


# ----------------------------------------------------------------------------------------------- nearest layouts


@dataclass(frozen=True)
class Layout:
    """A way to run the recipe: this many processes, with these keys set on top of it."""

    processes: int
    set: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def overrides(self) -> list[str]:
        """The keys as `key.path=value`."""
        return overrides(self.set)


Allowed = Callable[[Config], bool]


def nearest_layouts(cfg: Config, world_size: int, fault: Fault, allowed: Allowed) -> list[Layout]:
    """Layouts near the asked one that work, each a whole remedy of `fault` by itself; empty when none was found.

    Other numbers of processes, batch sizes, micro batch sizes and axes are tried, as `fault` suggests, the nearest
    first. Where one of them fits but for the micro batch size, that is changed too.

    Args:
        allowed: whether a changed recipe keeps the rules.
    """
    search = {
        "processes": (_other_processes, _other_axes),
        "batch": (_other_batches, _other_processes, _other_axes),
        "microbatch": (_other_microbatches, _other_axes, _other_batches),
    }[fault.kind]
    found: list[Layout] = []
    for candidates in search:
        # One below and one above what was asked, or the two nearest axes.
        for side in candidates(cfg, world_size):
            tried = [one for one in side if one not in found]
            fits = (one for one in tried if _works(cfg, one, allowed))
            one = next(fits, None) or next(filter(None, (_with_micro_batch(cfg, one, allowed) for one in tried)), None)
            found += [one] if one is not None and one not in found else []
    return found[:_NUM_SUGGESTIONS]


def describe_layouts(layouts: list[Layout], world_size: int) -> str:
    """What to do, in words: `start 4 or 8 processes, or use parallel.vision.tp=1`."""
    plain = [str(one.processes) for one in layouts if not one.set]
    ways = [f"start {' or '.join(plain)} process{'' if plain == ['1'] else 'es'}"] if plain else []
    changes = [
        " ".join(one.overrides) + (f" with {_processes(one.processes)}" if one.processes != world_size else "")
        for one in layouts
        if one.set
    ]
    ways += [f"use {', or '.join(changes)}"] if changes else []
    return ", or ".join(ways) or "change train.global_batch_size or the axes in `parallel`"


_LIMIT = 64  # candidates of a side that are tried
_NUM_SUGGESTIONS = 4


def _works(cfg: Config, layout: Layout, allowed: Allowed) -> bool:
    changed = with_keys(cfg, layout.set)
    return world_fault(changed, layout.processes) is None and allowed(changed)


def _with_micro_batch(cfg: Config, layout: Layout, allowed: Allowed) -> Layout | None:
    """`layout` with the nearest micro batch size that makes it work, if there is one."""
    if cfg.train.micro_batch_size is None and cfg.parallel.vision.vpp == 1:
        return None
    for side in _other_microbatches(with_keys(cfg, layout.set), layout.processes):
        for one in side:
            both = Layout(layout.processes, {**layout.set, **one.set})
            if _works(cfg, both, allowed):
                return both
    return None


def with_keys(cfg: Config, values: Change) -> Config:
    """`cfg`, which may be `load`'s partial view of a broken recipe, with these keys set, not validated."""
    for key, value in values.items():
        cfg = _set(cfg, key.split("."), value)
    return cfg


class _Over:
    """A partial view of a section with one key set."""

    def __init__(self, section: Any, key: str, value: Any) -> None:
        self._section, self._key, self._value = section, key, value

    def __getattr__(self, name: str) -> Any:
        return self._value if name == self._key else getattr(self._section, name)


def _set(section: Any, keys: list[str], value: Any) -> Any:
    inner = value if len(keys) == 1 else _set(getattr(section, keys[0]), keys[1:], value)
    if isinstance(section, Section):
        return section.model_copy(update={keys[0]: inner})
    return _Over(section, keys[0], inner)


Sides = tuple[Iterator[Layout], ...]


def _other_processes(cfg: Config, world_size: int) -> Sides:
    block = sharing_ranks(cfg)
    below, above = world_size // block, world_size // block + 1
    if world_size % block == 0:
        below -= 1
    down = (Layout(count * block) for count in range(below, max(0, below - 4 * _LIMIT), -1))
    up = (Layout(count * block) for count in range(above, above + 4 * _LIMIT))
    return down, up


def _other_batches(cfg: Config, world_size: int) -> Sides:
    batch, axes = cfg.train.global_batch_size, cfg.parallel.vision
    passes = (cfg.train.micro_batch_size or 1) * (axes.pp if axes.vpp > 1 else 1)
    unit = lcm(
        data_ranks(axes, world_size) * passes, *(data_ranks(other, world_size) for other in step_axes(cfg).values())
    )
    if cfg.task == "contrastive":
        unit = lcm(unit, world_size)
    near = batch // unit
    down = (
        _batch(count * unit, world_size) for count in range(near, max(0, near - _LIMIT), -1) if count * unit != batch
    )
    up = (_batch(count * unit, world_size) for count in range(near + 1, near + 1 + _LIMIT))
    return down, up


def _batch(size: int, world_size: int) -> Layout:
    return Layout(world_size, {"train.global_batch_size": size})


def _other_microbatches(cfg: Config, world_size: int) -> Sides:
    ranks = data_ranks(cfg.parallel.vision, world_size)
    if ranks == 0 or cfg.train.global_batch_size % ranks:
        return ()
    share = cfg.train.global_batch_size // ranks
    asked = cfg.train.micro_batch_size or share
    sizes = [size for size in divisors(share) if size != cfg.train.micro_batch_size]
    down = (_micro(size, world_size) for size in reversed(sizes) if size <= asked)
    up = (_micro(size, world_size) for size in sizes if size > asked)
    return down, up


def _micro(size: int, world_size: int) -> Layout:
    return Layout(world_size, {"train.micro_batch_size": size})


_COMMON_TP = divisors(
    gcd(*(tower["vision"][key] for tower in VARIANTS.values() for key in ("num_heads", "ffn_hidden_size")))
)


def _other_axes(cfg: Config, world_size: int) -> Sides:
    """The layouts of `world_size` processes in order of distance, twice: two that work are wanted."""
    vision = cfg.parallel.vision
    second, asked = (
        ("text", cfg.parallel.text.tp) if cfg.task == "contrastive" else ("teacher", cfg.parallel.teacher.tp)
    )
    # A teacher's heads are not known here; a divisor of the asked size cuts whatever that size cuts, and the common
    # divisors of all variants cut each of these.
    second_choices = text_tp_choices(cfg) if second == "text" else sorted({*divisors(asked), *_COMMON_TP})
    found: list[tuple[float, int, Layout]] = []
    pps = [pp for pp in divisors(world_size) if pp <= cfg.model.vision.num_layers]
    for tp, tp2, pp, vpp in product(vision_tp_choices(cfg), second_choices, pps, sorted({1, vision.vpp})):
        if world_size % lcm(tp * pp, tp2) or (pp == 1 and vpp > 1):
            continue
        new: dict[str, int | None] = {}
        distance = 0.0
        for key, value, old in (
            ("vision.tp", tp, vision.tp),
            (f"{second}.tp", tp2, asked),
            ("vision.pp", pp, vision.pp),
            ("vision.vpp", vpp, vision.vpp),
        ):
            if value != old:
                new[f"parallel.{key}"] = value
                distance += abs(log2(value / old))
        if vision.layers_per_stage is not None and pp * vpp != vision.pp * vision.vpp:
            new["parallel.vision.layers_per_stage"] = None
        if new:
            found.append((distance, len(new), Layout(world_size, new)))
    ordered = [layout for *_, layout in sorted(found, key=lambda entry: entry[:2])]
    return iter(ordered[:_LIMIT]), iter(ordered[:_LIMIT])


# ------------------------------------------------------------------------------------------- remedies of the rules

WhyNot = Callable[[Change], str | None]


def with_remedies(found: list[Problem], why_not: WhyNot) -> list[Problem]:
    """`found`, in which each of the `Remedies` names the values that work, each together with what the others name.

    Where none does, it says what else must hold.

    Args:
        why_not: what a recipe with this change still breaks, beside the problems that are no `Remedies`; None: nothing.
    """
    open_ones = [problem for problem in found if isinstance(problem, Remedies)]
    if not open_ones:
        return found
    known: dict[str, str | None] = {}

    def broken(changes: Sequence[Change]) -> str | None:
        change = {key: value for one in changes for key, value in one.items()}
        if repr(change) not in known:
            known[repr(change)] = why_not(change)
        return known[repr(change)]

    tried = [[change for way in problem.ways for change in way] for problem in open_ones]
    # Smaller axes and micro batches ask for least. Where they do not work together, few other ways do.
    least = [min(changes, key=_size_of) for changes in tried]
    starts = chain([least], map(list, islice(product(*tried), _NUM_STARTS)))
    chosen = next((changes for changes in starts if broken(changes) is None), None)
    if chosen is None:
        small = " ".join(key_value for change in least for key_value in overrides(change))
        do = f"change more than this key: even with {small}, {broken(least)}"
        return [Problem(one.key, one.must, do) if isinstance(one, Remedies) else one for one in found]

    def working(at: int) -> list[Change]:
        def works(change: Change) -> bool:
            return broken([*chosen[:at], change, *chosen[at + 1 :]]) is None

        return [change for way in open_ones[at].ways if (change := next(filter(works, way), None)) is not None]

    for at in range(len(open_ones)):
        chosen[at] = working(at)[0]  # that which works is among them, so there is one
    named = {id(problem): problem.naming(working(at)) for at, problem in enumerate(open_ones)}
    return [Problem(one.key, one.must, named[id(one)]) if id(one) in named else one for one in found]


_NUM_STARTS = 100


def _size_of(change: Change) -> tuple[int, int]:
    return prod(value for value in change.values() if isinstance(value, int)), -len(change)
