"""The engine: the tape, its primitives, backward in parts."""
