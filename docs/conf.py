"""How Sphinx builds these pages: `make docs`, strict, without the network."""

import re

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import sg_opd

project = "sg_opd"
author = "the sg_opd authors"
version = release = sg_opd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # `page.md#a-heading` resolves as it does on GitHub

html_theme = "furo"
html_title = f"sg_opd {version}"
html_show_copyright = html_show_sphinx = html_copy_source = False
html_math_renderer = "mathml"

# docstrings are in Google's style
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88

nitpick_ignore_regex = [
    # of other packages: to link them their inventories would have to be fetched, and nothing here needs the network
    (r"py:.*", r"(collections|dataclasses|datasets|jaxtyping|pathlib|torch|transformers|trl|typing)\..*"),
    # annotations that autodoc shows as they are written: jaxtyping's shapes, and what a module imported by name
    (r"py:class", r"Any|Bool|Float|GRPOTrainer|Int|Interval|Num|PreTrainedModel|Shaped|Tensor|Verifier"),
]

FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"\[`([~\w.]+)`\]|(?<!`)`([^`]+)`(?!`)")  # TRL's form of a link to a name, or inline code


def from_markdown(app, what, name, obj, options, lines):
    """Turn what is Markdown in a docstring into what Sphinx reads: fenced and inline code, TRL's links."""

    def block(fence):
        margin, language, code = fence.groups()
        body = "".join(f"    {line}" if line.strip() else line for line in code.splitlines(keepends=True))
        return f"{margin}.. code-block:: {language}\n\n{body}"

    def inline(code):
        name, literal = code.groups()
        return f":py:obj:`{name}`" if name else f"``{literal}``"

    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # a comment: else Napoleon takes what stands before the first colon for a type
    lines[:] = CODE.sub(inline, FENCE.sub(block, "\n".join(lines))).split("\n")


def inline_math(writer, node):
    writer.body.append(tex2mathml(node.astext()))
    raise SkipNode


def block_math(writer, node):
    formula = tex2mathml(node.astext(), as_block=True)
    writer.body.append(f'<div style="overflow: auto hidden; padding-block: 0.3em">{formula}</div>')
    raise SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", from_markdown, priority=400)  # before Napoleon
    # MathML, which browsers draw themselves: no script, so nothing is fetched to read a formula
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
