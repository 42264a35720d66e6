"""Settings that the suite needs wherever it runs, also from an installed wheel, which has no pyproject.toml."""


def pytest_configure(config):
    """Register the marker that pyproject.toml registers in the repository."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds; deselected unless -m says otherwise")
