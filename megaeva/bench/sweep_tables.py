"""Tables and the plot of a sweep's rows (megaeva/bench/sweep.py)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def table_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: every row, then strong and weak scaling, where there are several ranks, beside the fewest."""
    lines = [
        "| size | precision | layout | ranks | batch | samples/s | MFU | memory, GiB | data wait | communication |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] else "-"
        cells = [
            row["size"], row["precision"], row["layout"], row["ranks"], row["global_batch_size"],
            f"{row['samples_per_second']:.4g}", mfu, f"{row['memory_gib']:.2f}",
            f"{100 * row['data_wait_share']:.1f} %", f"{100 * row['communication_share']:.1f} %",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for kind, group_of in (("Strong", strong_group), ("Weak", weak_group)):
        scaled = [one for group in _groups(rows, group_of) for one in scaling_of(group)]
        if not scaled:
            continue
        lines += [
            "",
            f"{kind} scaling",
            "",
            "| size | precision | layout | batch | ranks | samples/s | times | efficiency |",
            "|---|---|---|--:|--:|--:|--:|--:|",
        ]
        for row, times, efficiency in scaled:
            where = f"{row['size']} | {row['precision']} | {row['layout']} | {row['global_batch_size']}"
            rate = f"{row['samples_per_second']:.4g} | {times:.2f} | {100 * efficiency:.0f} %"
            lines.append(f"| {where} | {row['ranks']} | {rate} |")
    return lines


def strong_group(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Rows of one global batch."""
    return (*_curve(row), row["global_batch_size"])


def weak_group(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Rows of one share of a rank."""
    return (*_curve(row), row["global_batch_size"] / row["ranks"])


def scaling_of(group: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float, float]]:
    """(row, its rate over that of the fewest ranks, that over the ratio of the ranks)."""
    first = group[0]
    times = [row["samples_per_second"] / first["samples_per_second"] for row in group]
    return [(row, ratio, ratio * first["ranks"] / row["ranks"]) for row, ratio in zip(group, times, strict=True)]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Samples per second over the ranks beside ideal scaling, and each row's time by part of the trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    from megaeva.observability.profile import PARTS

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, max(4.0, 0.35 * len(rows) + 1.5)))
    for kind, style, group_of in (("strong", "o-", strong_group), ("weak", "s--", weak_group)):
        for group in _groups(rows, group_of):
            ranks = [row["ranks"] for row in group]
            label = f"{'_'.join(map(str, _curve(group[0])[2:]))}, {kind}, from batch {group[0]['global_batch_size']}"
            (line,) = left.plot(ranks, [row["samples_per_second"] for row in group], style, label=label)
            ideal = [group[0]["samples_per_second"] * number / ranks[0] for number in ranks]
            left.plot(ranks, ideal, ":", color=line.get_color(), linewidth=0.8)
    left.set(xlabel="ranks", ylabel="samples/s (dotted: ideal)", xscale="log", yscale="log")
    numbers = sorted({row["ranks"] for row in rows})
    left.set_xticks(numbers, map(str, numbers))
    left.xaxis.set_minor_locator(pyplot.NullLocator())
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_minor_formatter(ScalarFormatter())
    if left.lines:
        left.legend(fontsize=7)
    names = [
        f"{row['size']} {row['precision']} {row['layout']} x{row['ranks']} b{row['global_batch_size']}: "
        f"{row['samples_per_second']:.4g}/s"
        for row in rows
    ]
    begin = [0.0] * len(rows)
    for part in PARTS:
        widths = [100 * row["trace_shares"][part] for row in rows]
        right.barh(range(len(rows)), widths, left=begin, label=part)
        begin = [start + width for start, width in zip(begin, widths, strict=True)]
    right.set_yticks(range(len(rows)), names, fontsize=7)
    right.invert_yaxis()  # in the table's order
    right.set_xlabel("% of the traced steps, rank 0")
    right.legend(fontsize=7, ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _curve(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["recipe"], tuple(row["overrides"]), row["size"], row["precision"], row["layout"]


def _groups(
    rows: Sequence[Mapping[str, Any]], group_of: Callable[[Mapping[str, Any]], tuple[Any, ...]]
) -> Iterator[list[Mapping[str, Any]]]:
    """Of several numbers of ranks each, the fewest first."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    for group in groups.values():
        if len({row["ranks"] for row in group}) > 1:
            yield sorted(group, key=lambda row: int(row["ranks"]))
