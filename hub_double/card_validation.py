"""What the Hub finds wrong with a card's metadata."""

import re
from typing import Any

import yaml

LICENSES = {
    "apache-2.0", "mit", "openrail", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "llama2", "llama3", "llama3.1",
    "llama3.2", "llama3.3", "llama4", "gemma", "unknown", "other",
}  # fmt: skip
ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HEAD = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


def validate_card(content: str) -> list[str]:
    """What is wrong with a card's metadata; nothing is where there is none."""
    match = HEAD.match(content)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["The metadata must be a mapping"]
    return [*_validate_licenses(data), *_validate_ids(data), *_validate_model_index(data.get("model-index"))]


def _values(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _validate_licenses(data: dict[str, Any]) -> list[str]:
    wanted = f'"license" must be one of [{", ".join(sorted(LICENSES))}]'
    return [wanted for name in _values(data.get("license", [])) if name not in LICENSES]


def _validate_ids(data: dict[str, Any]) -> list[str]:
    return [
        f'"{key}[{number}]" with value "{value}" is not valid'
        for key in ("base_model", "datasets")
        for number, value in enumerate(_values(data.get(key) or []))
        if not isinstance(value, str) or not ID.fullmatch(value)
    ]


def _validate_model_index(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    results = [result for model in index for result in (model.get("results", []) if isinstance(model, dict) else [{}])]
    return [error for result in results for error in _validate_result(result)]


def _validate_result(result: dict[str, Any]) -> list[str]:
    errors = []
    dataset, metrics = result.get("dataset") or {}, result.get("metrics") or []
    if not (result.get("task") or {}).get("type"):
        errors.append('"model-index[].results[].task.type" is required')
    if not dataset.get("type") or not dataset.get("name"):
        errors.append('"model-index[].results[].dataset" needs type and name')
    if not metrics or any("type" not in metric or "value" not in metric for metric in metrics):
        errors.append('"model-index[].results[].metrics[]" needs type and value')
    return errors
