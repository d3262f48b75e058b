"""A few held-out images with the captions a model ranks first, for the report."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megaeva.eval.features import Features
from megaeva.eval.retrieval import normalized, num_ahead

NUM_IMAGES = 64
NUM_CAPTIONS = 5
_MAX_PIXELS = 160  # side of a stored picture


def predict(features: Features, image_of_sample_X: Tensor, first_sample_of_image: list[int]) -> list[dict[str, Any]]:
    """For each kept picture: its captions, the five captions ranked first, and how many wrong ones are ahead.

    Args:
        features: a retrieval set with captions.
        image_of_sample_X: int64, image of each sample.
        first_sample_of_image: sample that stands for each image.
    """
    assert features.text_XE is not None
    image_XE = features.image_XE[first_sample_of_image]
    ahead_X = num_ahead(image_XE, features.text_XE, image_of_sample_X, "image_to_text")
    text_YE = normalized(features.text_XE)
    image_of_key = {features.keys[sample]: image for image, sample in enumerate(first_sample_of_image)}
    predictions = []
    for key, picture in features.pictures.items():
        if key not in image_of_key:  # a further caption's sample of an image that is listed already
            continue
        image = image_of_key[key]
        score_Y = text_YE @ normalized(image_XE[image])
        top = torch.topk(score_Y, min(NUM_CAPTIONS, len(score_Y)))
        right = [c for c, owner in zip(features.captions, image_of_sample_X.tolist()) if owner == image]
        predictions.append(
            {
                "key": key,
                "captions": right,
                "ahead": int(ahead_X[image]),
                "top": [
                    {
                        "caption": features.captions[i],
                        "score": round(score, 4),
                        "correct": int(image_of_sample_X[i]) == image,
                    }
                    for score, i in zip(top.values.tolist(), top.indices.tolist())
                ],
                "png": encode_png(picture),
            }
        )
    return predictions


def write_predictions(path: Path, predictions: dict[str, list[dict[str, Any]]]) -> None:
    """Writes set name -> predictions as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(predictions, ensure_ascii=False) + "\n", encoding="utf-8")


def encode_png(picture_HWC: NDArray[np.uint8]) -> str:
    """A picture as base64 of a PNG, at most 160 pixels wide or high."""
    image = Image.fromarray(picture_HWC)
    image.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
