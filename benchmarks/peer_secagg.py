"""Flower's SecAgg+ in its own functions, as its client module and its workflow call them, without its messages."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, Key
from flwr.server.workflow.secure_aggregation.secaggplus_workflow import WorkflowState
from flwr.supercore.task_identity import TaskIdentity

client: Any = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")  # its package hides it by a function

MODULUS, GRID, RANGE = 2**32, 2**22, 8.0
"""Flower's defaults: of words (each in 64 bits), of rounded parameters, and of parameters."""


def mask(size: int, seeds: list[bytes]) -> None:
    """What a client does with its masks: a stream for each seed, an addition for each stream, the modulus."""
    vector = [np.zeros(size, np.int64)]
    for i, seed in enumerate(seeds):
        combine = arithmetic.parameters_subtraction if i % 2 else arithmetic.parameters_addition
        vector = combine(vector, pseudo_rand_gen(seed, MODULUS, [(size,)]))
    arithmetic.parameters_mod(vector, MODULUS)


def bytes_up(size: int) -> int:
    """Bytes of a client's masked vector."""
    return len(ndarray_to_bytes(np.zeros(size, np.int64)))


def share_keys(k: int, threshold: int) -> Callable[[], object]:
    """A client's keys agreed with `k` others, two secrets split, and the shares sealed. It opens none yet."""
    public = client.public_key_to_bytes
    me, others = _keys(k + 1, threshold), [client.generate_key_pairs() for _ in range(2 * k)]
    them = [public(key) for _, key in others]
    known = {"0": (me.pk1, me.pk2)} | {str(i + 1): (them[2 * i], them[2 * i + 1]) for i in range(k)}
    return lambda: client._share_keys(me, known)


def _keys(shares: int, threshold: int, name: int = 0) -> Any:
    state = client.SecAggPlusState(
        nid=name, share_num=shares, threshold=threshold, rd_seed_share_dict={}, sk1_share_dict={}, ss2_dict={}
    )
    for number in "12":
        secret, public = client.generate_key_pairs()
        setattr(state, f"sk{number}", client.private_key_to_bytes(secret))
        setattr(state, f"pk{number}", client.public_key_to_bytes(public))
    return state


@dataclass
class Clients:
    """Flower's `Grid`, for the stage "unmask": the clients answer at once. `seconds`: how long that took them."""

    states: dict[int, Any]
    seconds: float = field(default=0.0)

    def send_and_receive(self, messages: list[Message], *, timeout: float | None = None) -> list[Message]:
        began = time.process_time()
        replies = [self._reply(message) for message in messages]
        self.seconds += time.process_time() - began
        return replies

    def _reply(self, message: Message) -> Message:
        asked = message.content.config_records[RECORD_KEY_CONFIGS]
        found = client._unmask(self.states[message.metadata.dst_node_id], asked)
        return Message(RecordDict({RECORD_KEY_CONFIGS: ConfigRecord(found, False)}), reply_to=message)


class Server:
    """A sum over `silos`, the first `gone` of whom vanished after they had shared their keys with `k` others each.

    `seconds` sums the vectors that came and runs the workflow's stage "unmask". The vectors are any: their sum means
    nothing, and finding it takes as long.
    """

    def __init__(self, silos: int, gone: int, k: int, threshold: int, size: int) -> None:
        logging.getLogger("flwr").setLevel(logging.ERROR)
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # or it makes no message
        self.threshold, self.dead, self.alive = threshold, range(1, gone + 1), range(gone + 1, silos + 1)
        near = range(-(k // 2), k // 2 + 1)
        self.neighbours = {i: {(i - 1 + step) % silos + 1 for step in near} for i in range(1, silos + 1)}
        self.states = {name: _keys(k + 1, threshold, name) for name in self.neighbours}
        for name in self.neighbours:
            self._share(name)
        vector = [np.array([GRID]), np.random.default_rng(0).integers(0, MODULUS, size)]
        self.blobs = [ndarray_to_bytes(array) for array in vector]

    def _share(self, name: int) -> None:
        """Gives the secret that will be asked for to the neighbours, and to itself."""
        dead, near = name in self.dead, sorted(self.neighbours[name])
        secret = self.states[name].sk1 if dead else os.urandom(32)
        for other, share in zip(near, create_shares(secret, self.threshold, len(near)), strict=True):
            held = self.states[other].sk1_share_dict if dead else self.states[other].rd_seed_share_dict
            held[name] = share

    def seconds(self) -> float:
        """Processor seconds of the server alone."""
        clients = Clients(self.states)
        began = time.process_time()
        done = SecAggPlusWorkflow(len(self.neighbours[1]), self.threshold).unmask_stage(
            clients, _context(), self._state(self._sum())
        )
        assert done, "Flower's workflow gave up."
        return time.process_time() - began - clients.seconds

    def _sum(self) -> list[Any]:
        """As the stage before does it: each vector parsed and added, and the modulus at the end."""
        total = [bytes_to_ndarray(blob) for blob in self.blobs]
        for _ in self.alive[1:]:
            total = arithmetic.parameters_addition(total, [bytes_to_ndarray(blob) for blob in self.blobs])
        return arithmetic.parameters_mod(total, MODULUS)

    def _state(self, total: list[Any]) -> WorkflowState:
        return WorkflowState(
            sampled_node_ids=set(self.neighbours), active_node_ids=set(self.alive), threshold=self.threshold,
            num_shares=len(self.neighbours[1]), clipping_range=RANGE, quantization_range=GRID, mod_range=MODULUS,
            nid_to_neighbours={name: set(near) for name, near in self.neighbours.items()},
            nid_to_publickeys={name: [state.pk1, state.pk2] for name, state in self.states.items()},
            aggregate_ndarrays=total,
        )  # fmt: skip


def _context() -> Any:
    """What the stage asks of its context: a round's number, and a strategy, which keeps nothing."""
    records = {MAIN_CONFIGS_RECORD: {Key.CURRENT_ROUND: 1}}
    strategy = SimpleNamespace(aggregate_fit=lambda number, results, failures: (None, {}))
    return SimpleNamespace(state=SimpleNamespace(config_records=records), strategy=strategy)
