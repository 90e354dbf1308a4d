"""The facade for people who know Hugging Face: fit, evaluate, save_pretrained, on your own datasets.

    trainer = foedus.FederatedTrainer(model="smollm2-135m-instruct", adapter=foedus.LoRA(rank=8), rounds=50)
    trainer.fit({"hospital-a": ds_a, "hospital-b": ds_b})
    trainer.evaluate(test)["perplexity"]
    trainer.save_pretrained("adapter/")

Underneath it writes a treaty, and runs that. All silos are simulated in this process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from . import loop
from .build import Workplace, adapter, build, columns
from .data import from_dataset
from .errors import RunError
from .evaluation import figures
from .execute import FEDERATED, begin, execute
from .governance import RunFolder
from .lm.adapters import Full, LoRA, load_params, save_adapter
from .lm.load import Base, base_of
from .progress import shown
from .report.card import model_card
from .silo.evaluate import evaluate
from .treaty import Treaty, from_dict
from .types import Release, State


def run(treaty: Treaty, data: Mapping[str, Any] | None = None) -> Iterator[tuple[State, Release]]:
    """Yields (state, release) after every round, and writes nothing.

    `data`: silo name → examples, when the treaty's source is "memory". What is done with a state — evaluating it,
    keeping it, stopping early — is the caller's code.
    """
    place = build(treaty, data)
    yield from loop.run(place.federation, place.engine(), loop.start(place.federation, place.bench.start()))


class FederatedTrainer:
    """Federated fine-tuning of one model on the datasets of several silos, simulated in this process.

    `model`: a name of `foedus list models`, a Hugging Face id, a folder, or a loaded model (then give its `tokenizer`).
    `adapter`: `LoRA(...)` or `Full()`. `algorithm`: a name of `foedus list algorithms`. `rounds` ≥ 1.
    `local_steps`, `batch`, `lr`: of local training. `text`, `target`, `label`, `domain`: columns of the datasets.
    `settings`: any other key of a treaty, dotted: `{"server.optimizer": "adam", "local.max_grad_norm": 1.0}`.
    Raises `TreatyError` with everything that is wrong.
    """

    def __init__(
        self,
        model: Any,
        adapter: LoRA | Full | None = None,
        algorithm: str = "fedavg",
        rounds: int = 10,
        *,
        task: str = "causal-lm",
        tokenizer: Any = None,
        local_steps: int = 10,
        batch: int = 8,
        lr: float = 1e-3,
        max_length: int = 128,
        seed: int = 0,
        text: str = "text",
        target: str | None = None,
        label: str | None = None,
        domain: str | None = None,
        validation: float = 0.0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or "a loaded model"
        if task == "sequence-classification" and label is None:
            label = "label"
        self._loaded = None if isinstance(model, str) else (model, tokenizer, task, name)
        self.treaty = from_dict(
            {
                "treaty": {"name": "federated-trainer", "seed": seed},
                "model": {"base": name, "task": task, "max_length": max_length},
                "adapter": _adapter_section(adapter if adapter is not None else LoRA()),
                "data": {"source": "memory", "text": text, "target": target, "label": label, "domain": domain},
                "silos": {"by": "given"},
                "split": {"validation": validation, "test": 0.0},
                "algorithm": {"name": algorithm, "rounds": rounds},
                "local": {"steps": local_steps, "batch": batch, "lr": lr},
                "evaluation": {"every": max(1, rounds // 10), "baselines": []},
            },
            "FederatedTrainer",
        )
        if settings:
            self.treaty = self.treaty.replace(**dict(settings))
        self.summary: dict[str, Any] = {}
        self._place: Workplace | None = None
        self._state: State | None = None

    def fit(self, data: Mapping[str, Any], out: str | Path | None = None, *, progress: bool = True) -> FederatedTrainer:
        """Trains on `data`: silo name → `datasets.Dataset`, Arrow table or list of dicts.

        `out`: a run's folder, which keeps checkpoints, ledger and report, and which a later `fit` on the same data goes
        on from; without it nothing is kept. Returns itself.
        """
        place = build(self.treaty, data, base=self._base())
        with tempfile.TemporaryDirectory(prefix="foedus-") as scratch:
            path = Path(out) if out is not None else Path(scratch) / "run"
            resumed = (path / "treaty.toml").exists()
            folder = self._resume(path) if resumed else begin(self.treaty, path)
            for event in shown(execute(folder, place), progress):
                if event.kind == "done":
                    self.summary = dict(event.row)
            restored = folder.restore(FEDERATED)
        assert restored is not None  # execute writes a checkpoint after every round, and a treaty has at least one
        self._place, self._state = place, restored[0]
        return self

    def evaluate(self, test: Any) -> dict[str, Any]:
        """Figures on held-out examples: a dataset, or silo name → dataset.

        "perplexity" (over everything), "accuracy" where there are labels (else "token_accuracy" and "bits_per_byte"),
        and "by_silo" and "by_domain", each name → the same figures.
        """
        place, state = self._fitted()
        by_silo = test if isinstance(test, Mapping) else {"": test}
        sums = {}
        for name, dataset in by_silo.items():
            table = from_dataset(dataset, columns(self.treaty))
            encoded = place.bench.objective.encode(table, place.base.tokenizer)
            scores = partial(place.bench.scores, state.params)
            sums[name] = evaluate(scores, encoded, place.bench.objective, seed=self.treaty.seed)
        table = figures(sums, labelled=place.labelled)
        out: dict[str, Any] = {measure: values["micro"] for measure, values in table.items()}
        for group in ("by_silo", "by_domain"):
            names = [name for name in table["perplexity"][group] if name]
            out[group] = {name: {measure: values[group][name] for measure, values in table.items()} for name in names}
        return out

    def save_pretrained(self, folder: str | Path) -> str:
        """Writes the adapter as `peft.PeftModel.from_pretrained` loads it; returns the SHA-256 of its weights."""
        place, state = self._fitted()
        card = model_card(self.summary, self.treaty.resolved())
        return save_adapter(place.base, adapter(self.treaty), state.params, Path(folder), card)

    @property
    def model(self) -> Any:
        """The fine-tuned model, with the final parameters in it: a `PeftModel`, or the model itself for `Full`."""
        place, state = self._fitted()
        load_params(place.base.model, state.params)
        return place.base.model

    def _base(self) -> Base | None:
        """The caller's own model as a base, without an adapter of an earlier fit; None when `build` is to load one."""
        if self._loaded is None:
            return None
        model, tokenizer, task, name = self._loaded
        if self._place is not None and self.treaty.adapter.kind == "lora":
            model = self._place.base.model.unload()
        return base_of(model, tokenizer, task=task, name=name)

    def _fitted(self) -> tuple[Workplace, State]:
        if self._place is None or self._state is None:
            raise RunError("a trainer that was fitted", "one that was not", "Call fit(data) first.")
        return self._place, self._state

    def _resume(self, path: Path) -> RunFolder:
        folder = RunFolder.open(path)
        if (path / "treaty.toml").read_text() != self.treaty.resolved():
            raise RunError(
                "a run of the same treaty, to go on with",
                "a run of another one",
                "Give this trainer another folder.",
                where=str(path),
            )
        return folder


def _adapter_section(adapter: LoRA | Full) -> dict[str, Any]:
    if isinstance(adapter, Full):
        return {"kind": "full"}
    targets = adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets)
    return {"kind": "lora", **vars(adapter), "targets": targets}
