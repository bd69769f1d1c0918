"""Training data in one order for every entrant: two streams of conversations, and batches of them as tensors.

Each entrant takes the next conversations of a stream when it wants some, so those that can afford more steps only get
further along the same order. `tests/comparison` proves that a batch equals what processor and collator make of it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from fusedvlm.quickstart import world

IGNORED = -100
PANEL_SHARE = {"one_word": 0.5, "dense": 0.35}


@dataclass(frozen=True)
class Asked:
    """One conversation: an image, a question, its answer."""

    image: int
    question: world.Question


class Stream:
    """Conversation number i of a kind ("one_word" or "dense"), a function of (seed, kind, i) alone."""

    def __init__(self, samples: list[world.Sample], kind: str, seed: int) -> None:
        self.samples, self.kind, self.seed, self.next = samples, kind, seed, 0
        self.pools = {scene: [i for i, s in enumerate(samples) if s.is_scene == scene] for scene in (True, False)}

    def conversation(self, index: int) -> Asked:
        """Conversation number `index`."""
        generator = np.random.default_rng([self.seed, int(self.kind == "dense"), index])
        pool = self.pools[bool(generator.random() >= PANEL_SHARE[self.kind])] or range(len(self.samples))
        image = int(pool[generator.integers(len(pool))])
        sample = self.samples[image]
        question = (
            sample.dense_question() if self.kind == "dense" else sample.draw_questions(generator, 1, dense=False)[0]
        )
        return Asked(image, question)

    def take(self, count: int) -> list[Asked]:
        """The next `count` conversations."""
        first, self.next = self.next, self.next + count
        return [self.conversation(index) for index in range(first, self.next)]


class Batches:
    """Conversations to inputs of the model, every prompt with the same m."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        view_tokens: torch.Tensor,
        image_token_id: int,
        device: torch.device,
        reads_question: bool,
    ) -> None:
        self.view_tokens, self.device, self.image_token_id = view_tokens, device, image_token_id
        self.reads_question = reads_question
        self.vocabulary, self.bos, self.eos = tokenizer.get_vocab(), tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id

    def ids(self, text: str) -> list[int]:
        """Token ids of words of the closed vocabulary."""
        return [self.vocabulary[word] for word in text.split()]

    def __call__(self, asked: list[Asked], num_visual_tokens: int) -> dict[str, torch.Tensor]:
        """Right-padded batch with labels on answers and the eos behind each."""
        ids, labels, questions = [], [], []
        for one in asked:
            question, answer = self.ids(one.question.text), [*self.ids(one.question.answer), self.eos]
            prompt = [self.bos, *[self.image_token_id] * num_visual_tokens, *question]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([IGNORED] * len(prompt) + answer))
            questions.append(question)
        count = len(asked)
        ones = torch.ones(count, dtype=torch.long)
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "view_features": self.view_tokens[[one.image for one in asked]].float(),
            "image_num_views": ones,
            "question_turns": torch.zeros(count, dtype=torch.long),
            "num_visual_tokens": torch.full((count,), num_visual_tokens),
            "image_num_questions": ones,
            "sample_num_images": ones,
        }
        if self.reads_question:
            batch["question_input_ids"] = torch.tensor([token for question in questions for token in question])
            batch["question_lengths"] = torch.tensor([len(question) for question in questions])
        return {name: value.to(self.device) for name, value in batch.items()}
