"""Write docs/example_card anew, on an idle machine: `python tests/hub_cards/write_example.py runs/quickstart`.

Without a family, the card and its plots are rendered anew from the facts that are there, as after a change of the
template: no number changes.
"""

import json
import sys
from pathlib import Path

from fusedvlm.files import sha256_of
from fusedvlm.hub_cards.facts import CardFacts
from fusedvlm.hub_cards.release.release_files import card_files, evidence_files
from fusedvlm.hub_cards.release.variant_release import build_family, write_file

EXAMPLE = Path(__file__).parents[2] / "docs" / "example_card"
M = 8


def main(family: Path) -> None:
    """Everything of one variant's repository that follows from facts; weights, code and tokenizers are left out."""
    releases = build_family(family, "your-name", stated=EXAMPLE / "facts.yaml")
    release = next(release for release in releases if release.num_visual_tokens == M)
    card = ("README.md", "facts.json", "checksums.json", "plots/score_vs_m.png", "plots/latency_vs_m.png")
    for name in (*release.facts.files, *card):
        write_file(EXAMPLE / name, release.files[name])


def render_again() -> None:
    """The card and the records of the facts that are there, and their checksums."""
    facts = CardFacts.from_json((EXAMPLE / "facts.json").read_text(encoding="utf-8"))
    written = {**evidence_files(facts), **card_files(facts)}
    for name, content in written.items():
        write_file(EXAMPLE / name, content)
    sums = json.loads((EXAMPLE / "checksums.json").read_text(encoding="utf-8"))
    sums["files"] |= {name: sha256_of(EXAMPLE / name) for name in written}
    write_file(EXAMPLE / "checksums.json", (json.dumps(sums, indent=2) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) > 1 else render_again()
