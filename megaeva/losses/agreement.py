"""What the ranks of a contrastive loss must agree on before any feature moves: shapes, dtypes, finite rows, numbers."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megaeva.errors import FeatureError
from megaeva.ops import DTYPES, accumulate_dtype
from megaeva.parallel.collectives import RowsInFlight, all_gather_rows

# A dtype's code is its place here; all ranks run one torch.
_ALL_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_NAMES = ("image_BE", "text_BE")
Call = Literal["start_gather", "clip_loss", "sigmoid_loss"]
_NEEDED: dict[Call, tuple[str, ...]] = {
    "start_gather": ("text_BE",),
    "clip_loss": (*_NAMES, "log_scale"),
    "sigmoid_loss": (*_NAMES, "log_scale", "bias"),
}
_CALLS = tuple(_NEEDED)
_BLOCK = 1024  # rows whose norms are computed at once, so that no wide copy of the features exists


def require_agreement(
    group: ProcessGroup | None,
    call: Call,
    *,
    image_BE: Tensor | None = None,
    text_BE: Tensor | None = None,
    text_in_flight: RowsInFlight | None = None,
    log_scale: Tensor | None = None,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> None:
    """Nothing, where all ranks of `group` pass finite features [B, E] of one shape and floating dtype, and one scale.

    All ranks of the group call it; a rank whose arguments are wrong sends their description as well, so that all ranks
    raise, with one text. Communication: 26 integers. Cost: one read of the features, and the host waits for the device,
    since features of differing shapes must not be sent. Traced by torch.compile, and of tensors without values, it does
    nothing: a NaN is the loss's.

    Args:
        call: what calls it, and so which of the tensors must be there (`_NEEDED`).
        text_in_flight: the texts of all ranks, which must be as many as `text_BE` says.
        log_scale, bias: 0-dim, floating, of the same values on all ranks.
        label_smoothing: of the same value on all ranks, in [0, 1).

    Raises:
        FeatureError: a ValueError that names the fault, the rank, the argument and the first row.
    """
    if torch.compiler.is_compiling() or (isinstance(image_BE, Tensor) and image_BE.is_meta):
        return
    tensors = [x for x in (image_BE, text_BE, log_scale) if isinstance(x, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    in_flight = None if text_in_flight is None else text_in_flight.rows
    header = torch.cat(
        [
            torch.tensor([_CALLS.index(call)], device=device),
            _describe(image_BE, device),
            _describe(text_BE, device),
            _describe(in_flight, device, look=False),
            _describe_number(log_scale, device),
            _describe_number(bias, device),
            torch.tensor([struct.unpack("<q", struct.pack("<d", label_smoothing))[0]], device=device),
        ]
    )
    ranks = [_Rank.read(integers) for integers in all_gather_rows(header[None], group).tolist()]
    fault = next(_faults(ranks), None)
    if fault is not None:
        raise FeatureError(fault)


_NOT_PASSED, _NO_TENSOR = -1, -2  # in place of a number of dimensions


@dataclass(frozen=True)
class _Seen:
    """One matrix on one rank: what is sent of it."""

    num_dims: int
    num_rows: int
    width: int
    dtype_code: int
    num_bad: int
    first_bad: int

    @property
    def dtype(self) -> torch.dtype:
        return _ALL_DTYPES[self.dtype_code]

    def __str__(self) -> str:
        if self.num_dims == 2:
            return f"[{self.num_rows}, {self.width}]"
        return _kind(self.num_dims)


@dataclass(frozen=True)
class _Number:
    """The scale's logarithm or the bias on one rank."""

    num_dims: int
    dtype_code: int
    bits: int  # of its value in float64

    def __str__(self) -> str:
        if self.num_dims:
            return _kind(self.num_dims)
        dtype = _ALL_DTYPES[self.dtype_code]
        return repr(_float(self.bits)) if dtype.is_floating_point else f"{_float(self.bits)!r} of {dtype}"


@dataclass(frozen=True)
class _Rank:
    """What one rank passes."""

    call: Call
    image: _Seen
    text: _Seen
    in_flight: _Seen  # its rows are not looked at
    log_scale: _Number
    bias: _Number
    label_smoothing: float

    @staticmethod
    def read(integers: Sequence[int]) -> "_Rank":
        image, text, in_flight = (_Seen(*integers[at : at + 6]) for at in (1, 7, 13))
        log_scale, bias = (_Number(*integers[at : at + 3]) for at in (19, 22))
        return _Rank(_CALLS[integers[0]], image, text, in_flight, log_scale, bias, _float(integers[25]))

    def needs(self, name: str) -> bool:
        return name in _NEEDED[self.call]

    @property
    def modalities(self) -> tuple[_Seen, _Seen]:
        return self.image, self.text


def _kind(num_dims: int) -> str:
    words = {_NOT_PASSED: "not passed", _NO_TENSOR: "no tensor"}
    return words.get(num_dims, f"a tensor of {num_dims} dimensions")


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _describe(x_BE: Tensor | None, device: torch.device, look: bool = True) -> Tensor:
    """The six integers of `_Seen`, on the device; without a look at the rows none of them is bad."""
    if not isinstance(x_BE, Tensor):
        return torch.tensor([_NOT_PASSED if x_BE is None else _NO_TENSOR, 0, 0, 0, 0, 0], device=device)
    is_matrix = x_BE.dim() == 2
    shape = x_BE.shape if is_matrix else (0, 0)
    static = torch.tensor([x_BE.dim(), *shape, _ALL_DTYPES.index(x_BE.dtype)], device=device)
    if not look or not is_matrix or shape[0] == 0 or x_BE.dtype not in DTYPES:
        return torch.cat([static, static.new_zeros(2)])
    bad_B = ~_row_norms(x_BE.detach()).isfinite()
    return torch.cat([static, torch.stack([bad_B.sum(), bad_B.long().argmax()])])


def _describe_number(value: Tensor | None, device: torch.device) -> Tensor:
    """The three integers of `_Number`, on the device."""
    if not isinstance(value, Tensor):
        return torch.tensor([_NOT_PASSED if value is None else _NO_TENSOR, 0, 0], device=device)
    static = torch.tensor([value.dim(), _ALL_DTYPES.index(value.dtype)], device=device)
    if value.dim() or value.is_complex():
        return torch.cat([static, static.new_zeros(1)])
    return torch.cat([static, value.detach().to(device, torch.float64).view(torch.int64)[None]])


def _row_norms(x_BE: Tensor) -> Tensor:
    """The norm of each row [B], not finite where an element is not, or where it overflows and the row would be lost."""
    wide = accumulate_dtype(x_BE.dtype)
    return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=wide) for block in x_BE.split(_BLOCK)])


def _faults(ranks: Sequence[_Rank]) -> Iterator[str]:
    """What is wrong, the most basic first."""
    for rank, passed in enumerate(ranks):
        if passed.call != ranks[0].call:
            yield (
                f"rank 0 calls {ranks[0].call} and rank {rank} {passed.call}; all ranks must make the same calls; call "
                f"start_gather on every rank or on none, and one loss on all"
            )
    for rank, passed in enumerate(ranks):
        for name, seen in zip(_NAMES, passed.modalities, strict=True):
            if not passed.needs(name):
                continue
            if seen.num_dims < 0:
                yield f"{name} on rank {rank} is {seen}; it must be a matrix [rows, embedding]; pass the features"
            if seen.num_dims != 2:
                yield f"{name} on rank {rank} is {seen}; it must be a matrix [rows, embedding]; reshape it"
            if seen.dtype not in DTYPES:
                known = ", ".join(str(dtype) for dtype in DTYPES)
                yield f"{name} on rank {rank} is {seen.dtype}; it must be one of {known}; convert it"
            if seen.num_rows == 0 or seen.width == 0:
                yield f"{name} on rank {rank} is {seen}, empty; every rank must pass at least one row; skip this batch"
        image, text = passed.modalities
        if not passed.needs("image_BE"):
            continue
        if str(image) != str(text):
            yield (
                f"image_BE is {image} and text_BE {text} on rank {rank}; row i of both is one pair, so the shapes must "
                f"be equal; pass as many texts as images, of one embedding width"
            )
        if image.dtype != text.dtype:
            yield (
                f"image_BE is {image.dtype} and text_BE {text.dtype} on rank {rank}; the dtypes must be equal; "
                f"convert one of them"
            )
    for rank, passed in enumerate(ranks):
        for name, seen, other in zip(_NAMES, passed.modalities, ranks[0].modalities, strict=True):
            if str(seen) != str(other):
                yield (
                    f"{name} is {other} on rank 0 and {seen} on rank {rank}; every rank must pass the same number of "
                    f"rows and the same width; deal equal batches, e.g. drop the last, smaller one"
                )
            if seen.dtype_code != other.dtype_code:
                yield (
                    f"{name} is {other.dtype} on rank 0 and {seen.dtype} on rank {rank}; the dtypes must be equal; "
                    f"convert them"
                )
    yield from _wrong_numbers(ranks)
    yield from _wrong_flights(ranks)
    yield from _bad_rows(ranks)


def _wrong_numbers(ranks: Sequence[_Rank]) -> Iterator[str]:
    """Of the scale, the bias and the smoothing."""
    for rank, passed in enumerate(ranks):
        for name, number in (("log_scale", passed.log_scale), ("bias", passed.bias)):
            if passed.needs(name) and (number.num_dims or not _ALL_DTYPES[number.dtype_code].is_floating_point):
                remedy = "take one element of it, or convert it" if number.num_dims >= 0 else "pass torch.tensor(...)"
                yield f"{name} on rank {rank} is {number}; it must be a 0-dim floating tensor; {remedy}"
        if not 0 <= passed.label_smoothing < 1:
            yield (
                f"label_smoothing is {passed.label_smoothing} on rank {rank}; it must lie in [0, 1); 0 is none, 0.1 is "
                f"common"
            )
    first = ranks[0]
    for rank, passed in enumerate(ranks):
        for name, mine, other in (
            ("log_scale", passed.log_scale, first.log_scale),
            ("bias", passed.bias, first.bias),
        ):
            if mine.bits != other.bits:
                yield (
                    f"{name} is {other} on rank 0 and {mine} on rank {rank}; the ranks compute one loss with one "
                    f"{name}; broadcast it from rank 0"
                )
        if passed.label_smoothing != first.label_smoothing:
            yield (
                f"label_smoothing is {first.label_smoothing} on rank 0 and {passed.label_smoothing} on rank {rank}; it "
                f"must be the same on all; pass one value"
            )


def _wrong_flights(ranks: Sequence[_Rank]) -> Iterator[str]:
    for rank, passed in enumerate(ranks):
        flight, text = passed.in_flight, passed.text
        if (flight.num_dims == _NOT_PASSED) != (ranks[0].in_flight.num_dims == _NOT_PASSED):
            has, lacks = (0, rank) if flight.num_dims == _NOT_PASSED else (rank, 0)
            yield (
                f"text_in_flight is passed on rank {has} and not on rank {lacks}; all must exchange the same; pass "
                f"it on every rank or on none"
            )
        if flight.num_dims == _NOT_PASSED:
            continue
        expected = f"[{len(ranks) * text.num_rows}, {text.width}]"
        if str(flight) != expected or flight.dtype != text.dtype:
            yield (
                f"text_in_flight on rank {rank} is {flight} of {flight.dtype}; with {len(ranks)} ranks and text_BE "
                f"{text} it must be {expected} of {text.dtype}; pass what start_gather(text_BE, group) returned"
            )


def _bad_rows(ranks: Sequence[_Rank]) -> Iterator[str]:
    bad = [
        f"{name} on rank {rank} in {seen.num_bad} of {seen.num_rows} rows, first in row {seen.first_bad}"
        for rank, passed in enumerate(ranks)
        for name, seen in zip(_NAMES, passed.modalities, strict=True)
        if seen.num_bad
    ]
    if bad:
        more = f", and {len(bad) - 4} more" if len(bad) > 4 else ""
        yield (
            f"not finite: {', '.join(bad[:4])}{more}; features must be finite, and their norms; lower the learning "
            f"rate, or look at the data of these rows"
        )
