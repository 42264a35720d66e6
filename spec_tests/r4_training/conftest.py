"""One small training run in one go, which the tests of runs compare with."""

import pytest

from refimpl.spec_tests.cases import runs
from refimpl.train.run import train


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return runs.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def whole(shards, tmp_path_factory):
    """The job in one go -> its end, its folder."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(runs.job(shards), folder), folder
