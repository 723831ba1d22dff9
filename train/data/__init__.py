"""Prepared text as packed rows, read by step."""

from train.data.loader import Loader, make_loader
from train.data.manifest import DataError, Manifest, read_manifest, verify
from train.data.split import Batch, Row, Split, open_split

__all__ = [
    "Batch",
    "DataError",
    "Loader",
    "Manifest",
    "Row",
    "Split",
    "make_loader",
    "open_split",
    "read_manifest",
    "verify",
]
