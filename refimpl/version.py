"""The version, by itself: anything may import it without importing the package's facade."""

__version__ = "0.2.0"
