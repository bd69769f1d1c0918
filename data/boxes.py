"""Bounding boxes in text, and what becomes of them when the image is padded to a square.

Two ways to write a box, corners from the top left, relative to the image's width and height:

    <bbox>137,82,500,999</bbox>      whole numbers 0..999 (the published checkpoints; docs/reference.md, "Boxes")
    [0.137, 0.082, 0.5, 1.0]         0..1 (LLaVA, SVIT)

LLaVA-1.5's boxes are of the padded square already, SVIT's are of the image as it is. Coordinates are fractions here, so
that placing a box and taking it back is exact; only writing a box down rounds it, to the nearest number of its kind
(the published checkpoints' boxes were cut off instead: up to one unit of 999 to the left and up).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

LARGEST = 999
TAG = re.compile(r"<bbox>(.*?)</bbox>", re.DOTALL)
NUMBER = r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*"
BRACKET = re.compile(rf"\[{','.join([NUMBER] * 4)}\]")


@dataclass(frozen=True)
class Box:
    """A box in an image, each coordinate a fraction of the image's width or height.

    Raises:
        ValueError: when a coordinate is outside 0..1 or a corner is on the wrong side of the other.
    """

    left: Fraction
    top: Fraction
    right: Fraction
    bottom: Fraction

    def __post_init__(self) -> None:
        if not (0 <= self.left <= self.right <= 1 and 0 <= self.top <= self.bottom <= 1):
            shown = ", ".join(f"{float(value):g}" for value in self.corners)
            raise ValueError(f"Box [{shown}] is not left <= right, top <= bottom within 0..1.")

    @property
    def corners(self) -> tuple[Fraction, Fraction, Fraction, Fraction]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom


@dataclass(frozen=True)
class Placement:
    """Where an image lies on a larger surface: x on it is `left + width * x` in the image, and likewise for y."""

    left: Fraction
    top: Fraction
    width: Fraction
    height: Fraction

    def place(self, box: Box) -> Box:
        """The box on the surface."""
        return Box(
            self.left + self.width * box.left,
            self.top + self.height * box.top,
            self.left + self.width * box.right,
            self.top + self.height * box.bottom,
        )

    def take_back(self, box: Box) -> Box:
        """The box in the image; the inverse of `place`.

        Raises:
            ValueError: for a box that reaches into the padding.
        """
        return Box(
            (box.left - self.left) / self.width,
            (box.top - self.top) / self.height,
            (box.right - self.left) / self.width,
            (box.bottom - self.top) / self.height,
        )


def square_placement(width: int, height: int, tile_size: int = 336) -> Placement:
    """An image on the padded square that becomes the global view, to the pixel (docs/reference.md, "The global view").

    Raises:
        ValueError: for an image without pixels.
    """
    # Imported when needed: this loads transformers and torchvision, which readers of plain text do without.
    from fusedvlm.processing.image_processing_fusedvlm_views import plan_global_square

    plan = plan_global_square(height, width, tile_size)
    return Placement(*(Fraction(value, plan.side) for value in (plan.left, plan.top, plan.width, plan.height)))


def remap_boxes(text: str, placement: Placement, inverse: bool = False) -> str:
    """Move every box of a text onto the placement's surface, or back. Each keeps its way of writing and its decimals.

    Raises:
        ValueError: for boxes that are malformed, out of range or, going back, in the padding.
    """
    move = placement.take_back if inverse else placement.place
    text = _replace_tags(text, lambda box: write_tag(move(box)))
    return BRACKET.sub(lambda match: _rewrite(match, lambda box, digits: write_bracket(move(box), digits)), text)


def boxes_to_tags(text: str, placement: Placement | None = None) -> str:
    """Write `[0.137, ...]` as `<bbox>137,...</bbox>`, and every box moved onto a surface when one is given.

    Raises:
        ValueError: for boxes that are malformed or out of range.

    >>> boxes_to_tags("the man [0.1, 0.2, 0.5, 1.0] waves; see [12]")
    'the man <bbox>100,200,500,999</bbox> waves; see [12]'
    """

    def write(box: Box, _: int = 0) -> str:
        return write_tag(box if placement is None else placement.place(box))

    return BRACKET.sub(lambda match: _rewrite(match, write), _replace_tags(text, write))


def find_boxes(text: str) -> list[Box]:
    """All boxes of a text, tagged ones first.

    Raises:
        ValueError: for boxes that are malformed or out of range.
    """
    found: list[Box] = []

    def note(box: Box, _: object = None) -> str:
        found.append(box)
        return ""

    _replace_tags(text, note)
    BRACKET.sub(lambda match: _rewrite(match, note), text)
    return found


def write_tag(box: Box) -> str:
    """A box as `<bbox>` text; whole numbers, rounded to the nearest."""
    return f"<bbox>{','.join(str(_nearest(value * LARGEST)) for value in box.corners)}</bbox>"


def write_bracket(box: Box, digits: int) -> str:
    """A box as `[x1, y1, x2, y2]` with that many decimals, rounded to the nearest."""
    numbers = [_nearest(value * 10**digits) for value in box.corners]
    return f"[{', '.join(f'{number / 10**digits:.{digits}f}' for number in numbers)}]"


def _nearest(value: Fraction) -> int:
    """Nearest integer, halves up, so that the order of two numbers never turns round."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def _replace_tags(text: str, write: Callable[[Box], str]) -> str:
    if not text.count("<bbox>") == text.count("</bbox>") == len(TAG.findall(text)):
        raise ValueError(f"<bbox> and </bbox> do not pair up in {_shown(text)}.")
    return TAG.sub(lambda match: write(_parse_tag(match[1])), text)


def _parse_tag(inside: str) -> Box:
    numbers = [number.strip() for number in inside.split(",")]
    if len(numbers) != 4 or not all(re.fullmatch(r"[0-9]{1,6}", number) for number in numbers):
        raise ValueError(f"<bbox>{_shown(inside)}</bbox> must hold four whole numbers 0..{LARGEST}.")
    return Box(*(Fraction(int(number), LARGEST) for number in numbers))


def _rewrite(match: re.Match, write: Callable[[Box, int], str]) -> str:
    """A bracket as it is written anew, or as it stands when it is a list of numbers but no box.

    A box has a decimal point somewhere, except the box of the whole image when written [0, 0, 1, 1].
    """
    numbers = match.groups()
    if "." not in match[0] and numbers != ("0", "0", "1", "1"):
        return match[0]
    digits = max(len(number.partition(".")[2]) for number in numbers)
    return write(Box(*map(Fraction, numbers)), digits)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
