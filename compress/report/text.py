"""Figures as text. Every figure of the report is formatted here, so that all its forms print the same strings."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime

MISSING = "—"


def plain(text: str) -> str:
    """One line of text from outside: white space collapsed, control characters made visible."""
    line = " ".join(text.split())
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(sign) in ("Cc", "Cs") else sign for sign in line)


def percent(value: float) -> str:
    """Percentage of 0 to 100."""
    return f"{value:.2f} %"


def signed(value: float, decimals: int = 2) -> str:
    """Difference with its sign; no sign where it rounds to zero."""
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def span(low: float, high: float, decimals: int = 2) -> str:
    """Interval of a figure that stands before it."""
    return f"[{low:.{decimals}f}, {high:.{decimals}f}]"


def size(size_bytes: int) -> str:
    """Bytes to three digits; 1 KB is 1000 bytes."""
    return _scaled(size_bytes, ("bytes", "KB", "MB", "GB", "TB"))


def count(value: int | None) -> str:
    """Parameters or MACs to three digits; None where they are not known."""
    return MISSING if value is None else _scaled(value, ("", "k", "M", "G", "T"))


def decimals_of(value: float) -> int:
    """Decimals that show `value` with three digits, at most six."""
    if not math.isfinite(value) or value <= 0:
        return 2
    return min(6, max(0, 2 - math.floor(math.log10(value))))


def milliseconds(value: float) -> str:
    """Latency to three digits."""
    return f"{value:.{decimals_of(value)}f} ms"


def profiled(value: float) -> str:
    """Time of a node to three digits, but no finer than the profile's clock, which ticks in microseconds."""
    if 0 < value < 0.0005:
        return "< 0.001 ms"
    return f"{value:.{min(3, decimals_of(value))}f} ms"


def rough(value: float) -> str:
    """Something that was measured once, to two digits."""
    value = float(f"{value:.1e}")
    return f"{value:,.{max(0, decimals_of(value) - 1)}f}"


def moment(iso: str) -> str:
    """A moment of ISO 8601 to the minute, UTC; what is none stays as it is."""
    try:
        at = datetime.fromisoformat(iso)
    except ValueError:
        return plain(iso)
    return f"{at.astimezone(UTC) if at.tzinfo else at:%Y-%m-%d %H:%M} UTC"


def rate(per_second: float | None) -> str:
    """A throughput to three digits; None where it was not measured."""
    if per_second is None:
        return MISSING
    return f"{per_second:,.{min(2, decimals_of(per_second))}f}"


def duration(seconds: float) -> str:
    """Time a stage took."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plural(number: int, noun: str) -> str:
    """Number and noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def factor(ratio: float) -> str:
    """A ratio as it never goes below one: 0.5 is '2.0×', like 2."""
    value = max(ratio, 1 / ratio)
    decimals = 2 if value < 1.095 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}×"


def factor_span(low: float, high: float) -> str:
    """Interval of a ratio, with a decimal more than the ratio itself."""
    decimals = 2 if high < 9.995 else 1 if high < 999.5 else 0
    return f"{low:,.{decimals}f}× to {high:,.{decimals}f}×"


def ratio(value: float) -> str:
    """A ratio as a figure of a table: two decimals, and of small ones three digits."""
    return f"{value:.{_ratio_decimals(value)}f}"


def ratio_with_span(value: float, low: float, high: float) -> str:
    """The same with its interval."""
    return f"{ratio(value)} {span(low, high, _ratio_decimals(value))}"


def times(ratio: float | None, more: str, less: str, same: str) -> str:
    """A ratio in words that never go below one: 0.5 of 'faster' is '2.0× slower'."""
    if ratio is None:
        return MISSING
    words = factor(ratio)
    return same if words == "1.00×" else f"{words} {more if ratio > 1 else less}"


def signed_span(low: float, high: float) -> str:
    """Interval of a difference."""
    return f"{signed(low)} to {signed(high)}"


def signed_scaled(words: Callable[[float], str], value: float) -> str:
    """A change of something that `words` prints only without a sign, such as a size."""
    told = words(abs(value))
    if told == words(0):
        return told
    return ("+" if value > 0 else "−") + told


def short(name: str, length: int) -> str:
    """A name of at most `length` characters, cut where it is longer."""
    return name if len(name) <= length else name[: length - 1] + "…"


def share(part: float, whole: float) -> str:
    """Part of a whole in percent, without idle decimals."""
    if whole <= 0:
        return MISSING
    value = 100 * part / whole
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.1f} %"


def p_value(value: float) -> str:
    """A probability, of which tiny ones need no digits."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def change(points: float) -> str:
    """Change of accuracy in words."""
    text = f"{abs(points):.2f}"
    if float(text) == 0:
        return "no points lost"
    return f"{text} points {'gained' if points > 0 else 'lost'}"


def _ratio_decimals(value: float) -> int:
    return max(2, decimals_of(value))


def _scaled(value: int, units: tuple[str, ...]) -> str:
    """A whole number to three digits with a decimal unit; the first unit is for numbers below 1000."""
    if value < 1000:
        return f"{value} {units[0]}".strip()
    step, scaled = 1, value / 1000
    while scaled >= 999.5 and step < len(units) - 1:  # from 999.5 on it would be printed as 1000
        step, scaled = step + 1, scaled / 1000
    decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:,.{decimals}f} {units[step]}"
