"""Numbers as people read them: meaningful digits and units."""

from __future__ import annotations

import math
from typing import Any

ABSENT = "\u2013"  # an en dash


def as_float(value: Any) -> float | None:
    """A number, or None for anything else. NaN and infinities are numbers."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_finite(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    number = as_float(value)
    return number is not None and math.isfinite(number)


def number(value: Any, digits: int = 3) -> str:
    """A number with that many meaningful digits: `0.0831`, `32.1`, `1,728`, `2.1e-6`."""
    found = as_float(value)
    if found is None:
        return ABSENT
    if not math.isfinite(found):
        return "not a number" if math.isnan(found) else "infinite" if found > 0 else "minus infinite"
    if isinstance(value, int) or (found == int(found) and 1000 <= abs(found) < 1e15):
        return f"{int(found):,}"
    if found == 0:
        return "0"
    size = abs(float(f"{found:.{digits - 1}e}"))
    if not 1e-4 <= size < 10**6:
        mantissa, exponent = f"{found:.{max(digits - 2, 1)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    places = digits - 1 - math.floor(math.log10(size))
    return f"{found:,.{max(places, 0)}f}"


def fixed(value: Any, places: int, unit: str = "") -> str:
    """A number with that many decimals and its unit."""
    return f"{value:,.{places}f}{unit and ' ' + unit}" if is_finite(value) else number(value)


def percent(value: Any, places: int = 1) -> str:
    """A share of 1 as a percentage. A share that is not quite 0 or 1 never becomes 0 % or 100 %."""
    if not is_finite(value):
        return number(value)
    while places < 4 and 0 < value < 1 and float(f"{value * 100:.{places}f}") in (0.0, 100.0):
        places += 1
    return f"{value * 100:.{places}f} %"


def with_error(value: Any, error: Any) -> str:
    """A value and its standard error, both with the decimals in which the error has one or two meaningful digits."""
    if not (is_finite(value) and is_finite(error) and error > 0):
        return number(value)
    places = 1 - math.floor(math.log10(error))
    places = min(max(places - (places > 5), 0), 9)
    return f"{value:,.{places}f} ± {error:.{places}f}"


def size(value: Any) -> str:
    """Bytes as GB, MB or kB of a thousand."""
    if not is_finite(value):
        return number(value)
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= divisor:
            return f"{number(value / divisor)} {unit}"
    return f"{value:,.0f} bytes"
