"""A case of preset tiny with one MTP module, drawn once for all tests that judge one."""

import functools
import pathlib
import tempfile

from refimpl.diff import Case
from refimpl.layers import PRESETS
from refimpl.record import new_case


@functools.cache
def _home():
    return tempfile.TemporaryDirectory()


@functools.cache
def mtp_case():
    folder, config = pathlib.Path(_home().name) / "mtp", PRESETS["tiny"].replace(num_nextn_predict_layers=1)
    return Case.read(new_case(folder, config, seed=1, length=12, mtp=True))
