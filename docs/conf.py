"""The pages, by `sphinx-build -W -n --keep-going docs docs/_build`; nothing needs the network."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from latex2mathml.converter import convert
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
sys.path += [str(HERE), *(str(HERE.parent / name) for name in ("benchmarks", "examples"))]

import equations  # noqa: E402
import spherical_optax as so  # noqa: E402
import tables  # noqa: E402

project, author, release = "spherical_optax", "The spherical_optax authors", so.__version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # included reports begin below the page's own headings

add_module_names = False
autodoc_type_aliases = {name: name for name in ("ChannelAxes", "Transport", "ArrayLike")}
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 90
# Types of other packages, whose pages are elsewhere, and of our modules behind the public names.
nitpick_ignore_regex = [("py:(class|exc)", ".*")]

html_theme = "furo"
html_title = f"spherical_optax {release}"
html_math_renderer = "mathml"


DATA = {
    "ChannelAxes": "spherical_optax._ground.selection",
    "Transport": "spherical_optax._ground.geometry",
}


def mathml(self, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers typeset by themselves."""
    block = isinstance(node, nodes.math_block)
    formula = convert(node.astext(), display="block" if block else "inline")
    if left := re.search(r"\\\w+", formula):
        raise ValueError(f"{left[0]} of {node.astext()!r} has no MathML")
    self.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


class Measured(SphinxDirective):
    """A table that is made of the committed results."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parses the table's Markdown."""
        name, table = self.arguments[0], nodes.container()
        self.state.nested_parse(StringList(tables.TABLES[name]().splitlines(), name), 0, table)
        return table.children


def docstring(app, what, name, obj, options, lines) -> None:
    """Makes reStructuredText of a docstring, which is written for a terminal."""
    if what == "data":  # whose words are a comment beside it
        name = name.rpartition(".")[2]
        lines[:] = ModuleAnalyzer.for_module(DATA[name]).find_attr_docs()["", name]
    parameters = ()
    if inspect.isfunction(obj):
        parameters = inspect.signature(obj).parameters
    literal = ""  # whether inside of an equation or an example, which stay as they are
    for i, line in enumerate(typeset := equations.typeset(lines, parameters)):
        if line.startswith((".. math::", ">>> ")):
            literal = line[:3]
        elif (
            line and literal == ".. " and not line.startswith(" ") or not line and literal == ">>>"
        ):
            literal = ""
        typeset[i] = line if literal else _markup(line)
    lines[:] = typeset


def _markup(line: str) -> str:
    """Links the public names in backticks, and sets other code as such."""

    def code(match: re.Match[str]) -> str:
        name = match[1].removeprefix("so.")
        return f":py:obj:`~spherical_optax.{name}`" if name in so.__all__ else f"``{match[1]}``"

    parts = re.split(r"(`[^`]+`)", line)
    return "".join(
        re.sub(r"`([^`]+)`", code, part) if part.startswith("`") else part.replace("|", r"\|")
        for part in parts
    )


def links_to_files(app, docname: str, source: list[str]) -> None:
    """Markdown outside of the documentation is a file to look at, and not a page."""
    source[0] = re.sub(r"\]\((\.\./\S+\.md)\)", r"](<path:\1>)", source[0])


def setup(app) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.add_directive("measured", Measured)
    app.connect("source-read", links_to_files)
    app.connect("autodoc-process-docstring", docstring, priority=400)  # before napoleon
