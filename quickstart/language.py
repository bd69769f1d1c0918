"""A tiny language model that answers from text, to be kept frozen: the quickstart's stand-in for Llama-2.

Its documents describe an image of the world and are followed by questions and answers; later the visual tokens take the
description's place. Run as a module it trains in a process of its own, reporting its step on standard output.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from . import world

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
OTHER_WORDS = (
    "scene",
    "panel",
    ":",
    ".",
    "colour",
    "shape",
    "letter",
    "at",
    "list",
    "all",
    "objects",
    "read",
    "the",
    "text",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ message.content }}{{ eos_token }}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
MAX_LENGTH = 320
ONE_WORD_WEIGHT = 3.0  # one-word answers are few tokens among many; without this they are learned last


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Closed word-level vocabulary, shared by the language model, the fusion module and the answer tower."""
    letters = [letter for letter in world.LETTERS if letter not in OTHER_WORDS]
    words = [*SPECIAL, *OTHER_WORDS, *world.COLOURS, *world.SHAPES, *world.CELLS, *letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # Question marks are dropped: a question then ends in its cell, where a two-layer model can look the answer up.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, width: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """An untrained decoder. Its initial scale is far above Llama's 0.02, at which such widths do not start to learn."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=int(width * 2.625),
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return model


class Documents:
    """Batches of documents with labels and weights on answers only. Drawn afresh at every step; nothing is stored."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = tokenizer.get_vocab()
        self.generator = np.random.default_rng([seed, 1])

    def _sample(self, short: bool) -> world.Sample:
        generator = self.generator
        is_scene = generator.random() < world.SCENE_SHARE
        content: world.Content = world._draw_scene(generator) if is_scene else world._draw_panel(generator)
        if short:
            kept = sorted(generator.choice(len(content), size=min(len(content), 4), replace=False))
            content = {cell: content[cell] for cell in [list(content)[index] for index in kept]}
        return world.Sample(None, is_scene, content)

    def _ids(self, text: str) -> list[int]:
        return [self.vocabulary[word] for word in text.split()]

    def document(self, short: bool, num_questions: int = 8) -> tuple[list[int], list[float]]:
        """Token ids and per-token loss weights (0 off answers) of one document."""
        sample = self._sample(short)
        ids = [self.tokenizer.bos_token_id, *self._ids(sample.description())]
        weights = [0.0] * len(ids)
        dense = bool(self.generator.random() < 0.5)
        # A dense question may come first, last or between others. Behind its answer a one-word answer must end too.
        questions = sample.draw_questions(self.generator, num_questions, dense=False)
        if dense:
            place = int(self.generator.integers(0, len(questions) + 1))
            questions = [*questions[:place], sample.dense_question(), *questions[place:]]
        for question in questions:
            asked = self._ids(question.text)
            answer = [*self._ids(question.answer), self.tokenizer.eos_token_id]
            weight = 1.0 if question.task in ("list", "read") else ONE_WORD_WEIGHT
            ids += asked + answer
            weights += [0.0] * len(asked) + [weight] * len(answer)
        return ids[:MAX_LENGTH], weights[:MAX_LENGTH]

    def batch(self, size: int, short_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(size, L) ids and weights, padded on the right."""
        rows = [self.document(short=bool(self.generator.random() < short_share)) for _ in range(size)]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([torch.tensor(ids) for ids, _ in rows], batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return ids, pad([torch.tensor(weights) for _, weights in rows], batch_first=True)


def pretrain(
    folder: Path,
    steps: int,
    seed: int,
    batch_size: int = 32,
    width: int = 64,
    layers: int = 2,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train the language model on text and save it with its tokenizer as an ordinary model folder.

    Args:
        folder: where to save.
        steps: optimizer steps; 700 make it answer from documents reliably.
        seed: of weights and documents.
        on_step: called with the step and its loss.

    Returns:
        Mean loss of the last 20 steps.
    """
    set_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, width, layers)
    documents = Documents(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(steps):
        rate = min(1.0, (step + 1) / 40, (steps - step) / (0.4 * steps))
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * rate
        ids, weights = documents.batch(batch_size, short_share=0.7 if step < 0.4 * steps else 0.0)
        logits = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
        losses_per_token = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        target_weights = weights[:, 1:].flatten()
        loss = (losses_per_token * target_weights).sum() / target_weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        on_step(step + 1, losses[-1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(np.mean(losses[-20:]))


def main(argv: list[str] | None = None) -> None:
    """Train in a process of its own; prints `step loss` lines."""
    parser = argparse.ArgumentParser(description="Pretrain the quickstart's language model on text.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)

    def report(step: int, loss: float) -> None:
        sys.stdout.write(f"{step} {loss:.4f}\n")
        sys.stdout.flush()

    pretrain(options.folder, options.steps, options.seed, width=options.width, layers=options.layers, on_step=report)


if __name__ == "__main__":
    main()
