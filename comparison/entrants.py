"""Who can be compared: every registered connector, with settings where wanted, and reducers over the dense one."""

import json
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, set_seed

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connectors import BUILT_IN, CONNECTORS, connector_class
from fusedvlm.processing import FusedVLMProcessor, build_processor
from fusedvlm.quickstart import world
from fusedvlm.reducers import REDUCERS

from .plan import Plan
from .shared_world import PATCH, SharedWorld, image_processor

# Settings worth an entrant of their own beside a connector's defaults.
ALSO: dict[str, tuple[dict[str, Any], ...]] = {"resampler": ({"keys": "image"},)}
NUM_HEADS = 4
NO_QUESTION = {"fuse_question": False}


@dataclass(frozen=True)
class Entrant:
    """One line of the comparison. `options` are fields of `connector_config`, and `fuse_question`."""

    connector: str
    options: tuple[tuple[str, Any], ...] = ()
    reducer: str | None = None

    @property
    def key(self) -> str:
        """As it is typed: "fused", "fused:fuse_question=false", "dense+visionzip"."""
        options = ",".join(
            f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in self.options
        )
        return self.connector + (f":{options}" if options else "") + (f"+{self.reducer}" if self.reducer else "")

    @property
    def slug(self) -> str:
        """The key as a file name."""
        return re.sub(r"[^a-z0-9_.+=-]+", "_", self.key.lower()).replace("=", "-")

    @property
    def trained(self) -> "Entrant":
        """Whose weights this one uses."""
        return Entrant(self.connector, self.options)

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of `FusedVLMConfig`; heads that a connector would derive from its width are those of this world."""
        options = dict(self.options)
        if connector_class(self.connector).settings.get("num_heads", 0) is None:
            options.setdefault("num_heads", NUM_HEADS)
        fields = {"fuse_question": options.pop("fuse_question")} if "fuse_question" in options else {}
        return {**fields, "connector": self.connector, "connector_config": options or None}

    @property
    def reads_question(self) -> bool:
        """Whether the question reaches the connector."""
        return bool(dict(self.options).get("fuse_question", connector_class(self.connector).reads_question != "never"))


def parse_entrant(text: str) -> Entrant:
    """Read `NAME[:field=value,...]` or `dense+REDUCER`.

    Raises:
        ValueError: naming what there is.
    """
    text, _, reducer = text.strip().partition("+")
    name, _, settings = text.partition(":")
    if name not in CONNECTORS:
        raise ValueError(
            f"Nothing is called {name!r}: connectors are {', '.join(sorted(CONNECTORS))}; reducers go behind dense, as "
            "in dense+visionzip. `fusedvlm compare --list` says more."
        )
    if reducer and (name != "dense" or reducer not in REDUCERS):
        raise ValueError(
            f"{text}+{reducer}: reducers are {', '.join(REDUCERS)}, and stand behind dense (dense+random)."
        )
    options = {}
    for pair in filter(None, settings.split(",")):
        field, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: {pair!r} is not field=value; settings are {_settings(name)}.")
        try:
            options[field.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[field.strip()] = value
    if unknown := set(options) - {*connector_class(name).settings, "fuse_question"}:
        raise ValueError(f"{name} has no setting {', '.join(sorted(unknown))}; its settings are {_settings(name)}.")
    return Entrant(name, tuple(sorted(options.items())), reducer or None)


def _settings(name: str) -> str:
    return ", ".join(["fuse_question", *connector_class(name).settings])


def all_entrants() -> list[Entrant]:
    """Everything that `--all` compares: connectors, with and without the question; reducers that need no CLIP text."""
    entrants = []
    names = [kind.name for kind in BUILT_IN]
    for name in [*names, *(name for name in CONNECTORS if name not in names)]:
        kind = CONNECTORS[name]
        variants = [{}, *([NO_QUESTION] if kind.reads_question == "optional" else []), *ALSO.get(name, ())]
        entrants += [Entrant(name, tuple(sorted(options.items()))) for options in variants]
    if "dense" in CONNECTORS:
        usable = [name for name, reducer in REDUCERS.items() if not reducer.reads_question]
        entrants += [Entrant("dense", (), name) for name in usable]
    return entrants


def supported_counts(entrant: Entrant, plan: Plan) -> tuple[list[int], dict[int, str]]:
    """The m of a plan that an entrant can give, and why not the others.

    Raises:
        ValueError: when it can give none.
    """
    counts, refused = [], {}
    for m in plan.num_visual_tokens:
        try:
            _check_count(entrant, plan, m)
            counts.append(m)
        except ValueError as error:
            refused[m] = str(error)
    if not counts:
        raise ValueError(
            f"{entrant.key} can give none of m = {list(plan.num_visual_tokens)}: {next(iter(refused.values()))}"
        )
    return counts, refused


def _check_count(entrant: Entrant, plan: Plan, m: int) -> None:
    if entrant.reducer is not None:
        reducer = REDUCERS[entrant.reducer]
        if reducer.reads_question:
            raise ValueError(f"{entrant.reducer} needs a CLIP with a text half, which this world has not.")
        reducer().check(m, world.GRID**2)
        return
    _make_config(entrant, plan, [m])


def _make_config(entrant: Entrant, plan: Plan, counts: list[int]) -> FusedVLMConfig:
    """The configuration of one set of weights for `counts`. Raises `ValueError` when the connector cannot have it."""
    vision = {
        "model_type": "clip_vision_model",
        "image_size": world.SIZE,
        "patch_size": PATCH,
        "hidden_size": plan.vision_width,
        "num_hidden_layers": plan.vision_layers,
        "num_attention_heads": NUM_HEADS,
    }
    text = LlamaConfig(hidden_size=plan.llm_width, num_hidden_layers=plan.llm_layers, num_attention_heads=NUM_HEADS)
    kind = connector_class(entrant.connector)
    fuser = {"hidden_size": plan.vision_width, "num_attention_heads": NUM_HEADS} if kind.has_fusion_decoder else None
    return FusedVLMConfig(
        vision_config=vision,
        text_config=text.to_dict(),
        fuser_config=fuser,
        num_visual_tokens=max(counts),
        trained_num_visual_tokens=counts,
        merge_views=False,
        newline_token=False,
        **entrant.fields,
    )


def training_jobs(entrant: Entrant, plan: Plan, counts: list[int]) -> list[tuple[int, ...]]:
    """Which m share one set of weights: all, where one configuration can hold them all; else each has its own."""
    if entrant.reducer is not None:
        return [(world.GRID**2,)]
    try:
        _make_config(entrant, plan, counts)
    except ValueError:
        return [(m,) for m in counts]
    return [tuple(counts)]


def build_model(
    entrant: Entrant, shared: SharedWorld, plan: Plan, counts: tuple[int, ...], seed: int
) -> tuple[FusedVLMForConditionalGeneration, FusedVLMProcessor]:
    """An untrained model of an entrant over the shared tower and LLM, and its processor.

    All start at one scale: weights of standard deviation 1 / sqrt(tower width), at which such narrow layers learn.
    """
    scale = round(plan.vision_width**-0.5, 4)
    fields = dict(entrant.fields)
    if connector_class(entrant.connector).has_fusion_decoder:
        fields.update(
            merge_views=False,
            newline_token=False,
            projector_initializer_range=0.5 * scale,
            fuser_config={
                "num_hidden_layers": plan.connector_layers,
                "num_attention_heads": NUM_HEADS,
                "initializer_range": scale,
                # Rows are short: a small base tells neighboring places apart more sharply than Llama's 10,000.
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            },
        )
    set_seed(seed + 1)
    model = FusedVLMForConditionalGeneration.from_backbones(
        shared.tower(),
        str(shared.llm_folder),
        num_visual_tokens=max(counts),
        trained_num_visual_tokens=list(counts),
        max_local_views=0,
        query_vocab_size=shared.tokenizer.vocab_size,
        query_eos_token_id=shared.tokenizer.eos_token_id,
        initializer_range=scale,
        **fields,
    )
    if hasattr(model.model, "fuser"):
        torch.nn.init.normal_(model.model.fuser.embed_tokens.weight, std=0.5)
    processor = build_processor(model.config, query_tokenizer=shared.tokenizer, image_processor=image_processor())
    return model, processor
