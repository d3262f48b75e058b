"""X -> megaeva -> X at full size, bit for bit: published EVA and OpenAI sizes through every format, from file to file.

About a minute and 3 GB under pytest's temporary folder; by itself: pytest tests/parity/test_full_size_round_trips.py
"""

import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megaeva.checkpoint.convert.command import convert, find_format
from megaeva.checkpoint.convert.contents import Contents
from megaeva.checkpoint.convert.identify import published
from megaeva.checkpoint.convert.ours import shapes
from megaeva.checkpoint.convert.rules import exported, plan_export
from megaeva.checkpoint.tensors import TensorInfo

CASES = {
    "EVA02-CLIP-B-16": ("eva", "eva-mim", "open_clip", "timm", "hf-eva"),
    "EVA02-CLIP-L-14": ("eva", "eva-mim", "open_clip", "timm", "hf-eva"),
    "ViT-B-32-quickgelu": ("openai", "open_clip", "hf-clip"),
}
SHARD_BYTES = 2**28  # several files where the format has them


class Random:
    """Weights of a model in our names that differ from each other: fp16, what has no second dimension in fp32."""

    path = Path("random weights")

    def __init__(self, what: Contents) -> None:
        self.infos = {
            name: TensorInfo(shape, torch.float16 if len(shape) > 1 else torch.float32)
            for name, shape in shapes(what).items()
        }
        self._pool = torch.randn(2**23, generator=torch.Generator().manual_seed(0))

    def read(self, name: str) -> Tensor:
        info = self.infos[name]
        numel = torch.Size(info.shape).numel()
        pool = self._pool.roll(zlib.crc32(name.encode()) % len(self._pool)).to(info.dtype)
        return pool.repeat(-(-numel // len(pool)))[:numel].view(info.shape)

    def close(self) -> None:
        """Nothing to give up."""


def _tensors(path: Path) -> dict[str, Tensor]:
    """What the format's own library finds in a file or folder."""
    if path.is_file():
        return dict(torch.load(path, weights_only=True, mmap=True))
    state: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            state |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    return state


@pytest.mark.exhaustive
@pytest.mark.parametrize(("variant", "to"), [(variant, to) for variant, names in CASES.items() for to in names])
def test_full_size_round_trips(variant: str, to: str, tmp_path: Path) -> None:
    form = find_format(to)
    assert form is not None
    kind = form.kinds[0]
    what = Contents(kind, published(variant), teacher_dim=1024 if kind == "mim" else None)
    source, rules = Random(what), form.rules(what, None)
    first, run, second = (tmp_path / name for name in ("first.pt", "run", "second.pt"))
    sink = form.open_sink(first, what, plan_export(rules, source.infos, source.path), SHARD_BYTES)
    for name, tensor in exported(rules, source):
        sink.write(name, tensor)
    sink.finish()

    there = convert(first, run, to="megaeva")
    back = convert(run, second, to=to, shard_bytes=SHARD_BYTES)
    assert (there.source_format, back.source_format) == (to, "megaeva")
    one, other = _tensors(first), _tensors(second)
    assert len(one) == back.num_tensors and list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
    shutil.rmtree(tmp_path)  # of the last tests pytest keeps the folders
