"""The workflows test the lowest and the newest supported versions, and the checks that `.ci/run` makes."""

import re
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from lbp_peft.tuner.compat.registration import BELOW_PEFT, LOWEST_PEFT

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()  # read by regular expressions, since Python 3.10 has no tomllib
CI = (ROOT / ".ci" / "run").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(name: str) -> dict[str, dict]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"]


def commands(job: dict) -> list[str]:
    return [line.strip() for step in job["steps"] for line in step.get("run", "").splitlines()]


def matrix(versions: str) -> dict[str, str]:
    (entry,) = [one for one in jobs("tests")["test"]["strategy"]["matrix"]["include"] if one["versions"] == versions]
    return entry


def bounds(package: str) -> SpecifierSet:
    """The versions of a package that pyproject.toml allows."""
    (specifiers,) = re.findall(rf'^    "{package}([<>=].*)",$', PYPROJECT, re.MULTILINE)
    return SpecifierSet(specifiers)


def lowest(specifiers: SpecifierSet) -> Version:
    (version,) = [Version(one.version) for one in specifiers if one.operator == ">="]
    return version


def pins(entry: dict[str, str]) -> dict[str, str]:
    """The version of each package in an entry of the matrix; "" where the newest one is installed."""
    requirements = f"{entry['torch']} {entry['others']}".split()
    return {name: version for name, _, version in (one.partition("==") for one in requirements)}


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_the_lowest_versions_are_those_of_pyproject(package):
    pinned = pins(matrix("lowest"))[package].removesuffix(".*")
    # The first release of a minor series may be missing from the index, so a series stands for its lowest release.
    assert Version(pinned).release[:2] == lowest(bounds(package)).release[:2]
    assert pinned in bounds(package)


def test_the_newest_versions_are_not_pinned():
    assert pins(matrix("newest")) == {"torch": "", "transformers": "", "peft": ""}


def test_the_oldest_and_the_newest_python_are_tested():
    (oldest,) = re.findall(r'^requires-python = ">=(.+)"$', PYPROJECT, re.MULTILINE)
    listed = re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)
    assert matrix("lowest")["python"] == oldest == min(listed, key=Version)
    assert matrix("newest")["python"] == max(listed, key=Version)


def test_the_package_checks_for_the_bounds_of_peft():
    assert bounds("peft") == SpecifierSet(f">={lowest(bounds('peft'))},<{BELOW_PEFT}")
    assert Version(LOWEST_PEFT) == lowest(bounds("peft"))
    assert f'"peft=={LOWEST_PEFT}"' in CI and f'"peft<{BELOW_PEFT}"' in CI


def test_the_checks_are_those_of_ci():
    checks = [command for command in commands(jobs("tests")["check"]) if not command.startswith("pip ")]
    assert checks == ["ruff check .", "ruff format --check .", "mypy"]
    assert "mkdocs build --strict" in commands(jobs("docs")["build"])
    for command in [*checks, "mkdocs build --strict"]:
        assert f".venv/bin/{command}" in CI
    for job in (jobs("tests")["wheel"], jobs("release")["build"]):
        assert {"python -m build", "twine check --strict dist/*"} <= set(commands(job))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_workflows_have_no_permission_that_they_do_not_need(workflow):
    content = yaml.safe_load(workflow.read_text())
    assert content["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in content["jobs"].items() if "permissions" in job}
    expected = {
        "docs.yml": {"deploy": {"pages": "write", "id-token": "write"}},
        "release.yml": {"publish": {"id-token": "write"}},
    }
    assert granted == expected.get(workflow.name, {})
