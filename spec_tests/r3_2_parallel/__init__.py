"""R 3.2: parallel training."""
