"""Mechanisms that articles describe and V3 does not have (docs/variants.md)."""
