"""Checkpoint files: opened by memory mapping in any layout, checked against a model, described, saved."""

from .atomic import Transaction
from .checks import Report, check, copies_that_differ, scan_nonfinite
from .info import count_parameters, describe
from .mapping import Checkpoint, Unscaled
from .reading import Reader, Rows
from .safetensors import SafetensorsFile, open_file, write_file
from .saving import save
from .shards import json_object

__all__ = [
    "Checkpoint",
    "Reader",
    "Report",
    "Rows",
    "SafetensorsFile",
    "Transaction",
    "Unscaled",
    "check",
    "copies_that_differ",
    "count_parameters",
    "describe",
    "json_object",
    "open_file",
    "save",
    "scan_nonfinite",
    "write_file",
]
