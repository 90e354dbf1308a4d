"""Whatever the reader is fed, a treaty or one of our errors comes out; and every treaty survives its own words."""

import datetime
from pathlib import Path

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from foedus.errors import FoedusError, GuaranteeError, TreatyError
from foedus.treaty import SECTIONS, Treaty, from_dict, parse
from foedus.treaty import text as toml

EXAMPLES = [path.read_text() for path in sorted((Path(__file__).parent.parent / "treaties").glob("*.toml"))]
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

lines = st.text(st.characters(min_codepoint=32, exclude_characters="\x7f", codec="utf-8"), min_size=1, max_size=12)
names = st.lists(lines, min_size=1, max_size=4, unique=True)
folders = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=3, max_size=3, unique=True)
positive = st.floats(1e-12, 1e12) | st.integers(1, 10**6)
fractions = st.floats(0, 0.999)
counts = st.integers(1, 10**9)

GOOD = {
    "treaty.name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,78}", fullmatch=True),
    "treaty.purpose": st.text(st.characters(codec="utf-8"), max_size=30),
    "treaty.seed": st.integers(0, 2**63 - 1),
    "model.base": lines,
    "model.task": st.sampled_from(["causal-lm", "masked-lm", "sequence-classification", "seq2seq"]),
    "model.max_length": st.integers(8, 8192),
    "model.layers": counts,
    "model.windows": counts,
    "adapter.kind": st.sampled_from(["lora", "full"]),
    "adapter.rank": st.integers(1, 1024),
    "adapter.alpha": positive,
    "adapter.dropout": fractions,
    "adapter.targets": st.sampled_from(["all-linear", "attention"]) | names,
    "adapter.embeddings": st.booleans(),
    "adapter.blocks": counts,
    "adapter.freeze_a": st.booleans(),
    "data.source": lines.filter(lambda name: name != "memory"),
    "data.test_source": lines,
    "data.text": lines | names,
    "data.target": lines,
    "data.label": lines,
    "data.domain": lines,
    "data.author": lines,
    "data.timestamp": lines,
    "data.keep": names,
    "data.labels": names,
    "data.max_examples": st.integers(10**6, 10**9),
    "data.scrub": st.booleans() | st.lists(st.sampled_from(["addresses", "names", "urls"]), unique=True),
    "data.unlabelled": names,
    "data.missing": fractions,
    "data.missing_kind": st.sampled_from(["sequence", "token", "topic"]),
    "silos.by": st.sampled_from(["domain", "author", "label", "column:x", "dirichlet", "quantity", "iid"]),
    "silos.count": st.just(3),
    "silos.alpha": positive,
    "silos.min_examples": st.integers(1, 10**6),
    "silos.names": folders,
    "silos.members": st.just([["a"], ["b", "c"], ["d"]]),
    "split.by": st.sampled_from(["hash", "time"]),
    "split.validation": st.floats(0.01, 0.49),
    "split.test": st.floats(0.0, 0.49),
    "algorithm.name": st.sampled_from(
        ["fedavg", "fedprox", "scaffold", "alignment", "reversal", "udalm", "knn-adapter", "fedlap", "alone"]
    ),
    "algorithm.rounds": st.integers(100, 10**6),
    "algorithm.mu": st.floats(0, 1e6),
    "topics.weight": st.floats(0, 10),
    "topics.smoothing": fractions,
    "topics.pseudo_labels": st.floats(0.01, 1),
    "topics.denoise": st.floats(0, 10),
    "topics.denoise_rate": st.floats(0.01, 0.99),
    "alignment.weight": st.floats(0, 10),
    "alignment.layers": st.lists(st.integers(-4, 4), min_size=1, max_size=3, unique=True),
    "alignment.features": st.integers(5, 32768).map(lambda half: 2 * half),
    "alignment.project": st.integers(0, 64),
    "alignment.public_text": lines,
    "alignment.every": counts,
    "alignment.noise_ratio": positive,
    "alignment.rate": st.floats(1e-6, 1),
    "alignment.head": st.sampled_from(["learned", "means"]),
    "alignment.tokens": st.integers(0, 4096),
    "alignment.attention": st.sampled_from(["none", "entropy", "rank", "error", "distance"]),
    "alignment.gamma": st.floats(-100, 100),
    "alignment.base": st.sampled_from([0, 1]),
    "alignment.largest": counts,
    "alignment.max_share": st.floats(0.01, 1),
    "alignment.momentum": fractions,
    "alignment.schedule": st.sampled_from(["constant", "ramp", "shift"]),
    "alignment.target": lines,
    "alignment.average": fractions,
    "alignment.rows": counts,
    "alignment.scale": positive,
    "scaffold.warm": st.integers(0, 99),
    "reversal.weight": st.floats(0, 10),
    "udalm.mix": st.floats(0, 1),
    "udalm.pretrain": st.integers(0, 99),
    "knn.neighbours": st.integers(1, 256),
    "knn.width": counts,
    "knn.public_text": lines,
    "knn.answers": st.sampled_from(["own", "public"]),
    "fedlap.samples": counts,
    "fedlap.length": st.integers(2, 8192),
    "fedlap.vocabulary": counts,
    "fedlap.radius": positive,
    "fedlap.queries": counts,
    "fedlap.visits": counts,
    "fedlap.boost": counts,
    "fedlap.inner": counts,
    "fedlap.passes": counts,
    "fedlap.rate": positive,
    "local.steps": counts,
    "local.epochs": counts,
    "local.batch": counts,
    "local.optimizer": st.sampled_from(["adamw", "sgd"]),
    "local.lr": positive,
    "local.momentum": fractions,
    "local.weight_decay": st.floats(0, 1e3),
    "local.keep_optimizer": st.booleans(),
    "local.schedule": st.sampled_from(["constant", "linear", "cosine"]),
    "local.warmup": st.integers(0, 99),
    "local.max_grad_norm": positive,
    "server.optimizer": st.sampled_from(["sgd", "momentum", "adagrad", "adam", "yogi"]),
    "server.lr": positive,
    "server.momentum": fractions,
    "server.beta1": fractions,
    "server.beta2": fractions,
    "server.tau": positive,
    "server.weighting": st.sampled_from(["examples", "uniform"]),
    "server.max_weight": positive,
    "cohort.sampling": st.sampled_from(["full", "fixed", "poisson"]),
    "cohort.size": st.just(1),
    "cohort.rate": st.floats(1e-9, 1),
    "cohort.minimum": st.just(1),
    "evaluation.every": counts,
    "evaluation.baselines": st.lists(st.sampled_from(["base", "local", "pooled"]), unique=True),
    "evaluation.max_windows": counts,
    "disclosure.loss": st.booleans(),
    "disclosure.holdings": st.booleans(),
    "disclosure.attention": st.booleans(),
    "performance.threads": counts,
    "performance.precision": st.sampled_from(["auto", "fp32", "bf16"]),
    "performance.cohort_batch": st.just("auto") | counts,
    "performance.microbatch": counts,
    "performance.keep_states": lines,
    "privacy.unit": st.sampled_from(["none", "example", "author", "silo"]),
    "privacy.epsilon": positive,
    "privacy.delta": st.floats(1e-9, 0.5),
    "privacy.noise_multiplier": positive,
    "privacy.noise_std": positive,
    "privacy.max_norm": positive,
    "privacy.quantile": st.floats(0.1, 0.9),
    "privacy.noise": st.sampled_from(["gaussian", "discrete-gaussian"]),
    "privacy.noise_ratio": positive,
    "privacy.bands": counts,
    "privacy.randomness": st.sampled_from(["system", "simulated"]),
    "privacy.rate": st.floats(1e-6, 1),
    "privacy.rows": counts,
    "privacy.author_examples": counts,
    "privacy.sampling": st.just("units"),
    "privacy.clipping": st.sampled_from(["whole", "layers", "factors"]),
    "privacy.shares": st.lists(positive, max_size=3),
    "privacy.placement": st.sampled_from(["server", "silo", "shared"]),
    "privacy.hide_cohort": st.just(False),
    "privacy.accept_noise": st.booleans(),
    "privacy.public_text": lines,
    "privacy.keep_modules": st.floats(1e-6, 1),
    "secure.sums": st.sampled_from(["open", "masked", "encrypted"]),
    "secure.word": st.sampled_from([16, 32, 64]),
    "secure.range": positive,
    "secure.corrupt": st.floats(0, 0.3),
    "secure.dropout": st.floats(0, 0.3),
    "secure.neighbours": st.integers(2, 3),
    "secure.threshold": st.just(2),
    "secure.group_size": st.just(3),
    "secure.scheme": st.just("bfv"),
    "secure.encrypted_share": st.floats(1e-6, 1),
    "secure.key_holders": st.integers(1, 3),
}
"""Good values for every key but `format`, which has one; in ranges that keep them from contradicting one another."""

NEEDED = ["treaty.name", "model.base", "data.source", "silos.by", "algorithm.rounds"]


@st.composite
def treaties(draw) -> Treaty:
    """Any treaty: keys that apply, drawn at random, and what they need."""
    values = {key: draw(GOOD[key]) for key in NEEDED} | {draw(st.sampled_from(["local.steps", "local.epochs"])): 2}
    values |= {key: draw(GOOD[key]) for key in draw(st.sets(st.sampled_from([*GOOD]))) if key != "data.test_source"}
    for decider in draw(st.sets(st.sampled_from(["privacy.unit", "secure.sums"]))):  # else few would protect anybody
        own = [key for key in GOOD if key.startswith(decider.partition(".")[0])]
        values |= {key: draw(GOOD[key]) for key in {decider, *draw(st.sets(st.sampled_from(own)))}}
    values |= {f"data.{role}": role for role in ("label", "domain", "author", "timestamp", "target")}
    return settled(values)


def settled(values: dict[str, object]) -> Treaty:
    """The treaty that these values make once what they leave open is added and what does not apply is taken out."""
    values = {"model.task": "causal-lm", "cohort.sampling": "full"} | values
    by, sampling = values["silos.by"], values["cohort.sampling"]
    drawn = by in ("dirichlet", "quantity", "iid")
    values |= {"silos.count": 3} if drawn else {}
    values |= {"cohort.size": 1} if sampling == "fixed" else {"cohort.rate": 0.5} if sampling == "poisson" else {}
    gone = learned(values)
    lora = ["rank", "alpha", "blocks", "dropout", "targets", "embeddings", "freeze_a"]
    gone += [f"adapter.{key}" for key in lora if values.get("adapter.kind") == "full"]
    gone += ["model.layers"] if values.get("adapter.kind") == "full" else []
    gone += [] if values["model.task"] == "seq2seq" else ["data.target"]
    gone += [] if drawn else ["silos.count"]
    gone += [] if by in ("dirichlet", "quantity") else ["silos.alpha"]
    gone += [] if values.get("algorithm.name") == "fedprox" else ["algorithm.mu"]
    gone += [] if values.get("local.optimizer") == "sgd" else ["local.momentum"]
    gone += ["local.epochs"] if "local.steps" in values else []
    server = values.get("server.optimizer", "sgd")
    gone += [] if server == "momentum" else ["server.momentum"]
    gone += [] if server in ("adagrad", "adam", "yogi") else ["server.beta1", "server.tau"]
    gone += [] if server in ("adam", "yogi") else ["server.beta2"]
    gone += ["server.max_weight"] if values.get("server.weighting") == "uniform" else []
    gone += private(values) + secure(values)
    gone += [] if values["cohort.sampling"] == "fixed" else ["cohort.size"]
    gone += [] if values["cohort.sampling"] == "poisson" else ["cohort.rate"]
    tables: dict[str, dict[str, object]] = {}
    for dotted, value in values.items():
        if dotted not in gone:
            section, _, key = dotted.partition(".")
            tables.setdefault(section, {})[key] = value
    return from_dict(tables)


OWN = {"knn": "knn-adapter"} | {name: name for name in ("alignment", "scaffold", "reversal", "udalm", "fedlap")}


def learned(values: dict[str, object]) -> list[str]:
    """What a treaty must leave out for its algorithm; adds what that algorithm needs."""
    name, unit = values.get("algorithm.name", "fedavg"), values.get("privacy.unit", "none")
    shared = unit in ("example", "author") and values.get("privacy.placement") == "shared"
    if (name in ("alone", "fedlap") and (unit == "silo" or shared or values.get("secure.sums", "open") != "open")) or (
        name in ("alignment", "scaffold") and shared
    ):
        name = values["algorithm.name"] = "reversal"
    if name in OWN.values() and name != "scaffold":
        values["model.task"] = "causal-lm"
    if name == "udalm":
        values["topics.weight"] = 0.5
    if name == "scaffold":
        values |= {"local.optimizer": "sgd", "local.momentum": 0.0, "local.weight_decay": 0.0}
    if name == "knn-adapter":
        values.setdefault("knn.public_text", "friends")
    language = values["model.task"] in ("causal-lm", "masked-lm")
    topical, attentive = values.get("topics.weight", 0) > 0, values.get("alignment.attention", "none") != "none"
    if name == "alignment":
        values.setdefault("alignment.public_text", "friends")
        made = values.get("alignment.head") == "means"
        values |= {"topics.weight": 0.5} if values.get("alignment.attention") == "error" else {}
        values |= {"topics.weight": 0.0} if made else {}
        topical = not made and (topical or values.get("alignment.attention") == "error")
    gone = [key for key in values if OWN.get(key.partition(".")[0], name) != name]
    gone += [key for key in values if key.startswith(("topics.", "data.missing", "data.unlabelled")) and not language]
    gone += [] if topical else ["topics.smoothing", "topics.pseudo_labels"]
    gone += [] if values.get("topics.denoise", 0) > 0 else ["topics.denoise_rate"]
    gone += [] if values.get("data.missing", 0) > 0 else ["data.missing_kind"]
    gone += [] if attentive else ["alignment.gamma", "alignment.base", "alignment.max_share", "alignment.largest"]
    gone += ["alignment.base"] if values.get("server.weighting", "examples") == "examples" and unit == "none" else []
    gone += [] if values.get("alignment.base") == 1 and "alignment.base" not in gone else ["alignment.largest"]
    gone += (
        ["alignment.rows"]
        if unit in ("example", "author")
        else ["alignment.noise_ratio", "alignment.rate", "alignment.tokens"]
    )
    gone += [] if unit == "silo" else ["alignment.scale"]
    gone += [] if attentive and name == "alignment" and unit != "silo" else ["disclosure.attention"]
    gone += ["local.max_grad_norm"] if name == "scaffold" else []
    gone += ["privacy.bands"] if name == "alignment" and unit in ("example", "author") else []
    named = "silos.names" in values or values["silos.by"] == "domain" and "data.keep" in values
    gone += ["data.unlabelled", "alignment.target"] if named else []
    secret = values.get("secure.sums", "open") != "open" or values.get("privacy.placement") == "shared"
    gone += ["alignment.target"] if secret else []
    drawn = values["silos.by"] in ("dirichlet", "quantity", "iid")
    return gone + (["silos.members"] if drawn or "silos.names" not in values or "data.keep" in values else [])


def private(values: dict[str, object]) -> list[str]:
    """What a treaty must leave out for the unit that it protects; adds what that unit needs."""
    unit = values.get("privacy.unit", "none")
    local = ["privacy.rate", "privacy.rows", "privacy.clipping", "privacy.shares", "performance.microbatch"]
    whole = ["privacy.hide_cohort", "privacy.accept_noise"]
    if values.get("privacy.placement") == "shared" and unit != "none":
        values |= {"secure.sums": "masked", "privacy.noise": "discrete-gaussian"}
    author = ["privacy.author_examples", "privacy.sampling"]
    every = [
        key for key in values if key.startswith("privacy.") and key not in (*local, *whole, *author, "privacy.unit")
    ]
    if unit == "none":
        return [*local, *whole, *author, *every]
    measures = ("privacy.epsilon", "privacy.noise_multiplier", "privacy.noise_std")
    given = [key for key in measures if key in values]
    values |= {"server.weighting": "uniform"} | ({} if given else {"privacy.epsilon": 8.0})
    gone = [*given[1:], "server.max_weight", "disclosure.loss"]
    if values.get("privacy.placement") == "shared":
        gone += ["secure.neighbours"]
    if unit == "silo":
        return [*gone, *local, *author, "cohort.minimum"]
    values |= {"privacy.rate": values.get("privacy.rate", 0.1), "local.steps": 1}
    values |= {"split.by": "hash"}
    if values.get("privacy.placement") == "shared":
        values |= {"local.optimizer": "sgd", "local.momentum": 0.0, "local.weight_decay": 0.0}
        gone += ["local.schedule", "local.warmup", "local.keep_optimizer", "privacy.clipping", "privacy.bands"]
    else:
        gone += ["privacy.placement", "privacy.noise"]
    return [
        *gone,
        "data.max_examples",
        *whole,
        *(author if unit == "example" else []),
        "local.epochs",
        "local.max_grad_norm",
    ]


def secure(values: dict[str, object]) -> list[str]:
    """What a treaty must leave out for the sums that it asks for; adds what those need."""
    encrypted = ["secure.scheme", "secure.encrypted_share", "secure.key_holders"]
    sums = values.get("secure.sums", "open")
    if sums == "open":
        return [key for key in values if key.startswith("secure.") and key != "secure.sums"]
    if values.get("privacy.unit", "none") == "silo" and values["cohort.sampling"] == "poisson":
        values |= {"cohort.sampling": "full"}
    values |= {"cohort.size": 3} | ({} if "server.max_weight" in values else {"server.max_weight": 9.0})
    drawn = values["silos.by"] in ("dirichlet", "quantity", "iid")
    uniform = values.get("server.weighting", "examples") == "uniform" or values.get("privacy.unit", "none") != "none"
    return [
        *(encrypted if sums == "masked" else []),
        *([] if drawn else ["silos.names", "silos.members"]),
        *(["server.max_weight"] if uniform else []),
        "cohort.minimum",
        "disclosure.holdings",
        "data.keep",
    ]


def spelled(x: object) -> str:
    """Any value that TOML has, in TOML."""
    if isinstance(x, dict):
        return "{" + ", ".join(f"{toml.value(key)} = {spelled(value)}" for key, value in x.items()) + "}"
    if isinstance(x, list):
        return f"[{', '.join(map(spelled, x))}]"
    return x.isoformat() if isinstance(x, datetime.date | datetime.time) else toml.value(x)


anything = st.recursive(
    st.text(st.characters(codec="utf-8"), max_size=8)
    | st.integers()
    | st.floats()
    | st.booleans()
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.sampled_from(["all-linear", "column:", "memory", "given", "auto", 2**63, -(2**63), 1e308, 5e-324, -0.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def read(text: str) -> Treaty | FoedusError:
    """What comes of a text: a treaty that survives its own words, or one of our errors; anything else is raised."""
    try:
        treaty = parse(text)
    except (TreatyError, GuaranteeError) as error:
        assert error.expected and error.came and error.do and str(error)
        return error
    assert parse(treaty.resolved()) == treaty
    return treaty


@QUICK
@given(st.text())
def test_any_text_gives_a_treaty_or_one_of_our_errors(text):
    read(text)


@QUICK
@given(st.text("[]{}=\".#\n\\'abtreylocsn_-:, 0123456789", max_size=60))
def test_any_text_of_tomls_own_signs_gives_a_treaty_or_one_of_our_errors(text):
    read(text)


@QUICK
@given(st.binary(max_size=60))
def test_any_bytes_in_a_file_give_a_treaty_or_one_of_our_errors(tmp_path_factory, blob):
    from foedus.treaty import load

    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(blob)
    try:
        load(path)
    except (TreatyError, GuaranteeError) as error:
        assert str(error)


@settings(QUICK, max_examples=600)
@given(st.sampled_from([*GOOD, "treaty.format"]), anything, st.sampled_from(EXAMPLES))
def test_any_value_at_any_key_gives_a_treaty_or_one_of_our_errors(key, value, example):
    tables = parse(example).tables()
    section, _, name = key.partition(".")
    tables.setdefault(section, {})[name] = value
    text = "\n".join(
        f"[{section}]\n" + "\n".join(f"{key} = {spelled(x)}" for key, x in table.items())
        for section, table in tables.items()
    )
    read(text)


@settings(QUICK, max_examples=300)
@given(st.sampled_from(EXAMPLES), st.integers(0), st.integers(0, 40), st.text(max_size=10))
def test_a_treaty_with_a_piece_torn_out_or_put_in_gives_a_treaty_or_one_of_our_errors(example, place, length, piece):
    place %= len(example)
    read(example[:place] + piece + example[place + length :])


@settings(QUICK, max_examples=300)
@given(st.dictionaries(st.sampled_from([*SECTIONS, "privacy", "x"]) | st.text(), anything, max_size=6))
def test_any_plain_values_give_a_treaty_or_one_of_our_errors(tables):
    try:
        from_dict(tables)
    except (TreatyError, GuaranteeError) as error:
        assert str(error)


@settings(QUICK, max_examples=200)
@given(treaties())
def test_every_treaty_survives_its_own_words(treaty):
    again = parse(treaty.resolved())
    assert again == treaty
    assert hash(again) == hash(treaty)
    assert again.digest() == treaty.digest()
    assert again.resolved() == treaty.resolved()


@settings(QUICK, max_examples=300)
@given(treaties(), st.data())
def test_the_digest_tells_any_two_treaties_apart_except_by_their_speed(treaty, data):
    tables = treaty.tables()
    dotted = data.draw(st.sampled_from(sorted(f"{s}.{key}" for s in tables for key in tables[s] if key != "format")))
    try:
        other = treaty.replace(**{dotted: data.draw(GOOD[dotted])})
    except TreatyError:
        assume(False)
    if dotted.startswith("performance."):
        assert other.digest() == treaty.digest()
    else:
        assert (other.digest() == treaty.digest()) == (other == treaty)


@settings(QUICK, max_examples=100)
@given(treaties(), st.randoms())
def test_two_spellings_of_a_treaty_have_one_digest(treaty, random):
    tables = treaty.tables()
    sections = random.sample(sorted(tables), len(tables))
    text = "".join(
        f"{section}.{key}={spelled(tables[section][key])} # a remark\n"
        for section in sections
        for key in random.sample(sorted(tables[section]), len(tables[section]))
    )
    assert parse(text).digest() == treaty.digest()
    assert parse(text) == treaty


def test_the_strategies_know_every_key():
    keys = {f"{section}.{key}" for section, cls in SECTIONS.items() for key in cls.model_fields}
    assert keys == {*GOOD, "treaty.format"}
