"""R 2.2: multi-token prediction."""
