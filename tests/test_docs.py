"""The documents: their Python runs, their links resolve, their code fits the page, and their figures are up to date."""

import codeop
import importlib.util
import re
import runpy
from pathlib import Path

import emulator
import pytest
import torch

SOURCE = Path(__file__).resolve().parents[1]
DOCS = SOURCE / "docs"
README = SOURCE / "README.md"
MAX_README_WORDS = 1200
MAX_CODE_COLUMNS = 88  # wider lines are cut off on the site
# Shown on the site by pages that include them.
TOP_LEVEL = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "tests/emulator/README.md")
DOCUMENTS = [*(SOURCE / name for name in TOP_LEVEL), *sorted(DOCS.rglob("*.md"))]
PYTHON = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Beginnings of messages that the troubleshooting page explains.
MESSAGES = (
    "no CUDA toolkit",
    "torch is not installed",
    "is a build without CUDA",
    "needs an nvcc of CUDA",
    "max_memory must be at least",
    "a C++ compiler is needed",
)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(SOURCE).as_posix())


def blocks(text):
    """Return (line, mark, code) of every Python block. The mark is the HTML comment on the line before it."""
    found = PYTHON.finditer(text)
    return [(text.count("\n", 0, block.start("code")) + 1, block["mark"], block["code"]) for block in found]


def run_blocks(text, name):
    """Run the Python blocks in order, in one namespace.

    Blocks marked `not run: reason` are left out, as are those marked `needs the emulator` or `needs PACKAGE` without it.
    """
    namespace = {}
    for line, mark, code in blocks(text):
        if mark and (mark.startswith("not run: ") or (mark.startswith("needs ") and not is_available(mark[len("needs ") :]))):
            continue
        exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)


def is_available(requirement):
    """True if a document's block can run that needs the emulator, or a package."""
    return emulator.available() if requirement == "the emulator" else importlib.util.find_spec(requirement) is not None


def paste(code):
    """Compile code as an interpreter does that reads it line by line: a blank line ends a compound statement."""
    statement = []
    for line in [*code.splitlines(), ""]:
        statement.append(line)
        if codeop.compile_command("\n".join(statement)) is not None:
            statement = []


def links(text):
    """Return the targets of all links to files and headings; links inside code do not count."""
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    return [target for target in (one or other for one, other in LINK.findall(prose)) if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """Return the anchors that GitHub creates for the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document, text):
    """Return the links whose file or heading does not exist."""
    missing = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in anchors(text if file == document else file.read_text())):
            missing.append(target)
    return missing


def wide_code(text):
    """Return the line numbers of code that is cut off on the site."""
    return [
        text.count("\n", 0, block.start()) + offset
        for block in FENCED.finditer(text)
        for offset, line in enumerate(block[0].splitlines(), start=1)
        if len(line) > MAX_CODE_COLUMNS
    ]


def listed_pages(docs):
    """Return the pages in toctrees, without suffix."""
    found = set()
    for page in docs.rglob("*.md"):
        for body in TOCTREE.findall(page.read_text()):
            entries = [line for line in body.splitlines() if line and not line.startswith(":")]
            names = (re.sub(r".*<(.*)>$", r"\1", entry) for entry in entries)  # `Title <page>` or `page`
            found |= {(page.parent / name).relative_to(docs).as_posix() for name in names}
    return found


def marked_command(mark):
    """Return the shell command after an HTML comment in the README."""
    return re.search(rf"^<!-- {mark} -->\n```sh\n(.*)\n```$", README.read_text(), re.MULTILINE)[1]


@each_document
def test_python_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_blocks(document.read_text(), document.relative_to(SOURCE).as_posix())


def test_the_kernel_page_can_be_pasted():
    for _, _, code in blocks((DOCS / "how_the_kernels_work.md").read_text()):
        paste(code)


@each_document
def test_links_resolve(document):
    assert broken_links(document, document.read_text()) == []


@each_document
def test_code_fits_the_page(document):
    assert wide_code(document.read_text()) == []


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= MAX_README_WORDS


@pytest.mark.parametrize("mark", ["demo command", "test command"])
def test_a_marked_command_does_all_the_setup(mark):
    assert marked_command(mark).startswith("python3 -m venv .venv && .venv/bin/pip install ")


def test_every_page_is_in_a_toctree():
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in (*DOCS.rglob("*.md"), *DOCS.rglob("*.rst"))}
    assert pages - {"index"} == listed_pages(DOCS)


@pytest.mark.parametrize("message", MESSAGES)
def test_troubleshooting_quotes_messages_that_exist(message):
    sources = [SOURCE / "setup.py", *(SOURCE / "movq_ext").rglob("*.py")]
    assert message in (DOCS / "troubleshooting.md").read_text()
    assert any(message in source.read_text() for source in sources)


def test_figures_are_what_the_script_draws(tmp_path):
    runpy.run_path(str(DOCS / "figures/draw.py"))["draw"](tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (DOCS / "figures").glob("*.svg")}
    assert drawn == committed, "run python docs/figures/draw.py"


# --- These tests can fail

PAGE = """
# What is it?
```python
x = 1
```
<!-- not run: there is no such thing -->
```python
assert False
```
```python
assert x == 2
```
[here](#what-is-it) [gone](#what-was-it) [file](page.md#what-is-it) ![picture](none.svg) <img src="nor.png">
[web](https://example.org/none) `[code](none.py)`
"""


def test_a_failing_block_is_reported_at_its_line():
    with pytest.raises(AssertionError) as raised:
        run_blocks(PAGE, "page.md")
    assert raised.traceback[-1].lineno + 1 == 11


def test_code_that_cannot_be_pasted_is_found():
    paste("if True:\n    x = 1\n\nx = 2\n")
    with pytest.raises(SyntaxError):
        paste("if True:\n    x = 1\nx = 2\n")


def test_broken_links_are_found(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    assert broken_links(tmp_path / "page.md", PAGE) == ["#what-was-it", "none.svg", "nor.png"]


def test_wide_code_is_found_at_its_line():
    assert wide_code(f"{'prose ' * 20}\n```sh\nshort\n{'x' * 89}\n```\n") == [4]


def test_toctrees_are_read(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.md").write_text("```{toctree}\n:hidden:\n\npage\nTitle <other>\n```\n")
    (tmp_path / "sub/index.md").write_text("```{toctree}\n\npage\n```\n")
    assert listed_pages(tmp_path) == {"page", "other", "sub/page"}
