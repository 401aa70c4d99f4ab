"""The documents: their Python runs, their links lead somewhere, their figures are what the script draws."""

import re
import runpy
from pathlib import Path

import emulator
import pytest
import torch

SOURCE = Path(__file__).resolve().parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
DOCUMENTS = [*(SOURCE / name for name in TOP), *sorted((SOURCE / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")

names = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(SOURCE).as_posix())


def blocks(text):
    """(line, mark, code) of every block of Python; the mark is the HTML comment on the line before it."""
    found = BLOCK.finditer(text)
    return [(text.count("\n", 0, block.start("code")) + 1, block["mark"], block["code"]) for block in found]


def run_blocks(text, name):
    """In order, in one namespace. Left out are blocks marked `not run: why`, and `needs the emulator` where there is none."""
    namespace = {}
    for line, mark, code in blocks(text):
        if mark and (mark.startswith("not run: ") or (mark == "needs the emulator" and not emulator.available())):
            continue
        exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)


def links(text):
    """What is linked to on this side of the web; code is none of it."""
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [target for target in (one or other for one, other in LINK.findall(prose)) if not re.match(r"[a-z]+:", target)]


def anchors(text):
    """The headings as GitHub names them in links."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(document, text):
    """Links whose file or heading is not there."""
    missing = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in anchors(text if file == document else file.read_text())):
            missing.append(target)
    return missing


@names
def test_python_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_blocks(document.read_text(), document.relative_to(SOURCE).as_posix())


@names
def test_links_lead_somewhere(document):
    assert broken(document, document.read_text()) == []


def test_figures_are_what_the_script_draws(tmp_path):
    runpy.run_path(str(SOURCE / "docs/figures/draw.py"))["draw"](tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (SOURCE / "docs/figures").glob("*.svg")}
    assert drawn == committed, "run python docs/figures/draw.py"


# --- That these tests can fail

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


def test_a_wrong_claim_is_seen_at_its_line():
    with pytest.raises(AssertionError) as raised:
        run_blocks(PAGE, "page.md")
    assert raised.traceback[-1].lineno + 1 == 11


def test_what_leads_nowhere_is_seen(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    assert broken(tmp_path / "page.md", PAGE) == ["#what-was-it", "none.svg", "nor.png"]
