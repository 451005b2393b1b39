"""How Sphinx builds these pages: `make docs`, strict, without the network."""

import re

from docutils.utils.math.latex2mathml import tex2mathml

import sg_opd

project = "sg_opd"
author = "the sg_opd authors"
version = release = sg_opd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # `page.md#a-heading` resolves as it does on GitHub
templates_path: list[str] = []

html_theme = "furo"
html_title = f"sg_opd {version}"
html_show_copyright = html_show_sphinx = html_copy_source = False
html_math_renderer = "mathml"

# docstrings: Google style, inline code in single backticks, as in Markdown
default_role = "code"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

nitpick_ignore_regex = [
    # of other packages: to link them their inventories would have to be fetched, and nothing here needs the network
    (r"py:.*", r"(collections|datasets|jaxtyping|pathlib|torch|transformers|trl|typing)\..*"),
    # annotations that autodoc shows as they are written: jaxtyping's shapes, and what a module imported by name
    (r"py:class", r"Float|Int|Interval|Num|Shaped|Tensor"),
]

FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
OBJECT = re.compile(r"\[`([~\w.]+)`\]")  # TRL's form of a link to a name


def from_markdown(app, what, name, obj, options, lines):
    """Turn what is Markdown in a docstring, fenced code and TRL's links, into what Sphinx reads; before Napoleon."""

    def block(fence):
        margin, language, code = fence.groups()
        body = "".join(f"    {line}" if line.strip() else line for line in code.splitlines(keepends=True))
        return f"{margin}.. code-block:: {language}\n\n{body}"

    if what == "attribute":
        lines[:0] = ["..", ""]  # a comment: else Napoleon takes what stands before the first colon for a type
    text = OBJECT.sub(r":py:obj:`\1`", FENCE.sub(block, "\n".join(lines)))
    lines[:] = text.split("\n")


def inline_math(writer, node):
    writer.body.append(tex2mathml(node.astext()))


def block_math(writer, node):
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')


def skip_children(visit):
    from docutils.nodes import SkipNode

    def visitor(writer, node):
        visit(writer, node)
        raise SkipNode

    return visitor


def setup(app):
    app.connect("autodoc-process-docstring", from_markdown, priority=400)
    # MathML, which browsers draw themselves: no script, so nothing is fetched to read a formula
    app.add_html_math_renderer("mathml", (skip_children(inline_math), None), (skip_children(block_math), None))
