"""Text and images to one packed batch; the only place that knows how many placeholders a prompt has.

Layout of the result, for B prompts, I images, V views and G segments (one question asked about one image):

    input_ids, attention_mask   (B, L), padded on the tokenizer's side
    pixel_values                (V, 3, S, S), image after image, global view first
    image_num_views             (I,)
    question_input_ids          (sum of lengths,), question_lengths (G,), question_turns (G,), image by image
    num_visual_tokens           (G,)
    image_num_questions         (I,)
    sample_num_images           (B,)

Everything but the text is packed on axis 0 and holds no index across samples: joining two batches is concatenation.
"""

import os
from typing import TYPE_CHECKING, Any, TypeAlias

from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase, TextInput
from transformers.utils import cached_file

from .processing_fusedvlm_counts import VisualTokenDial, check_policy
from .processing_fusedvlm_messages import check_conversations, check_text
from .processing_fusedvlm_plan import PromptPlanning
from .processing_fusedvlm_prompt import IMAGE, Prompt, Turn, parse_prompt, replacement_offsets
from .processing_fusedvlm_tokens import TokenPieces, pad_rows

QUERY_TOKENIZER_FOLDER = "query_tokenizer"
RENDERED = "rendered_by_fusedvlm"  # our templates refuse to be rendered by anybody else, who would tokenize the markers
PACKED_NAMES = [
    "image_num_views",
    "question_input_ids",
    "question_lengths",
    "question_turns",
    "num_visual_tokens",
    "image_num_questions",
    "sample_num_images",
]


class FusedVLMProcessorKwargs(ProcessingKwargs, total=False):
    """Keyword arguments of the processor: those of tokenizer and image processor."""


# Read unconditionally by transformers up to 5.16; the defaults themselves are class attributes of the processor.
FusedVLMProcessorKwargs._defaults = {}  # type: ignore[attr-defined]


if TYPE_CHECKING:  # also one by one (padding=True), which the nested groups do not say
    Options: TypeAlias = Any
else:
    Options = Unpack[FusedVLMProcessorKwargs]


class FusedVLMProcessor(ProcessorMixin, VisualTokenDial, PromptPlanning):  # transformers looks at the first
    """Image processor, LLM tokenizer and query tokenizer behind one call.

    Args:
        image_processor: `FusedVLMImageProcessor` or its PIL twin.
        tokenizer: the LLM's tokenizer.
        query_tokenizer: reads questions for the connector (CLIP BPE in the published model).
        image_token: marker for an image in unmarked text.
        image_token_id: placeholder id in the LLM's vocabulary; by default the id of `image_token`.
        num_visual_tokens: m, default per image for the first question; per view for connectors that count so.
        num_followup_visual_tokens: m', default for later questions.
        max_num_visual_tokens: largest count the model was trained with; defaults to m.
        trained_num_visual_tokens: every count the model was trained with; None when that is not known.
        trained_num_visual_tokens_is_range: whether every count from the smallest to the largest of these was.
        num_visual_tokens_policy: what happens to a count that was not trained: "as_asked" serves it and warns once,
            "round_down" takes the next smaller one that was.
        auto_num_visual_tokens: what chooses m where it is "auto", as `fusedvlm scaling calibrate` writes it; None where
            nobody calibrated the variant.
        connector: what the model's connector can give (`FusedVLMConnector.facts`); None for the fused one.
        chat_template: Jinja template that renders marked text.
    """

    valid_processor_kwargs = FusedVLMProcessorKwargs
    image_processor: Any
    tokenizer: Any
    query_tokenizer: Any

    def __init__(
        self,
        image_processor: BaseImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        query_tokenizer: PreTrainedTokenizerBase | None = None,
        image_token: str = IMAGE,
        image_token_id: int | None = None,
        num_visual_tokens: int = 256,
        num_followup_visual_tokens: int | None = None,
        max_num_visual_tokens: int | None = None,
        trained_num_visual_tokens: list[int] | None = None,
        trained_num_visual_tokens_is_range: bool | None = None,
        num_visual_tokens_policy: str = "as_asked",
        auto_num_visual_tokens: dict | None = None,
        connector: dict | None = None,
        chat_template: str | dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        if image_token != IMAGE:
            raise ValueError(f"The image marker is {IMAGE}, got image_token={image_token!r}.")
        self.image_token = image_token
        vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
        if image_token_id is None and image_token not in vocabulary:
            raise ValueError(f"The tokenizer has no {image_token} token; pass image_token_id= of a reserved token.")
        self.image_token_id = vocabulary[image_token] if image_token_id is None else image_token_id
        self.connector = connector
        self.num_visual_tokens = num_visual_tokens
        self.max_num_visual_tokens = max_num_visual_tokens or num_visual_tokens
        self.trained_num_visual_tokens = trained_num_visual_tokens
        self.trained_num_visual_tokens_is_range = trained_num_visual_tokens_is_range
        self.num_visual_tokens_policy = check_policy(num_visual_tokens_policy)
        self.auto_num_visual_tokens = auto_num_visual_tokens
        self._has_warned = False
        if num_followup_visual_tokens is None:
            num_followup_visual_tokens = self.counts.default_followup(num_visual_tokens, 8)
        self.num_followup_visual_tokens = num_followup_visual_tokens
        super().__init__(image_processor, tokenizer, query_tokenizer, chat_template=chat_template, **kwargs)
        self.counts.check(num_visual_tokens, "num_visual_tokens")
        self.counts.check_followup(num_followup_visual_tokens, num_visual_tokens)

    # -- loading -------------------------------------------------------------------------------------------------------

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type: str, pretrained_model_name_or_path: Any, subfolder: str = "", **kwargs: Any
    ) -> Any:
        """Load the query tokenizer from its own folder or fail.

        The base class falls back to the LLM's tokenizer with a warning when that folder cannot be read; the model would
        then be fed the wrong tokens.
        """
        folder = subfolder
        if sub_processor_type != "tokenizer":
            folder = f"{subfolder}/{QUERY_TOKENIZER_FOLDER}" if subfolder else QUERY_TOKENIZER_FOLDER
        cls._require_tokenizer_config(pretrained_model_name_or_path, folder, kwargs)
        if sub_processor_type == "tokenizer":
            return super()._load_tokenizer_from_pretrained(
                sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
            )
        kwargs.pop("trust_remote_code", None)
        return AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=folder, **kwargs)

    @staticmethod
    def _require_tokenizer_config(source: Any, folder: str, kwargs: dict) -> None:
        """A tokenizer without its settings loads all the same, but with other special tokens and padding sides."""
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        path = f"{folder}/tokenizer_config.json" if folder else "tokenizer_config.json"
        try:
            found = cached_file(source, path, _raise_exceptions_for_missing_entries=False, **given)
        except OSError as error:
            raise OSError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        if found is None:
            raise OSError(
                f"{str(source)[-120:]} has no {path}: without it the tokenizer would have other special tokens and pad "
                "on the other side. Take the file from where the variant was saved."
            )

    def save_pretrained(  # type: ignore[override]  # push_to_hub goes through kwargs
        self, save_directory: str | os.PathLike, **kwargs: Any
    ) -> Any:
        """As the base class, which would leave `auto_map` on this object and none on a loaded one."""
        saved = super().save_pretrained(save_directory, **kwargs)
        self.__dict__.pop("auto_map", None)
        return saved

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything a call can return for the model."""
        return [*self.tokenizer.model_input_names, "pixel_values", *PACKED_NAMES]

    # -- calling -------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        questions: str | list[str] | list[list[str]] | None = None,
        num_visual_tokens: int | str | list[int | str] | None = None,
        num_followup_visual_tokens: int | list[int] | None = None,
        return_assistant_tokens_mask: bool | None = None,
        num_visual_tokens_policy: str | None = None,
        **kwargs: Options,
    ) -> BatchFeature:
        """Build a batch.

        Args:
            images: one image, a list (in the order of the `<image>` markers), or one list per prompt. Each may be a
                PIL image, array, tensor, path, URL or base64 string.
            text: one prompt or several, as rendered by the chat template or plain with `<image>` markers.
            questions: what the fusion module reads, overriding what is found in the text: one string, or per prompt a
                string or a list with one question per turn.
            num_visual_tokens: m, for all prompts or per prompt; "auto" chooses it from a prompt's first question.
            num_followup_visual_tokens: m', for all prompts or per prompt.
            return_assistant_tokens_mask: also return `assistant_masks` (B, L), 1 on answers and what ends them.
            num_visual_tokens_policy: "as_asked" or "round_down", for this call.

        Returns:
            `BatchFeature` with the layout on top of this module.

        Raises:
            ValueError: naming the sample, when images and markers, questions and turns, or counts do not fit.
        """
        if images is None and text is None:
            raise ValueError("Give text, images or both.")
        merged = self._merged(kwargs)
        return_tensors = merged["text_kwargs"].get("return_tensors")
        if text is None:
            return self.image_processor(self.image_processor.fetch_images(images), **merged["images_kwargs"])
        prompts = self._parse(text, questions)
        images = self._flatten_images(images, prompts)
        asked = self._chosen(prompts, num_visual_tokens)
        counts = self._counts(len(prompts), asked, num_followup_visual_tokens, num_visual_tokens_policy)
        encoded: Any = {}
        views = None
        if images:
            encoded = self.image_processor(images, **{**merged["images_kwargs"], "return_tensors": return_tensors})
            views = [int(number) for number in encoded["image_num_views"]]
        data = self._encode(prompts, counts, views, return_assistant_tokens_mask, merged)
        return BatchFeature({**data, **encoded}, tensor_type=return_tensors)

    def encode_prompts(
        self,
        text: TextInput | list[TextInput],
        questions: str | list[str] | list[list[str]] | None = None,
        num_visual_tokens: int | str | list[int | str] | None = None,
        num_followup_visual_tokens: int | list[int] | None = None,
        return_assistant_tokens_mask: bool | None = None,
        image_num_views: list[int] | None = None,
        num_visual_tokens_policy: str | None = None,
        **kwargs: Options,
    ) -> BatchFeature:
        """The text half of a call: everything but pixels, for images whose view features are already computed.

        Arguments, result and errors as for a call; `pixel_values` and `image_num_views` are missing from the result.
        `image_num_views` holds the views of each image, for connectors that count visual tokens by view.
        """
        merged = self._merged(kwargs)
        prompts = self._parse(text, questions)
        asked = self._chosen(prompts, num_visual_tokens)
        counts = self._counts(len(prompts), asked, num_followup_visual_tokens, num_visual_tokens_policy)
        views = None if image_num_views is None else [int(number) for number in image_num_views]
        data = self._encode(prompts, counts, views, return_assistant_tokens_mask, merged)
        return BatchFeature(data, tensor_type=merged["text_kwargs"].get("return_tensors"))

    def _merged(self, kwargs: Any) -> dict:
        """Options of a call on top of the processor's own, by the part that they are for."""
        kind: Any = FusedVLMProcessorKwargs
        return self._merge_kwargs(kind, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)

    def _parse(self, text: TextInput | list[TextInput], questions: Any) -> list[Prompt]:
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(entry, str) for entry in texts):
            raise ValueError("`text` must be a string or a non-empty list of strings.")
        for sample, entry in enumerate(texts):
            check_text(entry, f"Sample {sample}")
        prompts = [parse_prompt(entry, sample) for sample, entry in enumerate(texts)]
        self._set_questions(prompts, questions)
        return prompts

    def _encode(
        self,
        prompts: list[Prompt],
        counts: list[tuple[int, int]],
        views: list[int] | None,
        return_mask: bool | None,
        merged: dict,
    ) -> dict:
        sizes = self._marker_sizes(prompts, counts, views)
        data = self._encode_text(prompts, sizes, return_mask, merged)
        if any(prompt.num_images for prompt in prompts):
            data.update(self._encode_questions(prompts, counts))
        return data

    def _marker_sizes(
        self, prompts: list[Prompt], counts: list[tuple[int, int]], views: list[int] | None
    ) -> list[list[int]]:
        """Placeholders of every image marker, prompt by prompt."""
        sizes, start, rules = [], 0, self.counts
        for prompt, (first, followup) in zip(prompts, counts, strict=True):
            stop = start + prompt.num_images
            if views is not None and stop > len(views):
                raise ValueError(f"image_num_views has {len(views)} entries, but the prompts have more images.")
            sizes.append(rules.marker_sizes(prompt, first, followup, None if views is None else views[start:stop]))
            start = stop
        return sizes

    def _set_questions(self, prompts: list[Prompt], questions: Any) -> None:
        """Replace the questions found in the text by explicit ones, and refuse empty questions about an image."""
        if questions is not None and not self.counts.reads_question:
            raise ValueError(
                f"The {self.counts.connector['name']} connector reads no question; leave questions= out, the language "
                "model reads the text."
            )
        if questions is not None:
            questions = [questions] if isinstance(questions, str) or len(prompts) == 1 else list(questions)
            if len(prompts) == 1 and len(questions) == 1 and isinstance(questions[0], list) and questions[0]:
                questions = questions[0] if isinstance(questions[0][0], list) else questions
            if len(questions) != len(prompts):
                raise ValueError(f"questions has {len(questions)} entries for {len(prompts)} prompts.")
        for sample, prompt in enumerate(prompts):
            turns = [turn for turn in prompt.turns if turn.num_new_images or turn.num_seen_images]
            if questions is not None and turns:
                given = [questions[sample]] if isinstance(questions[sample], str) else list(questions[sample])
                if len(given) != len(turns):
                    raise ValueError(f"Sample {sample}: {len(given)} questions for {len(turns)} turns with images.")
                for turn, question in zip(turns, given, strict=True):
                    turn.question = question
            if prompt.is_marked or questions is not None:
                self._refuse_empty(turns, sample)
            elif self.counts.reads_question and len(turns) == 1 and not turns[0].question:
                raise ValueError(
                    f"Sample {sample} asks nothing: its text has image markers alone, and this variant's visual tokens "
                    "depend on the question. A server that keeps the text from the processor (vLLM without our plugin) "
                    "would answer wrongly; run `fusedvlm serve`."
                )

    @staticmethod
    def _refuse_empty(turns: list[Turn], sample: int) -> None:
        for number, turn in enumerate(turns):
            if not turn.question.strip():
                raise ValueError(f"Sample {sample}: question {number} is empty; ask something about the image.")

    def _flatten_images(self, images: Any, prompts: list[Prompt]) -> list:
        """Images of all prompts in marker order, checked against the markers prompt by prompt."""
        expected = [prompt.num_images for prompt in prompts]
        if images is None:
            if sum(expected):
                raise ValueError(f"The prompts have {expected} {IMAGE} markers but no images were given.")
            return []
        images = self.image_processor.fetch_images(images)
        if isinstance(images, (list, tuple)) and images and all(isinstance(entry, (list, tuple)) for entry in images):
            if len(images) != len(prompts):
                raise ValueError(
                    f"images has {len(images)} lists for {len(prompts)} prompts: the number of {IMAGE} tokens in the "
                    "prompts should be the same as the number of images."
                )
            for sample, (entry, count) in enumerate(zip(images, expected, strict=True)):
                if len(entry) != count:
                    raise ValueError(f"Sample {sample}: {count} {IMAGE} markers in the text but {len(entry)} images.")
            images = [image for entry in images for image in entry]
        images = make_flat_list_of_images(images) if not isinstance(images, list) or images else []
        if len(images) != sum(expected):
            raise ValueError(
                f"The prompts have {sum(expected)} {IMAGE} markers (per sample: {expected}) but {len(images)} images "
                "were given."
            )
        return images

    def _encode_text(
        self, prompts: list[Prompt], sizes: list[list[int]], return_mask: bool | None, merged: dict
    ) -> dict:
        """Token ids of all prompts with every image marker expanded to its placeholders."""
        text_kwargs = merged["text_kwargs"]
        pieces = [prompt.pieces for prompt in prompts]
        encoder = TokenPieces(
            self.tokenizer, self.image_token_id, pieces, with_offsets=bool(text_kwargs.get("return_offsets_mapping"))
        )
        add_special_tokens = text_kwargs.get("add_special_tokens", True)
        rows = [
            encoder.encode(
                prompt.pieces,
                marker_sizes,
                add_special_tokens=add_special_tokens and not prompt.is_marked,
                sample=sample,
            )
            for sample, (prompt, marker_sizes) in enumerate(zip(prompts, sizes, strict=True))
        ]
        data = pad_rows(
            self.tokenizer,
            rows,
            text_kwargs,
            image_token_id=self.image_token_id,
            # A flat keyword in newer transformers, one of the text keywords in older ones.
            return_mm_token_type_ids=bool(
                merged.get("return_mm_token_type_ids") or text_kwargs.get("return_mm_token_type_ids")
            ),
            return_assistant_mask=bool(return_mask),
        )
        if merged.get("return_text_replacement_offsets") or text_kwargs.get("return_text_replacement_offsets"):
            data["text_replacement_offsets"] = [
                replacement_offsets(prompt, marker_sizes) for prompt, marker_sizes in zip(prompts, sizes, strict=True)
            ]
        return data

    def _encode_questions(self, prompts: list[Prompt], counts: list[tuple[int, int]]) -> dict:
        """The packed question fields, image by image."""
        packed: dict[str, list[int]] = {name: [] for name in PACKED_NAMES if name != "image_num_views"}
        asked_questions = []
        for prompt, (first, followup) in zip(prompts, counts, strict=True):
            asked: list[list[tuple[int, int, str]]] = []  # per image: (turn, visual tokens, question)
            for number, turn in enumerate(prompt.turns):
                # m' = 0: the tokens in front of the first question serve the later ones too.
                for segments in asked[: turn.num_seen_images] if followup else ():
                    segments.append((number, followup, turn.question))
                asked.extend([(number, first, turn.question)] for _ in range(turn.num_new_images))
            packed["sample_num_images"].append(len(asked))
            packed["image_num_questions"].extend(len(segments) for segments in asked)
            for number, size, question in (segment for segments in asked for segment in segments):
                packed["question_turns"].append(number)
                packed["num_visual_tokens"].append(size)
                asked_questions.append(question)
        if self.counts.reads_question:
            rows = self._tokenize_questions(asked_questions)
            packed["question_lengths"] = [len(ids) for ids in rows]
            packed["question_input_ids"] = [token_id for ids in rows for token_id in ids]
        else:
            del packed["question_lengths"], packed["question_input_ids"]
        return packed

    def _tokenize_questions(self, questions: list[str]) -> list[list[int]]:
        """Ids of each question; where the LLM reads it, with the special tokens the LLM is used to."""
        from_llm = self.counts.connector["question_tokens"] == "llm"
        texts = [question.strip() for question in questions] if from_llm else questions
        return self.query_tokenizer(texts, add_special_tokens=from_llm, split_special_tokens=True)["input_ids"]

    # -- what transformers and servers ask a processor -----------------------------------------------------------------

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """Text that stands for one image's placeholders: m times the marker."""
        views = int(image_inputs["image_num_views"][image_idx]) if self.counts.per_view else 1
        return self.image_token * self.served_num_visual_tokens() * views

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Visual tokens and views per image, from sizes (height, width) alone."""
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            m = int(kwargs.get("num_visual_tokens") or self.num_visual_tokens)
            m = self.served_num_visual_tokens(m)
            views = [self.image_processor.get_number_of_views(*size, kwargs) for size in image_sizes]
            tokens = [m * number if self.counts.per_view else m for number in views]
            data.update(num_image_tokens=tokens, num_image_patches=views)
        return MultiModalData(**data)

    def apply_chat_template(
        self,
        conversation: Any,
        *args: Any,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base class. With our markers, the assistant mask comes from the answers themselves.

        Raises:
            ValueError: for a message that cannot be read, naming it; when a mask is asked for while the last message is
                to be continued.
        """
        template = str(kwargs.get("chat_template") or self.chat_template)
        check_conversations(conversation, template)
        if RENDERED in template:
            kwargs[RENDERED] = True
        if return_assistant_tokens_mask and "<|answer|>" not in template:
            # CODEPATH: a template of the caller's without markers, whose answers only {% generation %} shows.
            kwargs["return_assistant_tokens_mask"] = True
        elif return_assistant_tokens_mask:
            if kwargs.get("continue_final_message"):
                raise ValueError("continue_final_message is not compatible with return_assistant_tokens_mask.")
            processor_kwargs = {**(processor_kwargs or {}), "return_assistant_tokens_mask": True}
        try:
            kwargs["processor_kwargs"] = processor_kwargs
            return super().apply_chat_template(conversation, *args, **kwargs)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            reason = " ".join(str(error).split())[:200]  # a template's own `raise_exception`, or a field it misses
            raise ValueError(f"The chat template refuses the conversation: {reason}") from error


FusedVLMProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["FusedVLMProcessor", "FusedVLMProcessorKwargs"]
