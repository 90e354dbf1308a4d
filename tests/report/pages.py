"""Reading a page the way the tests need it: is it well formed, and what do its tables and sections say."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
LOADS = {"src", "srcset", "poster", "data", "action", "formaction", "background"}


@dataclass
class Element:
    """A tag with its attributes, the tags inside it, and all the text inside it."""

    tag: str
    attributes: dict[str, str]
    inside: list[Element] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Every element inside with this tag and these attributes (`class_="big"` for one class among several)."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        here = [child for child in self.inside if child.tag == tag and child.fits(wanted)]
        return here + [found for child in self.inside for found in child.all(tag, **attributes)]

    def fits(self, wanted: dict[str, str]) -> bool:
        return all(value in self.attributes.get(name, "").split() for name, value in wanted.items())

    def section(self, name: str) -> Element:
        return next(section for section in self.all("section") if section.attributes.get("id") == name)


class Page(HTMLParser):
    """A parsed page; `faults` lists what is not well formed, not labelled, or would be loaded from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root", {})
        self.open = [self.root]
        self.faults: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.feed(html)
        self.close()
        self.faults += [f"<{element.tag}> is never closed" for element in self.open[1:]]
        self.faults += [f"id {name!r} occurs twice" for name in set(self.ids) if self.ids.count(name) > 1]
        self.faults += [f"#{name} leads nowhere" for name in self.refers if name not in self.ids]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._add(tag, attributes)
        if tag in VOID:
            self.open.pop()

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._add(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if len(self.open) > 1 and self.open[-1].tag == tag:
            self.open.pop()
        else:
            self.faults.append(f"</{tag}> closes <{self.open[-1].tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.words.append(data)

    def _add(self, tag: str, pairs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in pairs}
        if len(attributes) != len(pairs):
            self.faults.append(f"<{tag}> has an attribute twice at {self.getpos()}")
        element = Element(tag, attributes)
        self.open[-1].inside.append(element)
        self.open.append(element)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self._check(tag, attributes)

    def _check(self, tag: str, attributes: dict[str, str]) -> None:
        target = attributes.get("href", "")
        if target.startswith("#"):
            self.refers.append(target[1:])
        elif (tag, target) == ("a", "audit.html"):
            pass  # the one page beside this one, in the same folder
        elif target or LOADS & attributes.keys() or tag in ("link", "iframe", "object", "embed"):
            self.faults.append(f"<{tag}> reaches outside the page: {attributes}")
        self.refers += attributes.get("aria-labelledby", "").split()
        if tag in ("svg", "img") and not (attributes.get("aria-label") or attributes.get("alt")):
            if attributes.get("aria-hidden") != "true":
                self.faults.append(f"<{tag}> has no label at {self.getpos()}")
        if any(name.startswith("on") for name in attributes):
            self.faults.append(f"<{tag}> carries a script at {self.getpos()}")


def rows(table: Element) -> dict[str, list[Element]]:
    """The body of a table: the first cell's text → its other cells."""
    lines = [row for body in table.all("tbody") for row in body.all("tr")]
    return {line.inside[0].text.strip(): line.inside[1:] for line in lines}


def values(cells: list[Element]) -> list[float]:
    """The exact values behind the cells."""
    return [float(cell.attributes["data-value"]) for cell in cells]
