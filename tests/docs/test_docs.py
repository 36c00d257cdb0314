"""Links have a target, tables are those of the records, and the tutorial's notebooks run and show their results."""

import json
import re
import runpy
from pathlib import Path

import pytest
from benchmarks import report
from paper import report as paper_report

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorial").glob("*.ipynb"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *NOTEBOOKS])


def cells(notebook: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == kind]


def prose(page: Path) -> str:
    """The page's Markdown without its blocks of code."""
    if page.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in cells(page, "markdown"))
    else:
        text = page.read_text()
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site make of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_a_file_and_a_heading(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_how_it_works_lists_every_module():
    tables = re.split(r"^\| In `(lbp_peft/[\w/]*)` \|", prose(ROOT / "docs" / "how-it-works.md"), flags=re.MULTILINE)
    listed = set()
    for folder, table in zip(tables[1::2], tables[2::2], strict=True):
        first_cells = re.findall(r"^\| (`.*?) \|", table.partition("\n\n")[0], flags=re.MULTILINE)
        listed |= {ROOT / folder / name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}
    assert [str(path) for path in sorted(listed) if not path.exists()] == []
    whole = {path for path in listed if path.is_dir() and not any(path in other.parents for other in listed)}
    modules = {path for path in (ROOT / "lbp_peft").rglob("*.py") if path.name != "__init__.py"}
    assert sorted(str(path) for path in modules - listed if not whole & set(path.parents)) == []


def test_there_are_three_numbered_notebooks():
    assert [notebook.name[:2] for notebook in NOTEBOOKS] == ["1-", "2-", "3-"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run(notebook, monkeypatch, tmp_path):
    pytest.importorskip("sklearn", reason="the notebooks' digits need scikit-learn")
    matplotlib = pytest.importorskip("matplotlib", reason="the notebooks draw with Matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for number, cell in enumerate(cells(notebook, "code")):
        exec(compile("".join(cell["source"]), f"{notebook.name}, code cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_are_stored_with_what_they_print_and_draw(notebook):
    """The site shows the stored outputs and runs nothing."""
    for cell in cells(notebook, "code"):
        source, outputs = "".join(cell["source"]), cell["outputs"]
        if re.search(r"^ *print\(", source, flags=re.MULTILINE):
            assert any(output.get("name") == "stdout" for output in outputs), source
        assert source.count("plt.show()") == sum("image/png" in output.get("data", {}) for output in outputs), source
        assert not any(output.get("name") == "stderr" or output["output_type"] == "error" for output in outputs)


@pytest.mark.parametrize("name", report.TABLES)
def test_the_tables_of_results_are_those_of_the_records(name):
    written = f"<!-- table: {name} -->\n\n{report.TABLES[name]()}\n\n<!-- end -->"
    assert sum(written in page.read_text() for page in PAGES if page.suffix == ".md") == 1


def test_the_tables_of_accuracies_are_those_of_the_records():
    pages = "".join(page.read_text() for page in PAGES if page.suffix == ".md")
    tables = paper_report.contents(paper_report.RESULTS)
    assert {"accuracies", "warm-ups"} < tables.keys()
    for name, table in tables.items():
        assert pages.count(f"<!-- {name} -->\n\n{table}\n\n<!-- end -->") == 1, name


def test_every_marked_table_has_an_entry():
    marked = {name for page in PAGES for name in re.findall(r"<!-- table: (.+?) -->", page.read_text())}
    assert marked == report.TABLES.keys()


def test_one_program_writes_all_tables_and_figures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the figures need matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    pages = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("results.md", "choosing-settings.md"))]
    for page in pages:
        text = page.read_text()
        marked = re.findall(r"<!-- (.+?) -->\n\n\|", text)
        for name in marked:
            text = re.sub(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.DOTALL)
        (tmp_path / page.relative_to(ROOT)).write_text(text)
        assert marked and text != page.read_text()
    runpy.run_path(str(ROOT / "examples" / "report.py"))["main"](["--docs", str(docs)])
    for page in pages:
        assert (tmp_path / page.relative_to(ROOT)).read_text() == page.read_text()
    images = {path.name for path in (docs / "images").iterdir()}
    assert images == {"vit-b-float32.png", "vit-b-bf16.png"} | {
        path.name for path in (ROOT / "docs" / "images").glob("paper-*.png")
    }
