"""Write docs/example_card anew: `python tests/hub_cards/write_example.py runs/quickstart`, on an idle machine."""

import sys
from pathlib import Path

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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
