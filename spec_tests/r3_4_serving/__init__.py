"""R 3.4: inference and deployment."""
