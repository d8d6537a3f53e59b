"""The site: `make docs`. Sources are the repository's own pages and the notebooks as executed; nothing is fetched."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

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
html_copy_source = False
html_show_sphinx = False

# In docstrings `name` is code, and an indented block an equation, words to its right.
default_role = "literal"


def _equations(app, what, name, obj, options, lines):
    """Indented lines after a blank one become display mathematics; what stands behind two spaces is text."""
    found, inside, argument = [], False, False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        before = lines[number - 1].strip() if number else ""
        if not line.strip():
            inside = False
        elif indent >= 4 and before == "" and not argument and any(sign in line for sign in "=≤≈"):
            inside = True
        argument = argument and (indent > 0 or not line.strip()) or line.strip() in ("Args:", "Raises:", "Returns:", "Attributes:")
        if inside:
            equation, *words = (part for part in line.strip().split("  ") if part.strip())
            text = "".join(rf"\qquad\text{{{word.strip().replace('`', '')}}}" for word in words)
            found += ["", f".. math:: {_tex(equation)}{text}", ""]
        else:
            found.append(line)
    lines[:] = found


RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀ", "0123456789-T")


def _tex(equation):
    import re

    equation = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵀ]+", lambda m: "^{" + m[0].translate(RAISED) + "}", equation)
    equation = re.sub("[₀₁₂₃]", lambda m: "_" + str("₀₁₂₃".index(m[0])), equation)
    for sign, command in {"‖": r"\Vert ", "⟨": r"\langle ", "⟩": r"\rangle ", "→": r"\to ", "·": r"\cdot "}.items():
        equation = equation.replace(sign, command)
    return equation


def _folded(app, docname, source):
    """A notebook's code is folded, apart from its parameters: the site is read before it is run."""
    import json

    if docname.startswith("notebooks/"):
        book = json.loads(source[0])
        for cell in book["cells"]:
            tags = cell["metadata"].setdefault("tags", [])
            if cell["cell_type"] == "code" and "parameters" not in tags:
                tags.append("hide-input")
        source[0] = json.dumps(book)


def setup(app):
    app.connect("autodoc-process-docstring", _equations, priority=400)  # before napoleon
    app.connect("source-read", _folded)
