"""The site: `make docs`. Sources are the repository's own pages and the notebooks as executed; nothing is fetched."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import i2f  # noqa: E402

project, author, copyright = "i2f", "The i2f developers", "The i2f developers"
version = release = i2f.__version__
root_doc = "docs/index"
include_patterns = [
    *("docs/*.md", "notebooks/*.ipynb"),
    *("PAPER.md", "DATA.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinxcontrib.katex"]

# Notebooks as they are stored: their outputs are the published ones, which the tests hold.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # links and equations in outputs as in cells
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline"]
myst_heading_anchors = 3

# KaTeX comes with the extension and writes MathML, which browsers draw with fonts of their own: no other host is asked.
katex_css_path = "site.css"
katex_options = "output: 'mathml', throwOnError: false"

autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True

html_theme = "furo"
html_title = f"i2f {version}"
html_static_path = ["static"]
html_extra_path = ["extra"]
html_js_files = ["site.js", "play.js"]
html_copy_source = False
html_show_sphinx = False

default_role = "literal"  # in docstrings `name` is code


def setup(app):
    import sources  # beside this file

    app.connect("autodoc-process-docstring", sources.equations, priority=400)  # before napoleon
    app.connect("source-read", sources.written)
