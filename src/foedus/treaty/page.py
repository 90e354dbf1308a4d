"""docs/validity.md, from the table: `python -m foedus.treaty.page > docs/validity.md`."""

from __future__ import annotations

from textwrap import fill

from .combinations import COMBINATIONS, Combination
from .features import FEATURES

_TITLE = "# Which combinations are valid"
_HEAD = (
    "Written by `python -m foedus.treaty.page > docs/validity.md` from `src/foedus/treaty/combinations.py`; edit it"
    " there. `foedus check` decides every combination that a treaty asks for before anything runs; `--with NAME` adds a"
    " feature to the question, whether treaties can ask for it or not. Of {all} combinations {accept} are accepted,"
    " {conditional} are accepted under a condition, and {refuse} are refused: put together, the parts would not do what"
    " each of them promises. Treaties can ask for those words, at the end, that name a key."
)


def page() -> str:
    """The page in Markdown."""
    verdicts = [row.verdict for row in COMBINATIONS]
    counts = {kind: verdicts.count(kind) for kind in ("accept", "conditional", "refuse")}
    head = _HEAD.format(all=len(verdicts), **counts)
    words = (f"- `{x.name}`: {x.about}" + (f" (`{x.key}`)" if x.key else "") for x in FEATURES.values())
    return "\n".join([_TITLE, "", _lines(head), "", *map(_paragraph, COMBINATIONS), "## Words", *words, ""])


def _paragraph(row: Combination) -> str:
    sentence = row.said[:1].upper() + row.said[1:]
    held = ", ".join(f"`{place}`" for place in row.held_by)
    tests = "".join(f"- `{test}`\n" for test in row.tests)
    return f"## {row.number}. {row.name}\n{_lines(sentence)}\n\nHeld by {held}.\n{tests}"


def _lines(text: str) -> str:
    return fill(text, 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(page(), end="")
