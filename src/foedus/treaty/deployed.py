"""What a treaty must say before organisations can carry it out, none of which sees another's data.

In one process, names of silos, labels and domains are found in the data. Between organisations they stand in the
treaty, or there is nowhere to find them; and what needs all data in one place cannot be had.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import TreatyError
from .core import Treaty
from .mistakes import problem, setting
from .rules import FOLDER_NAME

CENTRAL = ("local", "pooled")
"""Baselines that train on silos' data wherever the run is carried out."""


def roster(treaty: Treaty) -> tuple[str, ...]:
    """The silos by name, in the order in which they are summed; () where only the data will tell."""
    return treaty.silos.names


def domains(treaty: Treaty) -> tuple[str, ...] | None:
    """All domains that evaluation sums may name, in alphabetical order; None where only the data will tell."""
    return ("",) if treaty.data.domain is None else treaty.data.keep


def labels(treaty: Treaty) -> tuple[str, ...] | None:
    """All labels that there may be, in alphabetical order; None where only the data will tell."""
    return treaty.data.labels


def obstacles(treaty: Treaty) -> list[TreatyError]:
    """Everything that keeps a treaty from being carried out between organisations; [] when nothing does."""
    return list(_obstacles(treaty))


def _obstacles(treaty: Treaty) -> Iterator[TreatyError]:
    names = roster(treaty)
    if not names:
        do = f"Add {setting('silos.names')} (for example) under [silos]: each by the name under which it was admitted."
        yield problem("silos.names", "the names of the silos", "none", do)
    for odd in (name for name in names if not FOLDER_NAME.fullmatch(name)):
        do = 'Use letters, digits, "_", "-" and ".", the last two not at the start, 80 at most.'
        yield problem("silos.names", "names of silos that are fit for folders", f'"{odd}"', do)
    if central := [name for name in treaty.evaluation.baselines if name in CENTRAL]:
        do = 'Keep "base": the others train on data that no single party has.'
        yield problem("evaluation.baselines", "baselines that need no silo's data", ", ".join(central), do)
    if treaty.performance.keep_states is not None:
        do = "Leave it out: what is kept of each text would have to lie beside the coordinator too."
        yield problem("performance.keep_states", "no kept states", f'"{treaty.performance.keep_states}"', do)
    if _learns_labels(treaty) and labels(treaty) is None:
        do = f"Add {setting('data.labels')} (for example) under [data]."
        yield problem("data.labels", "all labels, which no party can find alone", "none", do)
    if treaty.secure.sums != "open" and domains(treaty) is None:
        do = f"Add {setting('data.keep')} (for example) under [data]: a secure sum has one place for each domain."
        yield problem("data.keep", "all domains, which no party can find alone", "none", do)


def _learns_labels(treaty: Treaty) -> bool:
    learned = treaty.headed or treaty.topics.denoise > 0
    return treaty.model.task == "sequence-classification" or (learned and treaty.data.label is not None)
