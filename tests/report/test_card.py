from __future__ import annotations

import ast
import json

import pytest
import yaml

from foedus.report import model_card
from foedus.report.card import loading_code

from .conftest import TREATY, write_run


@pytest.fixture
def summary(tmp_path):
    return write_run(tmp_path / "run", labels=True)


def head_and_body(card: str) -> tuple[dict, str]:
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_head_is_yaml_that_names_base_library_and_tags(summary):
    head, _ = head_and_body(model_card(summary, TREATY))
    assert head["base_model"] == "smollm2-135m-instruct"
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation"
    assert {"federated-learning", "foedus", "lora"} <= set(head["tags"])
    assert "license" not in head, "no licence is claimed that nobody stated"


def test_hub_name_and_licence_are_used_where_the_summary_has_them(summary):
    summary["model"] |= {"hub": "HuggingFaceTB/SmolLM2-135M-Instruct", "licence": "apache-2.0"}
    head, _ = head_and_body(model_card(summary, TREATY))
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and head["license"] == "apache-2.0"


def test_hugging_face_reads_the_card(summary):
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(summary, TREATY))
    assert card.data.library_name == "peft"


def test_the_figures_are_those_of_the_summary(summary):
    _, body = head_and_body(model_card(summary, TREATY))
    for phase in ("base", "local_only", "federated", "pooled"):
        perplexity = summary["evaluation"][phase]["perplexity"]
        for value in (perplexity["micro"], perplexity["macro"], *perplexity["by_domain"].values()):
            assert f"{value:.2f}" in body
    assert "### Accuracy" in body and "5 of 5 domains" in body


def test_privacy_limits_origin_and_treaty_are_told(summary):
    _, body = head_and_body(model_card(summary, TREATY))
    assert "This run gives no privacy guarantee" in body and "## Limits" in body
    for fact in (summary["treaty"]["digest"], summary["model"]["digest"], summary["adapter"]["sha256"]):
        assert fact in body
    assert TREATY.strip() in body


def test_a_card_can_be_made_before_the_weights_have_a_hash_and_of_nothing_at_all(summary):
    summary["adapter"].pop("sha256")
    assert "SHA-256" not in model_card(summary, TREATY)
    head, body = head_and_body(model_card({}, ""))
    assert head["library_name"] == "peft" and "No privacy statement was recorded" in body


def test_a_name_cannot_break_out_of_its_table_or_its_head(tmp_path):
    evil = ["x | y\n# z", "<script>alert(1)</script>", "---", "`code`"]
    treaty = TREATY.replace('source = "20newsgroups"', f"source = {json.dumps('a | b: c')}") + "# ```\n"
    card = model_card(write_run(tmp_path / "run", names=evil), treaty)
    head, body = head_and_body(card)
    outside = body[: body.index("The treaty, resolved")]
    assert "<script>" not in outside and "\n# z" not in outside
    widths = {line.replace("\\|", "").count("|") for line in outside.splitlines() if "x &#124; y" in line}
    assert widths == {7}, "six cells, whatever a name holds"


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm", "sequence-classification", "seq2seq"])
@pytest.mark.parametrize("base", ["smollm2-135m-instruct", "org/model"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_loading_code_is_python_for_every_task_and_kind(summary, task, base, kind):
    summary["adapter"]["kind"], summary["model"]["name"] = kind, base
    code = loading_code(summary, {"model": {"task": task}})
    ast.parse(code)
    assert ("PeftModel.from_pretrained" in code) == (kind == "lora")
    assert ("load_base" in code) == (kind == "lora" and "/" not in base)
