"""What points at a person, replaced by typed marks and counted: addresses, names, URLs.

    urls        [url]
    addresses   [email] [phone] [address] (postal) [ip] [handle]
    names       [quote] (the line that says who is quoted) [signature] [name]

A pattern never looks inside a mark, and the patterns are applied until none finds anything, so scrubbing twice is
scrubbing once. Two kinds of text are known: as people type, and as archives keep it, in lower case without punctuation,
where "In article <x@y.edu> Gordon Banks writes:" is "in article x y edu gordon banks writes". First and last names are
those of the US census of 1990 (the distribution `names`), and the post's own author's.

This is no anonymisation. Rare names, nicknames and whatever else tells who wrote remain; a guarantee is what [privacy]
gives.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from importlib import resources

import pyarrow as pa

from ..errors import DataError, one_of

KINDS = ("addresses", "names", "urls")
DROPPED = "dropped"
"""Under which name a count tells how many texts had nothing left and were left out."""
_MARK = re.compile(r"\[(?:url|email|phone|address|ip|handle|quote|signature|name)\]")
_BARE = re.compile(r"[^a-z\s]")


def scrub(text: str, what: Sequence[str] = KINDS, author: str = "") -> tuple[str, Counter[str]]:
    """The text with marks for what was found, and how often each kind was. `author`: who wrote it, in words.

    `what`: of "addresses", "names", "urls". Idempotent: of its own text it finds nothing.

    >>> scrub("Call John Smith, 555-867-5309 or js@mit.edu.")[0]
    'Call [name], [phone] or [email].'
    """
    for kind in what:
        if kind not in KINDS:
            raise DataError("something that can be scrubbed", f'"{kind}"', one_of(kind, KINDS))
    clean, found = _scrubbed(text, tuple(what), author)
    return clean, Counter(found)


@lru_cache(1 << 16)  # a study reads the same posts again and again
def _scrubbed(text: str, what: tuple[str, ...], author: str) -> tuple[str, Counter[str]]:
    found: Counter[str] = Counter()
    while True:
        before, bare = text, not _BARE.search(_MARK.sub("", text))
        for mark, pattern, holds in _patterns(what, author, bare):
            text = _replaced(text, mark, pattern, holds, found)
        if text == before:
            return text, found


def scrub_table(table: pa.Table, what: Sequence[str] = KINDS) -> tuple[pa.Table, dict[str, int]]:
    """The table with every text (and target) scrubbed, and the counts over all of it by kind, in alphabetical order.

    A text of which only marks are left says nothing: it is left out and counted as "dropped". Names of the column
    `author`, where there is one, are names in the author's own texts. Raises `DataError` if no text is left.
    """
    if not what:
        return table, {}
    authors = table["author"].to_pylist() if "author" in table.column_names else [""] * table.num_rows
    found: Counter[str] = Counter()
    for name in ("text", "target"):
        if name in table.column_names:
            clean = []
            for text, author in zip(table[name].to_pylist(), authors, strict=True):
                scrubbed, counts = scrub(text, what, author)
                clean.append(scrubbed)
                found += counts
            table = table.set_column(table.column_names.index(name), name, pa.array(clean, pa.string()))
    said = [bool(re.search(r"\w", _MARK.sub("", text))) for text in table["text"].to_pylist()]
    if not any(said):
        raise DataError("a text with more in it than addresses and names", "none", "Scrub less, or check the source.")
    found += Counter({DROPPED: said.count(False)})
    return table.filter(pa.array(said)), dict(sorted(found.items()))


Holds = Callable[[re.Match[str]], bool]
Rule = tuple[str, re.Pattern[str], Holds]


def _replaced(text: str, mark: str, pattern: re.Pattern[str], holds: Holds, found: Counter[str]) -> str:
    """The text with a mark for each match between its marks that `holds`."""
    pieces, end = [], 0
    for seen in _MARK.finditer(text):
        pieces += [_marked(text[end : seen.start()], mark, pattern, holds, found), seen[0]]
        end = seen.end()
    return "".join([*pieces, _marked(text[end:], mark, pattern, holds, found)])


def _marked(piece: str, mark: str, pattern: re.Pattern[str], holds: Holds, found: Counter[str]) -> str:
    """The same for what lies between two marks. A match that does not hold hides none that begins inside it."""
    out, done, match = [], 0, pattern.search(piece)
    while match:
        if holds(match):
            out += [piece[done : match.start()], f"[{mark}]"]
            done = match.end()
            found[mark] += 1
            match = pattern.search(piece, done)
        else:
            match = pattern.search(piece, match.start() + 1)
    return "".join([*out, piece[done:]])


def _patterns(what: Sequence[str], author: str, bare: bool) -> Iterable[Rule]:
    """What to look for, in order: the line about who is quoted holds an address, and an address a name."""
    if "names" in what:
        yield from (_BARE_WRITERS if bare else _WRITERS)
    if "urls" in what:
        yield from _URLS
    if "addresses" in what:
        yield from (_BARE_ADDRESSES if bare else _ADDRESSES)
    if "names" in what:
        yield from _own_names(author)
        yield from (_bare_names() if bare else _NAMES)


def _always(_: re.Match[str]) -> bool:
    return True


def _own_names(author: str) -> Iterable[Rule]:
    """The author's, wherever they stand and however they are spelled."""
    own = [re.escape(word) for word in re.findall(r"[^\W\d_]{3,}", author) if word.casefold() not in _ORDINARY]
    if own:
        yield "name", re.compile(rf"(?<!\w)(?:{'|'.join(own)})(?:\s+(?:{'|'.join(own)}))*(?!\w)", re.I), _always


@cache
def _census(file: str) -> frozenset[str]:
    lines = resources.files("names").joinpath(file).read_text("ascii").splitlines()
    rows = [line.split() for line in lines if line.strip()]
    return frozenset(name.lower() for name, share, *_ in rows if float(share) >= _LEAST)


@cache
def _first() -> frozenset[str]:
    return (_census("dist.female.first") | _census("dist.male.first")) - _ORDINARY


@cache
def _last() -> frozenset[str]:
    return _census("dist.all.last") - _ORDINARY


def _is_name(match: re.Match[str]) -> bool:
    """A first name, or one that is also a word, before a last name."""
    words = [word.strip(".") for word in match[0].lower().split()]
    full = len(words) > 1
    return words[0] in _first() or (full and words[0] in _PERSONAL and words[-1] not in _ORDINARY)


@cache
def _bare_names() -> tuple[Rule, ...]:
    """In lower case a first name that is also a word counts only before a last name."""
    full = rf"\b{_any_of(_first() | _PERSONAL)}(?: [a-z])? (?P<last>[a-z]+)\b"
    alone = rf"\b{_any_of(name for name in _first() if len(name) > 2)}\b"
    return ("name", re.compile(full), _has_last_name), ("name", re.compile(alone), _always)


def _any_of(words: Iterable[str]) -> str:
    """A pattern of any of the words, letter by letter, so that a search looks at a few letters and not at all words."""
    tree: dict[str, dict] = {}
    for word in sorted(words):
        at = tree
        for letter in (*word, ""):
            at = at.setdefault(letter, {})

    def pattern(at: dict[str, dict]) -> str:
        longer = "|".join(re.escape(letter) + pattern(below) for letter, below in at.items() if letter)
        return f"(?:{longer})?" if longer and "" in at else f"(?:{longer})" if longer else ""

    return pattern(tree)


def _has_last_name(match: re.Match[str]) -> bool:
    return match["last"] in _last()


def _is_number(match: re.Match[str]) -> bool:
    return 7 <= sum(x.isdigit() for x in match[0]) <= 15


def _is_host(match: re.Match[str]) -> bool:
    return not set(match[0].split()[:-1]) & _FUNCTION


def _says_who(match: re.Match[str]) -> bool:
    return match[0].startswith("in article ") or bool(_HOST.search(match[0]))


_LEAST = 0.004  # percent of the population; 2,761 first names

_FUNCTION = frozenset(
    "a about after all also am an and any are as at be been but by can could did do does for from get had has"
    " have he her here him his how i if in into is it its just know like me more my new no not of on one only or"
    " other our out please post said say send she so some than that the their them then there these they this to"
    " try up us use used using via was we were what when where which who will with write writes wrote would you"
    " your email mail contact internet article reply thanks site ftp".split()
)
"""Words that no host is called by, and before which an address therefore ends."""

_PERSONAL = frozenset(
    "al andy art ben bill bob bobby bud cliff dale dan dean don drew ed frank gene glenn grant guy jack jay jimmy"
    " justin lance mark matt max mike neil nick pat pete ray rich rob rod rose sandy sue ted tim tom victor"
    " will".split()
)
"""First names that are also words, or short for first names."""

_ORDINARY = _FUNCTION | frozenset(
    "al alma angel april art asa asia august aura austin avery basil ben berry bill bird black bo bob booth brain"
    " brandy brook brown buck bud buddy bush buster candy carolina case chance charity chase chi china christian"
    " christen church clay cliff close cole cook cooper cross crystal dallas dawn day dean del denver destiny don"
    " dong drew dusty early ed east england era eve fair faith field fish florida flora ford forest france frank"
    " free gay geneva georgia german ginger good grace grant gray green guy hand hazel head heath heather high"
    " hill holland home hong hope house houston hung hunter india ina iran israel ivory jack jan jean jersey jewel"
    " jordan joy june junior justin king kitty lake lance land lane law lee les light long lord love ma major man"
    " manual march marina mark marvel may merry mi miles mill miller milan money moon morning mount nelson nice"
    " noble north nova numbers ok old olive ona ora page park part pearl penny person place point pope power"
    " precious price prince princess queen ray read rex rey rice rich right rock rod rose royal russian rusty"
    " sandy sang santa sea see shell short son song sonny soon star state sterling stone street strong sue summer"
    " sun sung sunny tad time valentine van vida virginia von walker wall war ward warner water well west white"
    " will window winter wise wood words world worth young".split()
)
"""Names that are as often words, places or months; they are names only beside others."""

_URLS: tuple[Rule, ...] = (
    ("url", re.compile(r"\b(?:https?|ftp|gopher|telnet|news)://[^\s<>\"\[\]]*[^\s<>\"\[\].,;:!?')]", re.I), _always),
    ("url", re.compile(r"\bwww\.[\w-]+(?:\.[\w-]+)+(?:/[^\s<>\"\[\]]*[^\s<>\"\[\].,;:!?')])?", re.I), _always),
)
_DOMAIN = r"[a-z0-9](?:[\w-]*[a-z0-9])?(?:\.[a-z0-9](?:[\w-]*[a-z0-9])?)*"
_STREET = r"(?i:street|st|avenue|ave|road|rd|drive|dr|lane|ln|boulevard|blvd|court|ct|place|pl|way|terrace|highway|hwy)"
_ADDRESSES: tuple[Rule, ...] = (
    ("email", re.compile(rf"<?\b[\w.+%!=-]*\w(?:@{_DOMAIN}| @ {_DOMAIN}\.[a-z]{{2,}})\b>?", re.I), _always),
    ("ip", re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)"), _always),
    ("ip", re.compile(r"(?<![\w:])(?:[0-9a-f]{1,4}:){3,7}(?::?[0-9a-f]{1,4})+(?![\w:])", re.I), _always),
    ("handle", re.compile(r"(?<![\w@/])(?:@\w{2,}|/?u/[\w-]{3,})", re.I), _always),
    ("phone", re.compile(r"(?<![\w.,$])(?:\+\d{1,3}[\s.-]?)?(?:\(\d{2,5}\)|\d{2,5})[\s./-]\s?\d{3,4}[\s.-]?\d{3,4}"
                         r"(?![\w-])"), _is_number),
    ("address", re.compile(rf"\b\d{{1,5}}(?:\s+[NSEW]\.?)?(?:\s+[A-Z][\w'-]*){{1,3}}\s+{_STREET}\b\.?"
                           r"(?:,?\s+(?:Apt|Suite|Ste|Unit|#)\.?\s*\w+)?"
                           r"(?:,?\s+[A-Z][\w'-]+(?:\s[A-Z][\w'-]+)?,?\s+[A-Z]{2}\.?\s+\d{5}(?:-\d{4})?)?"), _always),
    ("address", re.compile(r"\bP\.?\s?O\.?\s?Box\s+\d+\b", re.I), _always),
    ("address", re.compile(r"\b[A-Z][a-z]+(?:\s[A-Z][a-z]+)?,\s+[A-Z]{2}\s+\d{5}(?:-\d{4})?\b"), _always),
)  # fmt: skip
_TOP = r"(?:edu|com|gov|mil|uucp|bitnet|arpa)(?:\s(?:au|uk|ca))?"
_BARE_ADDRESSES: tuple[Rule, ...] = (
    ("email", re.compile(rf"\b(?:[a-z]+\s){{3}}{_TOP}\b"), _is_host),
    ("email", re.compile(rf"\b(?:[a-z]+\s){{2}}{_TOP}\b"), _is_host),
    ("email", re.compile(rf"\b[a-z]+\s{_TOP}\b"), _is_host),
    ("address", re.compile(r"\bp\s?o\sbox\b(?:\s[a-z]+){0,3}"), _always),
)
_SAID = r"(?:writes|wrote|said|says)"
_WRITERS: tuple[Rule, ...] = (
    ("quote", re.compile(r"^[ \t>|]*In (?:article|message|<)[^\n]*(?:\n[^\n]{0,80})?\b(?:writes?|wrote)\b[ \t]*:?",
                         re.I | re.M), _always),
    ("quote", re.compile(r"^[ \t>|]*On [^\n]{4,80}(?:\n[^\n]{0,80})?\bwrote[ \t]*:", re.M), _always),
    ("quote", re.compile(rf"^[ \t>|]*[^\n:]{{0,80}}[@<][^\n]{{0,80}}\b{_SAID}[ \t]*:", re.M), _always),
    ("quote", re.compile(r"^[ \t>|]*(?:From|Sender|Reply-To|Organization|Message-ID|NNTP-Posting-Host)[ \t]*:[^\n]+",
                         re.M), _always),
    ("signature", re.compile(r"^-- ?\n(?:[^\n]*\n?){1,8}\Z", re.M), _always),
)  # fmt: skip
_BARE_WRITERS: tuple[Rule, ...] = (
    ("quote", re.compile(r"\bin (?:article )?(?:[a-z]+ ){1,24}?(?:writes|wrote)\b"), _says_who),
    ("quote", re.compile(rf"\b(?:[a-z]+ ){{1,5}}{_TOP} (?:[a-z]+ ){{0,4}}(?:writes|wrote)\b"), _always),
)  # fmt: skip
_HOST = re.compile(rf"\b{_TOP}\b")
_NAMES: tuple[Rule, ...] = (
    ("name", re.compile(r"\b[A-Z][a-z]+(?:\s+[A-Z]\.?)*(?:\s+(?:van|von|de|der|la|Mc|O')?\s?[A-Z][\w'-]+){1,2}(?!\w)"),
     _is_name),
    ("name", re.compile(r"(?:(?<=\bMr\.\s)|(?<=\bMrs\.\s)|(?<=\bMs\.\s)|(?<=\bDr\.\s))[A-Z][\w'-]+"), _always),
    ("name", re.compile(r"\b[A-Z][a-z]{2,}\b"), _is_name),
)  # fmt: skip
