"""Settings that the suite needs wherever it runs, also from an installed wheel, which has no pyproject.toml.

Two profiles of examples: `quick`, the default, draws the same ones every time, so that a verdict on a change is about the change;
`--hypothesis-profile deep` draws others every time, to find what nobody thought of.
"""

from hypothesis import settings

from refimpl.spec_tests.conformance import plugin

settings.register_profile("quick", derandomize=True, print_blob=True)
settings.register_profile("deep", derandomize=False, print_blob=True)
settings.load_profile("quick")


def pytest_addoption(parser):
    """The options of conformance."""
    plugin.add_options(parser)


def pytest_configure(config):
    """Register the marker that pyproject.toml registers in the repository, and what conformance needs."""
    config.addinivalue_line("markers", "slow: takes more than a few seconds; deselected unless -m says otherwise")
    config.pluginmanager.register(plugin, "conformance")
    config.pluginmanager.register(plugin.Collector(config), "conformance-report")
