"""Does a variant load and answer where this package is not installed, and where there is nothing to steal?

The process that runs the repository's code has an environment of its own without any of the caller's variables, an
empty home and no network, may read nothing of the user's but the variant (and the language model it names, fetched
before), and has limits on time, memory, file sizes and processes. See sandbox.py for what holds where.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download

from fusedvlm.files import link_or_copy
from fusedvlm.hub_cards.hub_errors import CALL_ERRORS
from fusedvlm.hub_cards.release.bundle import is_local, self_contained

from .foreign_code import printable

HERE = Path(__file__).resolve().parent
GB = 1 << 30
# The caller's variables that Python's libraries need to be found; nothing else goes in.
LIBRARY_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Loaded:
    """What came of loading.

    Args:
        problem: what went wrong in one line, None when nothing did.
        isolation: what the process was kept from, {"network", "files", "limits": in words}.
    """

    problem: str | None
    isolation: dict[str, str] = field(default_factory=dict)


def load_isolated(folder: Path, timeout: float = 3600) -> Loaded:
    """Load a variant and ask it once, locked up. Runs the code in the folder, so check that first.

    Args:
        folder: the variant.
        timeout: seconds until it counts as failed.
    """
    folder = Path(folder).resolve()
    with tempfile.TemporaryDirectory(prefix="fusedvlm-load-") as name:
        place = Path(name).resolve()
        for part in ("home", "tmp", "cache"):
            (place / part).mkdir()
        cached = _language_model(folder, place / "cache")
        wanted = {
            "folder": str(folder),
            "paths": _library_paths(),
            "readable": [str(folder), *_real_folders(folder), *map(str, cached), *_python()],
            "writable": [str(place)],
            "limits": _limits(folder, cached, timeout),
            "answer": str(place / "answer.json"),
            "sandbox": str(HERE),
        }
        (place / "wanted.json").write_text(json.dumps(wanted), encoding="utf-8")
        code = _run(
            [sys.executable, "-I", "-B", str(HERE / "loading_probe.py"), str(place / "wanted.json")], place, timeout
        )
        if code is None:
            return Loaded(f"did not load and answer within {timeout:.0f} seconds", _held(place / "answer.json"))
        try:
            seen = json.loads((place / "answer.json").read_text(encoding="utf-8"))
            return Loaded(judge(seen), dict(seen["isolation"]))
        except (OSError, ValueError, LookupError, TypeError):
            words = _last_words(place, code)
            return Loaded(f"does not load and answer without this package: {words}", _held(place / "answer.json"))


def _held(answer: Path) -> dict[str, str]:
    """What the process was kept from, as far as it came."""
    try:
        return dict(json.loads(answer.read_text(encoding="utf-8"))["isolation"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _run(command: list[str], place: Path, timeout: float) -> int | None:
    """Exit code of a process; None when it took too long and was killed with all it started."""
    with (place / "said").open("wb") as said, (place / "errors").open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=errors, env=environment(place), cwd=place / "tmp",
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                _kill_group(process)
            process.wait()


def _kill_group(process: subprocess.Popen) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def environment(place: Path) -> dict[str, str]:
    """All variables of the process: none of the caller's but where libraries are."""
    home = str(place / "home")
    kept = {name: os.environ[name] for name in LIBRARY_VARIABLES if name in os.environ}
    folders = dict.fromkeys(("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"), home)
    return {
        **kept,
        **folders,
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "TMPDIR": str(place / "tmp"),
        "HF_HOME": home,
        "HF_HUB_CACHE": str(place / "cache"),
        "HF_MODULES_CACHE": str(place / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _python() -> list[str]:
    """Where Python and its libraries are, wherever they were installed."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    return sorted(prefixes | set(_library_paths()) | {str(HERE)})


def _library_paths() -> list[str]:
    """Entries of Python's search path that belong to Python or hold a library; a script's own folder does not."""
    own = (sys.prefix, sys.base_prefix, sys.exec_prefix)

    def holds_libraries(entry: str) -> bool:
        if any(Path(entry).is_relative_to(prefix) for prefix in own):
            return True
        return any(os.path.exists(os.path.join(entry, name)) for name in ("torch", "transformers", "PIL", "numpy"))

    return [entry for entry in sys.path if entry and os.path.exists(entry) and holds_libraries(entry)]


def _real_folders(folder: Path) -> list[str]:
    """Where the files of a folder really are when it consists of links, as in huggingface_hub's cache."""
    return sorted({os.path.realpath(path) for path in folder.rglob("*") if path.is_symlink()})


def _limits(folder: Path, cached: list[Path], timeout: float) -> dict[str, int]:
    """Bounds that no sound variant comes near: memory for the weights several times over, and so on."""
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    weights += sum(path.stat().st_size for path in cached if path.suffix == ".safetensors")
    return {
        "RLIMIT_CPU": int(timeout) * (os.cpu_count() or 1) + 60,
        "RLIMIT_DATA": 8 * weights + 8 * GB,
        "RLIMIT_FSIZE": GB // 16,
        "RLIMIT_NOFILE": 4096,
        "RLIMIT_NPROC": 512,
        "RLIMIT_CORE": 0,
    }


def _language_model(folder: Path, cache: Path) -> list[Path]:
    """Files of the language model that a variant names, linked into a cache of its own; none for self-contained ones.

    It is fetched here, by this package and with the caller's access; what cannot be fetched, the variant will say.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name, revision = config.get("text_model_name_or_path"), config.get("text_model_revision")
    if not name or is_local(name) or self_contained(folder):
        return []
    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except CALL_ERRORS:
        return []
    target = cache / f"models--{name.replace('/', '--')}" / "snapshots" / revision
    files = []
    for path in snapshot.rglob("*"):
        if path.is_file():
            link = target / path.relative_to(snapshot)
            link.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, link)
            files.append(path.resolve())
    return files


def judge(seen: dict) -> str | None:
    """What a run of the probe found wrong; None when nothing is."""
    for what in ("missing", "mismatched"):
        if seen[what]:
            return f"loads with {len(seen[what])} {what} tensors, {seen[what][0]} first"
    if seen["placeholders"] != seen["m"]:
        return f"shows an image as {seen['placeholders']} tokens instead of m = {seen['m']}"
    if seen["new_tokens"] < 1 or not seen["finite"]:
        return "loads, but does not answer: no tokens, or logits that are not numbers"
    return None


def _last_words(place: Path, code: int) -> str:
    """The exception at the end of a traceback: its first line, not the hints below it."""
    with (place / "errors").open("rb") as file:
        file.seek(max(0, (place / "errors").stat().st_size - 100_000))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line for line in text.strip().splitlines() if line.strip()]
    starts = [line for line in lines if line[:1].isalpha() and ("Error: " in line or "Exception: " in line)]
    if code == 0 or not (starts or lines):
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"it stopped without an answer ({ended})"
    return printable((starts or lines)[-1])
