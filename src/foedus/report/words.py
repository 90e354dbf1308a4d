"""How figures are spelled: sizes, times, counts, hashes. Figures of a comparison are in `compare.py`."""

from __future__ import annotations

import math

ALGORITHMS = {
    "fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD", "alignment": "alignment by MMD",
    "reversal": "gradient reversal (DANN)", "udalm": "UDALM", "knn-adapter": "kNN-Adapter", "fedlap": "FedLAP-DP",
    "alone": "every silo for itself",
}  # fmt: skip


def bytes_text(count: float) -> str:
    """Bytes in decimal units: 812 B, 1.23 MB.

    >>> bytes_text(1_234_567), bytes_text(812)
    ('1.23\\xa0MB', '812\\xa0B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}\u00a0{unit}"
    return f"{count:.0f}\u00a0B"


def seconds_text(seconds: float) -> str:
    """A time: 42 ms, 3.1 s, 4 min 12 s, 2 h 5 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}\u00a0ms" if seconds >= 0.0005 or seconds == 0 else "< 1\u00a0ms"
    if seconds < 99.95:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest}\u00a0s" if rest else f"{minutes}\u00a0min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes}\u00a0min" if minutes else f"{hours}\u00a0h"


def thousands(count: float) -> str:
    """A count with thin spaces between thousands: 81 234."""
    return f"{count:,.0f}".replace(",", "\u2009")


def parameters_text(count: float) -> str:
    """A number of parameters: 812, 4 900, 2.44 million, 1.54 billion."""
    for word, size in (("billion", 1e9), ("million", 1e6)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}\u00a0{word}"
    return thousands(count)


def printable(text: str) -> str:
    """Text on one line, without characters that a drawing cannot hold."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))


def shorten(name: str, most: int) -> str:
    """A name on one line, cut in the middle when it is longer than `most` characters."""
    name = printable(name)
    if len(name) <= most:
        return name
    tail = most // 3
    return f"{name[: most - tail - 1]}…{name[-tail:]}"
