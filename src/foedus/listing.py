"""What a treaty can name, for `foedus list`: each row a name and a line about it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def models() -> list[Row]:
    return _assets("model")


def datasets() -> list[Row]:
    return _assets("dataset")


def algorithms() -> list[Row]:
    from .algorithms import ALGORITHMS

    return [{"name": name, "about": about} for name, about in ALGORITHMS.items()]


def optimizers() -> list[Row]:
    from .server import OPTIMIZERS

    rows = [{"name": name, "where": "server", "about": about} for name, about in OPTIMIZERS.items()]
    local = {"adamw": "AdamW (Loshchilov & Hutter 2019)", "sgd": "SGD, with or without momentum"}
    return rows + [{"name": name, "where": "local", "about": about} for name, about in local.items()]


def stages() -> list[Row]:
    from .stages import Weigh
    from .stages.clip import Clip
    from .stages.grid import Grid
    from .stages.noise import AddNoise

    return [_class_row(cls) for cls in (Weigh, Clip, Grid, AddNoise)]


def mechanisms() -> list[Row]:
    from .privacy import mechanisms as room

    kinds = (room.Unprotected, room.AtSilos, room.Gaussian, room.DiscreteGaussian, room.Correlated, room.Bare)
    return [_class_row(cls) for cls in kinds]


def combinations() -> list[Row]:
    from .treaty import COMBINATIONS

    return [{"number": row.number, "name": row.name, "verdict": row.verdict, "said": row.said} for row in COMBINATIONS]


def _assets(kind: str) -> list[Row]:
    from .assets import CATALOG, cached

    return [
        {"name": a.name, "MB": round(a.bytes / 1e6), "fetched": "yes" if cached(a.name) else "no",
         "licence": a.licence, "about": a.about}
        for a in CATALOG.values() if a.kind == kind
    ]  # fmt: skip


def _class_row(cls: type) -> Row:
    fields = ", ".join(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
    return {"name": cls.__name__, "takes": fields, "about": _headline(cls)}


def _headline(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]


LISTINGS: dict[str, Callable[[], list[Row]]] = {
    "models": models,
    "datasets": datasets,
    "algorithms": algorithms,
    "optimizers": optimizers,
    "stages": stages,
    "mechanisms": mechanisms,
    "combinations": combinations,
}
