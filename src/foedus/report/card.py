"""The model card that travels with the adapter: Hugging Face's form, figures from the run's summary."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from .compare import TITLES, Comparison, Row, compare_all, figure, signed_percent, verdict
from .guarantee import guarantee_of, sections
from .words import ALGORITHMS, parameters_text, thousands

PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "seq2seq": "text2text-generation",
}
CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
ESCAPES = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]#~"} | {mark: f"&#{ord(mark)};" for mark in "<>|&"})
UNSTATED = "No privacy statement was recorded. Assume that updates were not protected."
SIMULATED = " would hold with real noise. The noise of this run was simulated, and nobody is protected."

Values = Mapping[str, Any]


def model_card(summary: Values, treaty_text: str) -> str:
    """The card as Markdown with a YAML head. `summary`: as in summary.json; `treaty_text`: the resolved treaty.

    What the summary does not hold (yet) is left out. Raises `tomllib.TOMLDecodeError` for text that is no TOML.
    """
    treaty = tomllib.loads(treaty_text)
    parts = [
        _head(summary, treaty),
        _what(summary, treaty),
        _how_trained(summary, treaty),
        _evaluated(summary),
        _privacy(summary),
        _limits(summary),
        f"## How to load it\n\n```python\n{loading_code(summary, treaty, '.')}\n```\n",
        _origin(summary, treaty_text),
    ]
    return "\n".join(part for part in parts if part)


def loading_code(summary: Values, treaty: Values, folder: str = "adapter") -> str:
    """Python that loads the result from `folder`, for a reader who has Transformers and PEFT."""
    task = _section(treaty, "model").get("task", "causal-lm")
    name, kind = _base_name(summary, treaty), (summary.get("adapter") or {}).get("kind", "lora")
    auto, quoted = CLASSES.get(task, "AutoModel"), json.dumps(folder)
    if kind == "full":
        return (
            f"from transformers import AutoTokenizer, {auto}\n\n"
            f"model = {auto}.from_pretrained({quoted})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({quoted})"
        )
    if "/" not in name:  # a name of foedus's own catalogue
        more = f", task={json.dumps(task)}" if task != "causal-lm" else ""
        more += f", labels={json.dumps(_labels(summary))}" if task == "sequence-classification" else ""
        return (
            "from foedus.lm.load import load_base\n"
            "from peft import PeftModel\n\n"
            f"base = load_base({json.dumps(name)}{more})\n"
            f"model = PeftModel.from_pretrained(base.model, {quoted})\n"
            "tokenizer = base.tokenizer"
        )
    labels = f", num_labels={len(_labels(summary))}" if task == "sequence-classification" else ""
    return (
        "from peft import PeftModel\n"
        f"from transformers import AutoTokenizer, {auto}\n\n"
        f"base = {auto}.from_pretrained({json.dumps(name)}{labels})\n"
        f"model = PeftModel.from_pretrained(base, {quoted})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})"
    )


def adapter_text(adapter: Values, model: Values) -> str:
    """The adapter in words: "LoRA of rank 8 (2.44 million of 135 million parameters)"."""
    kind = adapter.get("kind")
    if not kind:
        return ""
    words = "full-parameter training" if kind == "full" else "LoRA" if kind == "lora" else str(kind)
    if kind != "full" and adapter.get("rank"):
        words += f" of rank {adapter['rank']}"
    if adapter.get("parameters") and model.get("parameters"):
        words += f" ({parameters_text(adapter['parameters'])} of {parameters_text(model['parameters'])} parameters)"
    return words


def _head(summary: Values, treaty: Values) -> str:
    """YAML; every value is spelled as JSON, which is YAML too and quotes whatever a name may hold."""
    model, adapter = summary.get("model") or {}, summary.get("adapter") or {}
    fields = {
        "base_model": model.get("hub") or _base_name(summary, treaty),
        "library_name": "transformers" if adapter.get("kind") == "full" else "peft",
        "pipeline_tag": PIPELINES.get(_section(treaty, "model").get("task", "causal-lm")),
        "license": model.get("licence"),
        "tags": ["federated-learning", "foedus", *(["lora"] if adapter.get("kind", "lora") == "lora" else [])],
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value]
    return "\n".join(["---", *lines, "---", ""])


def _what(summary: Values, treaty: Values) -> str:
    name = summary.get("name") or _section(treaty, "treaty").get("name") or "A federated adapter"
    purpose = _section(treaty, "treaty").get("purpose")
    silos = summary.get("silos")
    where = f"{silos} silos, each of which kept its text" if silos else "silos that kept their text"
    lines = [f"# {_inline(str(name))}", ""]
    if purpose:
        lines += [_inline(str(purpose)), ""]
    result = "The model was" if (summary.get("adapter") or {}).get("kind") == "full" else "This adapter was"
    outcome = _inline(" ".join(verdict(_evaluation(summary))))
    lines += [f"{result} trained with Foedus across {where}. {outcome}", ""]
    return "\n".join(lines)


def _how_trained(summary: Values, treaty: Values) -> str:
    model, adapter = summary.get("model") or {}, summary.get("adapter") or {}
    local, algorithm = _section(treaty, "local"), summary.get("algorithm") or _section(treaty, "algorithm")
    each = next((f"{local[unit]} {unit}" for unit in ("steps", "epochs") if local.get(unit)), "")
    rows = {
        "Base model": _base_name(summary, treaty),
        "Trained": adapter_text(adapter, model),
        "Algorithm": ALGORITHMS.get(str(algorithm.get("name")), algorithm.get("name")),
        "Rounds": summary.get("rounds") or _section(treaty, "algorithm").get("rounds"),
        "In each round": ", ".join(
            word
            for word in (each, f"batch {local['batch']}" if "batch" in local else "", str(local.get("optimizer", "")))
            if word
        ),
        "Silos": summary.get("silos"),
        "Text": _section(treaty, "data").get("source"),
        "Examples trained on": _examples(summary),
        "Differential privacy": _in_a_cell(summary),
        "Seed": summary.get("seed"),
    }
    lines = [f"| {key} | {_inline(str(value))} |" for key, value in rows.items() if value not in (None, "")]
    return "\n".join(["## How it was trained", "", "| | |", "|---|---|", *lines, ""])


def _in_a_cell(summary: Values) -> str:
    given = guarantee_of(summary.get("privacy") or {})
    return (
        f"{given.short}{' (simulated noise: nobody is protected)' if given.simulated else ''}" if given.stated else ""
    )


def _examples(summary: Values) -> str:
    held = (summary.get("holdings") or {}).values()
    total = sum(int(facts.get("train") or 0) for facts in held)
    return thousands(total) if total else ""


def _evaluated(summary: Values) -> str:
    tables = [_table(comparison) for comparison in compare_all(_evaluation(summary))]
    if not tables:
        return ""
    note = "On held-out test text. Silos alone: each silo's own model on that silo's text."
    return "\n".join(["## Evaluation", "", note, "", *tables])


def _table(c: Comparison) -> str:
    heads = [TITLES[phase] for phase in c.phases]
    lines = [
        f"### {c.title}",
        "",
        f"| | {' | '.join(heads)} | Federated vs. base |",
        f"|---|{'---:|' * (len(heads) + 1)}",
        *(_line(c, row) for row in (*c.means, *c.domains)),
        "",
    ]
    return "\n".join(lines)


def _line(c: Comparison, row: Row) -> str:
    values = [figure(row.values.get(phase), c.metric) for phase in c.phases]
    return f"| {_inline(row.name)} | {' | '.join(values)} | {signed_percent(row.change())} |"


def _privacy(summary: Values) -> str:
    """ε, δ, the unit and the adversary first, then the whole statement; what nobody is promised is one paragraph."""
    recorded = summary.get("privacy") or {}
    given = guarantee_of(recorded)
    if not (given.stated and given.sentences):
        return f"## Privacy\n\n{_inline(recorded.get('statement') or UNSTATED)}\n"
    said = [f"{head}: {text}" if head else text for head, text in sections(given.sentences)]
    lines = [f"**{_inline(given.short)}**{SIMULATED if given.simulated else '.'}", "", *_list(said)]
    caveat = (summary.get("algorithm") or {}).get("caveat")
    lines += ["", _inline(caveat)] if caveat else []
    if given.not_covered:
        lines += ["", "Not covered by the guarantee:", "", *_list(given.not_covered)]
    return "\n".join(["## Privacy", "", *lines, ""])


def _list(lines: Iterable[str]) -> list[str]:
    return [f"- {_inline(line)}" for line in lines]


def _limits(summary: Values) -> str:
    lines = [
        "It has the limits and the biases of its base model, and those of the text it was trained on.",
        "The figures above hold for text like that of these silos; on other text it may be worse than the base model.",
        "An adapter fits only the base model it was trained on, of the very digest named below.",
    ]
    if not guarantee_of(summary.get("privacy") or {}).protected:
        lines.append("It may repeat passages of its training text: keep it where that text may be seen.")
    failures = summary.get("failures") or []
    if failures:
        lines.append(f"Silos failed {len(failures)} times while it was trained; the report says which and why.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines), ""])


def _origin(summary: Values, treaty_text: str) -> str:
    facts = {
        "Treaty digest": (summary.get("treaty") or {}).get("digest"),
        "Base model digest": (summary.get("model") or {}).get("digest"),
        "SHA-256 of the weights": (summary.get("adapter") or {}).get("sha256"),
    }
    lines = [f"- {name}: `{value}`" for name, value in facts.items() if value]
    lines += [f"- {name} {version}" for name, version in (summary.get("versions") or {}).items()]
    fence = "`" * max(3, _longest_run(treaty_text) + 1)
    if treaty_text.strip():
        lines += ["", "The treaty, resolved:", "", f"{fence}toml", treaty_text.strip(), fence]
    return "\n".join(["## Where it comes from", "", *lines, ""])


def _evaluation(summary: Values) -> Values:
    return summary.get("evaluation") or {}


def _section(treaty: Values, name: str) -> Values:
    return treaty.get(name) or {}


def _base_name(summary: Values, treaty: Values) -> str:
    return str((summary.get("model") or {}).get("name") or _section(treaty, "model").get("base") or "the base model")


def _labels(summary: Values) -> list[str]:
    return sorted({label for held in (summary.get("holdings") or {}).values() for label in held.get("labels") or {}})


def _longest_run(text: str) -> int:
    """The longest run of backticks at the start of a line."""
    return max((len(line) - len(line.lstrip("`")) for line in map(str.lstrip, text.splitlines())), default=0)


def _inline(text: str) -> str:
    """Text on one line that Markdown and HTML leave as it is."""
    return " ".join(text.translate(ESCAPES).split())
