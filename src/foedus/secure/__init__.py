"""Secure sums: pure protocol code, no transport and no torch. The server learns the sum and nothing else.

Read `silo.py` and `server.py` for the two sides, `messages.py` for what passes between them.
"""
