"""The dashboard: a page of the coordinator and one of each silo, made from the files of their homes and nothing else.

`view.py` reads, `alarms.py` judges, `pages.py` lays out, `app.py` answers, `numbers.py` tells Prometheus.
"""

from __future__ import annotations

from .alarms import ALARMS, Alarm
from .app import Served, coordinator_app, serve, silo_app
from .view import CoordinatorView, SiloView

__all__ = ["ALARMS", "Alarm", "CoordinatorView", "Served", "SiloView", "coordinator_app", "serve", "silo_app"]
