"""What a rule between sections reports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake: the key, what must be, and what to do. `load` adds the value, the file and the line."""

    key: str
    must: str
    do: str


def choices(values: list[int] | list[str]) -> str:
    """The text "1, 2 or 4"."""
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def divisors(number: int) -> list[int]:
    """Ascending, 1 and the number itself included."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
