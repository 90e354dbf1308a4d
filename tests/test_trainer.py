"""The facade: the user's own datasets and model, with the habits of Hugging Face."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from peft import PeftModel

import foedus
from foedus.errors import FoedusError, RunError

from .conftest import WORDS, rows, sentences

SMALL = {"rounds": 3, "local_steps": 2, "batch": 4, "lr": 0.01, "max_length": 24}


@pytest.fixture
def hospitals() -> dict[str, datasets.Dataset]:
    return {d: datasets.Dataset.from_list([{"text": t} for t in sentences(d, 30)]) for d in ("medicine", "law")}


@pytest.fixture
def fitted(hospitals) -> foedus.FederatedTrainer:
    trainer = foedus.FederatedTrainer(model="tiny:llama", adapter=foedus.LoRA(rank=4), algorithm="fedavg", **SMALL)
    return trainer.fit(hospitals, progress=False)


def test_fit_evaluate_save_and_load_with_peft(fitted, hospitals, tmp_path):
    results = fitted.evaluate(hospitals)
    assert results["perplexity"] > 1 and set(results["by_silo"]) == {"medicine", "law"}
    sha = fitted.save_pretrained(tmp_path / "adapter")
    assert len(sha) == 64
    model = PeftModel.from_pretrained(foedus.load_base("tiny:llama").model, tmp_path / "adapter")
    ours = dict(fitted.model.named_parameters())
    for name, x in model.named_parameters():
        np.testing.assert_array_equal(x.detach().numpy(), ours[name].detach().numpy())


def test_one_test_set_for_all_gives_overall_figures(fitted, hospitals):
    results = fitted.evaluate(hospitals["law"])
    assert set(results) == {"perplexity", "bits_per_byte", "token_accuracy", "by_silo", "by_domain"}
    assert results["by_silo"] == {} and results["perplexity"] > 1


def test_training_helps(fitted, hospitals):
    untouched = foedus.FederatedTrainer("tiny:llama", rounds=1, local_steps=1, batch=4, lr=1e-9, max_length=24)
    before = untouched.fit(hospitals, progress=False).evaluate(hospitals)["perplexity"]
    assert fitted.evaluate(hospitals)["perplexity"] < before


def test_labels_give_accuracy(tmp_path):
    data = {f"silo{i}": [{"text": r["text"], "label": r["domain"]} for r in rows(30, seed=i)] for i in range(2)}
    trainer = foedus.FederatedTrainer(
        "tiny:bert", task="sequence-classification", **(SMALL | {"rounds": 6, "local_steps": 8})
    )
    results = trainer.fit(data, progress=False).evaluate(data["silo0"])
    assert results["accuracy"] > 1 / len(WORDS) + 0.2


def test_a_loaded_model_is_trained_and_goes_on_working(hospitals):
    base = foedus.load_base("tiny:gpt2")
    trainer = foedus.FederatedTrainer(model=base.model, tokenizer=base.tokenizer, adapter=foedus.LoRA(rank=2), **SMALL)
    trainer.fit(hospitals, progress=False)
    ids = base.tokenizer("patient", return_tensors="pt")
    assert trainer.model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 3


def test_fit_goes_on_from_a_folder_and_refuses_that_of_another_treaty(hospitals, tmp_path):
    make = lambda rounds: foedus.FederatedTrainer("tiny:llama", **(SMALL | {"rounds": rounds}))  # noqa: E731
    first = make(2).fit(hospitals, tmp_path / "run", progress=False).summary["adapter"]["sha256"]
    assert make(2).fit(hospitals, tmp_path / "run", progress=False).summary["adapter"]["sha256"] == first
    with pytest.raises(RunError, match="same treaty"):
        make(3).fit(hospitals, tmp_path / "run", progress=False)


def test_settings_reach_every_key_of_a_treaty(hospitals):
    trainer = foedus.FederatedTrainer("tiny:llama", **SMALL, settings={"server.optimizer": "adam", "server.lr": 0.01})
    assert trainer.treaty.server.optimizer == "adam"
    trainer.fit(hospitals, progress=False)


@pytest.mark.parametrize("wrong", [
    {"algorithm": "fedavgg"}, {"rounds": 0}, {"lr": -1.0}, {"settings": {"server.optimiser": "adam"}},
    {"task": "causal"},
])  # fmt: skip
def test_mistakes_are_explained_before_anything_runs(wrong):
    with pytest.raises(FoedusError, match="expected"):
        foedus.FederatedTrainer("tiny:llama", **(SMALL | wrong))


def test_mistakes_in_the_data_are_explained(hospitals):
    trainer = foedus.FederatedTrainer("tiny:llama", **SMALL, text="note")
    with pytest.raises(FoedusError, match='"note"|note'):
        trainer.fit(hospitals, progress=False)
    with pytest.raises(FoedusError, match="at least one batch"):
        foedus.FederatedTrainer("tiny:llama", **(SMALL | {"batch": 500})).fit(hospitals, progress=False)


def test_a_trainer_that_was_not_fitted_says_so(tmp_path):
    with pytest.raises(RunError, match="fit"):
        foedus.FederatedTrainer("tiny:llama").save_pretrained(tmp_path)


def test_run_yields_state_and_release(treaty):
    rounds = list(foedus.run(treaty))
    assert [state.round for state, _ in rounds] == [1, 2, 3]
    assert {key[0] for key in rounds[0][1].tensors} == {"delta", "metric", "weight"}
