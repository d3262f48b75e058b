"""Tiny made-up shards: coloured shapes on gradients, each with a caption that says what is drawn."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (33, 102, 204),
    "yellow": (240, 200, 40),
    "purple": (130, 60, 170),
    "white": (245, 245, 245),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
PLACES: tuple[str, ...] = ("left", "middle", "right")


def draw_sample(rng: np.random.Generator, image_size: int) -> tuple[Image.Image, dict[str, object]]:
    """One RGB picture of `image_size` pixels square and its json: {"name", "class", "shape", "colour"}.

    `class` indexes `SHAPES`. Light noise and a gradient make the JPEG behave like a photograph in resizing and coding.
    """
    names = list(COLOURS)
    colour, ground = rng.choice(len(names), size=2, replace=False)
    shape, place = int(rng.integers(len(SHAPES))), int(rng.integers(len(PLACES)))
    slope = np.linspace(0.6, 1.0, image_size)[:, None, None]
    canvas = np.array(COLOURS[names[ground]])[None, None] * np.broadcast_to(slope, (image_size, image_size, 1))
    canvas = canvas + rng.normal(0.0, 4.0, canvas.shape)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    x, y, r = image_size * (0.3 + 0.2 * place), image_size * rng.uniform(0.4, 0.6), image_size * rng.uniform(0.15, 0.25)
    fill = COLOURS[names[colour]]
    if SHAPES[shape] == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif SHAPES[shape] == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif SHAPES[shape] == "triangle":
        pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=fill)
    else:
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
    name = f"a {names[colour]} {SHAPES[shape]} at the {PLACES[place]} on {names[ground]}"
    return image, {"name": name, "class": shape, "shape": SHAPES[shape], "colour": names[colour]}


def make_shards(
    folder: Path, num_shards: int = 2, samples_per_shard: int = 16, image_size: int = 54, seed: int = 0
) -> list[Path]:
    """Paths of the shards written to `folder`: 000000.tar, 000001.tar, ... with jpg, txt and json members.

    The same arguments write the same bytes. Keys are eight digits, unique over all shards; images are `image_size`
    pixels square, JPEG quality 92. `folder` is made when missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for shard in range(num_shards):
        path = folder / f"{shard:06d}.tar"
        with webdataset.TarWriter(str(path), mtime=0.0) as writer:
            for i in range(samples_per_shard):
                image, meta = draw_sample(rng, image_size)
                encoded = io.BytesIO()
                image.save(encoded, "JPEG", quality=92)
                key = f"{shard * samples_per_shard + i:08d}"
                writer.write(
                    {
                        "__key__": key,
                        "jpg": encoded.getvalue(),
                        "txt": str(meta["name"]).encode(),
                        "json": json.dumps(meta).encode(),
                    }
                )
        paths.append(path)
    return paths
