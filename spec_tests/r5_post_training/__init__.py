"""R 5: post-training."""
