"""Training conversations of the world: images with freshly drawn questions, each entry of one kind."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from . import world

# {kind: (one-word questions in front, whether the dense one is asked, one-word questions behind it)}
KINDS = {
    "one_word": (1, False, 0),
    "follow_up": (2, False, 0),
    "dense": (0, True, 0),
    "dense_first": (0, True, 1),
    "mixed": (2, True, 0),
}


def draw_questions(kind: str, sample: world.Sample, generator: np.random.Generator) -> list[world.Question]:
    """The questions of a conversation, in order.

    Args:
        kind: "one_word": one question about a cell; "follow_up": two different ones; "dense": the one whose answer is
            the whole image; "dense_first": a one-word question behind it; "mixed": two one-word questions in front of
            it.
        sample: what it is about.
        generator: of the draw.

    Raises:
        ValueError: for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}.")
    before, is_dense, behind = KINDS[kind]
    questions = sample.draw_questions(generator, before + behind, dense=False)
    return [*questions[:before], *([sample.dense_question()] if is_dense else []), *questions[before:]]


class Conversations(torch.utils.data.Dataset):
    """Conversations over cached view tokens; entry i is a function of (seed, i) alone.

    Args:
        samples: images of the training world.
        features: (images, views, tokens per view, width) their view tokens.
        length: entries.
        seed: of images and questions.
        kinds: entry i is of kind `kinds[i % len(kinds)]`, see `draw_questions`.
        panel_share: {kind: share of letter panels}; the world's own where none is given.
    """

    def __init__(
        self,
        samples: Sequence[world.Sample],
        features: torch.Tensor,
        length: int,
        seed: int,
        kinds: Sequence[str] = ("mixed",),
        panel_share: Mapping[str, float] | None = None,
    ) -> None:
        self.samples, self.features, self.length, self.seed = samples, features, length, seed
        self.kinds, self.panel_share = tuple(kinds), dict(panel_share or {})
        self.pools = {scene: [i for i, s in enumerate(samples) if s.is_scene == scene] for scene in (True, False)}

    def __len__(self) -> int:
        return self.length

    def source_names(self) -> np.ndarray:
        """(length,) the kind of every entry, by which batches are grouped."""
        return np.resize(np.asarray(self.kinds), self.length)

    def __getitem__(self, index: int) -> dict:
        generator = np.random.default_rng([self.seed, 2, index])
        kind = self.kinds[index % len(self.kinds)]
        number = self._draw_image(kind, generator)
        messages = []
        for turn, question in enumerate(draw_questions(kind, self.samples[number], generator)):
            content = ([{"type": "image"}] if turn == 0 else []) + [{"type": "text", "text": question.text}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
        return {"messages": messages, "view_features": self.features[number].float(), "source": kind}

    def _draw_image(self, kind: str, generator: np.random.Generator) -> int:
        share = self.panel_share.get(kind)
        if share is None:
            return int(generator.integers(len(self.samples)))
        pool = self.pools[bool(generator.random() >= share)] or range(len(self.samples))
        return int(pool[generator.integers(len(pool))])
