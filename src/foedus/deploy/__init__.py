"""Deployment: a federation between organisations. Read `guard.py` first: it is where a silo protects itself."""
