"""The treaty's sections: every key, its type, its range, its default. Frozen values; `rules.py` holds them together.

Types are strict: "8" is not 8, and true is not 1. A key's description is the comment that the resolved treaty carries.
A key that does not apply (mu under fedavg) keeps its default here and appears in no resolved treaty.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

FORMAT = 1
MEMORY = "memory"
GIVEN = "given"
PARTITIONS = ("domain", "author", "label", "column:<name>", "dirichlet", "quantity", "iid", GIVEN)
BASELINES = ("base", "local", "pooled")
SCRUBBED = ("addresses", "names", "urls")
LEAST_SECRET = 3
"""Silos in a secure sum: in one of two, each reads the other's number by taking off its own."""
MOST = 2**63 - 1  # TOML's integers have 64 bits


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


def _writable(value: str) -> str:
    value.encode()  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
    return value


def _unsigned_zero(value: float) -> float:
    return value + 0.0


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) != len(value):
        raise ValueError("the same name twice")
    return value


def _sorted(value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(_distinct(value)))


def _partition(value: str) -> str:
    column = value.removeprefix("column:")
    if (value not in PARTITIONS and column == value) or not column.strip():
        raise ValueError("not a way to partition")
    return value


def _members(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list | tuple) else value


def _each_once(value: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    _distinct(tuple(name for names in value for name in names))
    return tuple(map(_sorted, value))


def _what_to_scrub(value: Any) -> Any:
    return SCRUBBED if value is True else () if value is False else _tuple(value)


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("cosines and sines come in pairs")
    return value


def _targets(value: tuple[str, ...]) -> tuple[str, ...]:
    return value if value in (("all-linear",), ("attention",)) else _sorted(value)


def _says(expected: str, **more: Any) -> Any:
    """What an error says was expected, where the JSON schema alone would say it worse."""
    return {"expected": expected, **more}


Str = Annotated[str, AfterValidator(_writable)]
Line = Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$"), AfterValidator(_writable)]
Names = Annotated[tuple[Line, ...], Field(min_length=1), BeforeValidator(_tuple), AfterValidator(_sorted)]
Columns = Annotated[tuple[Line, ...], Field(min_length=1), BeforeValidator(_one_or_several), AfterValidator(_distinct)]
Targets = Annotated[tuple[Line, ...], Field(min_length=1), BeforeValidator(_one_or_several), AfterValidator(_targets)]
SiloNames = Annotated[tuple[Line, ...], BeforeValidator(_tuple), AfterValidator(_distinct)]
Baselines = Annotated[tuple[Literal["base", "local", "pooled"], ...], BeforeValidator(_tuple), AfterValidator(_sorted)]
Members = Annotated[
    tuple[Annotated[tuple[Line, ...], Field(min_length=1)], ...], BeforeValidator(_members), AfterValidator(_each_once)
]
Scrub = Annotated[
    tuple[Literal["addresses", "names", "urls"], ...], BeforeValidator(_what_to_scrub), AfterValidator(_sorted)
]
Layers = Annotated[tuple[int, ...], Field(min_length=1), BeforeValidator(_tuple), AfterValidator(_distinct)]
Count = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0), AfterValidator(_unsigned_zero)]
Fraction = Annotated[float, Field(ge=0, lt=1), AfterValidator(_unsigned_zero)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """What the sections share: frozen, strict, no unknown keys, no NaN, no infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Heading(Section):
    """[treaty]: which treaty this is."""

    name: Annotated[str, Field(max_length=80, pattern=r"^[._-]*[a-z0-9][a-z0-9._-]*$")] = Field(
        description="names the run",
        examples=["newsgroups"],
        json_schema_extra=_says("1 to 80 characters of a-z, 0-9, '.', '_' and '-', a letter or digit among them"),
    )
    purpose: Str = Field("", description="what the model is for, in words; part of the digest")
    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)] = Field(FORMAT, description="the format of this file")
    seed: Whole = Field(0, description="of every draw: partition, split, sampling, adapter, batches")


class Model(Section):
    """[model]: the frozen base and what it is trained to do."""

    base: Line = Field(
        description="a catalogued name (foedus list models), a Hugging Face id, or a folder",
        examples=["smollm2-135m-instruct"],
    )
    task: Literal["causal-lm", "masked-lm", "sequence-classification", "seq2seq"] = "causal-lm"
    max_length: Annotated[int, Field(ge=8, le=8192)] = Field(
        128, description="tokens; longer texts are cut into windows of this length"
    )
    windows: Count | None = Field(None, description="of a text at most; the rest of it is not read", examples=[1])
    layers: Count | None = Field(None, description="only so many of its blocks, the others left out", examples=[8])


class Adapter(Section):
    """[adapter]: what is trained. Every key but `kind` is for LoRA."""

    kind: Literal["lora", "full"] = Field("lora", description='"full" trains every parameter')
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Positive = Field(16.0, description="LoRA's delta is scaled by alpha / rank")
    dropout: Fraction = Field(0.0, description="probability, on the adapter's input")
    targets: Targets = Field(
        ("all-linear",),
        description='"all-linear", "attention", or a list of module names',
        json_schema_extra=_says('"all-linear", "attention", or a list of distinct module names'),
    )
    embeddings: bool = Field(False, description="whether embeddings get an adapter too")
    blocks: Count | None = Field(None, description="only so many of the last blocks are adapted", examples=[2])
    freeze_a: bool = Field(False, description="train LoRA's B only: half the numbers, half the noise (FFA-LoRA)")


class Data(Section):
    """[data]: where the text is and what its columns are called. Left out, the data are handed over in Python."""

    source: Line = Field(
        description='a catalogued name, a path, hf:org/name, or "memory": what silos hand over',
        examples=["20newsgroups"],
    )
    test_source: Line | None = Field(
        None, description="held-out examples from elsewhere", examples=["20newsgroups:test"]
    )
    text: Columns = Field(
        ("text",),
        description="the column, or columns joined by a newline, to learn from",
        json_schema_extra=_says("a column name, or a list of distinct column names"),
    )
    target: Line | None = Field(None, description="the column that seq2seq learns to write", examples=["summary"])
    label: Line | None = Field(None, description="the column with the class", examples=["label"])
    domain: Line | None = Field(None, description="the column by which results are broken down", examples=["domain"])
    author: Line | None = Field(None, description="the column with who wrote it", examples=["author"])
    timestamp: Line | None = Field(None, description="the column with when it was written", examples=["created_utc"])
    keep: Names | None = Field(
        None,
        description="only these domains",
        examples=[["sci.med", "sci.space"]],
        json_schema_extra=_says("a list of distinct domains"),
    )
    labels: Names | None = Field(
        None,
        description="all that there may be; left out, those found at all silos",
        examples=[["ham", "spam"]],
        json_schema_extra=_says("a list of distinct labels"),
    )
    max_examples: Count | None = Field(None, description="at most so many examples a silo", examples=[1000])
    scrub: Scrub = Field(
        (),
        description="what is replaced by marks before anything else: true, or some of addresses, names, urls",
        examples=[["addresses", "names", "urls"]],
        json_schema_extra=_says('true, or a list of distinct "addresses", "names", "urls"', known=SCRUBBED),
    )
    unlabelled: SiloNames = Field(
        (),
        description="silos whose topic labels nobody has; their test labels are for measuring",
        examples=[["north"]],
        json_schema_extra=_says("a list of distinct names of silos"),
    )
    missing: Fraction = Field(0.0, description="share of training texts (or tokens) that lose their labels")
    missing_kind: Literal["sequence", "token", "topic"] = Field(
        "sequence", description="what is lost: all targets of a text, single tokens, or its topic"
    )


class Silos(Section):
    """[silos]: who holds what."""

    by: Annotated[Line, AfterValidator(_partition)] = Field(
        description="a column, or a drawn partition of all examples",
        examples=["domain"],
        json_schema_extra=_says("one of " + ", ".join(f'"{name}"' for name in PARTITIONS), known=PARTITIONS),
    )
    count: Count | None = Field(None, description="silos", examples=[10])
    alpha: Positive = Field(0.5, description="of the Dirichlet distribution; smaller is more skewed")
    min_examples: Count = Field(1, description="a silo with fewer is refused")
    names: SiloNames = Field(
        (),
        description="of drawn or given silos, in order; else which of the column's values are silos",
        examples=[["north", "south"]],
        json_schema_extra=_says("a list of distinct names"),
    )
    members: Members = Field(
        (),
        description="of each silo in names: the values of the column that it holds",
        examples=[[["comp.graphics", "rec.autos"], ["sci.med"]]],
        json_schema_extra=_says("a list with a list of names for each silo, no name twice"),
    )


class Split(Section):
    """[split]: shares of each silo's examples that are held out."""

    by: Literal["hash", "time"] = Field("hash", description='"hash" of the text, or "time": the latest are held out')
    validation: Fraction = Field(0.1, description="share held out for the evaluation every k rounds")
    test: Fraction = Field(0.1, description="share held out for the final evaluation")


class Algorithm(Section):
    """[algorithm]: the federated algorithm."""

    name: Literal[
        "fedavg", "fedprox", "scaffold", "alignment", "reversal", "udalm", "knn-adapter", "fedlap", "alone"
    ] = "fedavg"
    rounds: Count = Field(description="server rounds", examples=[10])
    mu: NotNegative = Field(0.01, description="FedProx's pull towards the global model; 0 is FedAvg")


class Topics(Section):
    """[topics]: what a language model learns beside its tokens. Left out, nothing."""

    weight: NotNegative = Field(
        0.0, description="of the topic head's loss, on pooled features; 0: no head", examples=[0.1]
    )
    smoothing: Fraction = Field(0.0, description="of the topic labels: so much of each goes to all topics alike")
    pseudo_labels: Share | None = Field(
        None, description="where a label is missing, the head's own from this probability on", examples=[0.9]
    )
    denoise: NotNegative = Field(
        0.0, description="weight of predicting a text from a damaged copy of it; 0: not done", examples=[0.1]
    )
    denoise_rate: Annotated[float, Field(gt=0, lt=1)] = Field(0.15, description="share of tokens that are damaged")


class Alignment(Section):
    """[alignment]: for algorithm "alignment", feature distributions drawn together by MMD, and domain attention."""

    weight: NotNegative = Field(0.1, description="of the pull towards the mean embedding of the others")
    layers: Layers = Field(
        (-1,),
        description="whose features are aligned; -1 is the last",
        json_schema_extra=_says("a list of distinct integers"),
    )
    features: Annotated[int, Field(ge=10, le=65536), AfterValidator(_even)] = Field(
        128,
        description="random Fourier features, an even number",
        json_schema_extra=_says("an even integer ≥ 10 and ≤ 65536"),
    )
    project: Whole = Field(32, description="numbers to which features are projected first; 0: not at all")
    public_text: Line | None = Field(
        None, description="public source that sets the kernel's bandwidths", examples=["friends"]
    )
    every: Count = Field(1, description="rounds between surveys of the mean embedding, the first in round 0")
    noise_ratio: Positive = Field(1.0, description="the survey's noise multiplier over a step's")
    rate: Share | None = Field(None, description="of units in a survey; left out, as in a step", examples=[0.5])
    head: Literal["learned", "means"] = Field(
        "learned", description='"means": a topic head made of the mean features of each topic, as surveys release them'
    )
    tokens: Whole = Field(
        0,
        description="of the vocabulary, the first: a bias by how often surveys find and expect them",
        examples=[16384],
    )
    attention: Literal["none", "entropy", "rank", "error", "distance"] = Field(
        "none", description="by what a silo weighs in"
    )
    gamma: Annotated[float, Field(ge=-100, le=100), AfterValidator(_unsigned_zero)] = Field(
        1.0, description="of exp(gamma * attention); 0 weighs all alike"
    )
    base: Literal[0, 1] = Field(0, description="1: times the number of its examples, as its surveys count them")
    largest: Count = Field(1000, description="examples beyond so many weigh nothing")
    max_share: Share | None = Field(None, description="of one silo in the mean at most", examples=[0.3])
    momentum: Fraction = Field(0.0, description="of released embeddings, from survey to survey")
    schedule: Literal["constant", "ramp", "shift"] = Field(
        "constant", description='of weight: "shift" follows the released distance'
    )
    target: Line | None = Field(None, description="silo to align to; left out, all others", examples=["north"])
    average: Fraction = Field(0.0, description="of a running mean of parameters that the last round hands out; 0: none")
    rows: Count | None = Field(None, description="of a silo's text in an exact survey at most", examples=[500])
    scale: Positive = Field(1.0, description="of all but the delta, beside which it is clipped")


class Scaffold(Section):
    """[scaffold]: for algorithm "scaffold", control variates against client drift."""

    warm: Whole = Field(0, description="first rounds, in which silos only report their control variates")


class Reversal(Section):
    """[reversal]: for algorithm "reversal", features from which no silo can be told."""

    weight: NotNegative = Field(0.1, description="of the reversed gradient of the silo classifier")


class Udalm(Section):
    """[udalm]: for algorithm "udalm", language modelling mixed with the topic task."""

    mix: Annotated[float, Field(ge=0, le=1), AfterValidator(_unsigned_zero)] = Field(
        1 / 9, description="share of the topic task, where there are labels; the rest is language modelling"
    )
    pretrain: Whole = Field(0, description="first rounds of language modelling alone")


class Knn(Section):
    """[knn]: for algorithm "knn-adapter", a store of each silo's text and how far to trust it; the base stays."""

    neighbours: Annotated[int, Field(ge=1, le=256)] = Field(64, description="nearest stored contexts of a token")
    width: Count = Field(64, description="numbers to which contexts are projected")
    public_text: Line | None = Field(
        None, description="public source of a store to tune against", examples=["reuters-r8"]
    )
    answers: Literal["own", "public"] = Field("own", description="whose store predicts, the silo's or the public one")


class Fedlap(Section):
    """[fedlap]: for algorithm "fedlap", synthetic texts whose gradients are like a silo's."""

    samples: Count = Field(16, description="synthetic texts a silo")
    length: Annotated[int, Field(ge=2, le=8192)] = Field(16, description="tokens of each")
    vocabulary: Count = Field(256, description="first tokens, among which their targets are")
    radius: Positive = Field(1.5, description="how far a round may step")
    queries: Count = Field(10, description="looks at the silo's text from one place")
    visits: Count = Field(5, description="places, before the walk starts again")
    boost: Count = Field(5, description="matching steps for each look")
    inner: Count = Field(2, description="steps to the next place")
    passes: Count = Field(20, description="of the server over the synthetic texts at most")
    rate: Positive = Field(0.1, description="learning rate of the matching")


class Local(Section):
    """[local]: what a silo does in a round."""

    steps: Count | None = Field(None, description="optimizer steps a round", examples=[20])
    epochs: Count | None = Field(None, description="passes over the silo's training examples a round", examples=[1])
    batch: Count = Field(8, description="rows of at most max_length tokens a step")
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    momentum: Fraction = 0.0
    weight_decay: NotNegative = 0.0
    keep_optimizer: bool = Field(False, description="silos keep their optimizer's state between rounds, to themselves")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="of lr, over the rounds")
    warmup: Whole = Field(0, description="rounds in which lr grows to its full value")
    max_grad_norm: Positive | None = Field(
        None, description="L2 norm to which each step's gradient is clipped; protects nobody", examples=[1.0]
    )


class Server(Section):
    """[server]: what the coordinator does with the mean of the updates."""

    optimizer: Literal["sgd", "momentum", "adagrad", "adam", "yogi"] = Field(
        "sgd", description="sgd with lr = 1 is plain averaging"
    )
    lr: Positive = 1.0
    momentum: Fraction = 0.9
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = Field(1e-3, description="bounds an adaptive step")
    weighting: Literal["examples", "uniform"] = Field("examples", description="what a silo's update weighs in the mean")
    max_weight: Positive | None = Field(None, description="examples beyond so many weigh nothing", examples=[1000.0])


class Cohort(Section):
    """[cohort]: who takes part in a round."""

    sampling: Literal["full", "fixed", "poisson"] = "full"
    size: Count | None = Field(None, description="silos a round", examples=[5])
    rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="probability that a silo takes part in a round", examples=[0.5]
    )
    minimum: Count = Field(1, description="silos; a round that ends with fewer stops the run")


class Evaluation(Section):
    """[evaluation]: what is measured, and how often."""

    every: Count = Field(1, description="rounds between evaluations on the validation share")
    baselines: Baselines = Field(
        ("base",),
        description="the model untouched, each silo alone, all data pooled",
        json_schema_extra=_says('a list, without repetition, of "base", "local", "pooled"', known=BASELINES),
    )
    max_windows: Count | None = Field(None, description="at most so many rows a silo and split", examples=[100])


class Disclosure(Section):
    """[disclosure]: what silos let out beside their update, under their names."""

    loss: bool = Field(True, description="each silo's training loss, every round")
    holdings: bool = Field(True, description="how many examples of each domain and label each silo holds")
    attention: bool = Field(True, description="what each silo weighs, every round")


class Privacy(Section):
    """[privacy]: whose presence is protected, and how well. Left out, nobody's is."""

    unit: Literal["none", "example", "author", "silo"] = Field(
        "none",
        description="whose presence is protected, if anybody's",
    )
    epsilon: Positive | None = Field(None, description="of the whole treaty; the noise is found for it", examples=[8.0])
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="well below 1 / the number of units")
    noise_multiplier: Positive | None = Field(
        None, description="instead of epsilon: noise over clip norm", examples=[1.0]
    )
    noise_std: Positive | None = Field(
        None, description="instead of epsilon: bare noise, in update units", examples=[0.01]
    )
    max_norm: Positive | Literal["none"] = Field(
        1.0,
        description="L2 norm to which each unit is clipped",
        json_schema_extra=_says('a number > 0, or "none" beside noise_std, which then guarantees nothing'),
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="of the units' norms, which max_norm follows", examples=[0.5]
    )
    noise: Literal["gaussian", "discrete-gaussian"] = Field("gaussian", description="the second on a public grid")
    noise_ratio: Positive = Field(1.0, description="the last round's noise over the first's")
    bands: Count = Field(1, description="above 1: noise correlated over so many steps or rounds")
    randomness: Literal["system", "simulated"] = Field(
        "system", description='"simulated": noise from the seed, repeatable, and protecting nobody'
    )
    rate: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="of units in a local step; batch is the sum's divisor",
        examples=[0.05],
    )  # fmt: skip
    rows: Count = Field(1, description="rows of max_length tokens that a unit brings to a step at most")
    author_examples: Count | None = Field(None, description="examples an author keeps in a silo at most", examples=[8])
    sampling: Literal["units", "examples"] = Field(
        "units", description='what is drawn and clipped: authors, or their examples one by one ("examples")'
    )
    clipping: Literal["whole", "layers", "factors"] = Field("whole", description="what has a norm of its own")
    shares: Annotated[tuple[Positive, ...], BeforeValidator(_tuple)] = Field(
        (), description="of the budget, for each part in alphabetical order; left out, equal", examples=[[0.5, 0.5]]
    )
    placement: Literal["server", "silo", "shared"] = Field("server", description="who adds the noise")
    hide_cohort: bool = Field(False, description="no record names who took part")
    accept_noise: bool = Field(False, description="run although noise drowns what is learned")
    public_text: Line | None = Field(
        None, description="public source that chooses the modules to train", examples=["friends"]
    )
    keep_modules: Annotated[float, Field(gt=0, le=1)] = Field(0.25, description="share of the modules that are trained")


class Secure(Section):
    """[secure]: how silos' updates are summed. Left out, in the open: the coordinator sees every one."""

    sums: Literal["open", "masked", "encrypted"] = Field(
        "open", description="who sees a single update: the coordinator, or only its silo"
    )
    word: Literal[16, 32, 64] = Field(32, description="bits of a coordinate of the sum")
    range: Positive = Field(1.0, description="largest number of an update; one with a larger is scaled down")
    corrupt: Fraction = Field(0.1, description="share of silos that may collude with the coordinator")
    dropout: Fraction = Field(0.1, description="share of silos that may vanish in a round")
    neighbours: Count | None = Field(
        None, description="silos with which each shares secrets; left out, found by search", examples=[32]
    )
    threshold: Count | None = Field(
        None, description="neighbours who can open a mask; left out, found by search", examples=[22]
    )
    group_size: Count | None = Field(
        None, description="sums in random groups of at least so many, each one seen", examples=[5]
    )
    scheme: Literal["bfv", "ckks"] = Field("bfv", description="the first exact, on integers")
    encrypted_share: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="of the numbers; the rest is masked")
    key_holders: Count = Field(1, description="silos that hold the secret key")


class Performance(Section):
    """[performance]: bears on speed only, and is no part of the digest."""

    threads: Count | None = Field(
        None, description="of the processor; left out, as many as there are cores", examples=[2]
    )
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of matrix products")
    cohort_batch: Literal["auto"] | Count = Field(
        "auto",
        description="silos trained side by side",
        json_schema_extra=_says('"auto" or an integer ≥ 1'),
    )
    microbatch: Count = Field(32, description="rows that a private step sends through the model at once")
    keep_states: Line | None = Field(
        None, description="folder, beside the data, for what blocks below the first trained one make of each text",
        examples=["states"],
    )  # fmt: skip


SECTIONS: dict[str, type[Section]] = {
    "treaty": Heading,
    "model": Model,
    "adapter": Adapter,
    "data": Data,
    "silos": Silos,
    "split": Split,
    "algorithm": Algorithm,
    "topics": Topics,
    "alignment": Alignment,
    "scaffold": Scaffold,
    "reversal": Reversal,
    "udalm": Udalm,
    "knn": Knn,
    "fedlap": Fedlap,
    "local": Local,
    "server": Server,
    "cohort": Cohort,
    "evaluation": Evaluation,
    "disclosure": Disclosure,
    "privacy": Privacy,
    "secure": Secure,
    "performance": Performance,
}

SILENT = (
    "data.missing",
    "topics.weight",
    "topics.denoise",
    "alignment.head",
    "alignment.tokens",
    "disclosure.attention",
)
"""Keys whose default adds nothing to what the others ask for: a weight is in every update that is seen. A resolved
treaty leaves them out while they have it, and so does the digest."""
