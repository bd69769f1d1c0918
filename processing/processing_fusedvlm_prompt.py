"""Prompt text to pieces: where visual tokens go, which text is a question, which is an answer, which is literal.

Marked text is what the chat template renders:

    <s>[INST] <image><|question|>What is this?<|/question|>[/INST]<|answer|>A cat. <|/answer|></s>
    <s>[INST]<|image_again|><|question|>What colour?<|/question|>[/INST]

    <image>             m visual tokens of an image that is new in this turn
    <|image_again|>     m' visual tokens of an image seen before; the j-th one in a turn is the sample's j-th image
    <|question|>        user text: goes to the fusion module, and literally (no special tokens) to the LLM
    <|answer|>          assistant text: literal too; with the end-of-turn token behind it, what training learns
    <|turn_end|>        special tokens that training learns too, as in <|turn_end|><|end|>\n<|/turn_end|>
    <|literal|>         text of the system or of a tool: part of the text around it, but its special tokens are text
    <|piece|>           a boundary for tokenization, nothing else
    <|asked|>           inside a question: what stands before it is for the LLM only

Nothing inside a question or an answer is read as a marker, except its closing one, which the template escapes with a
private-use character; so `<image>` typed by a user stays text. Text without `<|question|>` and `<|answer|>` is
unmarked: there only the two image markers count.
"""

import re
from dataclasses import dataclass, field

IMAGE = "<image>"
IMAGE_AGAIN = "<|image_again|>"
MARKERS = ("image", "again")  # kinds of pieces that become placeholders
ASKED = "<|asked|>"
ESCAPE = "\ue000"

_MARKED = re.compile(
    r"(?P<image><image>)|(?P<again><\|image_again\|>)|(?P<piece><\|piece\|>)"
    r"|<\|question\|>(?P<question>.*?)<\|/question\|>|<\|answer\|>(?P<answer>.*?)(?:<\|/answer\|>|\Z)"
    r"|<\|turn_end\|>(?P<end>.*?)<\|/turn_end\|>|<\|literal\|>(?P<literal>.*?)<\|/literal\|>",
    re.DOTALL,
)
_UNMARKED = re.compile(r"(?P<image><image>)|(?P<again><\|image_again\|>)")


@dataclass
class Piece:
    """A stretch of prompt.

    `kind` is text, image, again, question, answer or end; `turn` counts questions; `start` is its place in the text.
    `literal` are the (start, stop) inside a piece of text where special tokens are plain text, `parts` where each
    stretch of it begins: (place in the piece, place in the prompt).
    """

    kind: str
    text: str
    turn: int
    start: int = 0
    literal: list[tuple[int, int]] = field(default_factory=list)
    parts: list[tuple[int, int]] = field(default_factory=list)
    is_closed: bool = False  # a boundary follows: what comes next is a piece of its own

    def add(self, text: str, start: int, is_literal: bool) -> None:
        """Append a stretch that stood at `start` of the prompt."""
        self.parts.append((len(self.text), start))
        if is_literal:
            self.literal.append((len(self.text), len(self.text) + len(text)))
        self.text += text

    def place(self, offset: int) -> int:
        """Where a character of the piece stood in the prompt."""
        inside, outside = max((part for part in self.parts if part[0] <= offset), default=(0, self.start))
        return outside + offset - inside


@dataclass
class Turn:
    """One question and the images in front of it."""

    num_new_images: int = 0
    num_seen_images: int = 0
    question: str = ""


@dataclass
class Prompt:
    """A parsed prompt."""

    pieces: list[Piece] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    is_marked: bool = False

    @property
    def num_images(self) -> int:
        """Images the prompt introduces."""
        return sum(turn.num_new_images for turn in self.turns)


def escape(text: str) -> str:
    """Make markers inside literal text harmless; the chat template does the same in Jinja."""
    return text.replace("<|", f"<{ESCAPE}|").replace(IMAGE, f"<{ESCAPE}image>")


def unescape(text: str) -> str:
    """Undo `escape`."""
    return text.replace(f"<{ESCAPE}", "<")


def replacement_offsets(prompt: Prompt, sizes: list[int]) -> list[dict]:
    """Where image markers stand in a prompt's text and in the same text with every marker repeated once per token.

    Args:
        prompt: a parsed prompt.
        sizes: visual tokens of every image marker, in order.

    Returns:
        One entry per marker, in the form that `ProcessorMixin.get_text_with_replacements` documents.
    """
    found, gained, sizes_left = [], 0, iter(sizes)
    for piece in prompt.pieces:
        if piece.kind in MARKERS:
            new = IMAGE * next(sizes_left)
            start, stop = piece.start, piece.start + len(piece.text)
            span, new_span = (start, stop), (start + gained, start + gained + len(new))
            found.append({"type": "image", "span": span, "new_span": new_span, "text": piece.text, "replacement": new})
            gained += len(new) - len(piece.text)
    return found


def parse_prompt(text: str, sample: int = 0) -> Prompt:
    """Split a prompt into pieces and turns.

    Raises:
        ValueError: when an image is shown again before it was shown, or after a new one in the same turn.
    """
    is_marked = any(marker in text for marker in ("<|question|>", "<|answer|>", "<|literal|>"))
    return _parse_marked(text, sample) if is_marked else _parse_unmarked(text, sample)


def _parse_marked(text: str, sample: int) -> Prompt:
    prompt = Prompt(is_marked=True)
    turn, seen, last = Turn(), 0, 0
    for match in _MARKED.finditer(text):
        _add_text(prompt, text, last, match.start())
        last = match.end()
        kind = match.lastgroup or ""
        content = match[kind]
        if kind == "literal":
            _add_text(prompt, content, 0, len(content), match.start(kind), is_literal=True)
            continue
        if kind == "image":
            turn.num_new_images += 1
        elif kind == "again":
            _see_again(turn, seen, sample)
        elif kind == "question":
            turn.question = unescape(content.rpartition(ASKED)[2])
            content = content.replace(ASKED, "")
        if kind == "piece" and prompt.pieces:
            prompt.pieces[-1].is_closed = True
        if kind != "piece":
            prompt.pieces.append(Piece(kind, unescape(content), len(prompt.turns), match.start()))
        if kind == "question":
            seen += turn.num_new_images
            prompt.turns.append(turn)
            turn = Turn()
    _add_text(prompt, text, last, len(text))
    if turn.num_new_images or turn.num_seen_images:
        prompt.turns.append(turn)  # images after the last question: a turn that is asked nothing
    return prompt


def _parse_unmarked(text: str, sample: int) -> Prompt:
    """Image markers with only white space between them are one turn; its question is the text up to the next turn.

    With a single turn the question is the whole text, in front of the images too.
    """
    prompt = Prompt()
    turn: Turn | None = None
    seen = last = 0
    for match in _UNMARKED.finditer(text):
        between = text[last : match.start()]
        if turn is None or between.strip():
            if turn is not None:
                turn.question = between.strip()
                seen += turn.num_new_images
            turn = Turn()
            prompt.turns.append(turn)
        _add_text(prompt, text, last, match.start())
        last = match.end()
        if match.lastgroup == "image":
            turn.num_new_images += 1
        else:
            _see_again(turn, seen, sample)
        prompt.pieces.append(Piece(match.lastgroup or "", match.group(), len(prompt.turns) - 1, match.start()))
    _add_text(prompt, text, last, len(text))
    if len(prompt.turns) == 1:
        prompt.turns[0].question = _UNMARKED.sub("", text).strip()
    elif turn is not None:
        turn.question = text[last:].strip()
    return prompt


def _add_text(
    prompt: Prompt, text: str, start: int, stop: int, place: int | None = None, is_literal: bool = False
) -> None:
    """Append `text[start:stop]`; literal text joins the text around it, and is tokenized with it."""
    if start >= stop:
        return
    content, place = unescape(text[start:stop]), start if place is None else place
    last = prompt.pieces[-1] if prompt.pieces else None
    if last is None or last.kind != "text" or last.is_closed or not (is_literal or last.literal):
        prompt.pieces.append(last := Piece("text", "", len(prompt.turns), place))
    last.add(content, place, is_literal)


def _see_again(turn: Turn, seen: int, sample: int) -> None:
    if turn.num_new_images:
        raise ValueError(f"Sample {sample}: put {IMAGE_AGAIN} in front of new {IMAGE} markers in a turn, not behind.")
    turn.num_seen_images += 1
    if turn.num_seen_images > seen:
        raise ValueError(f"Sample {sample}: {turn.num_seen_images} x {IMAGE_AGAIN} but {seen} images seen before.")
