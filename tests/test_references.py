"""References lead somewhere: pages and headings that are cited, links and anchors, tests and files named in the docs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "docs").is_dir():
    pytest.skip("docs are not part of an installed package", allow_module_level=True)
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SOURCES = [
    path
    for folder in sorted(ROOT.iterdir())
    if (folder / "__init__.py").exists() or folder.name == "benchmarks"
    for path in sorted(folder.rglob("*"))
    if path.suffix in {".py", ".jinja", ".yaml", ".md"} and path != Path(__file__)
]
TEXTS = [*PAGES, *SOURCES, ROOT / "Makefile", ROOT / "pyproject.toml"]
MARGIN = re.compile(r"\n[ \t]*(?:#+ |[*>] )?")  # where a sentence goes on in the next line of a comment or docstring
# docs/reference.md, "Fusion rows" and "Queries"
CITATION = re.compile(r"docs/([\w-]+)\.md((?:,? (?:and )?[\"'“][^\"'”]{2,80}[\"'”])*)")
# A number leads nowhere as soon as somebody adds a section; a paper's sections are cited beside the paper's title.
NUMBERED = re.compile(r"\b(?:[Rr]eference|[Tt]heory),? (?:sections? )?\d|\b[Ss]ections? \d+", re.ASCII)
POINTER = re.compile(r"\bsee (?:there|above|below)\b|\bof that choice\b", re.IGNORECASE)


def headings(page: Path) -> list[str]:
    """The headings of a page as they are read: without markup, and none from code blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#{1,6} (.+?)\s*$", text, re.MULTILINE)
    return [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "") for heading in found]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the Hub give those headings."""
    found: set[str] = set()
    for heading in headings(page):
        plain = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        taken = sum(1 for other in found if re.fullmatch(rf"{re.escape(plain)}(-\d+)?", other))
        found.add(f"{plain}-{taken}" if taken else plain)
    return found


def citations(text: str) -> list[tuple[str, str | None]]:
    """(page, heading or None) for every citation in a source or page, across line breaks."""
    flat = MARGIN.sub(" ", text).replace('\\"', '"')
    found: list[tuple[str, str | None]] = []
    for page, quoted in CITATION.findall(flat):
        names = re.findall(r"[\"'“]([^\"'”]+)[\"'”]", quoted)
        found += [(page, name) for name in names] or [(page, None)]
    return found


def broken_citations(text: str, folder: Path) -> list[str]:
    """What a text cites and nobody finds."""
    wrong = []
    for page, heading in citations(text):
        path = folder / "docs" / f"{page}.md"
        if not path.is_file():
            wrong.append(f"docs/{page}.md does not exist")
        elif heading is not None and heading not in headings(path):
            wrong.append(f'docs/{page}.md has no heading "{heading}"')
    return wrong


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links and anchors of Markdown text in a page, or in a module's docstrings, that lead nowhere."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    wrong = []
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE):
        target = target[0] or target[1]
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else page.parent / path
        if not there.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and there.suffix == ".md" and anchor not in anchors(there):  # a picture's names a color scheme
            wrong.append(f"{target}: no such heading")
    return wrong


def docstrings(path: Path) -> list[str]:
    """Every docstring of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]


def test_there_is_something_to_follow():
    cited = {citation for path in TEXTS for citation in citations(path.read_text(encoding="utf-8"))}
    assert len([heading for _, heading in cited if heading]) >= 10
    assert ("reference", "Fusion rows") in cited


def test_a_broken_reference_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "one.md"
    page.write_text(
        "# One\n\n## A `code` *heading*: yes\n\n```\n# not a heading\n```\n\n[x](#one) [y](#none) [z](no.md)\n"
    )
    text = (
        '"""See docs/one.md, "A code\n    heading: yes" and "Not a heading"; docs/two.md."""\n# docs/one.md,\n#   "One"'
    )
    assert broken_citations(text, tmp_path) == [
        'docs/one.md has no heading "Not a heading"',
        "docs/two.md does not exist",
    ]
    assert broken_links(page.read_text(), page) == ["#none: no such heading", "no.md: no such file"]
    assert anchors(page) == {"one", "a-code-heading-yes"}
    assert NUMBERED.search("as published (reference section 3)")
    assert NUMBERED.search("reference 1.1")
    assert not NUMBERED.search("cross-section of 3")


def test_citations_lead_to_a_page_and_its_heading():
    wrong = {path: broken_citations(path.read_text(encoding="utf-8"), ROOT) for path in TEXTS}
    assert {str(path.relative_to(ROOT)): found for path, found in wrong.items() if found} == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_of_the_pages_exist(page):
    assert broken_links(page.read_text(encoding="utf-8"), page) == []


def test_links_in_docstrings_exist():
    wrong = {path: broken_links("\n".join(docstrings(path)), path) for path in SOURCES if path.suffix == ".py"}
    assert {str(path.relative_to(ROOT)): found for path, found in wrong.items() if found} == {}


def test_nothing_is_cited_by_number():
    licenses = re.compile(r"Sections 1 through 9 of this document")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in TEXTS
        for match in NUMBERED.finditer(licenses.sub("", MARGIN.sub(" ", path.read_text(encoding="utf-8"))))
    ]
    assert found == []


def test_docstrings_stand_alone():
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in SOURCES
        if path.suffix == ".py"
        for text in docstrings(path)
        for match in POINTER.finditer(text)
    ]
    helps = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in SOURCES
        if path.suffix == ".py" and "tests" not in path.relative_to(ROOT).parts
        for match in POINTER.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found + helps == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page):
    """`test_file.py::test_name`, `test_name` and `tests/folder/test_file.py`: a promise is only as good as its test."""
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        return  # it tells what was, not what is
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    wrong = []
    for name in set(re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)[`:]", text)):
        if not any(str(path.relative_to(ROOT)).endswith(name) for path in sources):
            wrong.append(name)
    for name in set(re.findall(r"[`:](test_\w+)`", text)):
        if not any(f"def {name}(" in source for source in sources.values()):
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("page", ["reference.md", "theory.md"])
def test_code_of_the_pages_runs(page):
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), {})


def test_view_counts_of_the_reference_are_those_of_the_code():
    from fusedvlm.processing.image_processing_fusedvlm_views import plan_canvas

    rows = re.findall(
        r"^\| (\d+) x (\d+) \| (\d+) \| (\d+) \|$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE
    )
    assert len(rows) == 8
    for width, height, *counts in rows:
        plans = [plan_canvas(int(height), int(width), 336, most) for most in (9, 16)]
        assert [plan.rows * plan.columns + 1 for plan in plans] == [int(count) for count in counts]
