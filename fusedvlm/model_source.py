"""Whether a model's name is a folder of this machine or a repository on the Hub, before the network is asked."""

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def looks_like_repository(name: str) -> bool:
    """Whether a name that is no folder can be OWNER/NAME on the Hub, rather than a mistyped folder."""
    if not HUB_ID.fullmatch(name) or name.startswith("runs/"):
        return False
    return not Path(name.partition("/")[0]).is_dir()


def require_folder(path: str | Path) -> None:
    """Raise `ValueError` for a path that is no folder; called before anything heavy is imported to read it."""
    if not Path(path).is_dir():
        raise ValueError(f"{path}: {'is a file, not a folder' if Path(path).exists() else 'no such folder'}.")


def require_folder_or_repository(name: str) -> None:
    """Raise `ValueError` for a name that is neither a folder nor like OWNER/NAME."""
    if not Path(name).is_dir() and not HUB_ID.fullmatch(name):
        raise ValueError(f"{name}: no such folder, and not a repository id like user/name.")


def require_source(field: str, value: str | Path | None, file: str | None = None, hint: str = "") -> None:
    """Refuse a folder that does not exist, or holds no model, before the Hub is asked for a repository of that name.

    Args:
        field: what the user calls it, e.g. `--model`, for the message.
        value: folder or repository id; None and models in memory pass.
        file: what the folder must hold.
        hint: what to do when there is no such folder.

    Raises:
        ValueError: saying what to do.
    """
    if not isinstance(value, str | Path):
        return
    name = str(value)
    folder = Path(name).expanduser()
    if not name or (not folder.exists() and not looks_like_repository(name)):
        hint = hint or "correct the path."
        owner = name.partition("/")[0]
        repository = (
            f"For {name} on the Hub go to a folder without a {owner} in it."
            if HUB_ID.fullmatch(name) and Path(owner).is_dir()
            else "A repository on the Hub is written OWNER/NAME."
        )
        raise ValueError(f"{field}={name} does not exist: {hint} {repository}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{field}={name} is a file; give the folder of a model, or OWNER/NAME on the Hub.")
    if file is not None and folder.is_dir() and not (folder / file).is_file():
        if (folder / "adapter_config.json").is_file():
            return
        inner = next((path.parent for path in sorted(folder.glob(f"*/{file}"), reverse=True)), None)
        hint = f"; did you mean {inner}?" if inner is not None else "; it is no saved model."
        raise ValueError(f"{field}={name} holds no {file}{hint}")
