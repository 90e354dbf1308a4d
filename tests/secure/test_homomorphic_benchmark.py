"""The benchmarks of encrypted sums in small: that they measure something, and that their attack works. No speeds."""

from __future__ import annotations

import numpy as np
from benchmarks import homomorphic, selective

from foedus.audit.defences import gradients
from foedus.audit.inversion import encode
from foedus.secure.selective import select, sensitivity


def test_every_way_to_sum_has_its_speeds_and_bytes_beside_tenseals():
    rows = homomorphic.rows(count=5000, peer_count=4096, turns=1)
    assert len(rows) == 29 and all(row.ours > 0 and row.peer > 0 for row in rows)
    sizes = {row.name: row for row in rows if row.unit == "B"}
    assert sizes["encrypted: CKKS, against TenSEAL, customary: bytes"].ratio > 2


def test_without_tenseal_its_rows_are_left_out(monkeypatch):
    monkeypatch.setattr(homomorphic, "installed", lambda *names: False)
    rows = homomorphic.rows(count=5000, turns=1)
    assert sum("not installed" in row.name for row in rows) == 18


def test_the_more_is_encrypted_the_more_bytes_are_sent():
    sizes = [cost.size for cost in selective.costs((0.0, 0.5, 1.0), count=20_000, turns=1)]
    assert sizes[0] == 4.0 and sizes == sorted(sizes)


def test_a_matrix_of_low_rank_is_found_though_a_fifth_of_it_is_hidden():
    rng = np.random.default_rng(0)
    x, known = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 30)), rng.random((30, 30)) > 0.2
    assert np.abs(selective._completed(x, known, 3) - x).max() < 1e-3


def test_a_tenth_encrypted_hides_nothing_of_a_text_and_all_of_it_hides_everything(monkeypatch):
    monkeypatch.setattr(selective, "SWEEPS", 2)
    bench = selective._bench(*selective.MODELS["llama, LoRA rank 32"])
    params, texts = bench.start(), encode(bench, selective.PRIVATE[1:2])
    (gradient,) = gradients(bench, params, texts, [0])
    sizes, truth = selective._flat(sensitivity([gradient])), tuple(map(int, texts.inputs[0][:-1]))
    for share, found in ((0.1, (True, 1.0)), (1.0, (False, 0.0))):
        known = selective._shaped(~select(sizes, share).chosen, gradient)
        assert selective._attacked(bench, params, gradient, known, truth) == found
