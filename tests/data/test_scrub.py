"""Scrubbing: what is found in posts as people type them and as archives keep them, counted, once and for all."""

import doctest

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus.data import scrub as room
from foedus.data.scrub import KINDS, scrub, scrub_table
from foedus.errors import DataError

QUICK = settings(max_examples=200, deadline=None, derandomize=True)

TYPED = {
    "Write to j.smith+news@cs.mit.edu today": "Write to [email] today",
    "Mail <mathew@mantis.co.uk> for it": "Mail [email] for it",
    "See http://www.example.com/a?b=1, please": "See [url], please",
    "It is on www.example.org/x.": "It is on [url].",
    "ftp to 128.2.254.155 now": "ftp to [ip] now",
    "as 2001:0db8:85a3:0000:0000:8a2e:0370:7334 says": "as [ip] says",
    "call (415) 555-2671 or +1 415-555-2671": "call [phone] or [phone]",
    "thanks @some_user and /u/other-one": "thanks [handle] and [handle]",
    "at 123 Main Street, Springfield, IL 62704": "at [address]",
    "P.O. Box 740, Madison, WI 53701": "[address], [address]",
    "so said Gordon Banks of it": "so said [name] of it",
    "I asked Jennifer about it": "I asked [name] about it",
    "ask Dr. Kowalczyk": "ask Dr. [name]",
    "In article <C5x@pitt.edu> geb@cs.pitt.edu (Gordon Banks) writes:\n>so it is\nno": "[quote]\n>so it is\nno",
    "On Mon, 5 Apr 1993, Tom Baker wrote:\n> yes": "[quote]\n> yes",
    "I agree.\n-- \nJohn Doe | 555 1234\njd@x.org\n": "I agree.\n[signature]",
    "From: guykuo@u.washington.edu (Guy Kuo)\nhello": "[quote]\nhello",
}
ARCHIVED = {
    "re homeopathy in article nlsun oracle nl rgasch nl oracle com robert gasch writes in many countries": (
        "re homeopathy [quote] in many countries"
    ),
    "thanks in advance freddie eaton llcoolj athena mit edu": "thanks in advance [name] [email]",
    "it is at ftp cs wisc edu for all": "it is at ftp [email] for all",
    "send it to ffrf p o box madison wi telephone": "send it to ffrf [address]",
}
UNTOUCHED = [
    "I will mark the grant on May 5, 1993 at 10:30; it costs $1,200.50 or 3.14 each.",
    "The church in Austin, the state of Virginia, and the Will of the king.",
    "i m getting a car i need opinions good luck",
    "i will mark may the rose and the grace of god in the article that he writes",
    "version 1.2.3 of 5 files, ratio 16:9",
    "",
]


@pytest.mark.parametrize("text", TYPED | ARCHIVED)
def test_what_points_at_a_person_becomes_a_mark(text):
    assert scrub(text)[0] == (TYPED | ARCHIVED)[text]


@pytest.mark.parametrize("text", UNTOUCHED)
def test_what_points_at_nobody_stays(text):
    assert scrub(text) == (text, {})


def test_every_replacement_is_counted_by_its_kind():
    _, found = scrub("Mail a@b.org or c@d.org, see http://x.org/, ask Jennifer.")
    assert found == {"email": 2, "url": 1, "name": 1}


@pytest.mark.parametrize(("what", "left"), [
    (("urls",), "see [url], a@b.org, Jennifer"), (("addresses",), "see http://x.org/y, [email], Jennifer"),
    (("names",), "see http://x.org/y, a@b.org, [name]"), ((), "see http://x.org/y, a@b.org, Jennifer"),
])  # fmt: skip
def test_only_what_was_asked_for_is_scrubbed(what, left):
    assert scrub("see http://x.org/y, a@b.org, Jennifer", what)[0] == left


def test_the_authors_own_names_are_names_however_rare_and_however_they_are_spelled():
    assert scrub("Best, Xyzzar QUUXBY, of Xyzzar Ltd", author="Xyzzar Quuxby")[0] == "Best, [name], of [name] Ltd"
    assert scrub("a will of my own", author="Will Own")[0] == "a will of my [name]"


words = st.sampled_from(
    ["John", "Smith", "john", "smith", "a@b.org", "http://x.org/y", "555-867-5309", "@you", "[name]", "[email]", "edu",
     "in", "article", "writes", "In article <x>", "wrote:", "\n", "-- \n", "the", "cs", "mit", "p o box",
     "12 High Street",
     ":", ">", "[", "]", "1.2.3.4", "Mr.", "::1", "P.O. Box 12"]
)  # fmt: skip
posts = st.lists(words | st.text(max_size=6), max_size=20).map(" ".join)


@QUICK
@given(posts, st.sampled_from(["", "John Smith", "the"]))
def test_scrubbing_twice_is_scrubbing_once(text, author):
    once, _ = scrub(text, author=author)
    assert scrub(once, author=author) == (once, {})


@QUICK
@given(posts)
def test_counts_are_the_marks_that_came_into_the_text(text):
    clean, found = scrub(text)
    assert not found or clean != text
    assert all(clean.count(f"[{kind}]") <= text.count(f"[{kind}]") + many for kind, many in found.items())


@QUICK
@given(st.lists(posts.filter(str.strip), min_size=1, max_size=6))
def test_no_text_of_a_table_is_left_empty_and_every_one_that_goes_is_counted(texts):
    try:
        table, found = scrub_table(pa.table({"text": texts}))
    except DataError:
        return
    assert table.num_rows + found.get("dropped", 0) == len(texts)
    assert all(any(x.isalnum() for x in text) for text in table["text"].to_pylist())


def test_a_table_keeps_its_columns_and_loses_texts_of_marks_alone():
    table = pa.table({"text": ["a@b.org", "so says Jennifer"], "label": ["x", "y"], "author": ["me", "you"]})
    clean, found = scrub_table(table)
    assert clean.to_pylist() == [{"text": "so says [name]", "label": "y", "author": "you"}]
    assert found == {"dropped": 1, "email": 1, "name": 1}


def test_nothing_asked_is_nothing_done():
    table = pa.table({"text": ["a@b.org"]})
    assert scrub_table(table, ()) == (table, {})


def test_a_table_of_marks_alone_is_refused():
    with pytest.raises(DataError, match="more in it"):
        scrub_table(pa.table({"text": ["a@b.org"]}))


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(DataError, match="urls"):
        scrub("x", ("url",))


def test_what_the_docstring_shows_holds():
    assert doctest.testmod(room).attempted and not doctest.testmod(room).failed
    assert set(KINDS) == {"addresses", "names", "urls"}
