"""Questions in CLIP's joint space, for reducers that read them: how much each patch looks like the question."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from .tower_features import TowerFeatures


class ClipQuestions:
    """The text half of the CLIP whose vision half is the model's tower.

    A question longer than the text tower is cut into rows, and every row counts the same; a row that does not hold the
    end token is pooled as the published code does it, at the place of its largest id (for the second row of any long
    question that is its first token, so that row says nothing about the text; stated in `docs/comparison.md`).

    Args:
        clip: `CLIPModel`, or its folder or Hub repository (for LLaVA-1.5 openai/clip-vit-large-patch14-336).
        tokenizer: its tokenizer; by default the one in the same place.

    Raises:
        ValueError: when a model is given without its tokenizer.
    """

    def __init__(self, clip: CLIPModel | str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if not isinstance(clip, CLIPModel):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(clip)
            clip = CLIPModel.from_pretrained(clip)
        if tokenizer is None:
            raise ValueError("A CLIPModel without its tokenizer cannot read questions; pass tokenizer= too.")
        self.clip: Any = clip.eval()
        self.tokenizer = tokenizer

    def rows(self, question: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask of a question, (rows, at most 77) each; the last row is padded with id 0 behind a zero mask."""
        if not question.strip():
            raise ValueError("An empty question says nothing about which patches matter.")
        ids = torch.tensor(self.tokenizer(question, truncation=False, verbose=False)["input_ids"])
        longest = self.clip.config.text_config.max_position_embeddings
        if len(ids) <= longest:
            return ids[None], torch.ones_like(ids)[None]
        pad = -len(ids) % longest
        mask = F.pad(torch.ones_like(ids), (0, pad))
        return F.pad(ids, (0, pad)).unflatten(0, (-1, longest)), mask.unflatten(0, (-1, longest))

    @torch.no_grad()
    def embed(self, question: str) -> torch.Tensor:
        """(rows, E) text embeddings of one question. Raises `ValueError` for an empty one."""
        ids, mask = (part.to(self.clip.device) for part in self.rows(question))
        states = self.clip.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return self.clip.text_projection(states)

    @torch.no_grad()
    def similarity(self, features: TowerFeatures, questions: Sequence[str]) -> torch.Tensor:
        """(V, P) mean cosine of each patch with the rows of its view's question.

        Args:
            features: of V views.
            questions: V of them.

        Raises:
            ValueError: for another number of questions, or a tower of another width.
        """
        views, width = len(features.tokens), features.tokens.shape[-1]
        own_width = self.clip.config.vision_config.hidden_size
        if len(questions) != views:
            raise ValueError(f"{len(questions)} questions for {views} views; give one per view.")
        if width != own_width:
            raise ValueError(
                f"This CLIP's vision tower is {own_width} wide, the model's is {width}; use the CLIP that the model's "
                "tower came from."
            )
        tokens = features.tokens.to(self.clip.device, self.clip.dtype)
        patches = self.clip.visual_projection(self.clip.vision_model.post_layernorm(tokens)).float()
        patches = patches / patches.norm(dim=-1, keepdim=True)
        embedded = {question: self.embed(question).float() for question in dict.fromkeys(questions)}
        rows = [text / text.norm(dim=-1, keepdim=True) for text in (embedded[question] for question in questions)]
        cosines = [view @ text.T for view, text in zip(patches, rows, strict=True)]
        return torch.stack([cosine.mean(1) for cosine in cosines]).to(features.tokens.device)
