"""The site: `sphinx-build -W docs site`. Chapters are run as they are built; a cell that fails stops the build."""

import os
import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]
# The kernels of the chapters import the tree that is being documented, one thread each, so that outputs repeat.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE / "book"), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

project = "DeepSeek-V3, executable specification"
author = "The deepseek-v3-refimpl authors"
release = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "mathml", "stage_pages", "api_pages", "interactive", "accessible"]
exclude_patterns = ["_ext", "book/exercises", "book/solutions", "book/hidden", "examples", "claims"]
suppress_warnings = ["myst.header"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_default_options = {"no-value": True}
autodoc_member_order = "bysource"
add_module_names = False
html_use_index = False
html_search_scorer = str(HERE / "_ext" / "search_scorer.js")
html_show_search_summary = False  # it is fetched, which pages opened as files may not do
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / ".book_cache")
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
html_math_renderer = "mathml"
html_theme = "furo"
html_theme_options = {"top_of_page_buttons": []}
html_title = "DeepSeek-V3 spec"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False


def _outside(app, name, source):
    """Links to files that are in the repository and not on the site are said, not linked."""
    up = name.count("/") + 1  # as many times `../` as lead out of docs/
    source[0] = re.sub(rf"\[([^\]]*)\]\((?:\.\./){{{up}}}([^)]*)\)", r"\1 (`\2` in the repository)", source[0])


def setup(app):
    """Sphinx calls this."""
    app.connect("source-read", _outside)
