"""The native contrastive operators on a CPU against fp64, against plain PyTorch, and under torch.compile."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from megaeva.ops import accumulate_dtype, contrastive, native_devices
from megaeva.ops.contrastive import reference

pytestmark = pytest.mark.skipif("cpu" not in native_devices(), reason="the extension is not built")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# A tile of the kernels is 2048 queries by 512 keys, a block of a product 64 by 64.
UNEVEN = (2100, 1100, 24)
MANY = (2090, 2100, 2110, 2120)  # pairs: two tiles of queries, four to five of keys


def _native() -> Any:
    return torch.ops.megaeva


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(seed: int, num_rows: int, width: int) -> Tensor:
    return normalize(_draw(seed, num_rows, width), dim=-1)


def _numbers(dtype: torch.dtype, *values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=accumulate_dtype(dtype)) for value in values]


def _everything(
    ops: Any, query_BE: Tensor, key_GE: Tensor, first: int, keys: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every output of the four operators; the backward pass gets log-sum-exps that are not its own."""
    scale, bias, factor = _numbers(query_BE.dtype, 14.3, -3.0, 0.7)
    lse_query_B, lse_key_G = 14 + _draw(2, len(query_BE)), 14 + _draw(3, len(key_GE))
    pair_query_B, pair_key_G = (x.float().to(scale.dtype) for x in (_draw(4, len(query_BE)), _draw(5, len(key_GE))))
    names = ["lse_query_B", "lse_key_G", "pair_query_B", "grad_query_BE", "grad_key_KE", "scale_share"]
    names += ["sigmoid_total", "sigmoid_grad_query_BE", "sigmoid_grad_key_KE", "sigmoid_scale_share", "bias_share"]
    outputs = [
        *ops.infonce_forward(query_BE, key_GE, scale, first),
        *ops.infonce_backward(
            query_BE, key_GE, scale, factor, lse_query_B, lse_key_G, pair_query_B, pair_key_G,
            first, 1.8, 0.2 / max(len(key_GE), 1), *keys, dtype,
        ),
        ops.sigmoid_forward(query_BE, key_GE, scale, bias, first),
        *ops.sigmoid_backward(query_BE, key_GE, scale, bias, factor, first, *keys, dtype),
    ]  # fmt: skip
    return dict(zip(names, outputs, strict=True))


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "width", "first", "keys"),
    [
        (1, 1, 1, 0, (0, 1)),
        (7, 9, 5, 1, (2, 6)),  # an odd width, which bfloat16 has no blocks for
        (64, 64, 16, -3, (0, 64)),
        (64, 65, 6, 20, (65, 65)),  # no key wants a gradient, and the last queries have no pair
        (3, 5, 4, 8, (0, 5)),  # no pair at all
        (*UNEVEN, 700, (130, 900)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_is_that_of_the_reference_in_fp64(
    dtype: torch.dtype, num_queries: int, num_keys: int, width: int, first: int, keys: tuple[int, int]
) -> None:
    query_BE, key_GE = _rows(0, num_queries, width).to(dtype), _rows(1, num_keys, width).to(dtype)
    mine = _everything(_native(), query_BE, key_GE, first, keys, dtype)
    exact = _everything(reference, query_BE.double(), key_GE.double(), first, keys, torch.float64)
    wide = accumulate_dtype(dtype)
    for name, true in exact.items():
        is_gradient = "grad" in name
        expected_dtype = dtype if is_gradient else torch.float64 if "lse" in name else wide
        assert mine[name].dtype == expected_dtype and mine[name].shape == true.shape, name
        # Gradients are rounded once, and in bfloat16 their weights were too; the rest is summed in the wide type.
        bound = 8 * torch.finfo(wide).eps * true.norm()
        if "share" in name:  # a sum of numbers of both signs: each row and column gives a few units
            bound += 8 * torch.finfo(wide).eps * (num_queries + num_keys)
        if is_gradient:
            kind = torch.finfo(dtype)
            bound += 2 * kind.eps * true.norm() + kind.eps * kind.smallest_normal * true.numel() ** 0.5
        assert (mine[name].double() - true).norm() <= bound, name


def test_narrow_gradients_of_many_keys_are_made_in_two_sweeps() -> None:
    # 8,192 keys or half of all are a sweep (csrc/contrastive/launch.h); the range of keys lies in both.
    query_BE, key_GE = _rows(0, 70, 8).bfloat16(), _rows(1, 17_001, 8).bfloat16()
    outputs = _everything(_native(), query_BE, key_GE, 8_480, (3_000, 12_000), torch.bfloat16)
    exact = _everything(reference, query_BE.double(), key_GE.double(), 8_480, (3_000, 12_000), torch.float64)
    for name in ("grad_query_BE", "grad_key_KE", "sigmoid_grad_query_BE", "sigmoid_grad_key_KE"):
        error = (outputs[name].double() - exact[name]).norm() / exact[name].norm()
        assert error <= torch.finfo(torch.bfloat16).eps / 2, (name, error)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, whenever these flags are set
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_onednn_the_products_are_atens(dtype: torch.dtype) -> None:
    query_BE, key_GE = _rows(0, 70, 16).to(dtype), _rows(1, 66, 16).to(dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        mine = _everything(_native(), query_BE, key_GE, 0, (0, 60), dtype)
    exact = _everything(reference, query_BE.double(), key_GE.double(), 0, (0, 60), torch.float64)
    unit = torch.finfo(dtype).eps
    for name, true in exact.items():
        torch.testing.assert_close(mine[name].double(), true, rtol=2 * unit + 1e-5, atol=unit + 1e-5)


# ------------------------------------------------------------------------- against the plain B x B formula


def _plain(
    image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows and columns (or their total), gradients, and the derivatives by log(scale) and bias."""
    leaves = [x.detach().clone().requires_grad_() for x in (image_BE, text_BE, scale.log())]
    logits = leaves[2].exp() * (leaves[0] @ leaves[1].T)
    if bias is None:
        here = torch.arange(len(logits))
        losses = torch.cat([cross_entropy(x, here, reduction="none") for x in (logits, logits.T)]) / (2 * len(logits))
    else:
        leaves.append(bias.detach().clone().requires_grad_())
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        losses = -logsigmoid(signs * (logits + leaves[3])).sum()[None] / len(logits)
    grads = torch.autograd.grad(losses.sum(), leaves)
    return losses.detach(), *grads[:3], grads[3] if bias is not None else torch.zeros(())


def _streamed(
    image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_plain` returns, from the operators."""
    ops, num, dtype = _native(), len(image_BE), image_BE.dtype
    if bias is not None:
        total = ops.sigmoid_forward(image_BE, text_BE, scale, bias, 0)
        *grads, share, bias_share = ops.sigmoid_backward(image_BE, text_BE, scale, bias, scale / num, 0, 0, num, dtype)
        return total[None] / num, *grads, share / num, bias_share / num
    lse_image_B, lse_text_B, pair_B = ops.infonce_forward(image_BE, text_BE, scale, 0)
    *grads, share = ops.infonce_backward(
        image_BE, text_BE, scale, scale / (2 * num), lse_image_B, lse_text_B, pair_B, pair_B, 0, 2.0, 0.0, 0, num, dtype
    )
    losses = torch.cat([lse_image_B - pair_B, lse_text_B - pair_B]) / (2 * num)
    return losses, *grads, share / (2 * num), torch.zeros(())


def _random(seed: int, num: int, width: int) -> tuple[Tensor, Tensor]:
    return _rows(seed, num, width), _rows(seed + 1000, num, width)


def _matched(seed: int, num: int, width: int) -> tuple[Tensor, Tensor]:
    image_BE, noise_BE = _random(seed, num, width)
    return image_BE, normalize(image_BE + 0.7 * noise_BE, dim=-1)  # where training ends: small losses


def _equal(seed: int, num: int, width: int) -> tuple[Tensor, Tensor]:
    row_BE = _rows(seed, 1, width).expand(num, width)
    return row_BE, row_BE


def _one_huge(seed: int, num: int, width: int) -> tuple[Tensor, Tensor]:
    image_BE, text_BE = _random(seed, num, width)
    image_BE[3] *= 1e3
    text_BE[5] = image_BE[3]
    return image_BE, text_BE


def _growing(seed: int, num: int, width: int) -> tuple[Tensor, Tensor]:
    image_BE, text_BE = _matched(seed, num, width)
    longer_B1 = torch.linspace(0.1, 5, num, dtype=torch.float64)[:, None]
    return image_BE * longer_B1, text_BE  # each tile of queries has larger logits than all before it


def _long(seed: int, num: int, width: int) -> tuple[Tensor, Tensor]:
    image_BE, text_BE = _random(seed, num, width)
    return image_BE * 1e3, text_BE * 1e3


def _one_sided(seed: int, num: int, width: int) -> tuple[Tensor, Tensor]:
    image_BE, text_BE = _random(seed, num, 16 * width)
    return image_BE.abs(), text_BE.abs()  # sums of many numbers of one sign: a single long chain would show


@pytest.mark.parametrize("bias_value", [None, -10.0], ids=["infonce", "sigmoid"])
@pytest.mark.parametrize("scale_value", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("make", [_random, _matched, _equal, _one_huge, _long, _one_sided])
def test_error_against_fp64_is_at_most_twice_plain_pytorch(
    make: Callable[[int, int, int], tuple[Tensor, Tensor]], scale_value: float, bias_value: float | None
) -> None:
    # Other sizes in every draw: where all rows are equal, one rounding error would be everyone's.
    _check_errors(make, scale_value, bias_value, range(60, 84), 40)


@pytest.mark.slow
@pytest.mark.parametrize("bias_value", [None, -10.0], ids=["infonce", "sigmoid"])
@pytest.mark.parametrize("make", [_random, _matched, _growing])
def test_so_it_is_over_several_tiles_of_queries(
    make: Callable[[int, int, int], tuple[Tensor, Tensor]], bias_value: float | None
) -> None:
    _check_errors(make, 14.3, bias_value, MANY, 8)


def _check_errors(
    make: Callable[[int, int, int], tuple[Tensor, Tensor]],
    scale_value: float,
    bias_value: float | None,
    sizes: Sequence[int],
    width: int,
) -> None:
    """Over draws of these sizes, as single numbers (the scale's derivative) are compared over many."""
    squares = torch.zeros(2, 5, dtype=torch.float64)
    for seed, num in enumerate(sizes):
        image_BE, text_BE = (x.float() for x in make(seed, num, width))
        scale = torch.tensor(scale_value)
        bias = None if bias_value is None else torch.tensor(bias_value)
        exact = _plain(image_BE.double(), text_BE.double(), scale.double(), None if bias is None else bias.double())
        for side, function in enumerate((_streamed, _plain)):
            for i, (value, true) in enumerate(zip(function(image_BE, text_BE, scale, bias), exact, strict=True)):
                squares[side, i] += (value.double() - true).square().sum()
    mine, plain = squares.sqrt()
    names = ["losses", "grad_image", "grad_text", "scale", "bias"]
    # 1e-15: where the exact value is zero up to fp64's own rounding, and plain PyTorch happens to give zero.
    worse = {name: (m, p) for name, m, p in zip(names, mine.tolist(), plain.tolist()) if m > 2 * p + 1e-15}
    assert not worse


def test_bfloat16_features_have_fp32_logits() -> None:
    image_BE, text_BE = (x.bfloat16() for x in _matched(0, 300, 128))
    (scale,) = _numbers(torch.bfloat16, 14.3)
    losses, grad_image_BE, grad_text_BE, share, _ = _streamed(image_BE, text_BE, scale)
    exact = _plain(image_BE.double(), text_BE.double(), scale.double())
    assert (losses.sum() - exact[0].sum()).abs() <= 1e-6 * exact[0].sum()
    assert (share - exact[3]).abs() <= 1e-5 * exact[3].abs()
    plain = _plain(image_BE, text_BE, scale.bfloat16())
    for mine, theirs, true in zip((grad_image_BE, grad_text_BE), plain[1:3], exact[1:3], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - true).norm() <= 0.5 * (theirs.double() - true).norm()


# ------------------------------------------------------------ what is not a number, and what is not there


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_as_in_logsumexp(dtype: torch.dtype, value: float) -> None:
    query_BE, key_GE = _rows(0, 70, 8).to(dtype), _rows(1, 66, 8).abs().to(dtype)
    query_BE[3, 2] = value
    (scale,) = _numbers(dtype, 14.3)
    lse_query_B, lse_key_G, pair_query_B = _native().infonce_forward(query_BE, key_GE, scale, 0)
    logits_BG = 14.3 * (query_BE.double() @ key_GE.double().T)
    close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
    torch.testing.assert_close(lse_query_B, logits_BG.logsumexp(1), **close)
    torch.testing.assert_close(lse_key_G, logits_BG.logsumexp(0), **close)
    torch.testing.assert_close(pair_query_B[:66].double(), logits_BG.diagonal(), **close)
    bad = [3] if value != -float("inf") else []
    assert lse_query_B.isfinite().logical_not().nonzero().flatten().tolist() == (bad or [3])
    if value != value:
        losses, grad_query_BE, *_ = _streamed(query_BE[:66], key_GE, scale)
        assert losses.isnan().any() and grad_query_BE[3].isnan().all()


def test_no_logit_overflows_or_underflows_a_sum() -> None:
    query_BE = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [1e-30, 0.0]])
    key_GE = torch.tensor([[1e4, 0.0], [-1e4, 1.0], [0.0, 0.0]])
    lse_query_B, lse_key_G, _ = _native().infonce_forward(query_BE, key_GE, torch.tensor(1.0), 0)
    logits = query_BE.double() @ key_GE.double().T
    torch.testing.assert_close(lse_query_B, logits.logsumexp(1))
    torch.testing.assert_close(lse_key_G, logits.logsumexp(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_queries", "num_keys", "width"), [(0, 5, 4), (5, 0, 4), (0, 0, 4), (3, 5, 0)])
def test_empty_inputs(dtype: torch.dtype, num_queries: int, num_keys: int, width: int) -> None:
    query_BE, key_GE = torch.ones(num_queries, width, dtype=dtype), torch.ones(num_keys, width, dtype=dtype)
    mine = _everything(_native(), query_BE, key_GE, 0, (0, num_keys), dtype)
    expected = _everything(reference, query_BE, key_GE, 0, (0, num_keys), dtype)
    for name, value in mine.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    if num_queries == 0:
        assert (mine["lse_key_G"] == -torch.inf).all() and (mine["grad_key_KE"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows(dtype: torch.dtype) -> None:
    wide = _rows(0, 140, 61).to(dtype)
    for query_BE, key_GE in [
        (wide[:70, 1:25], wide[70:, 25:49]),  # rows an odd number of elements apart
        (wide[::2, ::3], wide[1::2, 1::3][:, :20].repeat(1, 2)[:, :21]),  # elements apart: copied inside
        (wide[:1, :24].expand(70, 24), wide[70:, :24]),  # stride 0
        (wide.T[:24, :20], wide.T[24:48, 20:40]),
    ]:
        keys = (3, len(key_GE) - 1)
        mine = _everything(_native(), query_BE, key_GE, 1, keys, dtype)
        dense = _everything(_native(), query_BE.contiguous(), key_GE.contiguous(), 1, keys, dtype)
        for name, value in mine.items():
            if dtype == torch.float64:  # MKL: other strides, another order of summation
                torch.testing.assert_close(value, dense[name])
            else:
                assert torch.equal(value, dense[name]), name


def test_strided_numbers_of_rows() -> None:
    query_BE, key_GE = (x.float() for x in _random(0, 70, 16))
    (scale,) = _numbers(torch.float32, 14.3)
    lse_query_B, lse_key_G, pair_B = _native().infonce_forward(query_BE, key_GE, scale, 0)
    rest = (0, 2.0, 0.0, 0, 70, torch.float32)
    dense = _native().infonce_backward(query_BE, key_GE, scale, scale, lse_query_B, lse_key_G, pair_B, pair_B, *rest)
    apart = [torch.stack([x, x + 1], dim=1)[:, 0] for x in (lse_query_B, lse_key_G, pair_B, pair_B)]
    for mine, expected in zip(
        _native().infonce_backward(query_BE, key_GE, scale, scale, *apart, *rest), dense, strict=True
    ):
        assert torch.equal(mine, expected)


# --------------------------------------------------------------------------------------------- the operators' contract


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    query_BE, key_GE = _rows(0, 2100, 96).to(dtype), _rows(1, 600, 96).to(dtype)
    threads_before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 3, 3):
            torch.set_num_threads(num_threads)
            results.append(_everything(_native(), query_BE, key_GE, 5, (0, 600), dtype))
    finally:
        torch.set_num_threads(threads_before)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_contract(dtype: torch.dtype) -> None:
    query_BE, key_GE = _rows(0, 5, 6).to(dtype), _rows(1, 7, 6).to(dtype)
    scale, bias, factor = _numbers(dtype, 14.3, -3.0, 0.1)
    lse_query_B, lse_key_G, pair_B = _native().infonce_forward(query_BE, key_GE, scale, 1)
    pair_key_G = torch.zeros(7, dtype=scale.dtype)
    ops = _native()
    for op, arguments in [
        (ops.infonce_forward, (query_BE, key_GE, scale, 1)),
        (
            ops.infonce_backward,
            (query_BE, key_GE, scale, factor, lse_query_B, lse_key_G, pair_B, pair_key_G, 1, 2.0, 0.0, 1, 4, dtype),
        ),
        (ops.sigmoid_forward, (query_BE, key_GE, scale, bias, 1)),
        (ops.sigmoid_backward, (query_BE, key_GE, scale, bias, factor, 1, 1, 4, torch.float32)),
    ]:
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_that_require_a_gradient_are_taken(dtype: torch.dtype) -> None:
    # The operators are not differentiable themselves: whoever calls them with grad mode on gets values.
    query_BE, key_GE = (x.to(dtype).requires_grad_() for x in _random(0, 5, 6))
    outputs = _everything(_native(), query_BE, key_GE, 0, (0, 5), dtype)
    plain = _everything(_native(), query_BE.detach(), key_GE.detach(), 0, (0, 5), dtype)
    assert all(torch.equal(value, plain[name]) for name, value in outputs.items())


def _call(op: str, **replaced: Any) -> None:
    arguments = {
        "query_BE": torch.ones(4, 6),
        "key_GE": torch.ones(5, 6),
        "scale": torch.tensor(1.0),
        "bias": torch.tensor(1.0),
        "factor": torch.tensor(1.0),
        "lse_query_B": torch.ones(4, dtype=torch.float64),
        "lse_key_G": torch.ones(5, dtype=torch.float64),
        "pair_query_B": torch.ones(4),
        "pair_key_G": torch.ones(5),
        "first": 0,
        "pair_weight": 2.0,
        "uniform": 0.0,
        "key_begin": 0,
        "key_end": 5,
        "dtype": torch.float32,
    } | replaced
    schema = getattr(_native(), op).default._schema
    getattr(_native(), op)(*(arguments[argument.name] for argument in schema.arguments))


OPERATORS = ["infonce_forward", "infonce_backward", "sigmoid_forward", "sigmoid_backward"]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        ({"key_GE": torch.ones(5, 7)}, r"\[4, 6\] and key_GE \[5, 7\] must be two matrices of one width"),
        ({"query_BE": torch.ones(6)}, "two matrices of one width"),
        ({"key_GE": torch.ones(5, 6).double()}, "query_BE is Float on cpu, key_GE Double on cpu; they must agree"),
        ({"query_BE": torch.ones(4, 6).int(), "key_GE": torch.ones(5, 6).int()}, "dtype Int must be float32"),
        ({"scale": torch.ones(1)}, r"scale is \[1\] Float on cpu, must be a 0-dim tensor, Float on cpu"),
        ({"scale": torch.tensor(1.0).double()}, "scale is .* Double on cpu, must be a 0-dim tensor, Float"),
    ],
)
def test_what_every_operator_refuses(op: str, replaced: dict[str, Any], expected: str) -> None:
    _call(op)
    with pytest.raises(RuntimeError, match=f"{op}: .*{expected}"):
        _call(op, **replaced)


@pytest.mark.parametrize(
    ("op", "replaced", "expected"),
    [
        ("sigmoid_forward", {"bias": torch.ones(1)}, "bias is"),
        ("sigmoid_backward", {"factor": torch.ones(1)}, "factor is"),
        (
            "infonce_backward",
            {"lse_query_B": torch.ones(4)},
            r"lse_query_B is \[4\] Float on cpu, must be \[4\], Double",
        ),
        ("infonce_backward", {"lse_key_G": torch.ones(4).double()}, r"lse_key_G is \[4\] .* must be \[5\]"),
        ("infonce_backward", {"pair_query_B": torch.ones(4).double()}, "pair_query_B is"),
        ("infonce_backward", {"pair_key_G": torch.ones(5, 1)}, "pair_key_G is"),
        ("infonce_backward", {"key_end": 6}, "keys 0 to 6 must be a range inside"),
        ("sigmoid_backward", {"key_begin": 4, "key_end": 3}, "keys 4 to 3 must be a range inside"),
        ("sigmoid_backward", {"dtype": torch.int32}, "gradients in Int must be"),
    ],
)
def test_what_one_operator_refuses(op: str, replaced: dict[str, Any], expected: str) -> None:
    with pytest.raises(RuntimeError, match=f"{op}: .*{expected}"):
        _call(op, **replaced)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def run(image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
        lse_image_B, lse_text_B, pair_B = contrastive.infonce_forward(image_BE * 2, text_BE + 1, scale, 0)
        infonce = contrastive.infonce_backward(
            image_BE, text_BE, scale, scale / 12, lse_image_B, lse_text_B, pair_B, pair_B,
            0, 2.0, 0.0, 0, len(text_BE), torch.float32,
        )  # fmt: skip
        total = contrastive.sigmoid_forward(image_BE, text_BE, scale, bias, 0)
        sigmoid = contrastive.sigmoid_backward(image_BE, text_BE, scale, bias, total, 0, 1, 3, torch.float32)
        return [x * 2 for x in (lse_image_B, lse_text_B, *infonce, total, *sigmoid)]

    arguments = [*(x.float() for x in _random(0, 6, 16)), torch.tensor(3.0), torch.tensor(-1.0)]
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(*arguments), run(*arguments))


def test_the_public_functions_are_the_native_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    image_BE, text_BE = (x.float() for x in _random(0, 5, 6))
    monkeypatch.setattr(contrastive, "reference", SimpleNamespace())  # would raise AttributeError
    contrastive.infonce_forward(image_BE, text_BE, torch.tensor(1.0), 0)
    contrastive.sigmoid_forward(image_BE, text_BE, torch.tensor(1.0), torch.tensor(0.0), 0)
