"""The pages of the API reference against the package, and its docstrings against the code. Needs no Sphinx."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import movq_ext

PAGES = Path(__file__).resolve().parents[1] / "docs" / "api"
DIRECTIVE = re.compile(r"^\.\. (?:auto|py:)(\w+):: (\S+)((?:\n   :.*)*)", re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n((?:(?:    .*)?(?:\n|$))+)", re.MULTILINE)
ENTRY = re.compile(r"^    ([*\w][*\w., ]*): \S", re.MULTILINE)


def documented(pages):
    """Every name that the pages document: its directive's kind and its members."""
    found = {}
    for page in sorted(pages.glob("*.rst")):
        for kind, name, options in DIRECTIVE.findall(page.read_text()):
            assert name not in found, f"{page.name}: {name} is on two pages"
            members = re.search(r":members: (.+)", options)
            found[name] = kind, members[1].split(", ") if members else []
    return found


def resolve(name):
    """The object of a full name."""
    module, _, rest = name.partition(".")
    value = importlib.import_module(module)
    for part in rest.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(f"{value.__name__}.{part}")
    return value


def sections(docstring):
    return {title: text for title, text in SECTION.findall(inspect.cleandoc(docstring) + "\n")}


def entries(section):
    return [name.lstrip("*") for names in ENTRY.findall(section) for name in names.split(", ")]


def is_one_value(returns):
    """Whether napoleon takes the section for a description: what stands before a colon in its first line would be a type."""
    return ": " not in re.sub("``.*?``", "", returns.partition("\n")[0])


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def raised(function):
    """Names of the classes that the function's own code raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


DOCUMENTED = documented(PAGES)
CLASSES = [name for name, (kind, _) in DOCUMENTED.items() if kind in ("class", "exception")]
FUNCTIONS = [name for name, (kind, _) in DOCUMENTED.items() if kind == "function"]
METHODS = [(name, member) for name in CLASSES for member in DOCUMENTED[name][1]]


def test_the_pages_have_every_public_name():
    assert {f"movq_ext.{name}" for name in movq_ext.__all__} - DOCUMENTED.keys() == set()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_name_exists_and_is_what_the_page_calls_it(name):
    kind, members = DOCUMENTED[name]
    value = resolve(name)
    found = "function" if inspect.isfunction(value) else "data"
    if inspect.isclass(value):
        found = "exception" if issubclass(value, Exception) else "class"
    assert kind == found
    assert [member for member in members if not hasattr(value, member)] == []
    assert name.rpartition(".")[0] != "movq_ext" or name.rpartition(".")[2] in movq_ext.__all__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_gives_and_raises(name):
    function = resolve(name)
    said = sections(function.__doc__)
    assert entries(said.get("Args", "")) == parameters(function)
    gives = inspect.signature(function).return_annotation not in ("None", "Iterator[None]", None)
    assert ("Returns" in said) == gives
    assert is_one_value(said.get("Returns", ""))
    assert raised(function) <= set(entries(said.get("Raises", "")))


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_is_made_of_and_raises(name):
    value = resolve(name)
    assert "__doc__" in value.__dict__ and not value.__doc__.startswith(f"{value.__name__}(")  # which dataclass makes up
    said = sections(value.__doc__)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        assert entries(said.get("Args", said.get("Attributes", ""))) == fields
    elif "__init__" in value.__dict__:
        assert entries(said.get("Args", "")) == parameters(value.__init__)
    makes = value.__dict__.get("__post_init__" if dataclasses.is_dataclass(value) else "__init__")
    assert makes is None or raised(makes) <= set(entries(said.get("Raises", "")))


@pytest.mark.parametrize(("name", "member"), METHODS)
def test_a_method_says_what_it_does_and_raises(name, member):
    method = inspect.getattr_static(resolve(name), member)
    function = method.fget if isinstance(method, property) else method
    assert function.__doc__
    said = sections(function.__doc__)
    assert "Args" not in said or entries(said["Args"]) == parameters(function)
    assert is_one_value(said.get("Returns", ""))
    assert {error for error in raised(function) if error not in function.__doc__} == set()


@pytest.mark.parametrize("name", CLASSES)
def test_the_page_of_a_class_has_all_of_its_own_public_methods(name):
    """But for those of which the superclass says what they do."""
    value = resolve(name)
    superclass = value.__mro__[1]
    own = {
        member
        for member, found in value.__dict__.items()
        if (inspect.isfunction(found) or isinstance(found, property)) and not member.startswith("_")
    }
    inherited = {member for member in own if hasattr(superclass, member) and member != "forward"}
    assert own - inherited <= set(DOCUMENTED[name][1])
