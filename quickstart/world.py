"""A small visual world to learn from: scenes of coloured shapes, panels of letters, questions with exact answers.

Images are 64 x 64 with a 4 x 4 grid of cells a1..d4 (letter: row, digit: column). Everything is a function of
(seed, index), so training and held-out images never overlap and a run can be repeated.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
GRID = 4
CELL = SIZE // GRID
OVERSAMPLE = 2
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 200, 220),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CELLS = tuple(f"{row}{column}" for row in "abcd" for column in "1234")
SCENE_SHARE = 0.65
Content = dict[str, Any]  # {cell: (colour, shape) of a scene, or the letter of a panel}
TASKS = ("colour", "shape", "letter", "list", "read")
DENSE_TASKS = ("list", "read")  # their answer is the whole image


@dataclass(frozen=True)
class Question:
    """One question about an image, with its exact answer."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One image of the world. `content` maps a cell to (colour, shape), or to a letter on a panel."""

    image: Any  # None where only words are asked for
    is_scene: bool
    content: Content

    def description(self) -> str:
        """The image in words, cell by cell; what the language model is pretrained to answer from."""
        words = [f"{cell} {' '.join(what) if self.is_scene else what}" for cell, what in self.content.items()]
        return f"{'scene' if self.is_scene else 'panel'} : {' '.join(words)} ."

    def dense_question(self) -> Question:
        """The question whose answer is the whole image."""
        answer = self.description().split(" : ", 1)[1].removesuffix(" .")
        return (
            Question("list", "list all objects", answer) if self.is_scene else Question("read", "read the text", answer)
        )

    def cell_question(self, task: str, cell: str) -> Question:
        """A one-word question about a cell: colour, shape or letter."""
        what = self.content[cell]
        answer = {"colour": what[0], "shape": what[1]}[task] if self.is_scene else what
        return Question(task, f"{task} at {cell}", answer)

    def cell_tasks(self) -> tuple[str, ...]:
        """One-word tasks this image can be asked."""
        return ("colour", "shape") if self.is_scene else ("letter",)

    def draw_questions(self, generator: np.random.Generator, count: int, dense: bool) -> list[Question]:
        """Random one-word questions about distinct (task, cell) pairs, and the dense question last when asked for."""
        pairs = [(task, cell) for task in self.cell_tasks() for cell in self.content]
        chosen = generator.choice(len(pairs), size=min(count, len(pairs)), replace=False)
        questions = [self.cell_question(*pairs[index]) for index in chosen]
        return [*questions, self.dense_question()] if dense else questions


def make_sample(seed: int, index: int) -> Sample:
    """The image number `index` of world `seed`."""
    generator = np.random.default_rng([seed, index])
    is_scene = generator.random() < SCENE_SHARE
    content: Content = _draw_scene(generator) if is_scene else _draw_panel(generator)
    gray = int(generator.integers(190, 256))
    image = Image.new("RGB", (SIZE * OVERSAMPLE, SIZE * OVERSAMPLE), (gray, gray, gray))
    draw = ImageDraw.Draw(image)
    font_size = float(generator.choice([11.0, 12.5, 14.0]))
    for cell, what in content.items():
        x, y = _center(cell, generator)
        if is_scene:
            _paint_shape(draw, x, y, what[1], _tint(what[0], generator), float(generator.uniform(5.0, 6.6)))
        else:
            _paint_letter(draw, x, y, what, font_size, generator)
    return Sample(image.reduce(OVERSAMPLE), is_scene, content)


def _draw_scene(generator: np.random.Generator) -> dict[str, tuple[str, str]]:
    share = generator.uniform(0.3, 0.6)
    filled = [cell for cell in CELLS if generator.random() < share] or [CELLS[generator.integers(len(CELLS))]]
    colours, shapes = list(COLOURS), list(SHAPES)
    return {cell: (colours[generator.integers(8)], shapes[generator.integers(6)]) for cell in filled}


def _draw_panel(generator: np.random.Generator) -> dict[str, str]:
    return {cell: LETTERS[generator.integers(26)] for cell in CELLS}


def _center(cell: str, generator: np.random.Generator) -> tuple[float, float]:
    jitter = generator.uniform(-1.2, 1.2, 2)
    column, row = int(cell[1]) - 1, "abcd".index(cell[0])
    return (column + 0.5) * CELL + jitter[0], (row + 0.5) * CELL + jitter[1]


def _tint(colour: str, generator: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + generator.integers(-18, 19, 3), 0, 255))


def _paint_shape(draw: ImageDraw.ImageDraw, x: float, y: float, shape: str, colour: tuple, radius: float) -> None:
    x, y, r = x * OVERSAMPLE, y * OVERSAMPLE, radius * OVERSAMPLE
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=max(2, round(r * 0.4)))
    elif shape == "square":
        draw.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=colour)
    elif shape == "star":
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, r * 1.1, r * 0.42)
        draw.polygon([(x + q * np.cos(a), y + q * np.sin(a)) for a, q in zip(angles, radii, strict=True)], fill=colour)
    else:  # cross
        bar = 0.34 * r
        draw.rectangle((x - r, y - bar, x + r, y + bar), fill=colour)
        draw.rectangle((x - bar, y - r, x + bar, y + r), fill=colour)


def _paint_letter(draw: Any, x: float, y: float, letter: str, font_size: float, generator: np.random.Generator) -> None:
    font = ImageFont.load_default(size=font_size * OVERSAMPLE)
    ink = tuple(int(v) for v in generator.integers(0, 90, 3))
    draw.text((x * OVERSAMPLE, y * OVERSAMPLE), letter.upper(), font=font, fill=ink, anchor="mm")


def score(task: str, answer: str, expected: str) -> float:
    """Score of a free answer in [0, 1].

    One-word tasks: exact match. list: F1 over (cell, colour, shape). read: share of cells with the right letter.
    """
    if task in ("colour", "shape", "letter"):
        return float(answer.strip() == expected)
    step = 3 if task == "list" else 2
    said, truth = _groups(answer, step), _groups(expected, step)
    right = len(said & truth)
    if task == "read":
        return right / len(truth)
    return 0.0 if right == 0 else 2 * right / (len(said) + len(truth))


def _groups(answer: str, step: int) -> set[tuple[str, ...]]:
    words = answer.split()
    return {tuple(words[start : start + step]) for start in range(0, len(words) - step + 1, step)}
