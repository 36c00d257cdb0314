"""Everything the docs name can be imported from where they name it, and what is exported can be used by itself."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest

import lbp_peft

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
DOTTED = re.compile(r"\blbp_peft(?:\.[A-Za-z_]\w*)+")
IMPORTED = re.compile(r"^from (lbp_peft[\w.]*) import (.+)$", re.MULTILINE)
FILE = re.compile(r"\blbp_peft(?:/\w+)*/\w+\.py\b|\blbp_peft/(?:\w+/)+")
# Written in square brackets, names of the package are links to it, in docstrings too.
LINKED = re.compile(r"\[`(lbp_peft(?:\.\w+)+)`\]")


def bound_by(module: types.ModuleType) -> set[str]:
    """The names that a module's own imports bind. Others may be there too, if some test has imported a submodule."""
    imports = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def resolve(dotted: str) -> object:
    """Resolve a name through attributes only, as `import lbp_peft` leaves them."""
    found: object = lbp_peft
    names = dotted.split(".")[1:]
    assert names[0] in bound_by(lbp_peft), f"import lbp_peft does not bring {dotted}"
    for name in names:
        found = getattr(found, name)
    return found


def without_comment(names: str) -> list[str]:
    return [name.split(" as ")[0].strip() for name in names.split("#")[0].strip(" ()").split(",") if name.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_name_exists(page):
    text = page.read_text()
    for dotted in DOTTED.findall(IMPORTED.sub("", text)):  # an import brings the module that it names
        if not dotted.endswith((".py", ".md")):
            resolve(dotted)
    for module, names in IMPORTED.findall(text):
        for name in without_comment(names):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"
    for file in FILE.findall(text):
        assert (ROOT / file).exists(), file


def test_pages_name_something():
    """Otherwise the test above would find nothing wrong."""
    text = "".join(page.read_text() for page in PAGES)
    assert len(DOTTED.findall(text)) > 10 and IMPORTED.search(text) and len(FILE.findall(text)) > 5


def test_names_linked_in_docstrings_exist():
    found = [name for file in ROOT.glob("lbp_peft/**/*.py") for name in LINKED.findall(file.read_text())]
    assert len(found) > 10
    for dotted in found:
        try:
            pkgutil.resolve_name(dotted)
        except ModuleNotFoundError as error:  # those of kernels, which import it
            assert error.name == "triton"


@pytest.mark.parametrize("module", [lbp_peft, lbp_peft.tuner], ids=lambda module: module.__name__)
def test_exports_are_listed_and_there(module):
    assert module.__all__ == sorted(module.__all__, key=lambda name: (name[0].islower(), name))
    for name in module.__all__:
        getattr(module, name)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    }
    helpers = {"add_peft_type", "check_peft_version", "register"}
    assert public - helpers <= set(module.__all__)


def test_types_of_arguments_are_exported():
    """The package's own classes in the signatures of exported functions are exported too."""
    for name in lbp_peft.__all__:
        function = getattr(lbp_peft, name)
        if not isinstance(function, types.FunctionType):
            continue
        for parameter in inspect.signature(function).parameters.values():
            for word in re.findall(r"\w+", str(parameter.annotation)):
                value = vars(sys.modules[function.__module__]).get(word)
                if inspect.isclass(value) and value.__module__.startswith("lbp_peft"):
                    assert word in lbp_peft.__all__, f"{name} takes a {word}"


def test_the_version_has_one_source():
    """pyproject.toml reads it from the package, where setuptools must find it without importing the package."""
    text = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^version *= *\"", text, re.MULTILINE)
    assert 'dynamic = ["version"]' in text and 'attr = "lbp_peft.__version__"' in text
    assigned = re.findall(r'^__version__ = "(.+?)"', (ROOT / "lbp_peft" / "__init__.py").read_text(), re.MULTILINE)
    assert assigned == [lbp_peft.__version__]
