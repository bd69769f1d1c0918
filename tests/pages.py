"""Code blocks of a page as tests of their own, run in the page's order."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest


def blocks_of(page: Path, languages: str) -> list[tuple[str, str]]:
    """(language, source) of each fenced block; `languages` as a regular expression."""
    return re.findall(rf"^```({languages})\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def names_of(blocks: list[tuple[str, str]]) -> list[str]:
    """Test ids: number, language and first words of each block."""
    return [
        f"{number}-{language}-{re.sub(r'[^A-Za-z0-9]+', '_', source)[:40].strip('_')}"
        for number, (language, source) in enumerate(blocks)
    ]


class Page:
    """The blocks of a page that share a folder, a shell or names.

    A test that asks for one block alone gets those before it, too. A block that fails after an earlier one failed is
    skipped with that reason, since it may lack what the earlier one leaves behind; one that needs nothing of it passes.
    """

    def __init__(self, blocks: list[tuple[str, str]], run_block: Callable[[str, str], None]):
        self.blocks, self.run_block = blocks, run_block
        self.errors: list[BaseException | None] = []

    def run(self, number: int) -> None:
        """Run a block, and those before it that have not been."""
        while len(self.errors) <= number:
            try:
                self.run_block(*self.blocks[len(self.errors)])
            except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - raised below, by the block's own test
                self.errors.append(error)
            else:
                self.errors.append(None)
        error, earlier = self.errors[number], self.first_failure(number)
        if error is not None and earlier is not None:
            pytest.skip(f"block {earlier} failed before this one, which then ended with {error!r}"[:500])
        if error is not None:
            raise error

    def first_failure(self, before: int) -> int | None:
        """Number of the first block that failed, below `before`."""
        return next((number for number, error in enumerate(self.errors[:before]) if error is not None), None)

    def finish(self) -> None:
        """Run what is left; skip the calling test when a block failed, whose own test says why."""
        for number in range(len(self.errors), len(self.blocks)):
            try:
                self.run(number)
            except (Exception, pytest.skip.Exception):  # noqa: BLE001 - its own test raises it
                continue
        if (failed := self.first_failure(len(self.blocks))) is not None:
            pytest.skip(f"block {failed} failed")
