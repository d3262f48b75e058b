"""Evaluation shards as a local webdataset task of clip_benchmark, and its command run on an open_clip folder.

python -m tests.helpers.clip_benchmark_task RUN_DIR EXPORT SHARDS CLASSES prints both zero-shot numbers, ours from
RUN_DIR/eval.json (`zero_shot/heldout`), theirs from an export of the same run.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from megaeva.data.shards import expand_shards, read_shard

Task = Literal["zeroshot_classification", "zeroshot_retrieval"]


def write_task(
    shards: Sequence[str | Path], folder: Path, task: Task, classes: Path | None = None, crop_share: float = 1.0
) -> Path:
    """Writes `folder` as `clip_benchmark --dataset wds/NAME --dataset_root folder` reads it, and returns it.

    Args:
        shards: of `eval.zero_shot` or `eval.retrieval`.
        classes: of zero_shot: the file of names and templates.
        crop_share: below 1 images are stored cut to the centre's share, as open_clip's preprocessing cannot cut them.
    """
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text(task.removeprefix("zeroshot_"))
    if classes is not None:
        stored = json.loads(classes.read_text())
        (folder / "classnames.txt").write_text("\n".join(stored["classes"]))
        templates = [template.replace("{}", "{c}") for template in stored["templates"]]
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        number = 0
        for path in expand_shards(shards):
            for sample in read_shard(path):
                assert sample.image is not None
                parts = dict([_cut(sample.image, crop_share)])
                if classes is not None:
                    parts["cls"] = str(json.loads(sample.files["json"])["class"]).encode()
                else:
                    parts["txt"] = sample.files["txt"]
                for extension, content in parts.items():
                    member = tarfile.TarInfo(f"{number:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                number += 1
    return folder


def _cut(content: bytes, share: float) -> tuple[str, bytes]:
    image = Image.open(io.BytesIO(content))
    if share == 1.0:
        assert image.format is not None
        return {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[image.format], content
    side = round(min(image.size) * share)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = io.BytesIO()
    image.convert("RGB").crop((left, top, left + side, top + side)).save(cut, "PNG")
    return "png", cut.getvalue()


def run_clip_benchmark(export: Path, task_folder: Path, task: Task, *more: str) -> dict[str, float]:
    """The metrics of `clip_benchmark eval`, unmodified, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        subprocess.run(
            [
                sys.executable, "-c", "from clip_benchmark.cli import main; main()", "eval", "--dataset", "wds/local",
                "--dataset_root", str(task_folder), "--task", task, "--model", f"local-dir:{export}",
                "--pretrained", "in-the-folder", "--no_amp", "--num_workers", "0", "--quiet",
                "--output", str(output), *more,
            ],
            check=True,
            capture_output=True,
            text=True,
        )  # fmt: skip
        metrics: dict[str, float] = json.loads(output.read_text())["metrics"]
        return metrics


def main(run_dir: str, export: str, shards: str, classes: str) -> None:
    """Prints our number and clip_benchmark's."""
    ours: dict[str, Any] = json.loads((Path(run_dir) / "eval.json").read_text())["zero_shot/heldout"]
    content = json.loads((Path(export) / "open_clip_config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        task = write_task(
            [shards],
            Path(folder) / "task",
            "zeroshot_classification",
            Path(classes),
            content["preprocess_cfg"].get("crop_share", 1.0),
        )
        theirs = run_clip_benchmark(Path(export), task, "zeroshot_classification")
    print(f"ours           top1 {100 * ours['top1']:.2f}  top5 {100 * ours['top5']:.2f}")
    print(f"clip_benchmark top1 {100 * theirs['acc1']:.2f}  top5 {100 * theirs['acc5']:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
