"""Settings of Sphinx for the site: ``make docs`` builds it, by way of ``build.py``."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ziafont
import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import deepprob

sys.path.insert(0, str(Path(__file__).parent))
from build import MODULES, names_of, notebooks_without_data

project = "deepprob"
author = "The deepprob developers"
version = release = deepprob.__version__
root_doc = "index"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "myst_nb"]

# Pages are Markdown as in the repository; formulas of docstrings are reStructuredText.
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a changelog repeats headings

# A notebook is stored without outputs, so it runs at every build; DEEPPROB_SMOKE=1 takes short fits.
nb_execution_mode = "force"
nb_execution_excludepatterns = notebooks_without_data()
nb_execution_timeout = 1800
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

autosummary_generate = False  # build.py writes one page for each name
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # a method that overrides says nothing new
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

ziafont.config.svg2 = False  # each formula on its own, without parts that another one refers to

html_theme = "furo"
html_title = "deepprob"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # a page opened as a file cannot read others
html_show_copyright = False
html_math_renderer = "drawn"
pygments_style = "friendly"
pygments_dark_style = "github-dark"


@cache
def public_homes() -> dict[str, str]:
    """The public name of each documented object, by the names that annotations have for it."""
    found = {}
    for face in reversed(MODULES):
        module = importlib.import_module(face)
        for name in names_of(face):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found[f"{value.__module__}.{value.__qualname__}"] = found[name] = f"{face}.{name}"
    return found


def drawn(latex: str, *, inline: bool) -> str:
    """A formula as a picture of its glyphs in the color of the text, which needs neither a script nor a font."""
    braced = re.sub(r"\\(math[a-z]+)\s+(\w)", r"\\\1{\2}", latex)
    spaced = re.sub(r"\\sim\b", r"\\;\\sim\\;", braced)
    formula = ziamath.Latex(spaced.replace(r"\_", "_"), size=17, color="currentColor", inline=inline)
    if left := re.search(r"\\[A-Za-z]+", formula.mathmlstr()):
        raise ExtensionError(f"the command {left[0]} cannot be drawn, in the formula: {latex}")
    picture = formula.svgxml()
    picture.set("role", "img")
    picture.set("aria-label", latex)
    picture.set("style", f"vertical-align: {formula.getyofst():.2f}px")
    return ElementTree.tostring(picture, encoding="unicode")


def inline_math(writer: Any, node: nodes.math) -> None:
    """Write a formula within a line."""
    writer.body.append(drawn(node.astext(), inline=True))
    raise nodes.SkipNode


def display_math(writer: Any, node: nodes.math_block) -> None:
    """Write a formula of its own; a wide one scrolls inside its box."""
    latex = node.astext()
    if "\\\\" in latex or "&" in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    writer.body.append(f'<div class="math">{drawn(latex, inline=False)}</div>\n')
    raise nodes.SkipNode


def resolve(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.reference | None:
    """Link a name to its public page where an annotation or docstring uses the name of its own module."""
    public = public_homes().get(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or public is None:
        return None
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)


def shorten(app: Sphinx, what: str, name: str, value: object, options: object, signature: str, result: str) -> Any:
    """Show a default that is made for each object as ``...``."""
    return (signature or "").replace("<factory>", "...") or None, result


def setup(app: Sphinx) -> None:
    """Register the writer of formulas and the resolver of names."""
    app.add_html_math_renderer("drawn", (inline_math, None), (display_math, None))
    app.connect("autodoc-process-signature", shorten)
    app.connect("missing-reference", resolve)
