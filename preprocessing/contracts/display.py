"""What people read: strangers' text (captions, URLs, hosts) made fit for the eye, and numbers.

Escaping is the template engine's business.
"""

import unicodedata
from typing import Final

MAX_CHARS: Final = 300


def display_text(text: str, max_chars: int = MAX_CHARS) -> str:
    """A stranger's text, for the eye only: one line, without control and direction characters, cut to a length."""
    composed = unicodedata.normalize("NFC", text[: 16 * max_chars])  # what is cut off anyway costs nothing
    visible = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in composed)
    visible = "".join(c for c in visible if not unicodedata.category(c).startswith("C"))
    line = " ".join(visible.split())
    is_whole = len(line) <= max_chars and len(text) <= 16 * max_chars
    return line if is_whole else f"{line[: max_chars - 1]}…"


def number_text(value: float) -> str:
    """``12,345`` or ``0.0312``: whole numbers whole, others with three digits that count, down to 0.0001."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return "< 0.0001" if value > 0 else "> −0.0001"
    return f"{value:.3g}"


def bytes_text(num_bytes: float) -> str:
    """``1.4 MB``: decimal, three digits that count."""
    if num_bytes < 999.5:
        return f"{num_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
    return f"{num_bytes / 1000:,.3g} TB"


def share_text(part: float, whole: float) -> str:
    """``12.3 %``; a share that is not nothing is not shown as 0 %, nor one that is not all as 100 %."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"
