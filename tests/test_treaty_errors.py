"""Every way we know to get a treaty wrong, as one table: what is written, and the three parts that come of it."""

import pytest

from foedus.errors import FoedusError, TreatyError
from foedus.treaty import Mistakes, Treaty, from_dict, load, parse

GOOD = {
    "treaty": {"name": '"small"'},
    "model": {"base": '"tiny:gpt2"'},
    "data": {"source": '"posts.csv"', "domain": '"topic"'},
    "silos": {"by": '"domain"'},
    "algorithm": {"rounds": "5"},
    "local": {"steps": "2"},
}


def written(**changes: str | None) -> str:
    """A good treaty's text with some keys (`section__key`) as raw TOML; None takes a key, or a section, out."""
    tables = {section: dict(table) for section, table in GOOD.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key and value is not None:
            tables.setdefault(section, {})[key] = value
        elif key:
            del tables[section][key]
        else:
            del tables[section]
    return "\n".join(
        f"[{section}]\n" + "\n".join(f"{key} = {value}" for key, value in table.items())
        for section, table in tables.items()
    )


DIRICHLET = {"silos__by": '"dirichlet"', "silos__count": "4", "data__label": '"topic"'}

BAD = {
    # what is not there, and what should not be
    "no name": (
        written(treaty__name=None, treaty__seed="1"),
        ("[treaty] name", "1 to 80 characters", "nothing", 'Add name = "newsgroups" (for example) under [treaty].'),
    ),
    "no model section": (
        written(model=None),
        ("[model] base", "a text in quotes", "no section [model]", 'Add base = "smollm2-135m-instruct"'),
    ),
    "no rounds": (
        written(algorithm__rounds=None),
        ("[algorithm] rounds", "an integer ≥ 1", "nothing", "Add rounds = 10 (for example) under [algorithm]."),
    ),
    "no silos section": (
        written(silos=None),
        ("[silos] by", '"domain", "author", "label"', "no section [silos]", 'Add by = "domain"'),
    ),
    "no source": (
        written(data__source=None),
        ("[data] source", "a text in quotes", "nothing", 'Add source = "20newsgroups"'),
    ),
    "a misspelled key": (
        written(local__optimiser='"sgd"'),
        ("[local] optimiser", "a key that [local] has", '"optimiser"', 'Did you mean "optimizer"?'),
    ),
    "a key of another section": (
        written(local__rounds="3"),
        ("[local] rounds", "a key that [local] has", '"rounds"', "It belongs under [algorithm]."),
    ),
    "a key of two other sections": (
        written(model__momentum="0.9"),
        (
            "[model] momentum",
            "a key that [model] has",
            '"momentum"',
            "It belongs under [alignment] or [local] or [server].",
        ),
    ),
    "pseudo-labels without a topic head": (
        written(topics__pseudo_labels="0.9"),
        (
            "[topics] pseudo_labels",
            "pseudo_labels only with [topics] weight",
            "pseudo_labels = 0.9 with weight = 0.0",
            "Remove pseudo_labels, or add weight = 0.1 (for example) in [topics].",
        ),
    ),
    "a section of another algorithm": (
        written(alignment__weight="0.1"),
        (
            "[alignment] weight",
            'weight only with [algorithm] name "alignment"',
            'weight = 0.1 with name = "fedavg"',
            'Remove weight, or set name = "alignment" in [algorithm].',
        ),
    ),
    "an odd number of features": (
        written(algorithm__name='"alignment"', alignment__public_text='"friends"', alignment__features="129"),
        ("[alignment] features", "an even integer ≥ 10", "129 (integer)", "features = 128"),
    ),
    "something else to scrub": (
        written(data__scrub='["faces"]'),
        ("[data] scrub", 'true, or a list of distinct "addresses", "names", "urls"', '["faces"] (list)', "Known:"),
    ),
    "a domain at two silos": (
        written(silos__members='[["a", "b"], ["b"]]', silos__names='["x", "y"]'),
        ("[silos] members", "a list with a list of names for each silo", "(list)", "members ="),
    ),
    "a key unlike any": (
        written(split__zzz="1"),
        ("[split] zzz", "a key that [split] has", '"zzz"', "Known: by, test, validation."),
    ),
    "a misspelled section": (
        written(algoritm__rounds="3"),
        ("[algoritm]", "a section that treaties have", "[algoritm]", 'Did you mean "algorithm"?'),
    ),
    "a key before any section": (
        "rounds = 3\n" + written(),
        ("rounds", "every key inside a section", "rounds = 3 (integer) outside any", "Move it under [algorithm]."),
    ),
    "an unknown key before any section": (
        "verbose = true\n" + written(),
        ("verbose", "every key inside a section", "verbose = true (boolean)", "Remove it, or name its section."),
    ),
    "a section that is a value": (
        'split = "time"\n' + written(),
        ("[split]", "a section [split] of keys", 'split = "time" (text)', "Open it with a line [split]."),
    ),
    "a section that is a list of sections": (
        written() + "\n[[cohort]]\nminimum = 2",
        ("[cohort]", "a section [cohort] of keys", "cohort = [", "Open it with a line [cohort]."),
    ),
    "a section inside a section": (
        written() + "\n[local.optimizer]\nname = 'sgd'",
        ("[local] optimizer", 'one of "adamw", "sgd"', "{...} (table)", 'Write, for example, optimizer = "adamw"'),
    ),
    "a threshold of sums in the open": (
        written(secure__threshold="3"),
        ("[secure] threshold", 'threshold only with [secure] sums "masked"', 'sums = "open"', "Remove threshold"),
    ),
    "a word of no size that words have": (
        written(secure__sums='"masked"', server__weighting='"uniform"', secure__word="24"),
        ("[secure] word", "one of 16, 32, 64", "24 (integer)", "Write, for example, word = 32"),
    ),
    "a word in quotes": (
        written(secure__sums='"masked"', server__weighting='"uniform"', secure__word='"32"'),
        ("[secure] word", "one of 16, 32, 64", '"32" (text)', "Write it without quotes, for example word = 32."),
    ),
    "a charter": (
        written(charter__max_rounds="3"),
        ("[charter]", "only sections that this version honours", "[charter]", "its own charter.toml"),
    ),
    # types
    "an integer in quotes": (
        written(algorithm__rounds='"8"'),
        ("[algorithm] rounds", "an integer ≥ 1", '"8" (text)', "Write it without quotes, for example rounds = 10."),
    ),
    "a number in quotes": (
        written(local__lr='"1e-3"'),
        ("[local] lr", "a number > 0", '"1e-3" (text)', "Write it without quotes, for example lr = 0.001."),
    ),
    "a boolean in quotes": (
        written(disclosure__loss='"no"'),
        ("[disclosure] loss", "true or false", '"no" (text)', "Write it without quotes, for example loss = true."),
    ),
    "a boolean for an integer": (
        written(local__batch="true"),
        ("[local] batch", "an integer ≥ 1", "true (boolean)", "Write, for example, batch = 8, or leave it out."),
    ),
    "an integer for a boolean": (
        written(adapter__embeddings="1"),
        ("[adapter] embeddings", "true or false", "1 (integer)", "Write, for example, embeddings = false"),
    ),
    "a float for an integer": (
        written(local__steps="2.0"),
        ("[local] steps", "an integer ≥ 1", "2.0 (float)", "Write, for example, steps = 20"),
    ),
    "a boolean for a number": (
        written(local__lr="true"),
        ("[local] lr", "a number > 0", "true (boolean)", "Write, for example, lr = 0.001"),
    ),
    "a number for a text": (
        written(model__base="135"),
        ("[model] base", "a text in quotes, on one line", "135 (integer)", 'base = "smollm2-135m-instruct"'),
    ),
    "a date": (
        written(treaty__seed="2024-05-01"),
        ("[treaty] seed", "an integer ≥ 0", "(date)", "Write, for example, seed = 0"),
    ),
    "an empty text": (
        written(data__source='""'),
        ("[data] source", "a text in quotes, on one line", '"" (text)', 'Write, for example, source = "20newsgroups"'),
    ),
    "a list of numbers for columns": (
        written(data__text="[1, 2]"),
        ("[data] text", "a column name, or a list of distinct", "[1, 2] (list)", 'Write, for example, text = "text"'),
    ),
    "no columns": (
        written(data__text="[]"),
        ("[data] text", "a list of distinct column names", "[] (list)", 'text = "text"'),
    ),
    "one domain, not in a list": (
        written(data__keep='"sci.med"'),
        ("[data] keep", "a list of distinct domains", '"sci.med" (text)', 'keep = ["sci.med", "sci.space"]'),
    ),
    # ranges
    "a name with a space": (
        written(treaty__name='"My run"'),
        ("[treaty] name", "a-z, 0-9", '"My run" (text)', 'Write, for example, name = "newsgroups".'),
    ),
    "a name that is a folder above": (
        written(treaty__name='".."'),
        ("[treaty] name", "a letter or digit among them", '".." (text)', 'name = "newsgroups"'),
    ),
    "a name of 81 characters": (
        written(treaty__name=f'"{"a" * 81}"'),
        ("[treaty] name", "1 to 80 characters", '"aaa', 'name = "newsgroups"'),
    ),
    "a format of the future": (
        written(treaty__format="2"),
        ("[treaty] format", "an integer 1", "2 (integer)", "format = 1"),
    ),
    "a negative seed": (
        written(treaty__seed="-1"),
        ("[treaty] seed", "an integer ≥ 0", "-1 (integer)", "seed = 0"),
    ),
    "a window of 7 tokens": (
        written(model__max_length="7"),
        ("[model] max_length", "an integer ≥ 8 and ≤ 8192", "7 (integer)", "max_length = 128"),
    ),
    "a rank of 0": (
        written(adapter__rank="0"),
        ("[adapter] rank", "an integer ≥ 1 and ≤ 1024", "0 (integer)", "rank = 8"),
    ),
    "certain dropout": (
        written(adapter__dropout="1.0"),
        ("[adapter] dropout", "a number ≥ 0 and < 1", "1.0 (float)", "dropout = 0.0"),
    ),
    "no rounds at all": (
        written(algorithm__rounds="0"),
        ("[algorithm] rounds", "an integer ≥ 1", "0 (integer)", "rounds = 10"),
    ),
    "a learning rate of 0": (
        written(local__lr="0"),
        ("[local] lr", "a number > 0", "0 (integer)", "lr = 0.001"),
    ),
    "an infinite learning rate": (
        written(server__lr="inf"),
        ("[server] lr", "a number > 0", "inf (float)", "lr = 1.0"),
    ),
    "a learning rate that is no number": (
        written(local__lr="nan"),
        ("[local] lr", "a number > 0", "nan (float)", "lr = 0.001"),
    ),
    "beta1 of 1": (
        written(server__optimizer='"adam"', server__beta1="1.0"),
        ("[server] beta1", "a number ≥ 0 and < 1", "1.0 (float)", "beta1 = 0.9"),
    ),
    "beta2 above 1": (
        written(server__optimizer='"yogi"', server__beta2="1.5"),
        ("[server] beta2", "a number ≥ 0 and < 1", "1.5 (float)", "beta2 = 0.99"),
    ),
    "tau of 0": (
        written(server__optimizer='"adam"', server__tau="0.0"),
        ("[server] tau", "a number > 0", "0.0 (float)", "tau = 0.001"),
    ),
    "a rate above 1": (
        written(cohort__sampling='"poisson"', cohort__rate="1.5"),
        ("[cohort] rate", "a number > 0 and ≤ 1", "1.5 (float)", "rate = 0.5"),
    ),
    "an integer of thousands of digits": (
        written(treaty__seed="0x" + "f" * 5000),
        ("[treaty] seed", "an integer ≥ 0", "thousands of digits (integer)", "seed = 0"),
    ),
    "half a silo side by side": (
        written(performance__cohort_batch="0"),
        ("[performance] cohort_batch", '"auto" or an integer ≥ 1', "0 (integer)", 'cohort_batch = "auto"'),
    ),
    # names of things
    "an unknown task": (
        written(model__task='"causal_lm"'),
        ("[model] task", 'one of "causal-lm", "masked-lm"', '"causal_lm" (text)', 'Did you mean "causal-lm"?'),
    ),
    "an unknown adapter": (
        written(adapter__kind='"lora2"'),
        ("[adapter] kind", 'one of "lora", "full"', '"lora2" (text)', 'Did you mean "lora"?'),
    ),
    "an unknown algorithm": (
        written(algorithm__name='"FedAvg"'),
        ("[algorithm] name", 'one of "fedavg", "fedprox"', '"FedAvg" (text)', 'Did you mean "fedavg"?'),
    ),
    "an unknown partition": (
        written(silos__by='"domian"'),
        ("[silos] by", 'one of "domain"', '"domian" (text)', 'Did you mean "domain"?'),
    ),
    "a partition by no column": (
        written(silos__by='"column:"'),
        ("[silos] by", '"column:<name>"', '"column:" (text)', "Known: author, column:<name>"),
    ),
    "an unknown schedule": (
        written(local__schedule='"cosin"'),
        ("[local] schedule", 'one of "constant"', '"cosin" (text)', 'Did you mean "cosine"?'),
    ),
    "an unknown server optimizer": (
        written(server__optimizer='"adamw"'),
        ("[server] optimizer", 'one of "sgd", "momentum"', '"adamw" (text)', 'Did you mean "adam"?'),
    ),
    "an unknown precision": (
        written(performance__precision='"fp16"'),
        ("[performance] precision", 'one of "auto"', '"fp16" (text)', 'Did you mean "bf16"?'),
    ),
    "an unknown baseline": (
        written(evaluation__baselines='["base", "pool"]'),
        ("[evaluation] baselines", '"base", "local", "pooled"', '["base", "pool"]', 'Did you mean "pooled"?'),
    ),
    "a baseline twice": (
        written(evaluation__baselines='["base", "base"]'),
        ("[evaluation] baselines", "without repetition", '["base", "base"]', "Name each once."),
    ),
    "a silo name twice": (
        written(**DIRICHLET, silos__names='["a", "b", "c", "a"]'),
        ("[silos] names", "a list of distinct names", '["a", "b", "c", "a"]', 'names = ["north", "south"]'),
    ),
    "a silo name that is a path": (
        written(**DIRICHLET, silos__names='["a", "b", "c", "../d"]'),
        ("[silos] names", "fit for folders", '"../d"', "Use letters, digits"),
    ),
    "silo names that differ in case": (
        written(**DIRICHLET, silos__names='["a", "b", "c", "A"]'),
        ("[silos] names", "differ in lower case too", '["a", "b", "c", "A"]', "Rename one"),
    ),
    "a name for a given silo that is a path": (
        written(data=None, silos__by='"given"', silos__names='["a", "../b"]'),
        ("[silos] names", "fit for folders", '"../b"', "Use letters, digits"),
    ),
    "labels of no column": (
        written(data__labels='["a", "b"]'),
        ("[data] label", "label, which [data] labels", "none", "Add label"),
    ),
    "at most fewer examples than at least": (
        written(silos__min_examples="50", data__max_examples="20"),
        ("[data] max_examples", "≥ min_examples", "max_examples = 20 with [silos] min_examples = 50", "Lower the one"),
    ),
    "more silos in a cohort than named": (
        written(silos__names='["a", "b"]', cohort__minimum="3"),
        ("[cohort] minimum", "minimum ≤ 2", "3", "Set minimum = 2 or less."),
    ),
    "a domain twice": (
        written(data__keep='["a", "a"]'),
        ("[data] keep", "a list of distinct domains", '["a", "a"] (list)', "Write, for example, keep"),
    ),
    # what does not go together
    "steps and epochs": (
        written(local__epochs="1"),
        ("[local] steps", "exactly one of steps and epochs", "both", "Remove one of them."),
    ),
    "neither steps nor epochs": (
        written(local__steps=None, local__lr="0.1"),
        ("[local] steps", "exactly one of steps and epochs", "neither", "Add steps = 20 (for example) under [local]."),
    ),
    "mu under fedavg": (
        written(algorithm__mu="0.1"),
        ("[algorithm] mu", 'mu only with [algorithm] name "fedprox"', 'mu = 0.1 with name = "fedavg"', "Remove mu, or"),
    ),
    "local momentum under adamw": (
        written(local__momentum="0.9"),
        ("[local] momentum", 'momentum only with [local] optimizer "sgd"', "momentum = 0.9", "Remove momentum, or"),
    ),
    "server momentum under sgd": (
        written(server__momentum="0.9"),
        ("[server] momentum", '[server] optimizer "momentum"', 'optimizer = "sgd"', 'set optimizer = "momentum"'),
    ),
    "beta2 under adagrad": (
        written(server__optimizer='"adagrad"', server__beta2="0.9"),
        ("[server] beta2", '"adam" or "yogi"', 'beta2 = 0.9 with optimizer = "adagrad"', "Remove beta2"),
    ),
    "a capped weight where all weigh the same": (
        written(server__weighting='"uniform"', server__max_weight="10"),
        ("[server] max_weight", '[server] weighting "examples"', 'weighting = "uniform"', "Remove max_weight"),
    ),
    "a rank under full training": (
        written(adapter__kind='"full"', adapter__rank="8"),
        ("[adapter] rank", 'rank only with [adapter] kind "lora"', 'rank = 8 with kind = "full"', "Remove rank"),
    ),
    "targets under full training": (
        written(adapter__kind='"full"', adapter__targets='"attention"'),
        ("[adapter] targets", 'kind "lora"', 'targets = ["attention"] with kind = "full"', "Remove targets"),
    ),
    "a cohort's size under full participation": (
        written(cohort__size="2"),
        ("[cohort] size", '[cohort] sampling "fixed"', 'size = 2 with sampling = "full"', "Remove size"),
    ),
    "fixed sampling of no size": (
        written(cohort__sampling='"fixed"'),
        ("[cohort] size", 'size, which [cohort] sampling = "fixed" needs', "none", "Add size = 5"),
    ),
    "a rate under fixed sampling": (
        written(cohort__sampling='"fixed"', cohort__size="2", cohort__rate="0.5"),
        ("[cohort] rate", '[cohort] sampling "poisson"', "rate = 0.5", "Remove rate"),
    ),
    "Poisson sampling of no rate": (
        written(cohort__sampling='"poisson"'),
        ("[cohort] rate", 'rate, which [cohort] sampling = "poisson" needs', "none", "Add rate = 0.5"),
    ),
    "more silos in a cohort than there are": (
        written(**DIRICHLET, cohort__sampling='"fixed"', cohort__size="5"),
        ("[cohort] size", "size ≤ 4, the number of silos", "5", "Set size = 4 or less."),
    ),
    "more silos in a cohort than domains kept": (
        written(data__keep='["a", "b"]', cohort__sampling='"fixed"', cohort__size="3"),
        ("[cohort] size", "size ≤ 2, the number of silos", "3", "Set size = 2 or less."),
    ),
    "a minimum above the cohort's size": (
        written(cohort__sampling='"fixed"', cohort__size="2", cohort__minimum="3"),
        ("[cohort] minimum", "minimum ≤ 2, the most silos that a round can have", "3", "Set minimum = 2 or less."),
    ),
    "a minimum above the silos": (
        written(**DIRICHLET, cohort__minimum="5"),
        ("[cohort] minimum", "minimum ≤ 4", "5", "Set minimum = 4 or less."),
    ),
    "a drawn partition without a count": (
        written(silos__by='"iid"'),
        ("[silos] count", 'count, which [silos] by = "iid" needs', "none", "Add count = 10 (for example)"),
    ),
    "a count of domains": (
        written(silos__count="3"),
        ("[silos] count", '"dirichlet" or "quantity" or "iid"', 'count = 3 with by = "domain"', "Remove count"),
    ),
    "alpha of an even partition": (
        written(silos__by='"iid"', silos__count="3", silos__alpha="0.1"),
        ("[silos] alpha", '"dirichlet" or "quantity"', 'alpha = 0.1 with by = "iid"', "Remove alpha"),
    ),
    "too few names": (
        written(**DIRICHLET, silos__names='["a", "b"]'),
        ("[silos] names", "as many names as silos, 4", "2", "Set count = 2, or give 4 names."),
    ),
    "silos by domain without a domain": (
        written(data__domain=None),
        ("[data] domain", 'domain, which [silos] by = "domain" needs', "none", 'Add domain = "domain"'),
    ),
    "silos by author without an author": (
        written(silos__by='"author"'),
        ("[data] author", 'author, which [silos] by = "author" needs', "none", 'Add author = "author"'),
    ),
    "silos by label without a label": (
        written(silos__by='"label"'),
        ("[data] label", 'label, which [silos] by = "label" needs', "none", 'Add label = "label"'),
    ),
    "label skew without a label": (
        written(silos__by='"dirichlet"', silos__count="4", data__domain=None),
        ("[data] label", 'label, which [silos] by = "dirichlet" needs', "none", 'Add label = "label"'),
    ),
    "a split by time without a timestamp": (
        written(split__by='"time"'),
        ("[data] timestamp", 'timestamp, which [split] by = "time" needs', "none", 'Add timestamp = "created_utc"'),
    ),
    "a classifier without labels": (
        written(model__task='"sequence-classification"'),
        ("[data] label", '[model] task = "sequence-classification"', "none", 'Add label = "label"'),
    ),
    "seq2seq without a target": (
        written(model__task='"seq2seq"'),
        ("[data] target", 'target, which [model] task = "seq2seq" needs', "none", 'Add target = "summary"'),
    ),
    "a target that nothing reads": (
        written(data__target='"summary"'),
        (
            "[data] target",
            'target only with [model] task "seq2seq"',
            'task = "causal-lm"',
            "Remove target, or set task",
        ),
    ),
    "domains kept of an unnamed column": (
        written(silos__by='"author"', data__author='"who"', data__domain=None, data__keep='["a"]'),
        ("[data] domain", "domain, the column in which keep looks", "none", 'Add domain = "domain"'),
    ),
    "all of it held out": (
        written(split__validation="0.5", split__test="0.5"),
        ("[split] validation", "validation + test < 1", "1", "Lower one of them"),
    ),
    "nothing to validate on": (
        written(split__validation="0"),
        (
            "[split] validation",
            "validation > 0",
            "validation = 0 with [evaluation] every = 1",
            "every above rounds = 5",
        ),
    ),
    "two test sets": (
        written(data__test_source='"test.csv"', split__test="0.1"),
        ("[split] test", "test = 0 where [data] test_source", "test = 0.1", "Set test = 0 in [split]"),
    ),
    "warmup to the end": (
        written(local__warmup="5"),
        ("[local] warmup", "fewer rounds of warmup", "warmup = 5 with rounds = 5", "Set warmup to 4 at most"),
    ),
    "a file of silos that are given": (
        written(silos__by='"given"'),
        ("[silos] by", "a partition of the data source", 'by = "given" with source = "posts.csv"', "Choose another by"),
    ),
    "data in memory, partitioned": (
        written(data__source='"memory"'),
        ("[silos] by", 'by = "given" where there is no data source', '"domain"', "Name a [data] source"),
    ),
    "no data section, and a partition": (
        written(data=None, silos__by='"iid"', silos__count="3"),
        ("[silos] by", 'by = "given"', '"iid"', "hand the silos over in Python"),
    ),
    "data in memory and a test file": (
        written(data__source='"memory"', data__test_source='"test.csv"', silos__by='"given"'),
        ("[data] test_source", 'no test_source with source = "memory"', '"test.csv"', "Remove test_source"),
    ),
    # what is not TOML
    "JSON": (
        '{"treaty": {"name": "x"}}',
        ("", "TOML", "JSON", "[model] and base ="),
    ),
    "YAML": (
        "# a run\ntreaty:\n  name: x\n",
        ("", "TOML", "what looks like YAML (`treaty:`)", "Write key: value as key = value"),
    ),
    "a text without its end": (
        '[treaty]\nname = "x\n',
        ("line 2, column 10", "TOML", '`name = "x`', "texts in quotes"),
    ),
    "a word without quotes": (
        "[treaty]\nname = small\n",
        ("line 2, column 8", "TOML", "Invalid value: `name = small`", "texts in quotes"),
    ),
    "a key twice": (
        '[treaty]\nname = "x"\nname = "y"\n',
        ("line 3, column 11", "TOML", 'Cannot overwrite a value: `name = "y"`', "each key and section once"),
    ),
    "a section twice": (
        "[local]\nsteps = 1\n[local]\nbatch = 2\n",
        ("line 3, column 7", "TOML", "Cannot declare ('local',) twice: `[local]`", "each key and section once"),
    ),
    "an end that comes too soon": (
        "[local]\nbatch =",
        ("at its end", "TOML", "Invalid value: `batch =`", "key = value"),
    ),
    "brackets without end": (
        "x = " + "[" * 100_000,
        ("", "plain sections and keys", "brackets nested too deep", "Flatten it."),
    ),
    "an integer of 5,000 digits": (
        "[treaty]\nseed = " + "9" * 5000,
        ("", "TOML", "limit", "key = value"),
    ),
}


METHOD = {"algorithm__name": '"alignment"', "alignment__public_text": '"friends"'}
STORE = {"algorithm__name": '"knn-adapter"'}
CONTROLS = {"algorithm__name": '"scaffold"', "local__optimizer": '"sgd"'}
NAMED = {"silos__names": '["north", "south"]'}
SHARED_STEP = {
    "privacy__unit": '"example"', "privacy__epsilon": "8.0", "privacy__rate": "0.1", "privacy__placement": '"shared"',
    "privacy__noise": '"discrete-gaussian"', "local__steps": "1", "local__optimizer": '"sgd"',
    "secure__corrupt": "0.01",
}  # fmt: skip
BAD_METHODS = {
    "topics without labels": (lambda: written(topics__weight="0.1"), "label, which [topics] weight"),
    "damaged copies without labels": (lambda: written(topics__denoise="0.1"), "label, which [topics] denoise"),
    "no bandwidths": (lambda: written(algorithm__name='"alignment"'), "public_text, which [algorithm] name"),
    "UDALM without labels": (lambda: written(algorithm__name='"udalm"', topics__weight="0.1"), "label, which"),
    "UDALM without a head": (lambda: written(algorithm__name='"udalm"', data__label='"l"'), "weight, which [udalm]"),
    "an error of no head": (lambda: written(**METHOD, alignment__attention='"error"'), "weight, which [alignment]"),
    "class means without labels": (lambda: written(**METHOD, alignment__head='"means"'), "label, which [alignment]"),
    "a head of class means that learns": (
        lambda: written(**METHOD, alignment__head='"means"', data__label='"l"', topics__weight="0.1"), "no topic loss"
    ),
    "surveys that tell who came": (
        lambda: written(**METHOD, **SILO, alignment__every="2", cohort__sampling='"poisson"', cohort__rate="0.5",
                        privacy__hide_cohort="true"), "every = 1 with a hidden cohort",
    ),
    "a gamma of no attention": (lambda: written(**METHOD, alignment__gamma="1.0"), "gamma only with [alignment]"),
    "examples that count twice": (
        lambda: written(**METHOD, alignment__attention='"entropy"', alignment__base="1"), "in one place"
    ),
    "a ratio of no noise": (lambda: written(**METHOD, alignment__noise_ratio="2.0"), "noise_ratio only with [privacy]"),
    "features of a classifier": (
        lambda: written(**METHOD, model__task='"sequence-classification"', data__label='"l"'), "task ="
    ),
    "synthetic texts under a mask": (
        lambda: written(algorithm__name='"fedlap"', model__base='"tiny:bert"', model__task='"masked-lm"'), "task ="
    ),
    "controls of Adam": (lambda: written(algorithm__name='"scaffold"'), "plain SGD"),
    "controls with momentum": (lambda: written(**CONTROLS, local__momentum="0.9"), "plain SGD"),
    "controls of clipped steps": (lambda: written(**CONTROLS, local__max_grad_norm="1.0"), "plain SGD"),
    "warm for ever": (lambda: written(**CONTROLS, scaffold__warm="5"), "fewer first rounds"),
    "a target that is no silo": (lambda: written(**METHOD, **NAMED, alignment__target='"west"'), "the name of a silo"),
    "a target in a secret sum": (lambda: secured(**METHOD, alignment__target='"north"'), "no target in secure sums"),
    "nobody with labels": (
        lambda: written(**NAMED, data__label='"l"', data__unlabelled='["north", "south"]'), "a silo with labels"
    ),
    "no labels to be without": (lambda: written(**NAMED, data__unlabelled='["north"]'), "label, which [data] unlab"),
    "no topics to lose": (
        lambda: written(data__missing="0.1", data__missing_kind='"topic"'), "label, which [data] missing_kind"
    ),
    "a kind of nothing missing": (lambda: written(data__missing_kind='"token"'), "missing_kind only with [data]"),
    "classes that are missing": (
        lambda: written(model__task='"sequence-classification"', data__label='"l"', data__missing="0.1"),
        "missing only with [model] task",
    ),
    "members without names": (lambda: written(silos__members='[["a"], ["b"]]'), "a name for each of 2 silos"),
    "members of drawn silos": (
        lambda: written(**DIRICHLET, silos__members='[["a"]]'), "members of silos by a column"
    ),
    "members that are not kept": (
        lambda: written(**NAMED, silos__members='[["a"], ["b"]]', data__keep='["a"]'), "every member of a silo"
    ),
    "members in no folder": (
        lambda: written(silos__names='["a/b"]', silos__members='[["a"]]'), "fit for folders"
    ),
    "a cut that is trained": (lambda: written(model__layers="2", adapter__kind='"full"'), "no layers with"),
    "surveys beside shares": (lambda: secured(**METHOD, **SHARED_STEP), 'placement = "silo" with this algorithm'),
    "controls beside shares": (
        lambda: secured(**CONTROLS | SHARED_STEP), 'placement = "silo" with this algorithm'
    ),
    "surveys beside bands": (lambda: written(**PRIVATE, **METHOD, privacy__bands="2"), "bands = 1 beside surveys"),
    "whole silos alone": (
        lambda: written(algorithm__name='"alone"', privacy__unit='"silo"', privacy__epsilon="8.0"), 'unit "example"'
    ),
    "whole silos in synthetic texts": (
        lambda: written(algorithm__name='"fedlap"', privacy__unit='"silo"', privacy__epsilon="8.0"), 'unit "example"'
    ),
    "synthetic texts in a secret sum": (lambda: secured(algorithm__name='"fedlap"'), "a combination that holds"),
    "a store of private text": (lambda: written(**PRIVATE, **STORE), "public_text to tune against"),
    "answers of no public store": (lambda: written(**STORE, knn__answers='"public"'), "public_text, which [knn]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_METHODS)
def test_a_method_that_would_not_hold_is_refused(name):
    text, expected = BAD_METHODS[name]
    (problem,) = problems(text())
    assert expected in problem.expected
    assert problem.came and problem.do.endswith(".")


def test_the_table_of_methods_starts_from_good_treaties():
    for good in (METHOD, STORE, CONTROLS, NAMED, METHOD | PRIVATE):
        assert isinstance(parse(written(**good)), Treaty)
    assert isinstance(parse(secured(**SHARED_STEP)), Treaty)
    assert isinstance(parse(secured(**METHOD)), Treaty)
    assert isinstance(parse(written(**METHOD, privacy__unit='"silo"', privacy__epsilon="8.0")), Treaty)


def problems(text: str) -> tuple[TreatyError, ...]:
    with pytest.raises(Mistakes) as caught:
        parse(text)
    return caught.value.problems


@pytest.mark.parametrize("case", BAD)
def test_a_bad_treaty_is_told_what_was_expected_what_came_and_what_to_do(case):
    text, (where, expected, came, do) = BAD[case]
    (problem,) = problems(text)
    assert problem.where == where
    assert expected in problem.expected
    assert came in problem.came
    assert do in problem.do


def test_the_table_starts_from_a_good_treaty():
    assert isinstance(parse(written()), Treaty)
    assert len(BAD) >= 45


@pytest.mark.parametrize("case", BAD)
def test_a_single_mistake_speaks_for_itself_with_the_name_of_its_file(case):
    text, _ = BAD[case]
    with pytest.raises(TreatyError) as caught:
        parse(text, "my.toml")
    error, (problem,) = caught.value, caught.value.problems
    assert (error.expected, error.came, error.do) == (problem.expected, problem.came, problem.do)
    assert str(error).startswith(f"my.toml: {problem.where}".rstrip(": "))
    assert "\n" not in str(error)


def test_all_mistakes_are_told_at_once():
    text = written(
        treaty__name='"X Y"', local__lr="0", locl__steps="1", algorithm__mu="1.0", cohort__sampling='"fixed"'
    )
    found = problems(text)
    assert [problem.where for problem in found] == [
        "[locl]", "[treaty] name", "[local] lr", "[algorithm] mu", "[cohort] size",
    ]  # fmt: skip
    with pytest.raises(TreatyError) as caught:
        parse(text, "my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: expected a sound treaty; got one with 5 mistakes.")
    assert all(str(problem) in message for problem in found)


def test_a_broken_key_brings_no_mistakes_that_only_follow_from_it():
    assert [p.where for p in problems(written(silos__by='"domian"', silos__count="3"))] == ["[silos] by"]
    assert [p.where for p in problems(written(local__steps='"2"'))] == ["[local] steps"]
    assert [p.where for p in problems(written(cohort__sampling='"fixd"', cohort__size="9"))] == ["[cohort] sampling"]


def test_every_problem_is_a_treaty_error_of_its_own():
    for text, _ in BAD.values():
        assert all(type(problem).__mro__.index(TreatyError) and problem.do for problem in problems(text))


PRIVATE = {"privacy__unit": '"example"', "privacy__epsilon": "8.0", "privacy__rate": "0.1"}
SILO = {"privacy__unit": '"silo"', "privacy__epsilon": "8.0"}
SHARED = {
    **PRIVATE, "privacy__placement": '"shared"', "privacy__noise": '"discrete-gaussian"', "secure__sums": '"masked"',
    "local__steps": "1", "local__optimizer": '"sgd"',
}  # fmt: skip
MANY_SILOS = {"silos__by": '"iid"', "silos__count": "100"}
SECURE = {
    "secure__sums": '"masked"', "secure__corrupt": "0.01", "server__weighting": '"uniform"', **MANY_SILOS,
}  # fmt: skip


def shared(**changes: str) -> str:
    """A treaty in which silos share the noise for examples, with changes."""
    return written(**SHARED | changes)


def secured(**changes: str) -> str:
    """A treaty of a hundred silos with masked sums, with changes."""
    return written(**SECURE | changes)


BAD_PRIVACY = {
    "epsilon without a unit": (written(privacy__epsilon="8.0"), "epsilon only with [privacy] unit"),
    "no measure": (written(privacy__unit='"silo"'), "exactly one of epsilon, noise_multiplier and noise_std"),
    "two measures": (written(**PRIVATE, privacy__noise_std="1.0"), "exactly one of epsilon"),
    "no clip and an epsilon": (written(**PRIVATE, privacy__max_norm='"none"'), "a clip, without which no noise"),
    "no rate": (written(privacy__unit='"example"', privacy__epsilon="8.0"), "rate, which [privacy] unit"),
    "epochs": (written(**PRIVATE, local__steps=None, local__epochs="1"), "a public number of steps"),
    "examples that put others out": (written(**PRIVATE, data__max_examples="5"), "one example more changes no other"),
    "a border in time": (
        written(**PRIVATE, split__by='"time"', data__timestamp='"t"'), "one example more changes no other"
    ),
    "a second clip": (written(**PRIVATE, local__max_grad_norm="1.0"), "one clip, that of [privacy]"),
    "weights that are counts": (written(**PRIVATE, server__weighting='"examples"'), 'weighting = "uniform"'),
    "bare losses": (written(**SILO, disclosure__loss="true"), "loss = false where whole silos"),
    "authors without a column": (
        written(**{**PRIVATE, "privacy__unit": '"author"'}), "author, which [privacy] unit = \"author\" needs"
    ),
    "groups without a size": (
        written(**{**PRIVATE, "privacy__unit": '"author"'}, data__author='"who"', privacy__sampling='"examples"'),
        "author_examples, the size of a group",
    ),
    "a hidden cohort of everybody": (written(**SILO, privacy__hide_cohort="true"), "independent coins"),
    "a minimum of sampled silos": (
        written(**SILO, cohort__sampling='"poisson"', cohort__rate="0.5", cohort__minimum="2"),
        "minimum = 1 with sampled",
    ),
    "noise inside silos from the server": (
        written(**PRIVATE, privacy__placement='"server"'), 'placement "silo" or "shared" for units inside silos'
    ),
    "discrete noise that is no share": (
        written(**PRIVATE, privacy__noise='"discrete-gaussian"'), 'noise = "gaussian" where each silo adds all of it'
    ),
    "shared noise for examples in the open": (shared(secure__sums='"open"'), 'sums = "masked" with'),
    "shared noise in encrypted sums": (shared(secure__sums='"encrypted"'), 'sums = "masked" with'),
    "shared noise after two steps": (shared(local__steps="2"), 'steps = 1 with placement = "shared"'),
    "shared noise after Adam": (shared(local__optimizer='"adamw"'), 'optimizer = "sgd" with'),
    "shared noise after momentum": (shared(local__momentum="0.9"), "momentum = 0.0 with"),
    "shared noise after decay": (shared(local__weight_decay="0.1"), "weight_decay = 0.0 with"),
    "a rate for whole silos": (written(**SILO, privacy__rate="0.1"), "rate only with [privacy] unit"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PRIVACY)
def test_a_privacy_section_that_would_not_hold_is_refused(name):
    text, expected = BAD_PRIVACY[name]
    assert any(expected in problem.expected for problem in problems(text)), [p.expected for p in problems(text)]


BAD_SUMS = {
    "the sum of two": (secured(cohort__minimum="2"), "minimum ≥ 3 with secure sums"),
    "no two honest silos": (secured(secure__corrupt="0.2", cohort__minimum="21"), "minimum ≥ 22 with secure sums"),
    "a share that floating point spells badly": (
        secured(secure__corrupt="0.29", cohort__minimum="30"), "minimum ≥ 31 with secure sums"
    ),
    "two silos": (
        secured(silos__count="2"), "at least 3 silos a round with secure sums"
    ),
    "a cohort of two": (
        secured(cohort__sampling='"fixed"', cohort__size="2"), "at least 3 silos a round with secure sums"
    ),
    "more than dropout leaves": (secured(cohort__minimum="91"), "minimum ≤ 90, the silos of a round"),
    "a word too small": (
        secured(silos__count="300", secure__word="16"), "each of 300 silos has 127 steps"
    ),
    "counts beside a sum": (secured(disclosure__holdings="true"), "holdings = false with secure sums"),
    "weights without end": (
        written(secure__sums='"masked"', server__weighting='"examples"'), "max_weight, for which a secure sum"
    ),
    "a hidden cohort": (
        secured(**SILO, cohort__sampling='"poisson"', cohort__rate="0.5", privacy__hide_cohort="true"),
        "no secret of who takes part",
    ),
    "coins under a guarantee on silos": (
        secured(**SILO, cohort__sampling='"poisson"', cohort__rate="0.5"), "a public number of silos a round"
    ),
    "no threshold between": (secured(secure__corrupt="0.4", secure__dropout="0.3"), "corrupt + 2 × dropout"),
    "one neighbour": (secured(secure__neighbours="1"), "neighbours ≥ 2"),
    "half the neighbours": (
        secured(secure__neighbours="32", secure__threshold="16"), "more than half of the 32 neighbours"
    ),
    "more than the neighbours": (
        secured(secure__neighbours="32", secure__threshold="33"), "more than half of the 32 neighbours"
    ),
    "groups of two": (secured(secure__group_size="2"), "groups of which 3 are left"),
    "groups below the minimum": (
        secured(cohort__minimum="5", secure__group_size="5", secure__dropout="0.2"),
        "groups of which 5 are left",
    ),
    "a group of more than all": (secured(secure__group_size="101"), "group_size ≤ 100"),
    "more holders than silos": (
        secured(secure__sums='"encrypted"', secure__key_holders="101"), "key_holders ≤ 100"
    ),
    "approximate sums": (
        secured(secure__sums='"encrypted"', secure__scheme='"ckks"'), 'scheme = "bfv" where the coordinator gets'
    ),
    "a key for masks": (secured(secure__key_holders="2"), "key_holders only with [secure] sums"),
    "floating-point shares of noise": (
        secured(**SILO, privacy__placement='"shared"', cohort__minimum="20"), "a combination that holds"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SUMS)
def test_secure_sums_that_would_hide_nothing_are_refused(name):
    text, expected = BAD_SUMS[name]
    (problem,) = [problem for problem in problems(text) if expected in problem.expected] or problems(text)
    assert expected in problem.expected
    assert problem.came and problem.do


def test_the_tables_of_sums_and_shares_start_from_good_treaties():
    assert parse(secured()).secure.sums == "masked"
    assert parse(shared()).privacy.placement == "shared"
    assert parse(shared(**MANY_SILOS, cohort__minimum="12")).cohort.minimum == 12


def test_where_sums_are_secure_three_silos_are_the_least_and_no_counts_stand_beside_them():
    treaty = parse(written(secure__sums='"masked"', server__max_weight="100"))
    assert (treaty.cohort.minimum, treaty.disclosure.holdings, treaty.disclosure.loss) == (3, False, True)
    assert parse(secured(cohort__minimum="7")).cohort.minimum == 7


def test_noise_for_units_inside_silos_is_added_there_unless_it_is_shared():
    assert parse(written(**PRIVATE)).privacy.placement == "silo"
    assert parse(written(**SILO)).privacy.placement == "server"


def test_shared_noise_in_the_open_is_a_rehearsal_that_only_whole_silos_may_have():
    assert parse(written(**SILO, privacy__placement='"shared"')).secure.sums == "open"


def test_where_somebody_is_protected_silos_let_out_neither_losses_nor_counts_unless_the_treaty_says_so():
    treaty = parse(written(**PRIVATE))
    assert (treaty.disclosure.loss, treaty.disclosure.holdings, treaty.server.weighting) == (False, False, "uniform")
    assert parse(written(**PRIVATE, disclosure__holdings="true")).disclosure.holdings


def test_a_missing_file_names_the_nearest_treaty_beside_it(tmp_path):
    (tmp_path / "newsgroups.toml").write_text(written())
    with pytest.raises(TreatyError, match='no such file. Did you mean "newsgroups.toml"?'):
        load(tmp_path / "newsgrups.toml")
    with pytest.raises(TreatyError, match="There is no folder"):
        load(tmp_path / "nowhere" / "x.toml")


def test_a_folder_is_not_a_treaty(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(TreatyError, match="expected a treaty's file; got a folder"):
        load(tmp_path / "runs")


def test_a_file_that_is_not_utf8_says_so(tmp_path):
    (tmp_path / "t.toml").write_bytes(b'[treaty]\npurpose = "caf\xe9"')
    with pytest.raises(TreatyError, match="a byte at 23 that is not UTF-8. Save it as UTF-8 text."):
        load(tmp_path / "t.toml")


def test_a_file_too_large_to_be_a_treaty_is_not_read(tmp_path):
    (tmp_path / "data.csv").write_bytes(b"\xff" * 1_000_001)
    with pytest.raises(TreatyError, match="more than 1,000,000 bytes. Name the treaty, not the data"):
        load(tmp_path / "data.csv")


def test_a_path_that_no_file_can_have_is_refused():
    with pytest.raises(TreatyError):
        load("a\0b.toml")


def test_windows_line_ends_and_a_byte_order_mark_are_no_mistake(tmp_path):
    (tmp_path / "t.toml").write_bytes(b"\xef\xbb\xbf" + written().replace("\n", "\r\n").encode())
    assert load(tmp_path / "t.toml") == parse(written()) == parse("\ufeff" + written())


def test_plain_values_of_odd_types_are_refused_like_any_other():
    good = parse(written()).tables()
    for odd in (object(), b"x", {1: 2}, {"a": {}}, [[]], 10**5000, -(10**400), "\ud800", {3}, 1j):
        for section, table in good.items():
            with pytest.raises(TreatyError):
                from_dict(good | {section: odd})
            for key in table:
                with pytest.raises(TreatyError):
                    from_dict(good | {section: table | {key: odd}})


def test_every_error_is_one_of_ours():
    assert issubclass(Mistakes, FoedusError)
