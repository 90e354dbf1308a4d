"""The benchmarks' rows, helpers and small selves. How fast anything is, is no matter here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from benchmarks import __main__ as everything
from benchmarks import federation, flower, flower_wire, masks, memory, overhead, secure, secure_round, table
from benchmarks.apart import apart, peak
from benchmarks.reddit_topics import BORDER, main
from benchmarks.table import Row, faster, more, share
from pyarrow import csv

from foedus.build import build
from foedus.errors import DataError
from foedus.secure import simulate
from foedus.treaty import parse

from .test_secure_run import secure as secure_treaty

KEYS = {"name", "ours", "peer", "ratio", "target", "unit", "hardware"}


def test_less_time_more_rate_and_a_smaller_share_keep_their_targets():
    assert faster("a", 1.0, 3.0, "s", 2.5).ratio == 3.0 and faster("a", 1.0, 3.0, "s", 2.5).kept
    assert more("a", 50.0, 5.0, "1/s", 10.0).kept and not more("a", 49.0, 5.0, "1/s", 10.0).kept
    assert share("a", 1.1, 1.0, "GiB", 1.15).kept and not share("a", 1.2, 1.0, "GiB", 1.15).kept


def test_a_row_without_a_target_or_a_peer_is_neither_kept_nor_broken():
    assert faster("a", 1.0, 2.0, "s").kept is None
    row = faster("a", 1.0, None, "s", 2.0)
    assert row.kept is None and row.peer is None and "not installed" in row.name


def test_rows_are_written_with_the_keys_that_readers_expect_and_without_nan(tmp_path):
    step = {key: None for key in KEYS} | {"name": "b", "ours": 1.0, "unit": "s", "hardware": "h"}
    path = table.save("x", [faster("a", math.nan, 2.0, "s"), step], tmp_path / "results")
    first, second = json.loads(path.read_text())
    assert set(first) >= KEYS and set(second) >= KEYS
    assert first["ours"] is None and second["name"] == "b"


def test_a_table_shows_every_row(capsys):
    table.show([share("a share", 1.0, 100.0, "s", 0.02), Row("alone", 1.0, None, None, None, "s", "here")])
    printed = capsys.readouterr().out
    assert "a share" in printed and "≤ 0.02" in printed and "yes" in printed and "alone" in printed


def test_a_benchmark_that_fails_leaves_the_others_their_rows(tmp_path, monkeypatch, capsys):
    def run(name):
        if name == "memory":
            raise RuntimeError("no memory")
        return [share(name, 1.0, 100.0, "s", 0.02)]

    monkeypatch.setattr(everything, "run", run)
    monkeypatch.setattr(everything, "save", lambda name, rows: None)
    assert everything.main(["memory", "federation"]) == 1
    printed = capsys.readouterr()
    assert "memory failed: no memory" in printed.err and "yes" in printed.out


def test_a_process_of_its_own_answers_and_says_why_it_failed():
    assert apart(overhead.shapes_of, 1000) == [(100,)] * 10
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        apart(share, "a", 1.0, 0.0, "s")


def test_the_peak_counts_what_was_held():
    held = np.ones(2**23)
    assert peak() > held.nbytes


def test_the_engine_without_training_leaves_the_parameters_where_they_were():
    ours = overhead.Ours(overhead.shapes_of(1000), clients=3)
    assert len(ours.run(2)) == 2 and ours.state.round == 2
    assert all((x == 0).all() for x in ours.state.params.values())


def test_flowers_batches_are_the_rows_that_ours_trains_on_all_of_one_length(tmp_path):
    flower.make_model(tmp_path / "model", hidden=16)
    place = flower.workplace(tmp_path / "model", rounds=2, clients=2, together=2)
    found = flower.batches(place, 2)
    assert found.shape == (2, 2, flower.STEPS, flower.BATCH, flower.LENGTH)
    assert {tuple(x) for x in found[0, 1].reshape(-1, flower.LENGTH)} == {
        tuple(x) for x in place.silos["client-001"].splits["train"].inputs.values.reshape(-1, flower.LENGTH)
    }
    assert place.together == 2 and place.bench.precision == "fp32"


def test_flowers_table_compares_updates_a_second_and_the_losses():
    mine = {"first": 1.0, "rounds": [1.0, 1.0], "losses": [3.0, 2.0], "arrays": {"a": np.ones(4)}}
    theirs = {"first": 30.0, "rounds": [20.0, 40.0], "losses": [3.0, 2.0], "arrays": {"a": np.ones(4)}}
    rows = flower.table([mine], [theirs], clients=100)
    assert (rows[0].ours, round(rows[0].peer, 3), rows[0].kept) == (100.0, 3.333, True)
    assert rows[-1].ratio == 0.0 and rows[-2].ratio == 0.0
    assert len(flower.table([mine], [], clients=100)) == 4


@pytest.mark.parametrize(
    "text",
    [
        federation.TREATY.format(rounds=2, steps=1),
        memory.TREATY.format(silos=3, examples=5),
        secure_round.TREATY.format(base=secure_round.MODEL, steps=1, batch=1),
        *(flower_wire.treaty(sums, 4, 2).resolved() for sums in flower_wire.SUMS),
    ],
)
def test_the_treaties_of_the_benchmarks_are_sound(text):
    assert parse(text).algorithm.rounds == 2


def test_small_secure_sums_give_every_row_and_each_sum_is_exact(monkeypatch):
    for module in (masks, secure):
        monkeypatch.setattr(module, "installed", lambda name: False)
    size = secure.Size(silos=12, words=300, turns=1)
    rows = [*masks.rows({100: 1}, 3), *secure.silo_rows(size), *secure.server_rows(size)]
    assert len(rows) == 4 + 2 * 3 + 4 and all(row.ours > 0 for row in rows)
    assert sum("not installed" in row.name for row in rows) == 2 + 2 + 1


def test_many_simulated_silos_sum_exactly_whoever_of_them_vanishes():
    assert secure.many(36, 36, 10)[1] == 0
    steps = [secure.vanishes(name) for name in simulate.names(10_000)]
    assert 400 < sum(map(bool, steps)) < 600 and set(steps) == {"", *simulate.GONE}


def test_a_million_parameters_in_16_bits_take_two_bytes_each_and_little_more(monkeypatch):
    monkeypatch.setattr(secure_round, "installed", lambda name: False)
    small, large = (secure_round.steady_bytes(6, size) for size in (1000, 3000))
    assert large - small == 2 * 2000 and small < 2000 + 4000


def test_secure_and_open_rounds_are_those_of_one_workplace(tmp_path):
    place = build(secure_treaty(tmp_path))
    plain = secure_round.in_the_open(place)
    runs = [secure_round.Rounds(place, rules) for rules in (place.federation, plain)]
    for run in runs:
        training, rest = run.one()
        assert training > 0 and rest > 0 and run.state.round == 1
    assert runs[0].rules.stages.hides and not runs[1].rules.stages.hides
    assert all(np.allclose(x, runs[1].state.params[name], atol=1e-3) for name, x in runs[0].state.params.items())


def test_rounds_over_tls_that_train_nothing_carry_whole_tasks_and_updates(tmp_path):
    scale, size = flower_wire.Scale(), 8192 * 4  # of an adapter of rank 8
    with flower_wire.federated(tmp_path, 8, 3, scale) as one_round:
        assert list(one_round) == list(flower_wire.SUMS)
        for step in one_round.values():
            assert scale.of(step) > 6 * size
            event = step()
            assert event.round == 2 and len(event.row["silos"]) == 3 and not event.row["failures"]


def test_comments_get_the_topic_of_their_subreddit_and_are_parted_by_a_day(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    day = int(BORDER.timestamp())
    rows = ((-1, "books", "one,\ntwo"), (0, "news", "three"), (9, "cooking", "four"), (9, "gaming", "five"))
    lines = [f'"{text}",{day + after},{subreddit}' for after, subreddit, text in rows]
    Path("comments.csv").write_text("\n".join(["text,created_utc,subreddit", *lines]) + "\n")
    main(Path("comments.csv"))
    early, late = (_columns(Path(f"runs/data/{name}.csv")) for name in ("reddit", "reddit-test"))
    assert early["text"] == ["one,\ntwo"] and early["topic"] == ["culture"]
    assert late["text"] == ["three", "five"] and late["topic"] == ["world", "play"]
    Path("other.csv").write_text("body,subreddit\none,books\n")
    with pytest.raises(DataError, match="created_utc"):
        main(Path("other.csv"))


def _columns(file):
    return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True)).to_pydict()
