"""A vocabulary that tp does not divide: the text tower of 18B takes tp=5 (20 heads), its 49,408 words do not."""

import pytest
import torch
from torch import Tensor

from megaeva.config.schema import AxesSection, ParallelSection, TextSection
from megaeva.model import TextTower
from megaeva.parallel.grid import Grid, build_grid
from megaeva.parallel.runtime import Runtime
from megaeva.parallel.shards import gather_full, is_sharded
from megaeva.parallel.wrap import reduce_gradients, wrap, zero_gradients
from tests.helpers.spawn import run_ranks
from tests.helpers.tiny import full_shapes, load_full, random_state, single_grid, tiny

LAYOUTS = {"tp": AxesSection(tp=5), "sp": AxesSection(tp=5, sequence_parallel=True)}


def section() -> TextSection:
    size = {"vocab_size": 61, "hidden_size": 80, "num_heads": 10, "ffn_hidden_size": 320}
    return tiny("EVA-CLIP-18B").text.model_copy(update=size)


def one_pass(grid: Grid) -> dict[str, Tensor]:
    """The embeddings of four captions and the tp=1 main gradient of every parameter, on the path of training."""
    cfg = section()
    tower = TextTower(cfg, 12, grid=grid)
    load_full(tower, random_state(full_shapes(tower, grid.tp_size)), grid)
    wrapped = wrap("text", tower, grid, ParallelSection())
    generator = torch.Generator().manual_seed(1)
    token_BL = torch.randint(1, 60, (4, cfg.context_length), generator=generator)
    token_BL[torch.arange(4), torch.tensor([6, 3, 6, 2])] = 60  # lengths 7 and less: not a multiple of tp
    token_BL[1, :2] = token_BL[0, 0]  # a word that occurs often
    zero_gradients([wrapped])
    text_BE = wrapped.ddp(token_BL)
    (text_BE * torch.randn(text_BE.shape, generator=generator)).sum().backward()
    reduce_gradients([wrapped])
    gradients = {name: gather_full(p.main_grad, p, grid) for name, p in tower.named_parameters()}
    return {"text_BE": text_BE.detach()} | gradients


def _ranks(runtime: Runtime) -> dict[str, dict[str, Tensor]]:
    grids = {name: build_grid(axes, runtime) for name, axes in LAYOUTS.items()}
    for vocab_size, cut in ((61, False), (60, True)):
        tower = TextTower(section().model_copy(update={"vocab_size": vocab_size}), 12, grid=grids["tp"])
        assert is_sharded(tower.token_embedding.weight) == cut
    return {name: one_pass(grid) for name, grid in grids.items()}


@pytest.fixture(scope="module")
def five_ranks() -> list[dict[str, dict[str, Tensor]]]:
    """Both layouts on five ranks, in one start of five processes."""
    return run_ranks(_ranks, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_ranks_equal_one(layout: str, five_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    single = one_pass(single_grid())
    for rank in five_ranks:
        assert rank[layout].keys() == single.keys()
        for name, expected in single.items():
            assert expected.norm() > 0, f"{name} is zero: it proves nothing"
            # fp32 sums in another order.
            assert (rank[layout][name] - expected).norm() <= 1e-5 * expected.norm(), name
    for rank in five_ranks[1:]:
        # Each rank updates its own copy: they must stay alike to the last bit.
        assert torch.equal(rank[layout]["token_embedding.weight"], five_ranks[0][layout]["token_embedding.weight"])
