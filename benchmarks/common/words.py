"""How the reports write figures and names."""

from __future__ import annotations

import math
from collections.abc import Iterable


def number(value: float | None, scale: float = 1.0) -> str:
    """Three digits, but all before the point and no more behind it; a dash for None."""
    if value is None:
        return "–"
    value *= scale
    digits = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:.{max(0, min(digits, 3))}f}"


def distinct(values: Iterable[str | None]) -> str:
    """Each of several names once."""
    return ", ".join(sorted({str(value) for value in values}))
