"""The connector protocol: view tokens, the question and wanted counts in; visual tokens of every segment out.

A connector is one class in one file. What it can do is stated by the class from a configuration alone (the answers
travel to the processor as data), what it computes is `reduce`. `docs/connectors.md` adds one step by step.

Shape legend
    V   views of the batch   T   view tokens per view   F   features per view token   C   width of the vision tower
    G   segments: one question asked about one image    H   LLM width                 m   visual tokens
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from .modeling_fusedvlm_connector_parts import grid_side, split_questions
from .modeling_fusedvlm_counts import forward_per_count
from .modeling_fusedvlm_rows import FusionPlan

# {name: class}; filled by `register_connector`.
CONNECTORS: dict[str, type["FusedVLMConnector"]] = {}


def register_connector(name: str) -> Callable[[type["FusedVLMConnector"]], type["FusedVLMConnector"]]:
    """Class decorator: make a connector known as `connector=name` in a configuration.

    Raises:
        ValueError: when another file's class has the name already.
    """

    def register(connector: type["FusedVLMConnector"]) -> type["FusedVLMConnector"]:
        known = CONNECTORS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            connector.__module__,
            connector.__qualname__,
        ):
            raise ValueError(
                f"connector={name!r} is {known.__module__}.{known.__qualname__} already; take another name."
            )
        connector.name = name
        CONNECTORS[name] = connector
        return connector

    return register


def name_counts(counts: Iterable[int]) -> str:
    """Counts as text, with every run of three or more as its ends: `1 to 32`, or `1, 2, 4, 8`."""
    runs: list[list[int]] = []
    for count in sorted(set(counts)):
        if runs and count == runs[-1][-1] + 1:
            runs[-1].append(count)
        else:
            runs.append([count])
    parts = [[f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ", ".join(part for names in parts for part in names)


def nearest_counts(counts: Sequence[int], wanted: int) -> str:
    """The possible counts around a wanted one, for a message."""
    below = max((count for count in counts if count < wanted), default=None)
    above = min((count for count in counts if count > wanted), default=None)
    return " or ".join(str(count) for count in (below, above) if count is not None)


class FusedVLMConnector(nn.Module):
    """Base of all connectors. Subclasses state what they support, build their modules and write `reduce`.

    Class attributes:
        name: how a configuration calls it; set by `register_connector`.
        summary: what it does in one sentence, for the card; None says what the fused one does.
        settings: {field: default} of `connector_config`; a field with another name is refused.
        reads_question: what the connector does with the question: "never", "optional" (`fuse_question` decides) or
            "always".
        question_tokens: whose ids it reads: "own" (those of the query tokenizer) or "llm" (the LLM's own).
        nested: whether fewer tokens are a part or an average of more, under one set of weights.
        per_view: whether m counts the tokens of each view, or those of the whole image.
        cacheable_views: whether view tokens of a frozen tower can be kept on disk.
        has_fusion_decoder: whether `fuser_config` describes a part of it.
        has_contrastive_stage: whether stage 1 can train it.
        turn_rows: whether a turn's question reads the views by itself, so that its visual tokens do not depend on the
            turns before it: "always", or "optional" (`fusion_row_per_turn` decides).
        parameter_groups: {label: prefixes of parameter names}, for counts, cards and `fusedvlm info`.
        lora_prefix: modules that the LoRA preset "fusion" adapts.
    """

    name = ""
    summary: str | None = "A connector of its own makes visual tokens of the views."
    settings: dict[str, Any] = {}
    reads_question = "never"
    question_tokens = "own"
    nested = False
    per_view = True
    cacheable_views = True
    has_fusion_decoder = False
    has_contrastive_stage = False
    turn_rows = "always"
    parameter_groups: dict[str, tuple[str, ...]] = {"connector": ("model.connector.",)}
    lora_prefix = "model.connector."

    # -- what it supports, from the configuration alone ----------------------------------------------------------------

    @classmethod
    def counts(cls, config: PreTrainedConfig) -> Sequence[int]:
        """Every m it can give, ascending (a range or a tuple)."""
        raise NotImplementedError

    @classmethod
    def is_nested(cls, config: PreTrainedConfig) -> bool:
        """Whether fewer tokens are a part or an average of more; `nested`, unless settings decide."""
        return cls.nested

    @classmethod
    def explain_counts(cls, config: PreTrainedConfig) -> str:
        """Why these counts, as half a sentence for an error message."""
        return "gives a fixed number of tokens"

    @classmethod
    def default_count(cls, config: PreTrainedConfig) -> int:
        """m where a configuration names none: the largest count up to the paper's 256, else the smallest."""
        counts = cls.counts(config)
        return max((count for count in counts if count <= 256), default=min(counts))

    @classmethod
    def default_followup_count(cls, config: PreTrainedConfig) -> int:
        """m' where a configuration names none: m again for each question that is read, else none."""
        return config.num_visual_tokens * int(bool(config.fuse_question))

    @classmethod
    def tokens_per_view(cls, config: PreTrainedConfig) -> int:
        """T, the tokens that `encode_views` gives per view."""
        return grid_side(config) ** 2

    @classmethod
    def complete_settings(cls, config: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
        """`connector_config` with what follows from the rest of the configuration filled in; called once, then saved.

        Raises:
            ValueError: for settings that do not fit.
        """
        return settings

    @classmethod
    def complete(cls, config: PreTrainedConfig) -> None:
        """Fill in what the connector decides of a configuration, and check what it can check.

        Raises:
            ValueError: in one line, with the numbers and the fix.
        """
        given = dict(config.connector_config or {})
        if unknown := sorted(set(given) - set(cls.settings)):
            known = ", ".join(cls.settings) or "no settings"
            raise ValueError(f"connector_config has {unknown[0]!r}; the {cls.name} connector knows {known}.")
        _set_default(config, "fuse_question", lambda config: cls.reads_question != "never")
        cls.check_question(config)
        _set_default(config, "fusion_row_per_turn", lambda config: cls.turn_rows == "always")
        cls.check_turn_rows(config)
        cls._complete_parts(config)
        settings = cls.complete_settings(config, {**cls.settings, **given})
        config.connector_config = settings or None
        _set_default(config, "num_visual_tokens", cls.default_count)
        _set_default(config, "num_followup_visual_tokens", cls.default_followup_count)
        _set_default(config, "trained_num_visual_tokens", lambda config: [config.num_visual_tokens])

    @classmethod
    def check_question(cls, config: PreTrainedConfig) -> None:
        """Raise `ValueError` when `fuse_question` asks for what the connector does not do."""
        if config.fuse_question and cls.reads_question == "never":
            raise ValueError(f"The {cls.name} connector reads no question; set fuse_question=False or leave it out.")
        if not config.fuse_question and cls.reads_question == "always":
            raise ValueError(f"The {cls.name} connector reads the question; set fuse_question=True or leave it out.")

    @classmethod
    def check_turn_rows(cls, config: PreTrainedConfig) -> None:
        """Raise `ValueError` when `fusion_row_per_turn` asks for turns that read each other and cannot."""
        if not config.fusion_row_per_turn and cls.turn_rows == "always":
            raise ValueError(f"The {cls.name} connector reads every turn by itself; leave fusion_row_per_turn out.")

    @classmethod
    def _complete_parts(cls, config: PreTrainedConfig) -> None:
        """Merge and newline belong to the fused connector; here patches come as they are."""
        if config.fuser_config is not None:
            raise ValueError(f"The {cls.name} connector has no fusion decoder; leave fuser_config out.")
        config.merge_views = config.newline_token = False

    @classmethod
    def fields_from_backbones(
        cls,
        vision_config: PreTrainedConfig,
        largest: int,
        query_vocab_size: int,
        query_eos_token_id: int,
        fuser_config: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Fields of the configuration of a new model that depend on its tower and on the query tokenizer.

        Args:
            vision_config: the tower's.
            largest: the largest m that will be trained.
            query_vocab_size, query_eos_token_id: of the query tokenizer, for connectors with "own" question tokens.
            fuser_config: overrides given by the user.
        """
        return {} if fuser_config is None else {"fuser_config": fuser_config}

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Check a completed configuration further. Raises `ValueError` in one line."""

    @classmethod
    def check_count(cls, config: PreTrainedConfig, count: int, name: str = "num_visual_tokens") -> None:
        """Raise `ValueError`, with the counts around it, when the connector cannot give `count` tokens."""
        every, largest = cls.counts(config), config.max_num_visual_tokens
        # A largest m that cannot be given is no limit, it is what is wrong.
        counts = [number for number in every if number <= largest or largest not in every]
        if not isinstance(count, bool) and count in counts and count <= largest:  # Python takes True for 1
            return
        each = " per view" if cls.per_view else ""
        if counts == list(range(1, counts[-1] + 1)):
            raise ValueError(
                f"{name}={count} is out of range: this model takes 1 to {counts[-1]} visual tokens{each} "
                f"(trained with m = {name_counts(config.trained_num_visual_tokens):.100})."
            )
        nearest = nearest_counts(counts, count)
        why = cls.explain_counts(config)
        raise ValueError(f"{name}={count} cannot be given: the {cls.name} connector {why}; take {nearest}{each}.")

    @classmethod
    def check_followup_count(cls, config: PreTrainedConfig, first: int, count: int) -> None:
        """Raise `ValueError` when `count` tokens for a later question do not go with `first` for the first one."""
        reads_question = bool(config.fuse_question)
        if count == 0 and not reads_question:
            return  # the tokens in front of the first question are there already
        if count > first:
            raise ValueError(f"num_followup_visual_tokens={count} must not exceed num_visual_tokens={first}.")
        if count != first and not cls.is_nested(config):
            others = "" if reads_question else " or 0"
            raise ValueError(
                f"num_followup_visual_tokens={count} with num_visual_tokens={first}: the {cls.name} connector is not "
                f"nested, so later questions get as many tokens as the first one; set it to {first}{others}."
            )
        cls.check_count(config, count, "num_followup_visual_tokens")

    @classmethod
    def has_own_question_tokens(cls, config: PreTrainedConfig) -> bool:
        """Whether questions are read with a tokenizer and embeddings of the connector's own."""
        return cls.question_tokens == "own" and cls.reads_question != "never"

    @classmethod
    def facts(cls, config: PreTrainedConfig) -> dict[str, Any] | None:
        """What a processor has to know of the connector, as plain data for its configuration file.

        None stands for the fused connector, whose processors had no such entry when they were published.
        """
        counts = list(cls.counts(config))
        is_range = counts == list(range(counts[0], counts[-1] + 1))
        return {
            "name": cls.name,
            "counts": None if is_range else counts,
            "smallest": counts[0],
            "per_view": cls.per_view,
            "reads_question": bool(config.fuse_question),
            "question_tokens": cls.question_tokens,
            "nested": cls.is_nested(config),
        }

    @classmethod
    def describe(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """Sizes worth a line in `fusedvlm info`: {label: value}."""
        return dict(config.connector_config or {})

    # -- building ------------------------------------------------------------------------------------------------------

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config

    def attach(self, model: nn.Module) -> None:
        """Make the connector's modules part of the model; they stand below `connector`."""
        model.connector = self

    def reset_parameters(self) -> None:
        """Initialize parameters the connector holds itself (not in a child), with `transformers.initialization`."""

    def grow(self, num_visual_tokens: int, seed: int) -> None:
        """Make room for a larger m, where weights allow it; the configuration is checked afterwards."""

    # -- running -------------------------------------------------------------------------------------------------------

    def hidden_layers(self) -> tuple[int, ...]:
        """Which of the tower's hidden states are read; the one before the last by default, as in LLaVA."""
        return (self.config.vision_config.num_hidden_layers - 1,)

    def encode_views(self, tower: nn.Module, pixel_values: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """(V, 3, S, S) to (V, T, F): patches of the hidden states that are read, one behind another on the channels.

        Returns:
            The view tokens, and what the tower returned.
        """
        outputs = tower(pixel_values, return_dict=True, **{**kwargs, "output_hidden_states": True})
        num_patches = grid_side(self.config) ** 2  # a class token, where there is one, stands in front
        states = [outputs.hidden_states[layer][:, -num_patches:] for layer in self.hidden_layers()]
        return torch.cat(states, dim=-1), outputs

    def unread_parameters(self, tower: nn.Module) -> set[str]:
        """Names of the tower's parameters that no view token depends on: layers and norms behind the last one read."""
        lists = [(name, part) for name, part in tower.named_modules() if isinstance(part, nn.ModuleList)]
        depth, read = self.config.vision_config.num_hidden_layers, max(self.hidden_layers())
        name = next(name for name, part in lists if len(part) == depth)
        behind = tuple(f"{name}.{layer}." for layer in range(read, depth))
        behind += ("post_layernorm.", "layernorm.", "norm.", "head.")
        return {name for name, _ in tower.named_parameters() if name.startswith(behind)}

    def view_settings(self) -> dict[str, Any]:
        """Settings that view tokens depend on, for the key of a cache."""
        return {"connector": self.name, "hidden_layers": list(self.hidden_layers())}

    def read_questions(
        self, questions: list[torch.Tensor], language_model: nn.Module | None
    ) -> tuple[torch.Tensor, ...]:
        """Ids of each segment's question to tensors (G, ...), which `reduce` gets view by view."""
        raise NotImplementedError

    def reduce(self, view_tokens: torch.Tensor, num_visual_tokens: int, *question: torch.Tensor) -> torch.Tensor:
        """(V, T, F) to (V, m, H); the question's tensors (V, ...) follow where a question is read."""
        raise NotImplementedError

    def forward(
        self,
        view_tokens: torch.Tensor,
        plan: FusionPlan,
        question_input_ids: torch.Tensor | None = None,
        language_model: nn.Module | None = None,
    ) -> list[torch.Tensor]:
        """Visual tokens of every segment of a batch, in the order of `plan.segments`.

        Args:
            view_tokens: (V, T, F), image after image.
            plan: `FusionPlan`, which views and counts belong to which segment.
            question_input_ids: (sum of lengths,) ids of all questions.
            language_model: the frozen LLM's decoder, for connectors that read the question with it.

        Returns:
            Per segment (its tokens, H); m of them, or m for each of its views.

        Raises:
            ValueError: for a question that is missing, or one that is not read.
        """
        view_tokens = view_tokens.to(next(self.parameters()).dtype)
        views = view_tokens.split(plan.views_per_image)
        question = self._question_tensors(plan, question_input_ids, language_model, view_tokens.device)
        tokens: list[torch.Tensor] = [view_tokens[:0]] * len(plan.segments)
        for count in sorted({segment.num_visual_tokens for segment in plan.segments}):
            chosen = [g for g, segment in enumerate(plan.segments) if segment.num_visual_tokens == count]
            parts = [views[plan.segments[g].image] for g in chosen]
            sizes = [len(part) for part in parts]
            rows = torch.tensor([g for g, size in zip(chosen, sizes, strict=True) for _ in range(size)])
            asked = [tensor[rows.to(tensor.device)] for tensor in question]
            reduced = self.reduce(torch.cat(parts), count, *asked)
            for g, part in zip(chosen, reduced.split(sizes), strict=True):
                tokens[g] = part.flatten(0, 1)
        return tokens

    def every_count(
        self, view_tokens: torch.Tensor, plan: FusionPlan, counts: list[int], *question: Any
    ) -> list[list[torch.Tensor]]:
        """Per segment, per count: what `forward` gives with it; connectors that can share more than the views do."""
        return forward_per_count(self, view_tokens, plan, counts, *question)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """What `forward` gave, to the LLM's width; most connectors are there already."""
        return states

    def dummy_question(self, device: torch.device) -> dict[str, torch.Tensor | list[int]]:
        """Question arguments of one segment for a pass whose result is thrown away; none where none is needed."""
        # CODEPATH: variants whose connector reads the question, or not.
        if not self.config.fuse_question:
            return {}
        ids = torch.zeros(1, dtype=torch.long, device=device)
        return {"question_input_ids": ids, "question_lengths": [1]}

    def _question_tensors(
        self,
        plan: FusionPlan,
        question_input_ids: torch.Tensor | None,
        language_model: nn.Module | None,
        device: torch.device,
    ) -> tuple[torch.Tensor, ...]:
        ids = question_input_ids if question_input_ids is not None else torch.empty(0, dtype=torch.long)
        # CODEPATH: variants whose connector reads the question, or not.
        if not self.config.fuse_question:
            if len(ids):
                raise ValueError(
                    f"The {self.name} connector of this model reads no question, but question_input_ids has "
                    f"{len(ids)} tokens; build the batch with the model's own processor."
                )
            return ()
        questions = split_questions(plan, ids, device) if len(ids) else []
        if not questions or min(len(question) for question in questions) == 0:
            raise ValueError(
                f"The {self.name} connector reads the question, but a segment has none; give question_input_ids and "
                "question_lengths as the processor does."
            )
        return self.read_questions(questions, language_model)

    # -- costs ---------------------------------------------------------------------------------------------------------

    def example(self, view_tokens: torch.Tensor, num_visual_tokens: int, question_length: int) -> torch.Tensor:
        """Visual tokens (m or m per view, H) of one image and one question, without the LLM's reading of the question.

        For counting and timing; runs on the meta device too.
        """
        # CODEPATH: variants whose connector reads the question, or not.
        asked = self.example_question(len(view_tokens), question_length) if self.config.fuse_question else ()
        return self.project(self.reduce(view_tokens, num_visual_tokens, *asked).flatten(0, 1))

    def example_question(self, num_views: int, question_length: int) -> tuple[torch.Tensor, ...]:
        """Tensors of the shapes that `read_questions` gives, for `num_views` views of one image."""
        raise NotImplementedError

    def llm_tokens(self, question_length: int) -> int:
        """How many tokens the frozen LLM reads beforehand for a question of this length."""
        return 0

    def image_flops(
        self, num_views: int, question_lengths: Sequence[int], counts: Sequence[int], share: float
    ) -> float:
        """FLOPs of one image and its segments, without projection and without what `llm_tokens` costs.

        Counted by torch over `example` on the meta device, so that a new connector needs no formula of its own.

        Args:
            num_views: views of the image.
            question_lengths, counts: tokens of each segment's question, and its m.
            share: of a causal attention's square that is computed; matters to connectors that have one.

        Raises:
            ValueError: when the model is not on the meta device.
        """
        segments = zip(question_lengths, counts, strict=True)
        reads = int(self.config.fuse_question)
        return sum(self._segment_flops(num_views, length * reads, count) for length, count in segments)

    def _segment_flops(self, num_views: int, question_length: int, num_visual_tokens: int) -> float:
        known = self.__dict__.setdefault("_flops", {})
        key = (num_views, question_length, num_visual_tokens)
        if key not in known:
            parameter = next(self.parameters())
            if parameter.device.type != "meta":
                raise ValueError("FLOPs are counted on the meta device; build the model under torch.device('meta').")
            size = (num_views, self.tokens_per_view(self.config), self.view_width())
            views = torch.empty(size, device="meta", dtype=parameter.dtype)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.example(views, num_visual_tokens, question_length)
            known[key] = float(counter.get_total_flops())
        return known[key]

    def projection_flops(self, num_tokens: int) -> float:
        """FLOPs of `project`."""
        return 0.0

    def view_parts(self) -> list[nn.Module]:
        """Modules between tower and view tokens."""
        return []

    def fusion_parts(self) -> list[nn.Module]:
        """Modules between view tokens and states."""
        return [self]

    def projection_parts(self) -> list[nn.Module]:
        """Modules of `project`."""
        return []

    def view_flops(self) -> float:
        """FLOPs of one view between tower and view tokens."""
        return 0.0

    def view_width(self) -> int:
        """F, features per view token."""
        return len(self.hidden_layers()) * self.config.vision_config.hidden_size

    # -- conversations about one image, question by question -----------------------------------------------------------

    def start_fusion(self, view_tokens: torch.Tensor, views_per_image: list[int]) -> list[Any]:
        """A state per image that `continue_fusion` extends question by question, for connectors that keep one."""
        raise ValueError(f"The {self.name} connector keeps nothing between questions; use get_image_features.")

    def continue_fusion(self, states: list[Any], *question: Any) -> list[torch.Tensor]:
        """States of one more question about each image that was read."""
        raise ValueError(f"The {self.name} connector keeps nothing between questions; use get_image_features.")


def _set_default(config: PreTrainedConfig, name: str, default: Callable[[PreTrainedConfig], Any]) -> None:
    if getattr(config, name) is None:
        setattr(config, name, default(config))
