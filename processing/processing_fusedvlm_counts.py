"""How many placeholders an image gets: what the model's connector can give, as plain data, and the counts of a call."""

from typing import Any

from .processing_fusedvlm_prompt import Prompt

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


class VisualTokenCounts:
    """The model's own checks of m and m', made before anything is encoded.

    Args:
        connector: what the model's configuration says of its connector (`FusedVLMConnector.facts`); None for fused.
        largest: the largest m the model was trained with.
    """

    def __init__(self, connector: dict[str, Any] | None, largest: int) -> None:
        self.connector = {**FUSED, **(connector or {})}
        self.is_fused = self.connector["name"] == "fused"
        self.per_view = self.connector["per_view"]
        self.reads_question = self.connector["reads_question"]
        self.largest = largest

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
