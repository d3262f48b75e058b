"""The contrastive losses on ranks against the plain formulas on one process; bad input of one rank stops all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from megaeva.errors import FeatureError
from megaeva.losses.contrastive import clip_loss, sigmoid_loss, start_gather
from megaeva.ops import contrastive as operators
from megaeva.parallel.collectives import RowsInFlight, all_logsumexp, gather_objects
from megaeva.parallel.runtime import Runtime
from tests.helpers.spawn import run_ranks

GLOBAL_PAIRS = (8, 52, 700)  # few; more than the tile of the reference here; more than one of the CPU kernel (512 keys)
EMBED_DIM = 12
TILE = 5
NUM_DRAWS = 12
QUANTITIES = ("loss", "image", "text", "log_scale", "bias")


@dataclass(frozen=True)
class Case:
    num_pairs: int
    dtype: torch.dtype
    in_flight: bool
    loss: str  # "infonce", "smoothed" or "sigmoid"


CASES = [
    Case(*values)
    for values in product(
        GLOBAL_PAIRS, (torch.float64, torch.float32), (False, True), ("infonce", "smoothed", "sigmoid")
    )
]


def plain(name: str, image_GE: Tensor, text_GE: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """The loss from the whole matrix of logits."""
    logits = log_scale.exp() * normalize(image_GE, dim=-1) @ normalize(text_GE, dim=-1).T
    if name == "sigmoid":
        sign = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        return -logsigmoid(sign * (logits + bias)).sum() / len(logits)
    labels, smoothing = torch.arange(len(logits)), 0.1 if name == "smoothed" else 0.0
    return (
        cross_entropy(logits, labels, label_smoothing=smoothing)
        + cross_entropy(logits.T, labels, label_smoothing=smoothing)
    ) / 2


def with_gradients(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))]


def draw(case: Case, seed: int) -> list[Tensor]:
    """Images and texts of the global batch, the scale's logarithm and the bias."""
    generator = torch.Generator().manual_seed(1000 * seed + case.num_pairs)
    wide = [3 * torch.randn(case.num_pairs, EMBED_DIM, generator=generator, dtype=torch.float64) for _ in range(2)]
    wide[1] += wide[0]
    values = [*wide, torch.tensor(1.7, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)]
    return [value.to(case.dtype) for value in values]


def draws_of(case: Case) -> range:
    # In a single draw the plain formula's few roundings may cancel.
    return range(NUM_DRAWS if case.dtype == torch.float32 else 1)


Plain = dict[tuple[Case, int], tuple[list[Tensor], list[Tensor]]]


def plain_results() -> Plain:
    """What the plain formula gives of each draw of each case, in fp64 and in the case's dtype; once over all ranks."""
    draws = [(case, seed) for case in CASES if not case.in_flight for seed in draws_of(case)]
    here: Plain = {}
    for case, seed in draws[torch.distributed.get_rank() :: torch.distributed.get_world_size()]:
        values = draw(case, seed)
        formula = partial(plain, case.loss)
        here[case, seed] = with_gradients(formula, [v.double() for v in values]), with_gradients(formula, values)
    return {key: value for part in gather_objects(here) for key, value in part.items()}


def on_rank(runtime: Runtime, case: Case, seed: int, expected: Plain) -> tuple[str, list[tuple[float, float, float]]]:
    """The loss's bits; for the loss and each gradient (our error, the plain formula's, the exact value's norm)."""
    num_ranks, rank = runtime.world_size, runtime.rank
    group = torch.distributed.group.WORLD
    values = draw(case, seed)
    exact, rough = expected[replace(case, in_flight=False), seed]

    def ours(image_BE: Tensor, text_BE: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        ahead = start_gather(text_BE.detach(), group) if case.in_flight else None
        if case.loss == "sigmoid":
            return sigmoid_loss(image_BE, text_BE, log_scale, bias, group=group, text_in_flight=ahead)
        smoothing = 0.1 if case.loss == "smoothed" else 0.0
        return clip_loss(image_BE, text_BE, log_scale, group=group, text_in_flight=ahead, label_smoothing=smoothing)

    here = slice(rank * case.num_pairs // num_ranks, (rank + 1) * case.num_pairs // num_ranks)
    found = with_gradients(ours, [values[0][here], values[1][here], *values[2:]])
    for share in found[3:]:
        torch.distributed.all_reduce(share)
    assert [tensor.dtype for tensor in found] == [case.dtype] * 5
    results = []
    for place, (mine, other, true) in enumerate(zip(found, rough, exact, strict=True)):
        part = here if place in (1, 2) else ...
        results.append(
            (
                (mine.double() - true[part]).norm().item(),
                (other.double() - true)[part].norm().item(),
                true[part].norm().item(),
            )
        )
    return found[0].double().item().hex(), results


def implementations() -> list[str]:
    return ["reference", "native"] if "cpu" in operators._NATIVE_DEVICES else ["reference"]


def cases_of(implementation: str) -> list[Case]:
    # The reference has small tiles here, so that few pairs are many of them.
    return [case for case in CASES if implementation == "native" or case.num_pairs < 100]


Found = dict[tuple[str, Case], list[tuple[str, list[tuple[float, float, float]]]]]


def all_cases(runtime: Runtime) -> Found:
    """What `on_rank` found in each draw of each case."""
    found: Found = {}
    expected = plain_results()
    native_devices, tile = operators._NATIVE_DEVICES, operators.TILE
    for implementation in implementations():
        if implementation == "reference":
            operators._NATIVE_DEVICES, operators.TILE = frozenset(), TILE
        for case in cases_of(implementation):
            found[implementation, case] = [on_rank(runtime, case, seed, expected) for seed in draws_of(case)]
        operators._NATIVE_DEVICES, operators.TILE = native_devices, tile
    return found


def check(per_rank: list[Found]) -> None:
    for key in per_rank[0]:
        bits = [[draw[0] for draw in found[key]] for found in per_rank]
        assert bits.count(bits[0]) == len(bits), f"{key}: the loss differs between ranks"
        # Over draws, and over ranks: of the features' gradients each holds its rows.
        results = torch.tensor([[draw[1] for draw in found[key]] for found in per_rank], dtype=torch.float64)
        for name, (error, plain_error, size) in zip(QUANTITIES, results.flatten(0, 1).norm(dim=0), strict=True):
            allowed = 2 * plain_error if key[1].dtype == torch.float32 else 1e-13 * (1 + size)
            assert error <= allowed, (key, name, error, plain_error, size)


def test_two_ranks_equal_the_plain_formula(two_ranks: list[Any]) -> None:
    check([cases for cases, _, _ in two_ranks])


@pytest.mark.slow
def test_four_ranks_equal_the_plain_formula() -> None:
    check(run_ranks(all_cases, 4))


# ------------------------------------------------------------------------------------------------------- bad input

NAN, INF = float("nan"), float("inf")

# Name: (what rank 1 of 2 passes as images and texts, what the message says). Rank 0 passes [4, 6] in fp32.
BAD: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], list[str]]] = {
    "other number of pairs": (
        lambda: (torch.ones(3, 6), torch.ones(3, 6)),
        ["image_BE is [4, 6] on rank 0 and [3, 6] on rank 1", "every rank must pass the same number", "equal batches"],
    ),
    "other width": (lambda: (torch.ones(4, 5), torch.ones(4, 5)), ["[4, 6] on rank 0 and [4, 5] on rank 1"]),
    "more texts than images": (
        lambda: (torch.ones(4, 6), torch.ones(5, 6)),
        ["image_BE is [4, 6] and text_BE [5, 6] on rank 1", "as many texts as images"],
    ),
    "no matrix": (
        lambda: (torch.ones(4, 6, 1), torch.ones(4, 6)),
        ["image_BE on rank 1 is a tensor of 3 dimensions", "must be a matrix", "reshape"],
    ),
    "integers": (
        lambda: (torch.ones(4, 6), torch.ones(4, 6, dtype=torch.int64)),
        ["text_BE on rank 1 is torch.int64", "torch.bfloat16", "convert it"],
    ),
    "another dtype": (
        lambda: (torch.ones(4, 6).double(), torch.ones(4, 6).double()),
        ["image_BE is torch.float32 on rank 0 and torch.float64 on rank 1", "convert"],
    ),
    "two dtypes": (
        lambda: (torch.ones(4, 6), torch.ones(4, 6).half()),
        ["image_BE is torch.float32 and text_BE torch.float16 on rank 1", "convert one"],
    ),
    "empty": (
        lambda: (torch.ones(0, 6), torch.ones(0, 6)),
        ["image_BE on rank 1 is [0, 6], empty", "at least one row", "skip this batch"],
    ),
    "NaN in an image": (
        lambda: (torch.ones(4, 6).index_fill(0, torch.tensor([2, 3]), NAN), torch.ones(4, 6)),
        ["not finite: image_BE on rank 1 in 2 of 4 rows, first in row 2", "lower the learning rate"],
    ),
    "Inf in a text": (
        lambda: (torch.ones(4, 6), torch.ones(4, 6).index_fill(0, torch.tensor([3]), -INF)),
        ["not finite: text_BE on rank 1 in 1 of 4 rows, first in row 3"],
    ),
    "a norm that overflows": (
        lambda: (torch.ones(4, 6).index_fill(0, torch.tensor([1]), 1e30), torch.ones(4, 6)),
        ["not finite: image_BE on rank 1 in 1 of 4 rows, first in row 1", "and their norms"],
    ),
}


def flight(rows: int, width: int, dtype: torch.dtype = torch.float32) -> RowsInFlight:
    return RowsInFlight(torch.ones(rows, width, dtype=dtype), None)


# Name: (the loss, its further arguments on rank 0 and on rank 1 of 2, what the message says).
OTHERS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], dict[str, Any], list[str]]] = {
    "other smoothing": (
        clip_loss,
        {"label_smoothing": 0.1},
        {},
        ["label_smoothing is 0.1 on rank 0 and 0.0 on rank 1", "must be the same", "pass one value"],
    ),
    "smoothing out of range": (
        clip_loss,
        {},
        {"label_smoothing": 1.0},
        ["label_smoothing is 1.0 on rank 1", "must lie in [0, 1)"],
    ),
    "other scale": (
        clip_loss,
        {},
        {"log_scale": torch.tensor(1.5)},
        ["log_scale is 1.0 on rank 0 and 1.5 on rank 1", "one log_scale", "broadcast it"],
    ),
    "scale of a dimension": (
        clip_loss,
        {},
        {"log_scale": torch.ones(1)},
        ["log_scale on rank 1 is a tensor of 1 dimensions", "must be a 0-dim floating tensor"],
    ),
    "scale a float": (clip_loss, {}, {"log_scale": 1.0}, ["log_scale on rank 1 is no tensor", "pass torch.tensor("]),
    "other bias": (
        sigmoid_loss,
        {"bias": torch.tensor(-1.0)},
        {"bias": torch.tensor(-2.0)},
        ["bias is -1.0 on rank 0 and -2.0 on rank 1"],
    ),
    "flight on one rank": (
        clip_loss,
        {},
        {"text_in_flight": flight(8, 6)},
        ["text_in_flight is passed on rank 1 and not on rank 0", "on every rank or on none"],
    ),
    "flight too short": (
        clip_loss,
        {"text_in_flight": flight(8, 6)},
        {"text_in_flight": flight(4, 6)},
        ["text_in_flight on rank 1 is [4, 6] of torch.float32", "must be [8, 6]", "pass what start_gather"],
    ),
    "flight of another dtype": (
        clip_loss,
        {"text_in_flight": flight(8, 6)},
        {"text_in_flight": flight(8, 6, torch.bfloat16)},
        ["text_in_flight on rank 1 is [8, 6] of torch.bfloat16", "must be [8, 6] of torch.float32"],
    ),
    "no texts": (clip_loss, {}, {"text_BE": None}, ["text_BE on rank 1 is not passed", "must be a matrix"]),
}


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert isinstance(caught.value, FeatureError)
    return str(caught.value)


def bad_calls(runtime: Runtime) -> dict[str, list[str]]:
    """What each loss and `start_gather` said of each bad input, on this rank."""
    group, scale = torch.distributed.group.WORLD, torch.tensor(1.0)
    said = {}
    for name, (make, _) in BAD.items():
        image_BE, text_BE = make() if runtime.rank == 1 else (torch.ones(4, 6), torch.ones(4, 6))
        said[name] = [
            message_of(lambda image=image_BE, text=text_BE: clip_loss(image, text, scale, group=group)),
            message_of(lambda image=image_BE, text=text_BE: sigmoid_loss(image, text, scale, scale, group=group)),
        ]
    said["texts ahead"] = [message_of(lambda: start_gather(torch.full((4, 6), NAN if runtime.rank else 1.0), group))]
    said["ahead on one rank"] = [
        message_of(
            lambda: (
                start_gather(torch.ones(4, 6), group)
                if runtime.rank
                else clip_loss(torch.ones(4, 6), torch.ones(4, 6), scale, group=group)
            )
        )
    ]
    said["another loss"] = [
        message_of(
            lambda: (sigmoid_loss if runtime.rank else clip_loss)(
                torch.ones(4, 6), torch.ones(4, 6), scale, *[scale] * runtime.rank, group=group
            )
        )
    ]
    for name, (loss, first, second, _) in OTHERS.items():
        usual: dict[str, Any] = {"image_BE": torch.ones(4, 6), "text_BE": torch.ones(4, 6), "log_scale": scale}
        arguments = usual | (second if runtime.rank else first)
        said[name] = [message_of(lambda loss=loss, arguments=arguments: loss(**arguments, group=group))]
    # Nothing was left behind: the next call works, with inputs that are views.
    image_BE = torch.randn(6, 4).T
    assert clip_loss(image_BE, torch.randn(8, 12)[::2, ::2], scale, group=group).isfinite()
    return said


def test_bad_input_of_one_rank_is_one_error_on_every_rank(two_ranks: list[Any]) -> None:
    said, other = (said for _, said, _ in two_ranks)
    assert said == other
    for name, (_, parts) in BAD.items():
        assert len(set(said[name])) == 1
        assert all(part in said[name][0] for part in parts), said[name]
    for name, (*_, parts) in OTHERS.items():
        assert all(part in said[name][0] for part in parts), said[name]
    assert "rank 0 calls clip_loss and rank 1 sigmoid_loss" in said["another loss"][0]
    assert "text_BE on rank 1 in 4 of 4 rows, first in row 0" in said["texts ahead"][0]
    assert "rank 0 calls clip_loss and rank 1 start_gather" in said["ahead on one rank"][0]


# ------------------------------------------------------------------------------------------------------- exchange


def logsumexps(runtime: Runtime) -> list[float]:
    rows = [[0.0, -INF, -INF, 1e30, 3.0, INF], [1.0, 2.0, -INF, 1.0, NAN, 0.0]]
    return all_logsumexp(torch.tensor(rows[runtime.rank]), torch.distributed.group.WORLD).tolist()


def everything(runtime: Runtime) -> tuple[Any, Any, Any]:
    return all_cases(runtime), bad_calls(runtime), logsumexps(runtime)


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    """One start of two processes for all tests above and below."""
    return run_ranks(everything, 2)


def test_log_sum_exp_over_ranks_keeps_infinities_and_nan(two_ranks: list[Any]) -> None:
    first, second = (sums for _, _, sums in two_ranks)
    assert repr(first) == repr(second)
    expected = torch.tensor([1.3132616875, 2.0, -INF, 1e30, NAN, INF])
    torch.testing.assert_close(torch.tensor(first), expected, equal_nan=True)
