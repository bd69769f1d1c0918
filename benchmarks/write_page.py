"""Write the tables of docs/performance.md from the records: `python benchmarks/write_page.py`."""

import json
from pathlib import Path
from typing import Any

from runner import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- written from the records by benchmarks/write_page.py -->", "<!-- end of the records -->"
ORDER = (
    "image_processors", "sweep", "questions", "mixed_rows", "training_counts", "decode", "startup", "exponents",
)  # fmt: skip


def cell(value: float) -> str:
    """Three digits, without powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def section(record: dict[str, Any]) -> str:
    """Goals of one record, and where the rest stands."""
    lines = [f"## {record['title']}", "", record["text"], "", "| what | goal | found | |", "|---|---|---|---|"]
    for goal in record["goals"]:
        sign = "at most" if goal["at_most"] else "at least"
        said = "" if goal["is_met"] else f"**missed**{': ' + goal['unmet'] if goal['unmet'] else ''}"
        lines.append(f"| {goal['what']} | {sign} {cell(goal['goal'])} | {cell(goal['found'])} | {said} |")
    lines += ["", *(f"- {name}: {value}" for name, value in record["facts"].items())]
    lines += ["", f"[Record](../benchmarks/results/{record['name']}.md)", ""]
    return "\n".join(lines)


def page(folder: Path = RESULTS) -> str:
    """The whole page: what stands there, with the records' tables between its two marks."""
    records = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ORDER]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, "", *(section(record) for record in records), END + after])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
