"""Write spec_tests/ids.txt and docs/sections.md: which sentence of the report is held by which tests.

python .ci/sections.py            gives new tests their ids, rewrites both files
"""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    """Rewrite what is out of date; a test that was renamed keeps its id if its line in ids.txt is changed by hand first."""
    spec = importlib.util.spec_from_file_location("sections", ROOT / "spec_tests" / "sections.py")
    sections = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sections)
    told = sections.renewed(sections.ids() if sections.IDS.exists() else {})
    sections.IDS.write_text("".join(f"{k} {v}\n" for k, v in told.items()), encoding="utf-8")
    (ROOT / "docs" / "sections.md").write_text(sections.rendered(), encoding="utf-8")


if __name__ == "__main__":
    main()
