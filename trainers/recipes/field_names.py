"""Names of the training arguments, read from source: importing them takes PyTorch, and a typing error cannot wait."""

import ast
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

OURS = Path(__file__).parents[1] / "arguments.py"
STAGE_CLASSES = {
    "contrastive": "ContrastiveArguments",
    "generation": "GenerationArguments",
    "variants": "GenerationArguments",
}


@lru_cache
def training_fields(stage: str) -> tuple[str, ...]:
    """Names of all fields of a stage's training arguments, those of `transformers.TrainingArguments` first."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    classes = [
        (Path(spec.origin).parent / "training_args.py", "TrainingArguments"),
        (OURS, "FusedVLMArguments"),
        (OURS, STAGE_CLASSES[stage]),
    ]
    return tuple(dict.fromkeys(name for file, title in classes for name in _fields_of(file, title)))


def _fields_of(file: Path, title: str) -> Iterator[str]:
    """Names that a dataclass annotates."""
    (found,) = (node for node in _module(file).body if isinstance(node, ast.ClassDef) and node.name == title)
    for node in found.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_set_by_users(node):
            yield node.target.id


def _is_set_by_users(node: ast.AnnAssign) -> bool:
    """No class variable, and no field that the class fills in by itself."""
    if "ClassVar" in ast.unparse(node.annotation):
        return False
    keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
    return not any(word.arg == "init" and ast.unparse(word.value) == "False" for word in keywords)


@lru_cache
def _module(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
