"""Attacks on what was built, to set beside the ε that it states. Beside evaluation: reads parameters and releases, and
a silo's own data where the silo itself asks.

Read `bounds.py` (what scores prove), then `membership.py` and `shadows.py` (who was in the training?), `canaries.py`
(units made up to be looked for) and `inversion.py` (text out of gradients). `report/audit.py` makes the page.
"""
