"""Which of its data block's samples a tower's data rank takes, and in what microbatches."""

from megaeva.config.schema import Config
from megaeva.config.topology import microbatches
from megaeva.data.batch import Batch
from megaeva.parallel.grid import Grid


def share_number(grid: Grid, data_grid: Grid) -> int:
    """The place of this rank's data rank on `grid` among those of its data block."""
    return grid.dp_rank % (grid.dp_size // data_grid.dp_size)


def own_microbatches(batch: Batch, grid: Grid, data_grid: Grid, cfg: Config, frames: int = 1) -> list[Batch]:
    """The samples of this rank's data rank on `grid`, in microbatches as the recipe asks for them.

    They are a slice of what the ranks of a data block read alike: a block holds whole data ranks of every tower
    (`config.topology.sharing_ranks`), which take slices in rank order.

    Args:
        frames: images of a sample that the tower sees at once.
    """
    shares = grid.dp_size // data_grid.dp_size
    own = batch.split(len(batch) // shares)[share_number(grid, data_grid)]
    _, passes = microbatches(cfg, grid.axes, grid.model_size * grid.dp_size, frames)
    return own.in_parts(passes)
