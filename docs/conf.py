"""The documentation site, of the installed package: ``pip install '.[docs]'``, then ``sphinx-build -W -n docs build/docs``."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import movq_ext
from movq_ext.cli import parser

project = "movq_ext"
copyright = "2026, the movq_ext authors, BSD-3-Clause"
release = version = movq_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 4  # as GitHub makes them
default_role = "py:obj"  # `decode_tiled` in a docstring is a link
nitpick_ignore_regex = [  # other packages' names, whose inventories a build would have to download, and our private ones
    ("py:.*", r"(torch|np|numpy|os|pathlib|collections|typing|nn|dist|F|PIL)\..*"),
    ("py:.*", r"Any|Tensor|Path|Mapping|Sequence|Iterator|Literal|PathLike|bool|int|float|str|tuple|list|dict|None|type|object"),
    ("py:.*", r"(Type|Value|OS|FileNotFound|Import|Runtime|FloatingPoint)Error"),
]

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
pygments_dark_style = "monokai"  # furo's default underlines imports
html_title = f"movq_ext {release}"
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["site.css"]

DOCS = Path(__file__).parent
ROOT = DOCS.parent
INCLUDE = re.compile(r"^```\{include\} (\S+)$", re.MULTILINE)
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")

# The page that shows each file from elsewhere in the repository. The front page shows the head of README.md.
PAGES = {(page.parent / file).resolve(): page for page in DOCS.rglob("*.md") for file in INCLUDE.findall(page.read_text())}


def site_links(text: str, folder: Path) -> str:
    """Links between files of the repository, made links between pages of the site where it has them, and downloads elsewhere."""

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], (folder / match[2]).resolve(), match[3] or ""
        if target.is_dir():
            return label
        target = PAGES.get(target, target)
        way = ""
        if not target.is_relative_to(DOCS):
            anchor = ""  # of a line or heading, which a download has not
            way = "path:" if target.suffix == ".md" else ""  # else it would be taken for a page
        return f"[{site_links(label, folder)}]({way}/{os.path.relpath(target, DOCS)}{anchor})"

    return LINK.sub(link, text)


def of_page(app: Sphinx, docname: str, content: list[str]) -> None:
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".md":
        content[0] = site_links(content[0], path.parent)


def of_included(app: Sphinx, path: Path, docname: str, content: list[str]) -> None:
    content[0] = site_links(content[0], (DOCS / path).resolve().parent)


class CommandLine(SphinxDirective):
    """The help text of every command, as ``--help`` prints it."""

    def run(self) -> list[nodes.Node]:
        top = parser()
        (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
        return [self.section("movq-ext", top), *(self.section(name, sub) for name, sub in commands.choices.items())]

    def section(self, title: str, command: argparse.ArgumentParser) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(f"command {title}")])
        section += nodes.title(title, title)
        text = command.format_help()
        section += nodes.literal_block(text, text, language="text")
        return section


def setup(app: Sphinx) -> dict[str, bool]:
    os.environ.update(COLUMNS="92", NO_COLOR="1")  # for argparse; as many columns as fit the page
    app.add_directive("command-line", CommandLine)
    app.connect("source-read", of_page)
    app.connect("include-read", of_included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
