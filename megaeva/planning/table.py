"""Tables as lines of text."""

from collections.abc import Sequence


def columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    """Rows of a table as lines; `right` numbers the columns whose cells end where the column does."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def in_bytes(number: int) -> str:
    """The text "12.3 GiB"; "-" for 0."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B" if number else "-"
