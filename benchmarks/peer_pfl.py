"""pfl-research (Granqvist et al. 2024, arXiv 2404.06430) as its documentation shows it: `PyTorchModel`,
`SimulatedBackend`, `FederatedAveraging`. The only change: a user's local SGD takes no step, so what is left is the
engine's own work.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel


class Arrays(torch.nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.arrays = torch.nn.ParameterList(torch.zeros(shape) for shape in shapes)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()

    def metrics(self, x: torch.Tensor) -> dict:
        return {}


class NoSteps(FederatedAveraging):
    """Federated averaging of users that do not train."""

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):
        return model.get_model_difference(initial_model_state), Metrics()


class _Clock(TrainingProcessCallback):
    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_train_begin(self, *, model) -> Metrics:
        self.ticks = [time.perf_counter()]
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.ticks.append(time.perf_counter())
        return False, Metrics()


class Simulation:
    """A simulation that goes on where it stopped. `shapes`: of the model's parameters."""

    def __init__(self, shapes: list[tuple[int, ...]], clients: int) -> None:
        asyncio.set_event_loop(asyncio.new_event_loop())  # pfl asks for the thread's current one
        torch_model = Arrays(shapes)
        self.model = PyTorchModel(torch_model, torch.optim.SGD, torch.optim.SGD(torch_model.parameters(), lr=1.0))
        self.clients, self.done = clients, 0
        self.algorithm = NoSteps()
        users = iter(range(10**9))
        data = FederatedDataset(lambda _: Dataset([np.zeros((1, 1), np.float32)]), lambda: next(users) % clients)
        self.backend = SimulatedBackend(training_data=data, val_data=data)

    def run(self, rounds: int) -> list[float]:
        """Seconds of each of the next `rounds` rounds."""
        self.done += rounds
        clock = _Clock()
        params = NNAlgorithmParams(
            central_num_iterations=self.done, evaluation_frequency=10**9, train_cohort_size=self.clients,
            val_cohort_size=0,
        )  # fmt: skip
        local = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.1, local_batch_size=None)
        self.algorithm.run(params, self.backend, self.model, local, callbacks=[clock], send_metrics_to_platform=False)
        return [after - before for before, after in zip(clock.ticks, clock.ticks[1:], strict=False)]
