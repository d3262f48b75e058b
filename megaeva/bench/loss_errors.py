"""Rounding of the fp32 loss and its gradients against fp64, beside that of the plain formula in fp32."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megaeva.bench.loss_sides import Features, Outcome, draw, engine, plain_formula

SCALES = (1.0, 14.3, 100.0)
NUM_DRAWS = 8
QUANTITIES = ("loss", "image_BE", "text_BE", "log_scale")
_HUGE = 30.0  # one image and one text are this long and parallel: a logit of 900 times the scale
_ROUNDING = 2.0**-24
_FP64_ROUNDING = 2.0**-50  # of logits of this scale, a few roundings


@dataclass(frozen=True)
class Errors:
    """Root mean squares over draws of the errors' norms.

    Attributes:
        inputs: which features.
        ours, plain: by quantity.
        reference: norms of the exact values.
    """

    inputs: str
    scale: float
    ours: dict[str, float]
    plain: dict[str, float]
    reference: dict[str, float]

    def floor(self, quantity: str) -> float:
        """What the plain formula's error counts as at least: the exact result's rounding to fp32.

        And what the fp64 formula itself loses: where every pair is certain, its gradients are rounding.
        """
        return max(_ROUNDING * self.reference[quantity], _FP64_ROUNDING * self.scale)

    def ratio(self, quantity: str) -> float:
        """Error of ours per error of the plain formula, or per `floor` where that is larger."""
        return self.ours[quantity] / max(self.plain[quantity], self.floor(quantity))

    def cell(self, quantity: str) -> str:
        """The ratio with what was divided; a star where that was the floor."""
        plain, floor = self.plain[quantity], self.floor(quantity)
        divisor = f"{plain:.1e}" if plain >= floor else f"{floor:.1e}*"
        return f"{self.ours[quantity]:.1e} / {divisor} = {self.ratio(quantity):.3g}"


def measure_errors(num_pairs: int, embed_dim: int) -> list[Errors]:
    """For each scale and kind of input, `engine` and `plain_formula` in fp32 against `plain_formula` in fp64."""
    measured = []
    for scale in SCALES:
        by_inputs: dict[str, list[tuple[Outcome, Outcome, Outcome]]] = {}
        for seed in range(NUM_DRAWS):
            for inputs, features in hard_inputs(num_pairs, embed_dim, scale, seed):
                exact = plain_formula(features.to(torch.float64))
                by_inputs.setdefault(inputs, []).append((engine(features), plain_formula(features), exact))
        for inputs, draws in by_inputs.items():
            ours, plain = (
                {name: _rms([_apart(one[side], one[2], name) for one in draws]) for name in QUANTITIES}
                for side in (0, 1)
            )
            reference = {
                name: _rms([getattr(exact, name).norm().item() for _, _, exact in draws]) for name in QUANTITIES
            }
            measured.append(Errors(inputs, scale, ours, plain, reference))
    return measured


def hard_inputs(num_pairs: int, embed_dim: int, scale: float, seed: int) -> Iterator[tuple[str, Features]]:
    """Ordinary features, and those on which a loss in tiles could lose digits, each under its name."""
    features = draw(num_pairs, embed_dim, scale=scale, seed=seed)
    image_BE, text_BE = features.image_BE, features.text_BE
    yield "random pairs", features
    one_pair = image_BE[:1].repeat(num_pairs, 1), text_BE[:1].repeat(num_pairs, 1)
    yield "all pairs equal", replace(features, image_BE=one_pair[0], text_BE=one_pair[1])
    yield "text = image", replace(features, text_BE=image_BE.clone())
    image_BE, text_BE = image_BE.clone(), text_BE.clone()
    image_BE[0] *= _HUGE
    text_BE[-1] = image_BE[0]
    yield "one huge logit", replace(features, image_BE=image_BE, text_BE=text_BE)


def error_lines(measured: list[Errors]) -> Iterator[str]:
    """A table, ours / plain under each quantity, what its stars mean, and the worst."""
    titles = {"loss": "loss", "image_BE": "image grad", "text_BE": "text grad", "log_scale": "scale grad"}
    yield "| inputs | scale | " + " | ".join(f"{titles[name]}: ours / plain fp32" for name in QUANTITIES) + " |"
    yield "|---|---" + "|---" * len(QUANTITIES) + "|"
    for errors in measured:
        cells = [errors.cell(name) for name in QUANTITIES]
        yield f"| {errors.inputs} | {errors.scale:g} | " + " | ".join(cells) + " |"
    yield (
        "* plain fp32 is off by less than this floor, which is divided by instead: 2^-24 of the exact value's norm "
        "(its rounding to fp32), or 2^-50 of the scale (what fp64 itself loses)"
    )
    errors, name = max(
        ((errors, name) for errors in measured for name in QUANTITIES), key=lambda at: at[0].ratio(at[1])
    )
    yield (
        f"worst: {errors.cell(name)} times the plain formula's error, of the {titles[name]} with {errors.inputs}, "
        f"scale {errors.scale:g}"
    )


def _apart(one: Outcome, exact: Outcome, name: str) -> float:
    return (getattr(one, name).double() - getattr(exact, name)).norm().item()


def _rms(values: list[float]) -> float:
    return (sum(value * value for value in values) / len(values)) ** 0.5
