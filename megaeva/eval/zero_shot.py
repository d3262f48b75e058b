"""Zero-shot classification: an image belongs to the class whose prompts it is nearest to."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megaeva.errors import DataError
from megaeva.eval.retrieval import TIE, normalized


class Classes(NamedTuple):
    """Names and prompt templates; a template holds `{}` or clip_benchmark's `{c}` where the name goes."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def prompts(self, name: str) -> list[str]:
        """Every template with the name filled in."""
        return [template.replace("{c}", name).replace("{}", name) for template in self.templates]


def read_classes(path: Path | str) -> Classes:
    """The classes of a file `{"classes": [...], "templates": ["a photo of a {}.", ...]}`.

    Raises:
        DataError: the file is missing, is not JSON, or lacks one of the two lists.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        classes = Classes(tuple(stored["classes"]), tuple(stored["templates"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"zero-shot classes {path} cannot be read ({type(error).__name__}: {error}).\n"
            f'It must be JSON with two lists, {{"classes": [...], "templates": ["a photo of a {{}}."]}}; '
            f"write it, or mend the path in eval.zero_shot."
        ) from None
    placeless = [t for t in classes.templates if "{}" not in t and "{c}" not in t]
    if not classes.names or not classes.templates or placeless:
        raise DataError(
            f"{path} has {len(classes.names)} classes and {len(classes.templates)} templates"
            f"{f', one of them {placeless[0]!r}' if placeless else ''}.\n"
            f"It must have at least one of each, and every template a {{}} where the class name goes; mend the file."
        )
    return classes


def class_vectors(encode: Callable[[Sequence[str]], Tensor], classes: Classes, names: Sequence[str]) -> Tensor:
    """One unit vector for each of `names`, [names, E] fp32: the renormalised mean of its prompts' unit vectors.

    Args:
        encode: texts -> features [texts, E], in order.
        classes: the templates.
        names: the classes wanted; a rank may ask for its share.

    Source: open_clip `build_zero_shot_classifier`, clip_benchmark `zero_shot_classifier`.
    """
    prompts = [prompt for name in names for prompt in classes.prompts(name)]
    feature_XE = normalized(encode(prompts))
    mean_XE = feature_XE.view(len(names), len(classes.templates), -1).mean(1)
    return F.normalize(mean_XE, dim=-1)


def accuracy(image_XE: Tensor, class_CE: Tensor, label_X: Tensor) -> dict[str, float]:
    """`top1` and `top5` as shares of 1.

    A class that scores as high as the right one (within 1e-6) counts as ahead of it, as in `retrieval`. With five
    classes or fewer, top5 is 1 by definition.

    Args:
        image_XE: features of any float type, normalised here in fp32.
        class_CE: unit vectors from `class_vectors`.
        label_X: int64, the right class of each image.
    """
    correct = {1: 0, 5: 0}
    for start in range(0, len(image_XE), 4096):
        score_XC = normalized(image_XE[start : start + 4096]) @ class_CE.T
        right_X1 = label_X[start : start + 4096, None]
        others_XC = torch.arange(len(class_CE), device=label_X.device)[None] != right_X1
        ahead_X = (~(score_XC < score_XC.gather(1, right_X1) - TIE) & others_XC).sum(1)
        for k in correct:
            correct[k] += int((ahead_X < k).sum())
    return {f"top{k}": count / len(image_XE) for k, count in correct.items()}
