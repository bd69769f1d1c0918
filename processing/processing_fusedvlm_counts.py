"""How many placeholders an image gets: what the model's connector can give, as plain data, and the counts of a call."""

from typing import Any

from transformers.utils import logging

from .processing_fusedvlm_auto import AUTO, QuestionCalibration
from .processing_fusedvlm_prompt import Prompt

logger = logging.get_logger(__name__)

FOLLOWUP = "num_followup_visual_tokens"

# What happens to a count that was not trained.
POLICIES = ("as_asked", "round_down")
# The fused connector, which folders saved without an entry have: any m up to the largest trained one.
FUSED = {
    "name": "fused",
    "counts": None,
    "smallest": 1,
    "per_view": False,
    "reads_question": True,
    "question_tokens": "own",
    "nested": True,
}


def whole_number(value: Any, name: str) -> int:
    """A count as an int, also from numpy and from tensors of one number. Raises `ValueError` for 2.5, True and text."""
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{name}={str(value)[:60]!r} is not a whole number of visual tokens.")
    return number


def check_policy(policy: str) -> str:
    """The policy, where it is one; raises `ValueError` naming them."""
    if policy not in POLICIES:
        raise ValueError(f"num_visual_tokens_policy={str(policy)[:60]!r} must be {' or '.join(POLICIES)}.")
    return policy


class VisualTokenCounts:
    """The model's own checks of m and m', made before anything is encoded.

    Args:
        connector: what the model's configuration says of its connector (`FusedVLMConnector.facts`); None for fused.
        largest: the largest m the model was trained with.
        trained: every m the model was trained with; None when nobody knows.
        is_range: whether every m from the smallest to the largest of these was.
    """

    def __init__(
        self,
        connector: dict[str, Any] | None,
        largest: int,
        trained: list[int] | None = None,
        is_range: bool | None = None,
    ) -> None:
        self.connector = {**FUSED, **(connector or {})}
        self.is_fused = self.connector["name"] == "fused"
        self.per_view = self.connector["per_view"]
        self.reads_question = self.connector["reads_question"]
        self.largest = largest
        self.trained = None if trained is None else sorted(trained)
        self.is_range = bool(is_range)

    def is_trained(self, value: int, also: int | None = None) -> bool:
        """Whether the model was trained with this number, as far as anybody knows; `also` is a further one it was."""
        if self.trained is None or value in (0, also):
            return True
        return self.trained[0] <= value <= self.trained[-1] if self.is_range else value in self.trained

    def round_down(self, value: int, name: str, also: int | None = None) -> int:
        """The largest trained number up to `value`; raises `ValueError` when there is none."""
        if self.trained is None or self.is_trained(value, also):
            return value
        smaller = [m for m in (*self.trained, also) if m is not None and m <= value]
        if not smaller:
            raise ValueError(
                f"{name}={value} is below every m this model was trained with, so it cannot be rounded down; the "
                f"smallest is {self.trained[0]}."
            )
        return max(smaller)

    def explain_untrained(self, value: int, name: str) -> str:
        """What to know of a number that is served and was not trained."""
        trained = self.trained or []
        listed = f"{trained[0]} to {trained[-1]}" if self.is_range else ", ".join(map(str, trained))
        return (
            f"{name}={value} is served, but this model was trained with m = {listed[:80]} only, and in between more "
            "tokens need not help: the last query was never trained there. num_visual_tokens_policy='round_down' takes "
            "the next smaller trained one."
        )

    def check(self, value: int, name: str) -> None:
        """Raise `ValueError`, with the counts there are, when the model cannot give this number."""
        whole_number(value, name)
        counts, smallest = self.connector["counts"], self.connector["smallest"]
        each = " per view" if self.per_view else ""
        if not smallest <= value <= self.largest:
            raise ValueError(
                f"{name}={value} is out of range: this model takes {smallest} to {self.largest} visual tokens{each}."
            )
        if counts is not None and value not in counts:
            possible = ", ".join(str(count) for count in counts if count <= self.largest)
            raise ValueError(
                f"{name}={value} cannot be given: the {self.connector['name']} connector takes {possible} visual "
                f"tokens{each}."
            )

    def check_followup(self, value: int, first: int) -> None:
        """Raise `ValueError` when m'=`value` does not go with m=`first`."""
        if value == 0 and not self.reads_question and not self.is_fused:
            return  # the tokens in front of the first question are there already
        self.check(value, "num_followup_visual_tokens")
        if value != first and not self.connector["nested"]:
            raise ValueError(
                f"num_followup_visual_tokens={value} with num_visual_tokens={first}: the {self.connector['name']} "
                f"connector is not nested; set it to {first}{'' if self.reads_question else ' or 0'}."
            )

    def default_followup(self, first: int, default: int) -> int:
        """m' of a call that names none: the model's default, which follows m down and, where not nested, up."""
        if default and not self.connector["nested"]:
            return first
        return min(first, default)

    def marker_sizes(self, prompt: Prompt, first: int, followup: int, views: list[int] | None) -> list[int]:
        """Placeholders of every image marker, in the order of the prompt's pieces.

        Args:
            prompt: a parsed prompt.
            first, followup: m and m' of this prompt.
            views: views of each of its images; needed where m counts by view.

        Raises:
            ValueError: when m counts by view and the views are not known.
        """
        if self.per_view and views is None and prompt.num_images:
            raise ValueError(
                f"The {self.connector['name']} connector counts visual tokens per view: give the images too, or "
                "image_num_views= with the views of each."
            )
        copies = views if self.per_view and views else [1] * prompt.num_images
        sizes, shown, turn, seen = [], 0, None, 0
        for piece in prompt.pieces:
            if piece.turn != turn:
                turn, seen = piece.turn, 0
            if piece.kind == "image":
                sizes.append(first * copies[shown])
                shown += 1
            elif piece.kind == "again":
                sizes.append(followup * copies[seen])
                seen += 1
        return sizes


class VisualTokenDial:
    """The processor's m and m': its own, those of a call, and what is served in their place."""

    connector: dict[str, Any] | None
    num_visual_tokens: int
    num_followup_visual_tokens: int
    max_num_visual_tokens: int
    trained_num_visual_tokens: list[int] | None
    trained_num_visual_tokens_is_range: bool | None
    num_visual_tokens_policy: str
    auto_num_visual_tokens: dict[str, Any] | None
    _has_warned: bool  # of a count that was not trained

    @property
    def counts(self) -> VisualTokenCounts:
        """What the model's connector can give."""
        return VisualTokenCounts(
            self.connector,
            self.max_num_visual_tokens,
            self.trained_num_visual_tokens,
            self.trained_num_visual_tokens_is_range,
        )

    def _counts(
        self, num_prompts: int, first_counts: Any, followup_counts: Any, policy: str | None = None
    ) -> list[tuple[int, int]]:
        """(m, m') of every prompt."""
        rules, counts = self.counts, []
        policy = self.num_visual_tokens_policy if policy is None else check_policy(policy)
        for sample in range(num_prompts):
            asked = self._per_sample(first_counts, "num_visual_tokens", sample, num_prompts)
            rules.check(asked, "num_visual_tokens")
            first = self._serve(rules, asked, "num_visual_tokens", policy)
            if followup_counts is None:
                followup = rules.default_followup(first, self.num_followup_visual_tokens)
            else:
                followup = self._per_sample(followup_counts, "num_followup_visual_tokens", sample, num_prompts)
                rules.check_followup(followup, min(asked, followup) if rules.connector["nested"] else asked)
                # m' follows m down, as in the published (1, 1), and where m is rounded down.
                followup = first if followup == asked else min(first, followup)
                own = self.num_followup_visual_tokens
                followup = first if followup == first else self._serve(rules, followup, FOLLOWUP, policy, own)
            counts.append((first, followup))
        return counts

    def choose_num_visual_tokens(self, question: str) -> int:
        """The m that "auto" means for a question.

        Raises:
            ValueError: when nobody calibrated the variant, or its calibration is damaged.
        """
        if self.auto_num_visual_tokens is None:
            raise ValueError(
                "num_visual_tokens='auto' needs a calibration, and this variant has none: run `fusedvlm scaling "
                "calibrate`, or name m."
            )
        return QuestionCalibration(self.auto_num_visual_tokens).choose(question)

    def _chosen(self, prompts: list[Prompt], asked: Any) -> Any:
        """What is asked for, with a number in place of each "auto": by the first question about a prompt's images."""
        each = list(asked) if isinstance(asked, (list, tuple)) else [asked] * len(prompts)
        if not any(isinstance(one, str) and one == AUTO for one in each) or len(each) != len(prompts):
            return asked
        questions = [next((turn.question for turn in prompt.turns if turn.num_new_images), "") for prompt in prompts]
        return [
            self.choose_num_visual_tokens(question) if isinstance(one, str) and one == AUTO else one
            for one, question in zip(each, questions, strict=True)
        ]

    def served_num_visual_tokens(self, num_visual_tokens: int | str | None = None, question: str = "") -> int:
        """The m that a call with this m gets, by `num_visual_tokens_policy`; the default m when none is given.

        Args:
            num_visual_tokens: m, or "auto".
            question: which "auto" chooses m for.
        """
        m: Any = self.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        m = self.choose_num_visual_tokens(question) if isinstance(m, str) and m == AUTO else m
        return self._serve(self.counts, m, "num_visual_tokens", self.num_visual_tokens_policy)

    def _serve(self, rules: VisualTokenCounts, value: int, name: str, policy: str, also: int | None = None) -> int:
        """The count that stands for one that is asked for: itself, or the next smaller one that was trained."""
        if policy == "round_down":
            return rules.round_down(value, name, also)
        if not self._has_warned and not rules.is_trained(value, also):
            self._has_warned = True
            logger.warning(rules.explain_untrained(value, name))
        return value

    def _per_sample(self, value: Any, name: str, sample: int, batch_size: int) -> int:
        """The count that is asked for for one sample."""
        if value is None:
            return getattr(self, name)
        if isinstance(value, (list, tuple)):
            if len(value) != batch_size:
                raise ValueError(f"{name} has {len(value)} entries for {batch_size} prompts.")
            value = value[sample]
        return getattr(self, name) if value is None else whole_number(value, name)
