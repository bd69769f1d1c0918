"""FusedVLM in lmms-eval: its requests, our runner, every m in one pass.

    lmms-eval --model fusedvlm --model_args pretrained=DIR,num_visual_tokens=8,counts=1:8:64,journal=out --tasks pope

The first run answers at every m of `counts` and keeps the answers in `journal`; runs at the other m find them there.
Imported by lmms-eval alone, in its own environment (entry point `lmms_eval.models`, see pyproject.toml).
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from fusedvlm.evaluation.answers.answer_run import AnswerRun
from fusedvlm.evaluation.answers.model_sources import find_variants, share_counts
from fusedvlm.evaluation.answers.variant_answers import VariantAnswers
from fusedvlm.evaluation.tasks.record_files import ImageStore
from fusedvlm.evaluation.tasks.task import Judged, Metric, Record
from fusedvlm.serving.chat import VisualChat

CAP = 32  # tokens of an answer where a task names none


class RequestTask:
    """Requests of one task of lmms-eval, with the same cap."""

    def __init__(self, name: str, cap: int, records: Sequence[Record]) -> None:
        self.name, self.max_new_tokens, self._records = name, cap, records

    def records(self) -> Sequence[Record]:
        """Every request."""
        return self._records

    def prompt(self, record: Record) -> str:
        """As the task made it."""
        return record.question

    question = prompt

    def parse(self, record: Record, answer: str) -> str | None:
        """The task does that."""
        return answer

    def score(self, record: Record, parsed: str | None) -> float:
        """The task does that."""
        return 0.0

    def metrics(self, judged: Sequence[Judged]) -> list[Metric]:
        """The task does that."""
        return []

    def facts(self) -> dict[str, Any]:
        """The task has them."""
        return {}


class FusedVLM(lmms):
    """A variant or a family.

    Args:
        pretrained: variant folder, family folder or Hub repository.
        num_visual_tokens: m of this run; the variant's own by default.
        counts: every m that other runs will ask for, with colons between.
        journal: folder of the answers; `runs/lmms_eval` by default.
        view_cache: folder that keeps view tokens.
        batch_size, device: of lmms-eval's command line.
        dtype, revision: see `VisualChat`.

    Raises:
        ValueError: for an argument that is unknown, and an m that the variant does not give.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_visual_tokens: int | None = None,
        counts: str | int | None = None,
        journal: str = "runs/lmms_eval",
        view_cache: str | None = None,
        batch_size: int | str = 32,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise ValueError(f"fusedvlm knows no argument {', '.join(unknown)}; see fusedvlm's docs/evaluation.md.")
        variants = find_variants(pretrained, revision)
        own = int(num_visual_tokens) if num_visual_tokens else variants[-1].num_visual_tokens
        every = sorted({own, *(int(part) for part in str(counts or own).split(":"))})
        variant, self.counts = next((v, c) for v, c in share_counts(variants, every) if own in c)
        self.m, self.commit = own, variant.commit
        self.folder = Path(journal)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            device = str(self.accelerator.device)
            self.folder = self.folder / f"process{self._rank}"
        chat = VisualChat(variant.source, revision=revision, device=device, dtype=dtype)
        self.answerer = VariantAnswers(chat, None if view_cache is None else Path(view_cache), max(1, int(batch_size)))
        self.answerer.check_counts(self.counts)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests."""
        store = ImageStore()
        groups: dict[tuple[str, int], list[tuple[int, Record, Any]]] = {}
        for number, request in enumerate(requests):
            _, doc_to_messages, settings, doc_id, task, split = request.args
            if settings.get("do_sample") and float(settings.get("temperature") or 0) > 0:
                raise ValueError(f"{task} asks for sampled answers; fusedvlm answers greedily.")
            content = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
            record = record_of(content, f"{split}-{doc_id}", store)
            cap = int(settings.get("max_new_tokens") or CAP)
            groups.setdefault((task, cap), []).append((number, record, settings.get("until")))
        answers: list[str] = [""] * len(requests)
        for (task, cap), group in groups.items():
            run = AnswerRun(RequestTask(task, cap, [r for _, r, _ in group]), self.commit, self.counts, self.folder)
            run.ask(self.answerer)
            found = run.answers(self.answerer.settings, self.counts)
            for number, record, until in group:
                answers[number] = cut(found[record.index][self.m], until)
        if answers and not any(answer.strip() for answer in answers):
            raise RuntimeError(
                f"All {len(answers)} answers at m={self.m} are empty: something is wrong with the weights."
            )
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Refused: only generated answers are scored."""
        raise NotImplementedError("fusedvlm generates answers; take the generative form of the task.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refused."""
        raise NotImplementedError("fusedvlm answers one question at a time here.")


def record_of(messages: list[dict[str, Any]], index: str, store: ImageStore) -> Record:
    """A request's chat as one question: its pictures first, then its text.

    Raises:
        ValueError: for a chat of several turns.
    """
    users = [message for message in messages if message["role"] == "user"]
    if len(users) != 1 or any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"Request {index} is a chat of {len(messages)} messages; one question was expected.")
    texts, images = [], []
    for part in [part for message in messages for part in message["content"]]:
        if part["type"] == "text":
            texts.append(part["text"])
        elif part["type"] == "image":
            buffer = io.BytesIO()
            part["image"].convert("RGB").save(buffer, "PNG")
            images.append(store.add(buffer.getvalue(), f"picture of {index}"))
        else:
            raise ValueError(
                f"Request {index} has a part of type {part['type']!r}; only text and pictures can be read."
            )
    return Record(index, "\n".join(texts), (), tuple(images))


def cut(answer: str, until: str | Sequence[str] | None) -> str:
    """The answer up to the first text that ends it."""
    for end in [until] if isinstance(until, str) else until or ():
        answer = answer.partition(end)[0] if end.strip() else answer
    return answer
