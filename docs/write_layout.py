"""Write docs/layout.md: every folder and file with the first sentence of its docstring.

    python docs/write_layout.py

`tests/test_layout.py` fails when the page is older than the code.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Folders in the order of the import rule, lowest layer first; see CONTRIBUTING.md.
FOLDERS = (
    "fusedvlm", "modeling_fusedvlm", "processing", "conversion", "costs", "data", "reducers", "trainers", "evaluation",
    "serving", "scaling", "hub_cards", "hub_double", "quickstart", "comparison", "lab",
)  # fmt: skip
HEAD = """# Layout

Written by `python docs/write_layout.py` from the docstrings. Folder `X` imports as `fusedvlm.X`; the folders stand
in the order of the import rule of CONTRIBUTING.md, lowest layer first. **[hub]** marks files that are copied into every
variant's folder and run there under `trust_remote_code`.
"""


def first_sentence(path: Path) -> str:
    """The first line of a module's docstring, up to its first full stop that ends a sentence."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")


def travels(path: Path) -> bool:
    """Whether a file is copied into every variant's folder."""
    folder, name = path.parent.name, path.stem
    if folder == "modeling_fusedvlm":
        return name == "configuration_fusedvlm" or name.startswith("modeling_fusedvlm")
    return folder == "processing" and name.startswith(("processing_fusedvlm", "image_processing_"))


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for top in FOLDERS:
        packages = sorted({path.parent for path in (ROOT / top).rglob("*.py") if "__pycache__" not in path.parts})
        for package in packages:
            parts.append(
                f"\n## {package.relative_to(ROOT).as_posix()}/\n\n{first_sentence(package / '__init__.py')}.\n"
            )
            files = sorted(path for path in package.glob("*.py") if path.name != "__init__.py")
            lines = [f"- `{path.name}`{' **[hub]**' if travels(path) else ''} {first_sentence(path)}" for path in files]
            if lines:
                parts.append("\n" + "\n".join(lines) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "layout.md").write_text(page(), encoding="utf-8")
