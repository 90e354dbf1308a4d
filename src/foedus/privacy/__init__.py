"""Privacy: the one door from a private total to a public release."""

from .mechanisms import Mechanism, Unprotected

__all__ = ["Mechanism", "Unprotected"]
