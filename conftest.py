"""Let `pytest` run in a bare clone: apply pyproject's folder -> package map without installing."""

import importlib.util
import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).parent
FOLDER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]


class _FolderMap:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in FOLDER:
            where = ROOT / FOLDER[name]
            return importlib.util.spec_from_file_location(
                name, where / "__init__.py", submodule_search_locations=[str(where)]
            )


sys.meta_path.insert(0, _FolderMap)
