"""Memory of a training step: what it keeps, in pieces or once more."""
