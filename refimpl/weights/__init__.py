"""Converted weights: any container under checkpoint names, held against a case's tensor by tensor, and what each is worth."""

from .containers import open_weights
from .findings import Finding
from .holding import held_against

__all__ = ["Finding", "held_against", "open_weights"]
