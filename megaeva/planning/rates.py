"""Learning rate and weight decay of all parameters as a table, printed at the start of a run and by `--topology`."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from megaeva.config.schema import Config
from megaeva.optim.param_groups import Depth, find_rule, param_groups
from megaeva.planning.table import columns
from megaeva.planning.topology import Spread, spread_towers


def rate_lines(cfg: Config) -> list[str]:
    """The table as lines below 100 columns: of each tower its embeddings, its blocks and what is above them, or that it
    is frozen.

    Rates are the peaks, of blocks from the first to the last. Counts are of whole towers, which are built on the meta
    device as by `topology_lines`, so that any rank can tell them alone.

    Raises:
        ParameterRuleError: a parameter that no rule covers.
    """
    decay = f"weight decay {cfg.optim.weight_decay:g}"
    rows: list[tuple[str, ...]] = [("trains", "", decay, "none", "peak learning rate", "layer decay")]
    for name, one in spread_towers(cfg)[0].items():
        rows += _rows(name, one, cfg)
    lines = columns(rows, right=(2, 3))
    average = cfg.optim.ema_decay
    return (
        lines if average is None else [*lines, f"beside them an average of the weights is kept, ema_decay={average:g}"]
    )


def _rows(name: str, spread: Spread, cfg: Config) -> list[tuple[str, ...]]:
    named = list(spread.module.named_parameters())
    frozen = sum(parameter.numel() for _, parameter in named if not parameter.requires_grad)
    rows: list[tuple[str, ...]] = []
    if frozen:
        rows.append((name, f"frozen: {frozen:,}", "-", "-", "-", "-"))
    trained = [(n, parameter) for n, parameter in named if parameter.requires_grad]
    groups = param_groups(name, trained, cfg.optim, spread.num_layers) if trained else []
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    blocks = f"blocks 0-{spread.num_layers - 1}" if spread.num_layers > 1 else "block 0"
    for depth, title in ((Depth.EMBEDDING, "embeddings"), (Depth.BLOCK, blocks), (Depth.TOP, "top")):
        inside = [(p, group_of[id(p)]) for n, p in trained if find_rule(n)[0].depth is depth]
        if inside:
            rows.append((name, title, *_cells(inside)))
    return rows


def _cells(inside: Sequence[tuple[nn.Parameter, dict[str, Any]]]) -> tuple[str, ...]:
    """Numbers of parameters with and without weight decay, learning rates, layer-decay scales."""
    counts = [sum(p.numel() for p, group in inside if bool(group["wd_mult"]) is decayed) for decayed in (True, False)]
    spans = [[group[key] for _, group in inside] for key in ("lr", "lr_mult")]
    return (*(f"{count:,}" if count else "-" for count in counts), *(_span(min(span), max(span)) for span in spans))


def _span(low: float, high: float) -> str:
    return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
