"""From a treaty to functions and values. The only reader of a treaty: nothing below this file sees one."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from . import methods
from .algorithms.base import Algorithm
from .data import (
    Columns,
    Partition,
    SplitPlan,
    Splits,
    bound_contributions,
    from_dataset,
    only,
    partition,
    read,
    split,
)  # fmt: skip
from .data.missing import Missing
from .data.partition import at_most
from .data.readers import ROLES
from .data.scrub import scrub_table
from .engines import InProcess
from .errors import DataError, GuaranteeError, ModelError, one_of
from .governance.circle import Circle, fresh_circle
from .lm.adapters import Adapter, Frozen, Full, LoRA, attach
from .lm.bench import Bench
from .lm.kept import keep
from .lm.load import Base, load_base
from .lm.objectives import Encoded, Objective, make_objective
from .lm.sensitivity import most_sensitive
from .loop import Federation
from .privacy.mechanisms import Unprotected
from .privacy.noise import SimulatedSource, SystemSource
from .privacy.plan import PrivacyPlan, Terms, facts, make_plan
from .seeds import derive
from .server import Adaptive, FixedSize, Poisson, Sampler, ServerOptimizer, Sgd, WeightedMean
from .server import Full as Everyone
from .silo import Handler, LocalPlan, Silo, Units
from .silo.handler import Custody
from .stages import Chain, Weigh, chain
from .sums import SecureSums, colluding, secure_sums
from .treaty import Mistakes, Treaty, obstacles, roster
from .treaty.deployed import domains
from .treaty.rules import LANGUAGE
from .treaty.schema import MEMORY
from .types import Key

PUBLIC_EXAMPLES = 64
"""How many public examples choose the modules to train."""


@dataclass(frozen=True)
class Workplace:
    """A treaty made ready to run in this process: the rules, the model, the silos that live here, and what answers for
    them. In a simulation all silos live here; in a federation one at most, and none at the coordinator's.
    """

    treaty: Treaty
    federation: Federation
    silos: Mapping[str, Silo]
    splits: Mapping[str, Splits]
    base: Base
    bench: Bench
    plan: LocalPlan
    parts: Mapping[Key, tuple[int, ...]]
    together: int
    seconds: float
    privacy: PrivacyPlan | None = None
    sums: SecureSums | None = None
    measures: Chain = Chain()

    def engine(
        self,
        silos: Mapping[str, Silo] | None = None,
        plan: LocalPlan | None = None,
        custody: Custody | None = None,
        rules: Federation | None = None,
    ) -> InProcess:
        """An engine for these silos (all of them) that train by this plan and under these rules (the treaty's)."""
        plan, rules = plan or self.plan, rules or self.federation
        secure = self.sums if rules.stages.hides else None
        handler = Handler(
            self.bench, replace(rules.algorithm, local=plan), rules.stages, self.base.digest,
            methods.disclosed(self.treaty),
            self.treaty.evaluation.max_windows, custody,
            self.measures if secure else Chain(), secure.membership if secure else None,
        )  # fmt: skip
        return InProcess(handler, silos or self.silos, plan, self.together)

    @property
    def labelled(self) -> bool:
        """Whether targets are labels, not tokens."""
        return self.base.task == "sequence-classification"

    @property
    def whole(self) -> bool:
        """Whether all silos live here."""
        return set(self.silos) == set(self.federation.silos)

    @property
    def final_split(self) -> str | None:
        """The split that the result is judged by: test, else validation, else none."""
        return next((split for split in ("test", "validation") if self.holders(split)), None)

    def holders(self, split: str) -> tuple[str, ...]:
        """The silos with something in a held-out split; of those that live elsewhere, all that the treaty gives one."""
        everywhere = getattr(self.treaty.split, split) > 0 or (split == "test" and self.treaty.data.test_source)
        return tuple(
            name for name in self.federation.silos
            if (len(self.silos[name].splits[split]) if name in self.silos else everywhere)
        )  # fmt: skip

    def agreed(self) -> dict[str, Any]:
        """What every party must have come to by itself, and alike, for its sums to mean anything; plain values."""
        return {
            "model": self.base.digest, "parts": sorted([*key, list(shape)] for key, shape in self.parts.items()),
            "privacy": facts(self.privacy) if self.privacy else None,
        }  # fmt: skip


def build(
    treaty: Treaty,
    data: Mapping[str, Any] | None = None,
    *,
    base: Base | None = None,
    circle: Circle | None = None,
    only: str | None = None,
) -> Workplace:
    """Loads the model and the data that a treaty names, and puts everything together.

    `data`: silo name → examples, where silos hand them over: a file's path, a `datasets.Dataset`, an Arrow table, a
    list of dicts, or `Splits`. Where the treaty names its silos, it may be of one of them, which is a silo's own place,
    or of none, which is the coordinator's. `base`: a base that is loaded already. `circle`: whose keys count in secure
    sums; left out, keys are drawn for all silos, as in a simulation. `only`: the one silo that this process serves; the
    others' data become no tokens.
    Raises `TreatyError`, `DataError`, `ModelError` or `AssetError`.
    """
    began = time.perf_counter()
    torch.set_num_threads(treaty.performance.threads or torch.get_num_threads())
    splits = silo_splits(treaty, data)
    names = (roster(treaty) if data is not None or not splits else ()) or tuple(splits)
    alone = len(splits) < len(names)
    if alone and (problems := obstacles(treaty)):
        raise Mistakes(problems)
    labels = _labels(treaty, splits) if treaty.model.task == "sequence-classification" else ()
    topics = methods.topics(treaty, splits)
    base = base or load_base(_model_name(treaty), treaty.model.task, labels=labels, layers=treaty.model.layers)
    if base.labels != labels:
        do = "Load the model with these labels, in this order, or relabel the data."
        raise ModelError(f"a classifier of the data's labels {labels}", f"one of {base.labels}", do)
    attach(base, _chosen(treaty, base) or adapter(treaty), treaty.seed)
    methods.put_heads(treaty, base, topics, names)
    base.model.to("cuda" if torch.cuda.is_available() else "cpu")
    objective = make_objective(treaty.model.task, treaty.model.max_length, labels, topics, treaty.model.windows)
    if treaty.performance.keep_states is not None:
        folder = (treaty.folder or Path()) / treaty.performance.keep_states
        objective = keep(base, objective, folder, treaty.adapter.blocks)
    here = [name for name in splits if only in (None, name)]
    silos = {name: _encode(name, splits[name], objective, base, treaty) for name in here}
    bench = Bench(base, objective, precision=treaty.performance.precision)
    privacy = privacy_plan(treaty, len(names))
    plan = replace(local_plan(treaty), goal=methods.goal(treaty, base))
    if privacy is not None:
        steps, survey = privacy.steps_at_silos(list(bench.start())), privacy.survey()
        plan = replace(plan, privacy=steps, survey=survey, rows=treaty.performance.microbatch)
    if plan.privacy is not None:
        bench.prove(plan.goal)
    else:
        _check_sizes(silos, plan)
    site = methods.Site(bench, names, lambda source, most: _public(treaty, source, most, objective, base))
    algorithm = methods.algorithm(treaty, plan, site)
    rules = federation(treaty, names, base.digest, plan, privacy, algorithm)
    parts = rules.algorithm.parts({name: x.shape for name, x in bench.start().items()})
    if privacy is not None:
        numbers = {part: sum(math.prod(s) for key, s in parts.items() if key[0] == part) for part, _ in parts}
        beside = sum(numbers.values()) - numbers.get("delta", 0)
        privacy.check_silos(sum(numbers.values()), treaty.privacy.accept_noise, beside)
    sums, measures = None, Chain()
    if treaty.secure.sums != "open":
        known = domains(treaty) if alone or treaty.data.keep else None
        evaluated = known or _domains(splits)
        sums = secure_sums(treaty, base.digest, circle or fresh_circle(names), privacy, parts, evaluated)
        rules, measures = replace(rules, stages=sums.stages, gather=sums.gather), sums.measures
    return Workplace(
        treaty=treaty,
        federation=rules,
        silos=silos,
        splits=splits,
        base=base,
        bench=bench,
        plan=plan,
        parts=parts,
        together=1 if only or alone else _together(treaty, bench, plan, len(silos)),
        seconds=time.perf_counter() - began,
        privacy=privacy,
        sums=sums,
        measures=measures,
    )


def federation(
    treaty: Treaty,
    silos: tuple[str, ...],
    model: str,
    plan: LocalPlan,
    privacy: PrivacyPlan | None = None,
    algorithm: Algorithm | None = None,
) -> Federation:
    """The rules of the loop, from a treaty; whatever bears on a guarantee comes from its plan. `algorithm`: left out,
    that of a baseline.
    """
    weigh = chain(Weigh(treaty.server.weighting, treaty.server.max_weight))
    return Federation(
        algorithm=algorithm or methods.ordinary(treaty, plan),
        stages=chain(*privacy.stages()) if privacy else weigh,
        aggregator=privacy.aggregator() if privacy else WeightedMean(),
        mechanism=privacy.mechanism() if privacy else Unprotected(),
        server_optimizer=_server_optimizer(treaty),
        sampler=(privacy and privacy.sampler()) or _sampler(treaty, len(silos)),
        silos=silos,
        model=model,
        rounds=treaty.algorithm.rounds,
        seed=treaty.seed,
        minimum=treaty.cohort.minimum,
    )


def planned(treaty: Treaty) -> PrivacyPlan:
    """The plan of a treaty that protects somebody, without its model; raises `GuaranteeError` for one that does not."""
    inside = treaty.privacy.unit in ("none", "example", "author")
    silos = 1 if inside else len(roster(treaty) or silo_splits(treaty))
    made = privacy_plan(treaty, silos)
    if made is None:
        raise GuaranteeError(
            "a treaty with a [privacy] section", "one without", 'Add unit = "example" and epsilon = 8.0.'
        )
    return made


def privacy_plan(treaty: Treaty, silos: int) -> PrivacyPlan | None:
    """Whose presence is protected and by how much noise; None where nobody's is."""
    terms = privacy_terms(treaty, silos)
    if terms is None:
        return None
    simulated = treaty.privacy.randomness == "simulated"
    return make_plan(terms, SimulatedSource(treaty.seed) if simulated else SystemSource())


def privacy_terms(treaty: Treaty, silos: int) -> Terms | None:
    """What a treaty asks for, in the numbers of a plan."""
    p, cohort = treaty.privacy, treaty.cohort
    if p.unit == "none":
        return None
    measure = {"epsilon": p.epsilon, "noise_multiplier": p.noise_multiplier, "noise_std": p.noise_std}
    common: dict[str, Any] = {
        **measure, "unit": p.unit, "delta": p.delta, "rounds": treaty.algorithm.rounds, "ratio": p.noise_ratio,
        "max_norm": None if p.max_norm == "none" else p.max_norm, "quantile": p.quantile, "bands": p.bands,
    }  # fmt: skip
    common |= _in_words(treaty, silos)
    if p.unit == "silo":
        return Terms(
            **common, rate=cohort.rate if p.hide_cohort and cohort.rate else 1.0, silos=silos, placement=p.placement,
            expected=silos * cohort.rate if cohort.rate else float(cohort.size or silos),
            minimum=cohort.minimum, discrete=p.noise == "discrete-gaussian",
        )  # fmt: skip
    assert treaty.local.steps is not None and p.rate is not None
    return Terms(
        **common, **_in_shares(treaty, silos), **methods.surveys(treaty), steps=treaty.local.steps, rate=p.rate,
        divisor=float(treaty.local.batch), rows=p.rows, clipping=p.clipping, shares=p.shares,
        group=(p.author_examples or 1) if p.sampling == "examples" else 1,
    )  # fmt: skip


def _in_words(treaty: Treaty, silos: int) -> dict[str, Any]:
    """Noise that is an integer, for secure sums: how much room it has, and whom its shares must be enough without."""
    if treaty.privacy.noise != "discrete-gaussian" or treaty.secure.sums == "open":
        return {}
    shared = treaty.privacy.placement == "shared"
    return {"word": treaty.secure.word, "parties": treaty.cohort.size or silos,
            "colluding": colluding(treaty, silos) if shared else 0}  # fmt: skip


def _in_shares(treaty: Treaty, silos: int) -> dict[str, Any]:
    """Where units inside silos are protected by shares of one noise for the whole federation."""
    if treaty.privacy.placement != "shared":
        return {}
    return {"placement": "shared", "discrete": True, "silos": silos, "expected": float(treaty.cohort.size or silos),
            "minimum": treaty.cohort.minimum, "lr": treaty.local.lr}  # fmt: skip


def silo_splits(treaty: Treaty, data: Mapping[str, Any] | None = None) -> dict[str, Splits]:
    """Who holds what: every silo's examples, split; of silos that hand theirs over, those in `data`. With
    `test_source`, the held-out test comes from there.
    """
    how = SplitPlan(treaty.split.by, treaty.split.validation, treaty.split.test)
    source = treaty.data.source
    if data is None and source == MEMORY:
        if not roster(treaty):
            do = "Pass data={name: dataset, …} in Python, or name the silos, who bring theirs: [silos] names."
            raise DataError("silos' data, since the treaty's source is \"memory\"", "none", do)
        data = {}
    whole = _partitioned(treaty, source) if data is None else _handed(treaty, data)
    if treaty.data.test_source is None:
        return {name: x if isinstance(x, Splits) else _split(treaty, x, how) for name, x in whole.items()}
    held = _partitioned(treaty, treaty.data.test_source)
    without_test = replace(how, test=0.0)
    return {
        name: x if isinstance(x, Splits) else _tested(treaty, _split(treaty, x, without_test), held.get(name))
        for name, x in whole.items()
    }


def _handed(treaty: Treaty, data: Mapping[str, Any]) -> dict[str, pa.Table | Splits]:
    """What silos hand over themselves, in the order of the treaty's names where it has them."""
    names = roster(treaty) or tuple(data)
    for odd in (name for name in data if name not in names):
        raise DataError("a silo of the treaty", f'"{odd}"', one_of(odd, names), where="data")
    return {name: _own(treaty, name, data[name]) for name in names if name in data}


def _own(treaty: Treaty, silo: str, examples: Any) -> pa.Table | Splits:
    """One silo's examples, with no column that the treaty does not name and no domain that it does not keep."""
    if isinstance(examples, Splits):
        return examples
    named, d = replace(columns(treaty), own=()), treaty.data
    here = isinstance(examples, str | Path)
    table = read(str(examples), named, base=Path()) if here else from_dataset(examples, named)
    table = table.select([role for role in table.column_names if role == "text" or getattr(named, role) is not None])
    if d.keep is not None:
        table = table.filter(pc.is_in(table["domain"], pa.array(d.keep, pa.string())))
    least = treaty.silos.min_examples
    if table.num_rows < least:
        kept = f" in {', '.join(d.keep)}" if d.keep else ""
        do = "Bring more, or propose a treaty with less in [silos] min_examples or more in [data] keep."
        raise DataError(f"at least {least} examples{kept}", f"{table.num_rows}", do, where=f"silo {silo!r}")
    return at_most(table, d.max_examples, treaty.seed) if d.max_examples is not None else table


def _split(treaty: Treaty, table: pa.Table, how: SplitPlan) -> Splits:
    """One silo's examples, scrubbed before anything is decided by their text."""
    table, found = scrub_table(table, treaty.data.scrub)
    return replace(split(table, how, treaty.seed), scrubbed=found)


def _tested(treaty: Treaty, parts: Splits, held: pa.Table | None) -> Splits:
    """The silo's examples with those held out elsewhere."""
    if held is None:
        return replace(parts, test=parts.train.slice(0, 0))
    held, found = scrub_table(held, treaty.data.scrub)
    return replace(parts, test=held, scrubbed=dict(Counter(parts.scrubbed) + Counter(found)))


def columns(treaty: Treaty) -> Columns:
    """What the columns of the data are called."""
    d, by = treaty.data, treaty.silos.by
    own = (by.removeprefix("column:"),) if by.startswith("column:") else ()
    return Columns(d.text, d.target, d.label, d.domain, d.author, d.timestamp, own=tuple(set(own) - set(ROLES)))


def _partitioned(treaty: Treaty, source: str) -> dict[str, pa.Table]:
    table = read(source, columns(treaty), base=treaty.folder or Path())
    if treaty.data.keep is not None:
        table = only(table, treaty.data.keep)
    s = treaty.silos
    how = Partition(s.by, s.count, s.alpha, s.min_examples, s.names or (), treaty.data.max_examples, s.members)
    return partition(table, how, treaty.seed)


def adapter(treaty: Treaty) -> Adapter:
    """What of the base is trained."""
    a = treaty.adapter
    if treaty.algorithm.name == "knn-adapter":
        return Frozen()
    if a.kind == "full":
        return Full()
    named = a.targets if len(a.targets) > 1 or a.targets[0] not in ("all-linear", "attention") else a.targets[0]
    return LoRA(a.rank, a.alpha, a.dropout, named, a.embeddings, a.freeze_a, a.blocks)


def local_plan(treaty: Treaty) -> LocalPlan:
    """How silos train in a round."""
    x = treaty.local
    return LocalPlan(
        lr=x.lr, batch=x.batch, steps=x.steps, epochs=x.epochs, optimizer=x.optimizer, momentum=x.momentum,
        weight_decay=x.weight_decay, max_grad_norm=x.max_grad_norm, schedule=x.schedule, warmup=x.warmup,
        rounds=treaty.algorithm.rounds, keep=x.keep_optimizer,
    )  # fmt: skip


def _server_optimizer(treaty: Treaty) -> ServerOptimizer:
    s = treaty.server
    if s.optimizer == "sgd":
        return Sgd(s.lr)
    if s.optimizer == "momentum":
        return Sgd(s.lr, s.momentum)
    return Adaptive(s.optimizer, s.lr, s.beta1, s.beta2, s.tau)


def _sampler(treaty: Treaty, silos: int) -> Sampler:
    c = treaty.cohort
    if c.sampling == "poisson":
        return Poisson(c.rate)
    if c.sampling == "fixed" and c.size > silos:
        raise DataError(f"[cohort] size ≤ {silos}, the number of silos", str(c.size), "Sample fewer silos a round.")
    if c.minimum > (c.size or silos):
        raise DataError(
            f"[cohort] minimum ≤ {c.size or silos}, the silos of a round",
            str(c.minimum),
            "Lower the minimum, or bring more silos: secure sums need three.",
        )
    return FixedSize(c.size) if c.sampling == "fixed" else Everyone()


def _model_name(treaty: Treaty) -> str:
    """A folder named relative to the treaty is looked up there; any other name is taken as it is."""
    beside = (treaty.folder or Path()) / treaty.model.base
    return str(beside) if beside.is_dir() else treaty.model.base


def _domains(splits: Mapping[str, Splits]) -> list[str]:
    """All domains, so that a sum says nothing of who has which."""
    held = [table for parts in splits.values() for table in (parts.validation, parts.test)]
    named = [table["domain"].to_pylist() if "domain" in table.column_names else [""] for table in held]
    return sorted({domain or "" for domains in named for domain in domains})


def _labels(treaty: Treaty, splits: Mapping[str, Splits]) -> tuple[str, ...]:
    found: set[str] = set()
    for parts in splits.values():
        for table in (parts.train, parts.validation, parts.test):
            if "label" not in table.column_names:
                raise DataError("a column with labels", "none", "Name it with [data] label.")
            found |= set(table["label"].to_pylist())
    return methods.known_labels(treaty, found)


def _encode(name: str, parts: Splits, objective: Objective, base: Base, treaty: Treaty) -> Silo:
    train = parts.train
    if treaty.privacy.author_examples is not None:
        train = bound_contributions(train, treaty.privacy.author_examples, treaty.seed)
    tables = {"train": train, "validation": parts.validation, "test": parts.test}
    splits = {which: objective.encode(table, base.tokenizer) for which, table in tables.items()}
    splits |= _unlabelled(treaty, name, splits, train)
    units = _units(treaty, train, splits["train"].documents) if treaty.privacy.unit in ("example", "author") else None
    return Silo(name, splits, units=units)


def _unlabelled(treaty: Treaty, name: str, splits: Mapping[str, Encoded], train: pa.Table) -> dict[str, Encoded]:
    """The splits that have fewer labels than their texts: those of the test are for measuring, and stay."""
    d, found = treaty.data, dict(splits)
    if d.missing:
        missing = Missing(d.missing, d.missing_kind, treaty.seed)
        found["train"] = found["train"].without(missing, train["text"].to_pylist())
    known = ("test",) if name in d.unlabelled else tuple(found)
    return {which: encoded if which in known else encoded.without_topics() for which, encoded in found.items()}


def _public(treaty: Treaty, source: str, most: int, objective: Objective, base: Base) -> Encoded:
    """Rows of a source's first texts, which everybody may read; of their topics nothing is known."""
    table = read(source, Columns(treaty.data.text), base=treaty.folder or Path()).slice(0, most)
    return replace(objective, topics=()).encode(table, base.tokenizer)


def _units(treaty: Treaty, table: pa.Table, documents: np.ndarray) -> Units:
    """Whom each training row belongs to: its document, or whoever wrote it."""
    by_author = treaty.privacy.unit == "author" and treaty.privacy.sampling == "units"
    names = [str(x) for x in table["author" if by_author else "text"].to_pylist()]
    owner = np.unique(names, return_inverse=True)[1] if by_author else np.arange(len(names))
    units, of = np.unique(owner[documents], return_inverse=True)
    first = {int(unit): i for i, unit in reversed(list(enumerate(owner)))}
    keys = [derive(treaty.seed, "unit", names[first[int(unit)]]) for unit in units]
    return Units(of.astype(np.int64), np.array(keys, np.uint64))


def _chosen(treaty: Treaty, base: Base) -> LoRA | None:
    """The adapter on those modules to which public text is most sensitive, where the treaty asks for that."""
    p, wished = treaty.privacy, adapter(treaty)
    if p.unit == "none" or p.public_text is None:
        return None
    if not isinstance(wished, LoRA):
        raise ModelError("a LoRA adapter, whose modules can be chosen", "full training", "Set [adapter] kind to lora.")
    named = Columns(treaty.data.text) if treaty.model.task in LANGUAGE else columns(treaty)
    table = read(p.public_text, named, base=treaty.folder or Path()).slice(0, PUBLIC_EXAMPLES)
    objective = make_objective(treaty.model.task, treaty.model.max_length, base.labels)
    return most_sensitive(base, wished, objective, objective.encode(table, base.tokenizer), p.keep_modules)


def _check_sizes(silos: Mapping[str, Silo], plan: LocalPlan) -> None:
    for silo in silos.values():
        if silo.examples < plan.batch:
            raise DataError(
                f"at least one batch of {plan.batch} rows to train on",
                f"{silo.examples}",
                "Lower [local] batch, give the silo more text, or raise [silos] min_examples to leave small ones out.",
                where=f"silo {silo.name!r}",
            )


def _together(treaty: Treaty, bench: Bench, plan: LocalPlan, silos: int) -> int:
    wished = treaty.performance.cohort_batch
    if not bench.stacks:
        return 1
    if wished != "auto":
        return min(int(wished), silos)
    from .lm.bench import preferred_cohort

    return preferred_cohort(bench, plan.batch, treaty.model.max_length, silos)
