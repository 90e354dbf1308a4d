"""Benchmarks against targets and peers: `python -m benchmarks` runs them all, `python -m benchmarks.NAME` one of them.

    step         one LoRA training step, beside `transformers.Trainer` + PEFT
    federation   what the federation itself costs, as a share of a run
    memory       peak memory with many silos, against one
    flower       client updates a second, beside Flower's simulation engine
    overhead     what the engine costs a client, beside pfl-research and Flower
    private_step what privacy costs a training step, beside one without it and Opacus
    noise        what noise costs, beside OpenDP and NumPy, and a silo's share of it
    calibrate    how long it takes to find the noise for ε
    masks        what masks cost a silo, beside the cipher alone and Flower's SecAgg+
    secure       keys, shares and the coordinator's part of a secure sum, beside Flower's; and 10,000 simulated silos
    secure_round what secure sums add to a whole round, in time and bytes
    homomorphic  what encrypted sums cost, beside TenSEAL
    flower_wire  what our line adds to Flower's own floor over TLS, in time and bytes

A benchmark is a module with `rows()`, which gives the rows of the table; `table.py` says what a row is.
"""

import os

# Before torch and Flower are imported, here and in every process that is started from here:
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a busy machine many times slower
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything that is measured is in the cache or made here
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
