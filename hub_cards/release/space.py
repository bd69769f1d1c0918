"""A Gradio Space for a variant: an m slider, an image, a question, the answer as it comes.

The Space is plain files. It needs transformers and gradio, never this package.
"""

import json
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from fusedvlm.hub_cards.card.card_links import read_page
from fusedvlm.hub_cards.card.render_card import TEMPLATES, card_template
from fusedvlm.hub_cards.facts import CardFacts
from fusedvlm.hub_cards.hub_errors import CALL_ERRORS, explain
from fusedvlm.model_source import HUB_ID, require_folder_or_repository

from .bundle import Files, bundle
from .run_facts import read_config, read_content

# The Gradio that the Space was tried with.
GRADIO = "6.31.0"
REQUIREMENTS = (
    "torch>=2.6",
    "torchvision>=0.21",
    "transformers>=5.18",
    "safetensors>=0.5",
    "pillow>=11.0",
    "gradio>=5.0",
)
QUESTION = "Describe the image."
QUESTIONS = (QUESTION, "What is in the middle?", "How many objects are there?", "Which colours do you see?")


def space_files(source: str, revision: str | None = None, repo_id: str | None = None) -> Files:
    """Files of a Space.

    Args:
        source: a variant's folder, or the id of its repository.
        revision: of the repository; its newest commit when left out, so that the Space stays as it was tried.
        repo_id: for a folder: the repository to ask instead of a copy of the folder in the Space.

    Raises:
        ValueError: when there is no such variant, or it cannot leave this machine.
    """
    folder = Path(source)
    if not folder.is_dir():
        require_folder_or_repository(source)
        return _from_repository(source, revision)
    if revision is not None and repo_id is None:
        raise ValueError(f"{source} is a folder; --revision is for repositories.")
    if repo_id is not None and not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r} is not a repository id like user/name.")
    own, _ = bundle(folder)
    config = read_config(folder, own["config.json"])
    if repo_id is not None:
        return _space(config, repo_id, revision, None, [repo_id])
    card = _card(folder)
    model = {f"model/{name}": content for name, content in {**own, **card}.items()}
    facts = _facts(folder)
    published = [facts.repo_id] if facts is not None and facts.complete else []
    license = facts.stated.license if facts is not None else None
    return {**model, **_space(config, "model", None, license, published, has_card="README.md" in card)}


def _card(folder: Path) -> Files:
    """A variant's card with everything beside it that it links to, as far as it is there."""
    if not (folder / "README.md").is_file():
        return {}
    links, _, _ = read_page((folder / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)[-1])
    names = {"README.md", "LICENSE", "LICENSE-CODE", "NOTICE", *(link.target for link in links)}
    return {name: folder / name for name in sorted(names) if _is_inside(folder, name)}


def _is_inside(folder: Path, name: str) -> bool:
    path = (folder / name).resolve()
    return path.is_relative_to(folder.resolve()) and path.is_file()


def _from_repository(repo_id: str, revision: str | None) -> Files:
    """A Space that asks a repository, pinned to a commit."""
    try:
        commit = HfApi().model_info(repo_id, revision=revision).sha
        path = hf_hub_download(repo_id, "config.json", revision=commit)
    except CALL_ERRORS as error:
        raise explain(error, repo_id) from error
    config = read_config(Path(repo_id), Path(path))
    return _space(config, repo_id, commit, None, [repo_id])


def _space(
    config: dict, model: str, revision: str | None, license: str | None, models: list[str], has_card: bool = False
) -> Files:
    """The four files of a Space."""
    m = config["num_visual_tokens"]
    trained = config.get("trained_num_visual_tokens") or [m]
    title = f"FusedVLM, m = {m}" if model == "model" else f"{model.partition('/')[2]}: FusedVLM"
    settings = {"model": model, "revision": revision, "title": title, "question": QUESTION, "questions": QUESTIONS}
    readme = card_template("space_readme.md.jinja").render(
        title=title,
        gradio=GRADIO,
        license=license,
        models=models,
        largest=max(trained),
        inside=model == "model",
        has_card=has_card,
    )
    return {
        "app.py": (TEMPLATES / "space_app.py").read_bytes(),
        "space.json": (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
        "requirements.txt": ("\n".join(REQUIREMENTS) + "\n").encode(),
        "README.md": readme.encode(),
    }


def _facts(folder: Path) -> CardFacts | None:
    """The facts of the variant's card, None without a card."""
    path = folder / "facts.json"
    return CardFacts.from_json(read_content(path).decode()) if path.is_file() else None
