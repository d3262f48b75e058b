"""Which of its data block's samples a tower's data rank takes, and in what microbatches."""

from megaeva.config.schema import Config
from megaeva.config.topology import microbatches
from megaeva.data.batch import Batch
from megaeva.parallel.grid import Grid


def own_share(batch: Batch, grid: Grid, data_grid: Grid) -> Batch:
    """The samples of this rank's data rank on `grid`: a slice of what the ranks of a data block read alike.

    A block holds whole data ranks of every tower (`config.topology.sharing_ranks`), which take slices in rank order.
    """
    shares = grid.dp_size // data_grid.dp_size
    return batch.split(len(batch) // shares)[share_number(grid, data_grid)]


def share_number(grid: Grid, data_grid: Grid) -> int:
    """The place of this rank's data rank on `grid` among those of its data block."""
    return grid.dp_rank % (grid.dp_size // data_grid.dp_size)


def own_microbatches(batch: Batch, grid: Grid, data_grid: Grid, cfg: Config) -> list[Batch]:
    """`own_share` in microbatches as the recipe asks for them."""
    _, passes = microbatches(cfg, grid.axes, grid.model_size * grid.dp_size)
    return own_share(batch, grid, data_grid).in_parts(passes)
