"""The native operators on rows, SwiGLU and LayerNorm, against fp64, against plain PyTorch, and under torch.compile."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megaeva.ops import native_devices
from megaeva.ops.layer_norm import layer_norm
from megaeva.ops.layer_norm import reference as plain_layer_norm
from megaeva.ops.swiglu import reference as plain_swiglu
from megaeva.ops.swiglu import swiglu

pytestmark = pytest.mark.skipif("cpu" not in native_devices("layer_norm"), reason="the extension is not built")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPSILON = 1e-5


@dataclass(frozen=True)
class Operator:
    """One of the two, as a function of those of its arguments that want a gradient: x and parameters."""

    name: str
    native: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    num_parameters: int  # of the last dim's size, beside x

    def draw(self, rows: tuple[int, ...], width: int, dtype: torch.dtype) -> list[Tensor]:
        x = (3 * _draw(0, *rows, width) + 1).to(dtype)
        return [x, *((0.3 * _draw(seed, width) + 1).to(dtype) for seed in range(5, 5 + self.num_parameters))]


OPERATORS = [
    Operator("swiglu", swiglu, plain_swiglu, 0),
    Operator(
        "layer_norm",
        lambda *arguments: layer_norm(*arguments, EPSILON),
        lambda *arguments: plain_layer_norm(*arguments, EPSILON),
        2,
    ),
]
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _forward_backward(function: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, _draw(1, *y.shape).to(y.dtype))]


@each_operator
@pytest.mark.parametrize("width", [6, 96, 768, 2730])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_against_fp64_is_at_most_twice_plain_pytorch(operator: Operator, dtype: torch.dtype, width: int) -> None:
    arguments = operator.draw((33, 5), width, dtype)
    exact = _forward_backward(operator.plain, [x.double() for x in arguments])
    # The gradient that both get is rounded to their dtype; so must be the exact one's.
    leaves = [x.double().requires_grad_() for x in arguments]
    y = operator.plain(*leaves)
    exact[1:] = torch.autograd.grad(y, leaves, _draw(1, *y.shape).to(dtype).double())
    ours, plain = (_forward_backward(f, arguments) for f in (operator.native, operator.plain))
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == true.shape
        error, plain_error = ((x.double() - true).norm() / true.norm() for x in (mine, theirs))
        assert plain_error > 0  # the comparison means something
        assert error <= 2 * plain_error


@each_operator
def test_gradient_is_the_derivative(operator: Operator) -> None:
    arguments = [x.requires_grad_() for x in operator.draw((3, 2), 4, torch.float64)]
    assert torch.autograd.gradcheck(operator.native, arguments)


@each_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_contract(operator: Operator, dtype: torch.dtype) -> None:
    arguments = operator.draw((3, 2), 4, dtype)
    forward, backward = (getattr(torch.ops.megaeva, operator.name + end).default for end in ("", "_backward"))
    epsilon = (EPSILON,) * (operator.num_parameters > 0)
    outputs = forward(*arguments, *epsilon)
    torch.library.opcheck(forward, (*(x.requires_grad_() for x in arguments), *epsilon))
    x, *parameters = [x.detach() for x in arguments]
    if operator.name == "swiglu":
        torch.library.opcheck(backward, (outputs, x))
    else:
        torch.library.opcheck(backward, (outputs[0], x, parameters[0], *outputs[1:]))


def test_large_gates_saturate() -> None:
    gate = torch.tensor([-1e4, -200.0, -88.0, 88.0, 200.0, 1e4, float("nan")])
    x = torch.cat([gate, torch.full_like(gate, 2.0)])
    ours, plain = (_forward_backward(f, [x]) for f in (swiglu, plain_swiglu))
    # exp overflows in plain PyTorch where this one is cut off at 2^-126: both are nothing beside one.
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-33, equal_nan=True)


def test_constant_rows_and_far_means() -> None:
    x = torch.cat([torch.full((1, 64), 7.0), 1e4 + _draw(0, 3, 64).float()])
    weight, bias = torch.ones(64), torch.zeros(64)
    arguments = [x, weight, bias]
    operator = OPERATORS[1]
    ours, plain = (_forward_backward(f, arguments) for f in (operator.native, operator.plain))
    exact = _forward_backward(operator.plain, [a.double() for a in arguments])
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.isfinite().all()
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + 1e-6 * true.norm()


@each_operator
def test_slices_expanded_gradients_and_nothing_at_all(operator: Operator) -> None:
    wide, *parameters = operator.draw((6, 4), 20, torch.float32)
    parameters = [p[:10].contiguous() for p in parameters]
    for x in (wide[::2, :, 5:15], wide[..., ::2], wide[:0, :, :10], wide.permute(1, 0, 2)[..., :10]):
        results = []
        for function in (operator.native, operator.plain):
            leaf = x.detach().clone().requires_grad_()
            y = function(leaf.as_strided(leaf.shape, leaf.stride()), *parameters)
            results.append((y.detach(), *torch.autograd.grad(y.sum(), leaf)))  # .sum() hands over an expanded gradient
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(operator.native(x, *parameters), operator.plain(x, *parameters))


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(operator: Operator, dtype: torch.dtype) -> None:
    arguments = operator.draw((777,), 64, dtype)
    threads_before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(_forward_backward(operator.native, arguments))
    finally:
        torch.set_num_threads(threads_before)
    assert all(map(torch.equal, *results))


def test_mismatched_inputs_are_named() -> None:
    with pytest.raises(RuntimeError, match="even last size"):
        swiglu(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="weight"):
        layer_norm(torch.ones(2, 3), torch.ones(4), torch.ones(3), EPSILON)
    # The parameters of a bf16 row may be fp32: plain PyTorch takes that.
    mixed = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3), torch.ones(3), EPSILON
    assert torch.equal(layer_norm(*mixed), plain_layer_norm(*mixed))


@pytest.mark.slow
@each_operator
def test_compiles_without_a_graph_break(operator: Operator) -> None:
    arguments = operator.draw((4, 3), 8, torch.float32)

    def loss(*arguments: Tensor) -> Tensor:
        return operator.native(*arguments).square().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in arguments]
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    torch.testing.assert_close(*grads)
