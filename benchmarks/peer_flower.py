"""Flower's simulation engine (Beutel et al. 2020, arXiv 2007.14390) as its documentation shows it: a `ClientApp`, a
`ServerApp` with the strategy `FedAvg`, `run_simulation`, and Ray underneath with one actor for each core.

Two clients: one that sends back what it was sent, and one that trains LoRA as a careful user of Flower and PEFT
would: the model is built once in an actor's process and kept, only the trained parameters travel, and the batches are
ready on disk.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

MODEL, BATCHES = "model", "batches.npy"

echo = ClientApp()
learner = ClientApp()


@echo.train()
def _echo(message: Message, context: Context) -> Message:
    """A client whose training changes nothing; it unpacks and packs the arrays as one that trains would."""
    state = message.content["arrays"].to_torch_state_dict()
    return _answer(message, ArrayRecord(state), {"num-examples": 1})


@learner.train()
def _learn(message: Message, context: Context) -> Message:
    """Some steps of AdamW from the parameters that came."""
    plan = message.content["config"]
    trained, model = _model(plan["folder"], plan["rank"], plan["alpha"])
    arrays = message.content["arrays"].to_torch_state_dict()
    with torch.no_grad():
        for name, x in trained.items():
            x.copy_(arrays[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=plan["lr"], weight_decay=0.0, fused=True)
    losses = []
    for ids in _batches(plan["folder"])[plan["server-round"] - 1, context.node_config["partition-id"]]:
        batch = torch.from_numpy(ids).to(model.device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    figures = {"num-examples": plan["examples"], "loss": float(torch.stack(losses).mean())}
    return _answer(message, ArrayRecord({name: x.detach().cpu() for name, x in trained.items()}), figures)


def _answer(message: Message, arrays: ArrayRecord, figures: Mapping[str, float]) -> Message:
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(dict(figures))}), reply_to=message)


@lru_cache(maxsize=1)
def _model(folder: str, rank: int, alpha: int) -> tuple[dict[str, torch.nn.Parameter], Any]:
    """The model with LoRA, once for each actor; and its trained parameters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # an actor has one core
    base = AutoModelForCausalLM.from_pretrained(Path(folder) / MODEL)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return {name: p for name, p in model.named_parameters() if p.requires_grad}, model


@lru_cache(maxsize=1)
def _batches(folder: str) -> np.ndarray:
    """(rounds, clients, steps, rows, tokens) token ids."""
    return np.load(Path(folder) / BATCHES)


def simulate(
    client: str, arrays: Mapping[str, np.ndarray], clients: int, rounds: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Runs `rounds` rounds with every client ("echo" or "learner") in each.

    `first`: seconds until the first round is done: Ray and its actors start, and each of them loads the model.
    `rounds`: seconds of every other round. `losses`: mean training loss of each. `arrays`: the final parameters.
    """
    ticks: list[float] = []
    outcome: dict[str, Any] = {}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < clients:
            time.sleep(0.01)
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=clients)
        initial = ArrayRecord({name: torch.from_numpy(np.asarray(x)) for name, x in arrays.items()})
        result = strategy.start(
            grid, initial, num_rounds=rounds, train_config=ConfigRecord(dict(config)),
            evaluate_fn=lambda number, now: ticks.append(time.perf_counter()),
        )  # fmt: skip
        metrics = result.train_metrics_clientapp
        outcome["losses"] = [metrics[number].get("loss") for number in sorted(metrics)]
        outcome["arrays"] = {name: x.numpy() for name, x in result.arrays.to_torch_state_dict().items()}

    began = time.perf_counter()
    run_simulation(server, {"echo": echo, "learner": learner}[client], clients, backend_config=_resources())
    seconds = [after - before for before, after in zip(ticks[1:], ticks[2:], strict=False)]
    return {"first": ticks[1] - began, "rounds": seconds, **outcome}


def _resources() -> dict[str, Any]:
    """One core for each client, and an equal share of the GPU if there is one."""
    import psutil

    cores = len(psutil.Process().cpu_affinity())
    gpu = 1.0 / cores if torch.cuda.is_available() else 0.0
    return {"client_resources": {"num_cpus": 1, "num_gpus": gpu}, "init_args": {"num_cpus": cores}}
