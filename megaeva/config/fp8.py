"""Which linears of a tower run in FP8, by their sizes on a rank and their place; shared by the checks and the model."""

from collections.abc import Callable, Iterator
from typing import Literal, get_args

from megaeva.config.problem import Problem
from megaeva.config.schema import Config, Fp8Section, TextSection, VisionSection

Fp8Linear = Literal["qkv", "proj", "fc1", "fc2"]
NAMES: tuple[Fp8Linear, ...] = get_args(Fp8Linear)

MULTIPLE = {"delayed": 16, "current": 16, "mxfp8": 32, "blockwise": 16}
"""What features of an FP8 product must be multiples of, by recipe.

Source: Transformer Engine's `assert_dim_for_fp8_exec` and `MXFP8Quantizer.is_quantizable`.
"""


def features_on_rank(section: VisionSection | TextSection, tp_size: int) -> dict[Fp8Linear, tuple[int, int]]:
    """(input, output) features of each linear of a layer on one of `tp_size` ranks."""
    width, hidden = section.hidden_size, section.ffn_hidden_size
    gates = 2 if section.activation == "swiglu" else 1
    return {
        "qkv": (width, 3 * width // tp_size),
        "proj": (width // tp_size, width),
        "fc1": (width, gates * hidden // tp_size),
        "fc2": (hidden // tp_size, width),
    }


def in_fp8(section: VisionSection | TextSection, tp_size: int, fp8: Fp8Section, number: int, name: Fp8Linear) -> bool:
    """Whether this linear of layer `number` (from 0 in the whole tower) multiplies in FP8."""
    if number < fp8.first_layers_bf16 or number >= section.num_layers - fp8.last_layers_bf16:
        return False
    return name in fp8.linears and min(features_on_rank(section, tp_size)[name]) >= fp8.min_features


def fp8_line(cfg: Config, *, emulated: bool) -> str | None:
    """What multiplies in FP8 and how, for the log; None where nothing does."""
    fp8 = cfg.train.fp8_in_use
    if fp8 is None:
        return None
    where = [
        f"{_count(section, tp, fp8)} of {section.num_layers * len(NAMES)} linears of {name}"
        for name, section, tp in _towers(cfg)
    ]
    how = f", {fp8.amax_compute} of {fp8.amax_history} steps" if fp8.recipe == "delayed" else ""
    return f"FP8 ({fp8.recipe}, {fp8.format}{how}): {', '.join(where)}" + (
        "; emulated on the CPU, slower than bf16 and of no use but as a rehearsal" if emulated else ""
    )


def _towers(cfg: Config) -> list[tuple[str, VisionSection | TextSection, int]]:
    """(name, section, tp) of what is trained; a frozen tower is in evaluation mode, so in bf16."""
    towers: list[tuple[str, VisionSection | TextSection, int]] = [
        ("vision", cfg.model.vision, cfg.parallel.vision.tp),
    ]
    if cfg.task == "contrastive":
        towers.append(("text", cfg.model.text, cfg.parallel.text.tp))
    return [tower for tower in towers if tower[0] not in cfg.optim.frozen]


def _count(section: VisionSection | TextSection, tp_size: int, fp8: Fp8Section) -> int:
    """Linears of the whole tower that multiply in FP8."""
    return sum(in_fp8(section, tp_size, fp8, number, name) for number in range(section.num_layers) for name in NAMES)


# ----------------------------------------------------------------------------------------------------------- rules


def _something_in_fp8(cfg: Config) -> Iterator[Problem]:
    fp8 = cfg.train.fp8_in_use
    if fp8 is None:
        return
    if not fp8.linears:
        yield Problem("train.fp8.linears", "must name at least one", f"use some of {', '.join(NAMES)}")
    elif not any(_count(section, tp, fp8) for _, section, tp in _towers(cfg)):
        layers = ", ".join(f"model.{name}.num_layers={section.num_layers}" for name, section, _ in _towers(cfg))
        bf16 = f"first_layers_bf16={fp8.first_layers_bf16}, last_layers_bf16={fp8.last_layers_bf16}"
        yield Problem(
            "train.precision",
            f"must leave linears in FP8; with train.fp8.{bf16} and min_features={fp8.min_features} none is ({layers})",
            "lower these, or set train.precision=bf16",
        )


def _features(cfg: Config) -> Iterator[Problem]:
    fp8 = cfg.train.fp8_in_use
    if fp8 is None:
        return
    multiple = MULTIPLE[fp8.recipe]
    odd: dict[Fp8Linear, list[str]] = {}
    smaller_tp = True
    for tower, section, tp in _towers(cfg):
        whole = features_on_rank(section, 1)
        for name, features in features_on_rank(section, tp).items():
            numbers = [number for number in features if number % multiple]
            if numbers and any(in_fp8(section, tp, fp8, layer, name) for layer in range(section.num_layers)):
                has = " and ".join(map(str, numbers))
                odd.setdefault(name, []).append(f"{name} of {tower} has {has} (parallel.{tower}.tp={tp})")
                smaller_tp &= not any(number % multiple for number in whole[name])
    if odd:
        rest = ", ".join(name for name in fp8.linears if name not in odd)
        yield Problem(
            "train.fp8.linears",
            f"must leave out {' and '.join(odd)}: FP8 with recipe={fp8.recipe} needs features in multiples of "
            f"{multiple}, and on a rank {', '.join(what for each in odd.values() for what in each)}",
            (f"set train.fp8.linears=[{rest}]" if rest else "set train.precision=bf16")
            + (", or a smaller tp" if smaller_tp else ""),
        )


def _options_of_the_recipe(cfg: Config) -> Iterator[Problem]:
    fp8, default = cfg.train.fp8_in_use, Fp8Section()
    if fp8 is None or fp8.recipe == "delayed":
        return
    for key in ("amax_history", "amax_compute", "margin"):
        if getattr(fp8, key) != getattr(default, key):
            yield Problem(
                f"train.fp8.{key}",
                f"must be absent with train.fp8.recipe={fp8.recipe}, whose scales look back on no step",
                "remove it, or set train.fp8.recipe=delayed",
            )


def _rehearsal(cfg: Config) -> Iterator[Problem]:
    fp8 = cfg.train.fp8_in_use
    if fp8 is not None and cfg.platform == "cpu" and not fp8.rehearse:
        yield Problem("train.precision", "must not be fp8 with platform=cpu, which has no FP8", REHEARSE)


REHEARSE = "set train.fp8.rehearse=true to emulate it (slowly), or train.precision=bf16"

FP8_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _something_in_fp8, _features, _options_of_the_recipe, _rehearsal,
)  # fmt: skip
