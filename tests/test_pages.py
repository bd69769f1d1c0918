"""The helper that runs the blocks of a page: each has its own result, in the page's order."""

import pytest

from fusedvlm.tests.pages import Page, blocks_of, names_of


def recorded(*wrong: str) -> tuple[Page, list[str]]:
    """A page of the blocks a, b and c that runs them into a list, and fails at some."""
    seen = []

    def run(language, source):
        seen.append(source)
        if source in wrong:
            raise RuntimeError(f"{source} is wrong")

    return Page([("python", source) for source in "abc"], run), seen


def test_every_block_runs_once_and_after_those_before_it():
    page, seen = recorded()
    page.run(1)
    assert seen == ["a", "b"]
    page.run(0)
    page.run(2)
    page.finish()
    assert seen == ["a", "b", "c"]


def test_the_first_failure_is_a_failure_a_later_one_is_skipped_and_others_pass():
    page, _ = recorded("a", "c")
    page.run(1)
    with pytest.raises(RuntimeError, match="a is wrong"):
        page.run(0)
    with pytest.raises(pytest.skip.Exception, match=r"block 0 failed before this one.*c is wrong"):
        page.run(2)
    with pytest.raises(pytest.skip.Exception, match="block 0 failed"):
        page.finish()


def test_blocks_are_found_by_language_and_named(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("text\n```bash\nls -l\n```\n```text\nno\n```\n```python\nx = 1\n```\n")
    blocks = blocks_of(path, "bash|python")
    assert blocks == [("bash", "ls -l\n"), ("python", "x = 1\n")]
    assert names_of(blocks) == ["0-bash-ls_l", "1-python-x_1"]
