"""Text to tokens, tokens to packed shards, shards to batches (R 4.1)."""
