"""`push_to_hub` of models, processors and trainers: transformers' own, with this package's card.

The [hub] files stay free of this; importing the package puts `upload_with_card` into their classes. A card that a
person edited on the Hub is kept.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel
from transformers.utils import PushToHubMixin

import fusedvlm
from fusedvlm.console import say
from fusedvlm.files import read_json, write_atomically, write_json
from fusedvlm.hub_cards.card.render_card import card_template, render_card
from fusedvlm.hub_cards.release.bundle import is_local, pin_backbones, self_contained, weight_headers
from fusedvlm.hub_cards.release.release_files import card_files, evidence_files
from fusedvlm.hub_cards.release.run_facts import read_content
from fusedvlm.hub_cards.release.variant_release import gather_facts

from .facts import CardFacts, Dataset, find_stated

CARD, FACTS, PROCESSOR = "README.md", "facts.json", "processor_config.json"
ANSWERS = "FusedVLMForConditionalGeneration"


def push_model_to_hub(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`PreTrainedModel.push_to_hub`, once it is known that others can load what it will publish.

    Raises:
        ValueError: when the model refers to a language model that only this machine has; nothing is created then.
    """
    pin_backbones(self.config.to_dict(), self.config.text_model_name_or_path is None, [])
    return PreTrainedModel.push_to_hub(self, *args, **kwargs)


def upload_with_card(
    self: PushToHubMixin, working_dir: str, repo_id: str, files_timestamps: dict, **kwargs: Any
) -> Any:
    """`PushToHubMixin._upload_modified_files`, through which `push_to_hub` and `save_pretrained(push_to_hub=True)` go.

    Raises:
        ValueError: when the model refers to a language model that only this machine has.
    """
    folder = Path(working_dir)
    source = getattr(self, "name_or_path", None)
    write_card(
        folder,
        repo_id,
        token=kwargs.get("token"),
        revision=kwargs.get("revision"),
        stated_beside=Path(source) if source and Path(source).is_dir() else None,
    )
    return PushToHubMixin._upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs)


def write_card(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    stated_beside: Path | None = None,
    online: bool = True,
    **stated: Any,
) -> None:
    """Put the card and its facts into a folder that is about to be uploaded.

    Args:
        folder: what `save_pretrained` wrote; with a processor alone no card is made.
        repo_id, revision: where it goes.
        stated_beside: folder in or beside which facts.yaml is looked for.
        online: whether to look for a card on the Hub; one that is not this package's is kept.
        stated: facts that override all others, as `license`.

    Raises:
        ValueError: when the model refers to a language model that only this machine has.
    """
    published = {name: fetch(repo_id, name, token, revision) for name in (CARD, FACTS)} if online else {}
    known = facts_of(published.get(FACTS))
    card = published.get(CARD)
    if card is not None and not is_ours(card, known):
        write_atomically(folder / CARD, card)
        say(f"{repo_id}: the card on the Hub was written by hand (or another version) and is kept")
        return
    if not holds_answers(folder):
        if card is None:
            (folder / CARD).unlink(missing_ok=True)  # transformers' empty template
        return
    clean_config(folder)
    facts = gather(folder, repo_id, revision or "main", known, stated_beside, stated)
    evidence = evidence_files(facts)
    facts = replace(facts, files=tuple(sorted(evidence)), complete=False)
    for name, content in {**evidence, **card_files(facts)}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_content(content))
    if online and not (folder / PROCESSOR).is_file() and fetch(repo_id, PROCESSOR, token, revision) is None:
        say(f"{repo_id}: has no processor yet, without which the card's code does not run; push that as well")


def fetch(repo_id: str, name: str, token: str | bool | None, revision: str | None) -> str | None:
    """Text of a file on the Hub, None when it is not there."""
    try:
        path = hf_hub_download(repo_id, name, token=token, revision=revision)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


def facts_of(text: str | None) -> CardFacts | None:
    """Facts from facts.json, None when there are none of this version's."""
    try:
        return None if text is None else CardFacts.from_json(text)
    except ValueError:
        return None


def is_ours(card: str, facts: CardFacts | None) -> bool:
    """Whether a card is what this package makes of the facts beside it, so that nobody's words are lost with it."""
    return facts is not None and render_card(facts) == card


def holds_answers(folder: Path) -> bool:
    """Whether a folder holds a model that answers."""
    path = folder / "config.json"
    return path.is_file() and ANSWERS in (read_json(path).get("architectures") or [])


def clean_config(folder: Path) -> None:
    """Take folders of this machine out of config.json; a language model that only this machine has is refused."""
    path = folder / "config.json"
    config = read_json(path)
    pin_backbones(config, self_contained(folder), [])
    write_json(path, config)


def gather(
    folder: Path,
    repo_id: str,
    revision: str,
    known: CardFacts | None,
    stated_beside: Path | None,
    stated: dict[str, Any],
) -> CardFacts:
    """Facts of what is about to be uploaded. What was stated on the Hub stays stated; measured is what lies here."""
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    said = known.stated if known is not None else find_stated(stated_beside or folder)
    said = replace(said, license_files=(), **{name: value for name, value in stated.items() if value})
    return gather_facts(folder, files, repo_id, tag=revision, stated=said)


# -- trainers ----------------------------------------------------------------------------------------------------------


def write_trainer_card(
    trainer: Any,
    language: str | Iterable[str] | None = None,
    license: str | None = None,
    dataset: str | Iterable[str] | None = None,
    dataset_tags: str | Iterable[str] | None = None,
    **unused: Any,
) -> None:
    """What `Trainer.create_model_card` is in this package: the card in `args.output_dir`.

    Args:
        trainer: a `FusedVLMTrainer`.
        language, license, dataset, dataset_tags: stated facts, as in transformers.
        unused: what transformers' card shows and this one takes from files instead.

    Raises:
        ValueError: when the weights refer to something that only this machine has.
    """
    given = sorted(name for name in ("finetuned_from", "tasks", "dataset_args") if unused.get(name))
    if given:
        say(f"The card takes {', '.join(given)} from the model's own files; what was given is not used")
    datasets = _datasets(_many(dataset), _many(dataset_tags))
    stated: dict[str, Any] = {"license": license, "languages": _many(language), "datasets": datasets}
    folder, args = Path(trainer.args.output_dir), trainer.args
    repo_id = trainer.hub_model_id or args.hub_model_id or folder.resolve().name
    if holds_answers(folder):
        online = trainer.hub_model_id is not None
        write_card(folder, repo_id, token=args.hub_token, revision=args.hub_revision, online=online, **stated)
    else:
        write_atomically(folder / CARD, checkpoint_card(folder, repo_id, trainer, stated))


def _many(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def _datasets(names: tuple[str, ...], ids: tuple[str, ...]) -> tuple[Dataset, ...]:
    """Stated datasets from names and Hub ids, paired as far as they go."""
    return tuple(Dataset(name=name or hub_id, id=hub_id) for name, hub_id in zip_longest(names, ids))


def checkpoint_card(folder: Path, repo_id: str, trainer: Any, stated: dict[str, Any]) -> str:
    """Card of weights that do not answer by themselves: those of stage 1, or an adapter.

    Raises:
        ValueError: for an adapter whose base only this machine has.
    """
    base, what, snippet = describe_checkpoint(folder, repo_id)
    shapes = [shape for tensors in weight_headers(folder).values() for shape in tensors.values()]
    metadata = ModelCardData(
        language=list(stated["languages"]) or None,
        license=stated["license"],
        library_name="transformers",
        base_model=[base] if base else None,
        base_model_relation="adapter" if base else None,
        datasets=sorted(dataset.id for dataset in stated["datasets"] if dataset.id) or None,
        tags=["fusedvlm", *(["lora", "peft"] if base else []), "vision-language-model"],
    )
    return card_template("checkpoint_card.md.jinja").render(
        metadata=metadata.to_yaml().rstrip(),
        name=repo_id.rpartition("/")[2],
        what=what,
        trainer=type(trainer).__name__,
        version=fusedvlm.__version__,
        m=getattr(trainer.processing_class, "num_visual_tokens", None),
        base=base,
        parameters=f"{sum(math.prod(shape) for shape in shapes):,}",
        size=f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 1e6:.2f} MB",
        snippet=snippet,
        license=stated["license"],
    )


def describe_checkpoint(folder: Path, repo_id: str) -> tuple[str | None, str, str]:
    """(base on the Hub, what the weights are, how to use them)."""
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        what = "Weights of stage 1 of a FusedVLM: vision tower, fusion decoder and the contrastive answer tower."
        snippet = (
            "from fusedvlm import FusedVLMForConditionalGeneration\n\n"
            f'model = FusedVLMForConditionalGeneration.from_pretrained("{repo_id}")  # stage 2 starts from it'
        )
        return None, what, snippet
    base = read_json(adapter)["base_model_name_or_path"]
    if is_local(base):
        raise ValueError(
            f"The adapter belongs to the variant in {base}, which nobody else has: save it with trainer.save_model and "
            "push both with `fusedvlm push DIR --adapters`."
        )
    what = f"A LoRA adapter on top of [{base}](https://huggingface.co/{base})."
    snippet = (
        "from transformers import AutoModelForImageTextToText\n\n"
        f'model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)  # needs peft'
    )
    return base, what, snippet
