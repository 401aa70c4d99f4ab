"""The API reference has every public name, and docstrings agree with the code. Needs no Sphinx."""

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
    """Return the kind of directive and the members of every documented name."""
    found = {}
    for page in sorted(pages.glob("*.rst")):
        for kind, name, options in DIRECTIVE.findall(page.read_text()):
            assert name not in found, f"{page.name}: {name} is on two pages"
            members = re.search(r":members: (.+)", options)
            found[name] = kind, members[1].split(", ") if members else []
    return found


def resolve(name):
    """Return the object with a full name."""
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
    """True if napoleon reads the section as a description. It would read text before a colon in the first line as a type."""
    return ": " not in re.sub("``.*?``", "", returns.partition("\n")[0])


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def raised(function):
    """Return the names of the exceptions that the function's own code raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


DOCUMENTED = documented(PAGES)
CLASSES = [name for name, (kind, _) in DOCUMENTED.items() if kind in ("class", "exception")]
FUNCTIONS = [name for name, (kind, _) in DOCUMENTED.items() if kind == "function"]
METHODS = [(name, member) for name in CLASSES for member in DOCUMENTED[name][1]]


def test_every_public_name_is_documented():
    assert {f"movq_ext.{name}" for name in movq_ext.__all__} - DOCUMENTED.keys() == set()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_documented_name_exists_and_has_the_kind_of_its_directive(name):
    kind, members = DOCUMENTED[name]
    value = resolve(name)
    found = "function" if inspect.isfunction(value) else "data"
    if inspect.isclass(value):
        found = "exception" if issubclass(value, Exception) else "class"
    assert kind == found
    assert [member for member in members if not hasattr(value, member)] == []
    assert name.rpartition(".")[0] != "movq_ext" or name.rpartition(".")[2] in movq_ext.__all__


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_documents_its_arguments_result_and_errors(name):
    function = resolve(name)
    doc = sections(function.__doc__)
    assert entries(doc.get("Args", "")) == parameters(function)
    has_result = inspect.signature(function).return_annotation not in ("None", "Iterator[None]", None)
    assert ("Returns" in doc) == has_result
    assert is_one_value(doc.get("Returns", ""))
    assert raised(function) <= set(entries(doc.get("Raises", "")))


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_documents_its_arguments_and_errors(name):
    value = resolve(name)
    assert "__doc__" in value.__dict__ and not value.__doc__.startswith(f"{value.__name__}(")  # as dataclass does by default
    doc = sections(value.__doc__)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        assert entries(doc.get("Args", doc.get("Attributes", ""))) == fields
    elif "__init__" in value.__dict__:
        assert entries(doc.get("Args", "")) == parameters(value.__init__)
    init = value.__dict__.get("__post_init__" if dataclasses.is_dataclass(value) else "__init__")
    assert init is None or raised(init) <= set(entries(doc.get("Raises", "")))


@pytest.mark.parametrize(("name", "member"), METHODS)
def test_a_method_is_documented_with_its_errors(name, member):
    method = inspect.getattr_static(resolve(name), member)
    function = method.fget if isinstance(method, property) else method
    assert function.__doc__
    doc = sections(function.__doc__)
    assert "Args" not in doc or entries(doc["Args"]) == parameters(function)
    assert is_one_value(doc.get("Returns", ""))
    assert {error for error in raised(function) if error not in function.__doc__} == set()


@pytest.mark.parametrize("name", CLASSES)
def test_all_public_methods_of_a_class_are_on_its_page(name):
    """Methods that its superclass documents may be left out."""
    value = resolve(name)
    superclass = value.__mro__[1]
    own = {
        member
        for member, found in value.__dict__.items()
        if (inspect.isfunction(found) or isinstance(found, property)) and not member.startswith("_")
    }
    inherited = {member for member in own if hasattr(superclass, member) and member != "forward"}
    assert own - inherited <= set(DOCUMENTED[name][1])
