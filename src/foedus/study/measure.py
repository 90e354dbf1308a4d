"""The figures of one finished run: perplexity, domain accuracy, discrepancy of features, guarantee, cost, shift.

    measure(Path("runs/one"))["phases"]["federated"]["mmd"]["pairs"]["mmd2"]

Nothing here is protected: held-out texts of all silos are read in one place, as a study may and a federation may not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from ..algorithms.local import OWN
from ..build import Workplace, build
from ..data import Columns, read
from ..errors import RunError
from ..evaluation import figures
from ..evaluation.probe import FOLDS, a_distance, macro_accuracy, probe
from ..evaluation.shift import discrepancy, divergence, spread, unigrams, vocabulary
from ..execute import BASE, FEDERATED, LOCAL, POOLED, treaty_of
from ..governance import RunFolder
from ..kernels import bandwidths, mmd_unbiased, permutation_test
from ..lm.objectives import Encoded
from ..methods import ordinary
from ..privacy.statement import round_up
from ..seeds import derive, generator
from ..silo.evaluate import evaluate
from ..tree import part
from ..types import Params, Tree

LEVELS = {"low": 0.0, "moderate": 1 / 3, "high": 2 / 3, "extreme": 1.0}
"""k of each level of shift: which share of the text comes from far."""
TOPICS = "topics"
TOKENS = 2048  # in one pass
Sums = dict[str, Tree]


@dataclass(frozen=True)
class Absent:
    """A figure that a run does not have, and why."""

    why: str


@dataclass(frozen=True)
class Trained:
    """What a phase left: for each silo the parameters that judge its text, and its own memory."""

    name: str
    round: int
    params: Mapping[str, Params]
    memories: Mapping[str, Tree]


@dataclass(frozen=True)
class Look:
    """What a model shows of n documents, each by its first row. `features`: (n, p), of norm one. `said`, `true`: the
    topic's number, (n,), −1 where unknown; `said` is None without a topic head.
    """

    features: np.ndarray
    said: np.ndarray | None
    true: np.ndarray


@dataclass(frozen=True)
class Ruler:
    """What all phases of a run are measured with. `widths`: bandwidths. `far`: each silo's share of far texts."""

    place: Workplace
    run: RunFolder
    split: str
    samples: int
    permutations: int
    seed: int
    widths: tuple[float, ...]
    far: Mapping[str, Encoded]

    @property
    def near(self) -> dict[str, Encoded]:
        """The split of each silo that has text in it."""
        held = {name: silo.splits[self.split] for name, silo in self.place.silos.items()}
        return {name: data for name, data in held.items() if len(data)}

    @property
    def targets(self) -> tuple[str, ...]:
        """The silos whose labels nobody has."""
        return tuple(name for name in self.near if name in self.place.treaty.data.unlabelled)

    def random(self, *names: str) -> np.random.Generator:
        return generator(self.seed, "measure", *names)


def measure(
    folder: Path,
    place: Workplace | None = None,
    *,
    split: str = "test",
    samples: int = 1000,
    permutations: int = 500,
    far: Sequence[str] = (),
    public: str = "friends",
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of a finished run, as JSON has them; the same again for the same arguments.

    `place`: the run's treaty made ready; left out, it is built. `samples`: of each silo's documents, at most so many
    show their features. `far`: texts from elsewhere, for the curve over shift. `public`: a source of text that is
    nobody's secret, whose features under the base model fix the kernel's bandwidths.

    "phases": the figures of each, see `_phase`; "shift": of each level, see `_shift`; "guarantee" and "cost": of the
    federated phase.

    A figure that the run does not have is None, and "absent" says why, by its path. Raises `RunError` for a run that is
    not finished, or has no text in `split`.
    """
    run = RunFolder.open(folder)
    summary = run.read_json("summary.json")
    if summary is None:
        raise RunError("a finished run", "one without summary.json", f"Finish it with `foedus resume {folder}`.")
    place = place or build(treaty_of(run))
    widths = _widths(place, public, samples)
    ruler = Ruler(place, run, split, samples, permutations, seed, widths, _dealt(place, far))
    if not ruler.near:
        held = sorted({name for silo in place.silos.values() for name, data in silo.splits.items() if len(data)})
        raise RunError(f'a silo with text in "{split}"', "none", f"Measure on one of: {', '.join(held)}.")
    phases = _phases(ruler)
    trained = [x for x in phases.values() if isinstance(x, Trained)]
    sums = {x.name: _sums(ruler, x) for x in trained}
    found = {
        "treaty": {"name": summary["name"], "digest": summary["treaty"]["digest"], "seed": summary["seed"]},
        "measured": _measured(ruler, public),
        "guarantee": _guarantee(summary),
        "cost": _cost(summary),
        "phases": {name: x if isinstance(x, Absent) else _phase(ruler, x, sums[name]) for name, x in phases.items()},
        "shift": _shift(ruler, trained, sums, far),
    }
    absent: dict[str, str] = {}
    return {**_plain(found, "", absent), "absent": absent}


# What the run left


def _phases(ruler: Ruler) -> dict[str, Trained | Absent]:
    wished = ruler.place.treaty.evaluation.baselines
    out: dict[str, Trained | Absent] = {}
    if "base" in wished:
        out[BASE] = Trained(BASE, 0, dict.fromkeys(ruler.near, ruler.place.bench.start()), {})
    out[FEDERATED] = _together(ruler, FEDERATED)
    out[POOLED] = _together(ruler, POOLED) if "pooled" in wished else Absent("the treaty asks for no pooled baseline")
    out[LOCAL] = _alone(ruler) if "local" in wished else Absent("the treaty asks for no local baseline")
    return out


def _together(ruler: Ruler, phase: str) -> Trained | Absent:
    restored = ruler.run.restore(phase)
    if restored is None:
        return Absent("the run kept no checkpoint of it")
    state, memories = restored
    params = {name: part(memories.get(name, {}), OWN) or state.params for name in ruler.near}
    return Trained(phase, state.round, params, memories)


def _alone(ruler: Ruler) -> Trained | Absent:
    restored = {name: ruler.run.restore(quote(f"local:{name}", safe="")) for name in ruler.near}
    left = {name: found for name, found in restored.items() if found is not None}
    if len(left) < len(restored):
        return Absent(f"the run kept no checkpoint of {', '.join(sorted(restored.keys() - left.keys()))} alone")
    memories = {name: memories.get(name, {}) for name, (_, memories) in left.items()}
    round = max(state.round for state, _ in left.values())
    return Trained(LOCAL, round, {name: state.params for name, (state, _) in left.items()}, memories)


def _guarantee(summary: Mapping[str, Any]) -> dict[str, Any]:
    held = summary["privacy"]
    if held.get("epsilon") is None:
        none = Absent("no guarantee")
        return {"words": "no guarantee", "unit": held["unit"], "epsilon": none, "delta": none, "simulated": False}
    words = f"epsilon = {round_up(held['epsilon'])}, delta = {held['delta']:g}, unit: {held['unit']}"
    said = {name: held[name] for name in ("unit", "epsilon", "delta")}
    return {"words": words, **said, "simulated": bool(held.get("simulated_noise"))}


def _cost(summary: Mapping[str, Any]) -> dict[str, Any]:
    sent = {way: sum(map(sum, summary["bytes"][way].values())) for way in ("up", "down")}
    bytes = {way: count or Absent("who took part is kept secret") for way, count in sent.items()}
    return {"bytes": bytes, "rounds": summary["rounds"], "seconds": summary["seconds"]}


# A phase


def _phase(ruler: Ruler, trained: Trained, sums: Sums) -> dict[str, Any]:
    """What is said of each phase.

    "perplexity": micro, macro, by_silo, of sources and of target. "d1": macro accuracy of the topic head on all, on
    sources and on target. "d2": of a probe for the silo. "d3": of the next token. "mmd" and "spread": as
    `evaluation/shift.py` has them, of the features of each silo's documents under its own model.
    """
    looks = {name: _look(ruler, trained.params[name], data, name) for name, data in ruler.near.items()}
    features = {name: look.features for name, look in looks.items() if len(look.features) > 1}
    return {
        "round": trained.round,
        "perplexity": _perplexity(ruler, sums),
        "d1": _d1(ruler, looks),
        "d2": _d2(ruler, features),
        "d3": _d3(ruler, sums),
        "mmd": _mmd(ruler, trained.name, features),
        "spread": _spread(features),
    }


def _sums(ruler: Ruler, trained: Trained) -> Sums:
    """Each silo's sums on the split: those of the run's own last evaluation, or taken again where it has none."""
    noted = _noted(ruler, trained)
    return {name: noted.get(name) or _scored(ruler, trained, name, data) for name, data in ruler.near.items()}


def _noted(ruler: Ruler, trained: Trained) -> Sums:
    out: Sums = {}
    for row in ruler.run.metrics():
        here = trained.name in (row["phase"], LOCAL if row["phase"].startswith("local:") else "")
        if here and row["kind"] == "evaluation" and (row["round"], row["split"]) == (trained.round, ruler.split):
            for silo, domains in row["sums"].items():
                out[silo] = {(measure, d): np.array([x]) for d, sums in domains.items() for measure, x in sums.items()}
    return out


def _scored(ruler: Ruler, trained: Trained, name: str, data: Encoded) -> Tree:
    place, silo = ruler.place, ruler.place.silos[name]
    params, memory = trained.params[name], trained.memories.get(name, {})
    algorithm = place.federation.algorithm if trained.name in (BASE, FEDERATED) else ordinary(place.treaty, place.plan)
    bench = place.bench
    return evaluate(
        lambda batch: algorithm.scores(bench, params, silo, batch, memory), data, bench.objective,
        seed=place.treaty.seed, limit=place.treaty.evaluation.max_windows,
    )  # fmt: skip


def _perplexity(ruler: Ruler, sums: Sums) -> dict[str, Any]:
    found = figures(sums, labelled=ruler.place.labelled)["perplexity"]
    return {
        **{name: found[name] for name in ("micro", "macro", "by_silo")},
        "sources": _micro({name: x for name, x in sums.items() if name not in ruler.targets}, "every silo is a target"),
        "target": _micro({name: sums[name] for name in ruler.targets}, "no silo is unlabelled"),
    }


def _micro(sums: Sums, otherwise: str) -> float | Absent:
    return math.exp(_entropy(sums)) if sums else Absent(otherwise)


def _entropy(sums: Sums) -> float:
    """Σ nll / Σ targets, in nats; NaN without targets."""
    nll, targets = (
        sum(float(x[0]) for tree in sums.values() for key, x in tree.items() if key[0] == name)
        for name in ("nll", "targets")
    )
    return min(nll / targets, 700.0) if targets else math.nan


def _d1(ruler: Ruler, looks: Mapping[str, Look]) -> dict[str, Any] | Absent:
    if any(look.said is None for look in looks.values()):
        return Absent("the model has no topic head")
    whose = {"all": set(looks), "sources": set(looks) - set(ruler.targets), "target": set(ruler.targets)}
    found = {name: _recognised([looks[silo] for silo in looks if silo in silos]) for name, silos in whose.items()}
    return {**found, "chance": 1 / len(ruler.place.bench.objective.topics)}


def _recognised(looks: Sequence[Look]) -> float | Absent:
    said = [look.said for look in looks if look.said is not None]
    true = np.concatenate([look.true for look in looks]) if looks else np.empty(0)
    return macro_accuracy(np.concatenate(said), true) if (true >= 0).any() else Absent("no document has a known topic")


def _d2(ruler: Ruler, features: Mapping[str, np.ndarray]) -> dict[str, Any] | Absent:
    enough = {name: x for name, x in features.items() if len(x) >= FOLDS}
    if len(enough) < 2:
        return Absent(f"fewer than two silos have {FOLDS} documents")
    labels = np.repeat(np.arange(len(enough)), [len(x) for x in enough.values()])
    found = probe(np.concatenate(list(enough.values())), labels, derive(ruler.seed, "probe"))
    return {"accuracy": found.accuracy, "chance": found.chance, "a_distance": _a_distance(ruler, enough)}


def _a_distance(ruler: Ruler, features: Mapping[str, np.ndarray]) -> float | Absent:
    """Of sources and targets."""
    sources = [x for name, x in features.items() if name not in ruler.targets]
    targets = [x for name, x in features.items() if name in ruler.targets]
    if not sources or not targets:
        return Absent(f"no source and target of {FOLDS} documents")
    return a_distance(np.concatenate(sources), np.concatenate(targets), derive(ruler.seed, "a-distance"))


def _d3(ruler: Ruler, sums: Sums) -> float | Absent:
    if ruler.place.labelled:
        return Absent("targets are labels, not tokens")
    return figures(sums, labelled=False)["token_accuracy"]["macro"]


def _mmd(ruler: Ruler, phase: str, features: Mapping[str, np.ndarray]) -> dict[str, Any] | Absent:
    if len(features) < 2:
        return Absent("fewer than two silos have two documents")
    found = discrepancy(features, ruler.targets, ruler.widths, ruler.permutations, ruler.random("deals", phase))
    return {**found, "target": found["target"] or Absent("no source and target of two documents")}


def _spread(features: Mapping[str, np.ndarray]) -> dict[str, Any] | Absent:
    if len(features) < 2:
        return Absent("fewer than two silos have two documents")
    found = spread(features)
    same = Absent("most documents have the same features")
    return {**found, "own_scale": same if found["own_scale"] is None else found["own_scale"]}


# Features


def _look(ruler: Ruler, params: Params, data: Encoded, name: str) -> Look:
    rows = _first_rows(data, ruler.samples, ruler.random("documents", name))
    headed = ruler.place.treaty.headed
    return _seen(ruler.place, params, data, rows, headed)


def _first_rows(data: Encoded, most: int, random: np.random.Generator) -> np.ndarray:
    """The first row of each document, or of `most` of them at random, in order."""
    first = np.unique(data.documents, return_index=True)[1]
    return first if len(first) <= most else np.sort(random.choice(first, most, replace=False))


def _seen(place: Workplace, params: Params, data: Encoded, rows: np.ndarray, headed: bool = False) -> Look:
    """What the model shows of these rows; those of like length go through it together."""
    lengths = np.diff(data.inputs.bounds)[rows]
    order = left = np.argsort(-lengths, kind="stable")
    features, said = [], []
    place.bench.objective.ready(data, rows)
    while len(left):
        chosen, left = np.split(left, [max(1, TOKENS // int(lengths[left[0]]))])
        seen = place.bench.see(params, place.bench.objective.collate(data, rows[chosen], 0))
        x = seen.features().detach()
        features.append(x.cpu().numpy())
        if headed:
            said.append(seen.head(TOPICS, x).detach().argmax(1).cpu().numpy())
    back = np.argsort(order)
    return Look(np.concatenate(features)[back], np.concatenate(said)[back] if headed else None, data.topics[rows])


def _widths(place: Workplace, public: str, most: int) -> tuple[float, ...]:
    """Bandwidths of the first `most` documents of a public source, through the model as it was before training."""
    table = read(public, Columns(), base=place.treaty.folder or Path()).slice(0, most)
    data = _encoded(place, table)
    rows = np.unique(data.documents, return_index=True)[1]
    return bandwidths(_seen(place, place.bench.start(), data, rows).features)


def _encoded(place: Workplace, table: pa.Table) -> Encoded:
    """Text that has no topics of ours."""
    return replace(place.bench.objective, topics=()).encode(table.select(["text"]), place.base.tokenizer)


# Shift


def _dealt(place: Workplace, far: Sequence[str]) -> dict[str, Encoded]:
    """The far texts dealt to the silos in turn, so that each is judged once, by one silo's model."""
    shares = {name: list(far[i :: len(place.silos)]) for i, name in enumerate(place.silos)}
    found = {name: _encoded(place, pa.table({"text": texts})) for name, texts in shares.items() if texts}
    return {name: data for name, data in found.items() if len(data)}


def _shift(
    ruler: Ruler, phases: Sequence[Trained], sums: Mapping[str, Sums], far: Sequence[str]
) -> dict[str, Any] | Absent:
    """At each level P_k = (1 − k)·own + k·far, a mixture: cross-entropies mix as k does, and so do mean embeddings, so
    MMD²(P_0, P_k) = k²·MMD²(own, far). "perplexity": by phase. "jsd": of P_0 and P_k, of words, in bits. "mmd2": of the
    base model's features, and "p" of "own and far are alike".
    """
    if sum(map(len, ruler.far.values())) < 2:
        return Absent("no far text was given")
    own = [text for name in ruler.near for text in _texts(ruler, name)]
    words = vocabulary([*own, *far])
    near, away = unigrams(own, words), unigrams(far, words)
    apart, p = _apart(ruler)
    entropies = {x.name: (_entropy(sums[x.name]), _entropy(_far_sums(ruler, x))) for x in phases}
    return {
        level: {
            "k": k,
            "perplexity": {name: math.exp((1 - k) * a + k * b) for name, (a, b) in entropies.items()},
            "jsd": divergence(near, (1 - k) * near + k * away),
            "mmd2": k**2 * apart,
            "p": p,
        }
        for level, k in LEVELS.items()
    }


def _texts(ruler: Ruler, name: str) -> list[str]:
    return getattr(ruler.place.splits[name], ruler.split)["text"].to_pylist()


def _far_sums(ruler: Ruler, trained: Trained) -> Sums:
    return {name: _scored(ruler, trained, name, data) for name, data in ruler.far.items() if name in trained.params}


def _apart(ruler: Ruler) -> tuple[float, float]:
    """MMD² of the base model's features of own and far texts, and its p."""
    own, far = _base_features(ruler, "own", ruler.near), _base_features(ruler, "far", ruler.far)
    p = permutation_test(own, far, ruler.widths, ruler.permutations, ruler.random("own and far"))
    return mmd_unbiased(own, far, ruler.widths), p


def _base_features(ruler: Ruler, kind: str, parts: Mapping[str, Encoded]) -> np.ndarray:
    """Of about `samples` documents in all, as many of each part."""
    start, each = ruler.place.bench.start(), -(-ruler.samples // len(parts))
    rows = {name: _first_rows(data, each, ruler.random(kind, name)) for name, data in parts.items()}
    return np.concatenate([_seen(ruler.place, start, parts[name], x).features for name, x in rows.items()])


# As JSON


def _measured(ruler: Ruler, public: str) -> dict[str, Any]:
    documents = {name: len(np.unique(data.documents)) for name, data in ruler.near.items()}
    return {
        "split": ruler.split, "samples": ruler.samples, "permutations": ruler.permutations, "seed": ruler.seed,
        "public": public, "bandwidths": list(ruler.widths), "targets": list(ruler.targets), "documents": documents,
    }  # fmt: skip


def _plain(value: Any, path: str, absent: dict[str, str]) -> Any:
    """JSON without NaN; what is None is noted in `absent`."""
    if isinstance(value, Mapping):
        return {key: _plain(x, f"{path}.{key}".lstrip("."), absent) for key, x in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        value = Absent("nothing to judge by")
    if isinstance(value, Absent):
        absent[path] = value.why
        return None
    return value
