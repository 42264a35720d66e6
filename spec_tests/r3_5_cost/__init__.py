"""R 3.5: hardware and what it costs."""
