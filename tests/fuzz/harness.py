"""What all fuzzers share: damage to cases, the one property, the corpus, and how many cases are tried.

The property: a case gives a clean result, which the target checks, or one `ValueError` or `OSError` whose message is one
line of at most 300 characters and names the input. Never another exception, never a hang, never a wrong result.

A corpus lies in `corpus/<target>/`: `seed-*` are what damage starts from, `found-*` is what a fuzzer once found, kept for
ever. `make test` tries the whole corpus and some fixed cases; `make fuzz` 10,000 random ones per target and writes what
fails, as small as it could be made, into the corpus (FUSEDVLM_FUZZ_CASES and FUSEDVLM_FUZZ_SEED choose others).
"""

import hashlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
FEW = 40  # cases of each target in `make test`, always the same ones
CASES = int(os.environ.get("FUSEDVLM_FUZZ_CASES", FEW))
SEED = os.environ.get("FUSEDVLM_FUZZ_SEED")
LONGEST = 300  # characters of a message
HANG = 60.0  # seconds after which a case counts as hanging; the slowest honest ones take about one


@dataclass(frozen=True)
class Target:
    """Something that reads what strangers hand over.

    Args:
        name: of its corpus.
        use: reads a case, given an empty folder; asserts that a result is right, raises what the user would see.
        names: one of them must stand in every message.
        damage: strategy of cases, given the corpus' cases.
        refusals: what else it may raise, with the same kind of message.
    """

    name: str
    use: Callable[[bytes, Path], None]
    names: tuple[str, ...]
    damage: Callable[[list[bytes]], st.SearchStrategy[bytes]]
    refusals: tuple[type[Exception], ...] = ()

    @property
    def folder(self) -> Path:
        return CORPUS / self.name

    def corpus(self) -> list[Path]:
        """Every kept case."""
        return sorted(self.folder.iterdir())


class Hang(BaseException):
    """A case takes longer than anything honest."""


@contextmanager
def limited(seconds: float):
    """Raise `Hang` in this thread after some seconds; the timer that was running goes on afterwards."""

    def stop(signum, frame):
        raise Hang(f"no result after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    before, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(before - (time.monotonic() - started), 0.01), interval)


def judge(target: Target, case: bytes, folder: Path) -> str:
    """ "clean" or "refused"; whatever breaks the property is raised."""
    try:
        with limited(HANG):
            target.use(case, folder)
    except AssertionError:
        raise
    except (ValueError, OSError, *target.refusals) as refusal:
        error = refusal
    else:
        return "clean"
    message = str(error)
    assert message, f"{type(error).__name__} without a message"
    assert len(message.splitlines()) == 1, f"more than one line: {message!r}"
    assert len(message) <= LONGEST, f"{len(message)} characters: {message!r}"
    assert any(name in message for name in target.names), f"does not name the input: {message!r}"
    return "refused"


def explore(target: Target, folder: Path) -> Counter:
    """Try many damaged cases; keep what fails. Returns how many were clean and refused."""
    failing: list[bytes] = []
    seen: Counter = Counter()
    strategy = target.damage([path.read_bytes() for path in target.corpus()])
    is_deep = CASES > FEW

    @hypothesis.settings(
        max_examples=CASES,
        derandomize=not is_deep and SEED is None,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        print_blob=False,
    )
    @hypothesis.given(strategy)
    def attempt(case: bytes) -> None:
        try:
            seen[judge(target, case, folder)] += 1
        except BaseException:
            failing.append(case)
            raise

    if SEED is not None:
        attempt = hypothesis.seed(int(SEED))(attempt)
    try:
        attempt()
    except BaseException as error:
        if failing:
            kept = keep(target, failing[-1]) if is_deep else None
            error.add_note(f"case: {failing[-1][:500]!r}" + (f"; kept as {kept}" if kept else ""))
        raise
    return seen


def keep(target: Target, case: bytes) -> Path:
    """Write a case into the corpus."""
    path = target.folder / f"found-{hashlib.sha256(case).hexdigest()[:12]}"
    path.write_bytes(case)
    return path


# -- damage ------------------------------------------------------------------------------------------------------------


@st.composite
def damaged_bytes(draw, seeds: list[bytes], most: int = 6) -> bytes:
    """A seed with a few edits: flipped bits, cuts, insertions, repeats, parts of another seed."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, most))):
        size = max(len(data), 1)
        place = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, min(size, 64)))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "splice", "set"]))
        if kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place : place + length]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=12))
        elif kind == "repeat":
            data[place:place] = bytes(data[place : place + length]) * draw(st.integers(1, 4))
        elif kind == "splice":
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, max(len(other) - 1, 0)))
            data[place:] = other[start:]
        elif kind == "set":
            data[place : place + length] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))]) * length
    return bytes(data)


ODD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, -(2**63), 10**30, 0.5, 2.5, -0.0, 1e308, float("nan"),
    float("inf"), "", " ", "\n", "\0", "a", "1", "true", "null", "-1", "<image>", "<|question|>", "</s>", "../x", "/", "é漢🙂",
    "\u202e", "\ud800", "x" * 400, "line\nline", "{}", "[]", [], {}, [[]], [None], [0], ["a"], [{}], {"": 0}, {"a": {"b": []}}, [[[[1]]]],
]  # fmt: skip


def paths_of(value: Any, here: tuple = ()) -> list[tuple]:
    """Every place in a JSON value, the root first."""
    found = [here]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += paths_of(entry, (*here, key))
    return found


@st.composite
def damaged_tree(draw, seeds: list[Any], most: int = 3, odd: list[Any] = ODD) -> Any:
    """A JSON value of the seeds with a few places replaced, removed, renamed, repeated, wrapped or exchanged."""
    tree = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.integers(0, most))):
        paths = paths_of(tree)
        path = paths[draw(st.integers(0, len(paths) - 1))]
        value = draw(st.sampled_from(odd) | st.integers(-5, 5) | st.text(max_size=8))
        value = json.loads(json.dumps(value))
        if not path:
            tree = value if draw(st.integers(0, 9)) == 0 else tree
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "repeat", "wrap", "move"]))
        _edit(parent, path[-1], kind, value, draw)
    return tree


def _edit(parent: Any, key: Any, kind: str, value: Any, draw) -> None:
    if kind == "remove":
        del parent[key]
    elif kind == "add":
        if isinstance(parent, dict):
            parent[draw(st.sampled_from(["", "type", "name", "x" * 60, "é"]) | st.text(max_size=5))] = value
        else:
            parent.insert(key, value)
    elif kind == "repeat" and isinstance(parent, list):
        parent.append(json.loads(json.dumps(parent[key])))
    elif kind == "wrap":
        parent[key] = [parent[key]]
    elif kind == "move" and isinstance(parent, dict):
        other = draw(st.sampled_from(sorted(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = value


def json_cases(most: int = 3, broken: bool = False, **kwargs) -> Callable[[list[bytes]], st.SearchStrategy[bytes]]:
    """Strategy of JSON documents as bytes; with `broken` also damaged text."""

    def strategy(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
        documents = []
        for seed in seeds:
            try:
                documents.append(json.loads(seed))
            except ValueError:
                continue
        trees = damaged_tree(documents, most, **kwargs).map(lambda tree: json.dumps(tree).encode())
        return trees | damaged_bytes(seeds, 3) if broken else trees

    return strategy
