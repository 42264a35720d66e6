"""Conformance of any implementation: driven through five methods, in this process or another, and judged by the diff."""

from .process import Lacking
from .subject import Subject, subject

__all__ = ["Lacking", "Subject", "subject"]
