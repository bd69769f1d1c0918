"""Training-free reducers: which of a view's tokens stay, by published rules. `docs/comparison.md` has the table.

One interface, `reducer(features, num_tokens) -> (V, num_tokens, C)`, and three promises: a view's result depends on
that view alone (and its question), exactly `num_tokens` come out or a `ValueError` says why not, and all patches kept
are the model's own features.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from .tower_features import TowerFeatures, there


@dataclass(frozen=True)
class TokenBudget:
    """Visual tokens of one image: `per_view` from each of its `views`."""

    per_view: int
    views: int

    @property
    def total(self) -> int:
        """What the LLM reads for the image."""
        return self.per_view * self.views


@dataclass(frozen=True)
class TokenReducer:
    """Base of all reducers. Subclasses state what they read and implement `reduce`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    reads_question: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def check(self, num_tokens: int, num_patches: int) -> None:
        """Raise `ValueError` with the numbers when the budget cannot be met exactly."""
        if not isinstance(num_tokens, int) or not 1 <= num_tokens <= num_patches:
            raise ValueError(f"{self.name}: {num_tokens} tokens per view; a view has {num_patches} patches to keep.")

    def __call__(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """(V, num_tokens, C) in front of the projector.

        Raises:
            ValueError: when the budget cannot be met, or the features lack what this reducer reads.
        """
        self.check(num_tokens, features.num_patches)
        for field in self.needs:
            if getattr(features, field) is None:
                raise ValueError(f"{self.name} reads {field}, which these features lack; see `read_tower`.")
        if num_tokens == features.num_patches and self.keeps_all_untouched():
            return features.tokens
        return self.reduce(features, num_tokens)

    def keeps_all_untouched(self) -> bool:
        """Whether all patches kept are the features themselves."""
        return True

    def reduce(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """The rule itself; the budget is checked."""
        raise NotImplementedError


class PatchSelector(TokenReducer):
    """A reducer that keeps patches as they are, in raster order."""

    def select(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """(V, num_tokens) raster positions of the patches to keep, in any order."""
        raise NotImplementedError

    def positions(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """(V, num_tokens) ascending raster positions of what is kept. Raises as a call does."""
        self.check(num_tokens, features.num_patches)
        return self.select(features, num_tokens).sort(1).values

    def reduce(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """Kept patches in raster order."""
        return take(features.tokens, self.positions(features, num_tokens))


@dataclass(frozen=True)
class RandomTokens(PatchSelector):
    """The same random positions for every view: a function of seed, patches and budget only."""

    name = "random"
    summary = "random patches, the same positions in every view"
    source = "baseline"
    seed: int = 0

    def select(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """First `num_tokens` of a seeded permutation, so that a larger budget keeps what a smaller one kept."""
        order = torch.randperm(features.num_patches, generator=torch.Generator().manual_seed(self.seed))
        return order[:num_tokens].to(features.tokens.device).expand(len(features.tokens), -1)


@dataclass(frozen=True)
class AverageTokens(TokenReducer):
    """Mean over the windows of a t x t grid (torch's adaptive average pooling), in front of the projector."""

    name = "average"
    summary = "mean over a t x t grid of windows; t^2 tokens"
    source = "baseline"

    def check(self, num_tokens: int, num_patches: int) -> None:
        """Both counts must be square: 10 would otherwise silently become 9."""
        super().check(num_tokens, num_patches)
        side, target = math.isqrt(num_patches), math.isqrt(num_tokens)
        if side * side != num_patches:
            raise ValueError(f"average needs a square grid of patches; these views have {num_patches}.")
        if target * target != num_tokens:
            nearest = f"{target**2} or {(target + 1) ** 2}" if target < side else f"{target**2}"
            raise ValueError(f"average keeps a square number of tokens per view: {nearest}, not {num_tokens}.")

    def reduce(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """Windows of equal size where t divides the grid's side, overlapping ones otherwise."""
        side, target = math.isqrt(features.num_patches), math.isqrt(num_tokens)
        grid = features.tokens.transpose(1, 2).unflatten(2, (side, side))
        return F.adaptive_avg_pool2d(grid, target).flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class VisionZip(TokenReducer):
    """Class token, patches it attends to, and a few tokens that merge the rest by the likeness of their keys.

    A merged token is its target plus the mean of the patches nearest to it, as published (not the group's mean).
    Published code fails without merged tokens; here none means none.

    Args:
        contextual_tokens: merged tokens; by default the published 10 of every 64, rounded. Given explicitly, the
            published arithmetic holds up to P + 1 tokens, class token included.
    """

    name = "visionzip"
    summary = "class token, most attended patches, merged rest"
    source = "VisionZip, arXiv 2412.04467"
    needs = ("class_token", "class_attention", "keys")
    contextual_tokens: int | None = None

    def keeps_all_untouched(self) -> bool:
        """Not with a split of the caller's, which always has the class token."""
        return self.contextual_tokens is None

    def split(self, num_tokens: int) -> tuple[int, int]:
        """(dominant tokens with the class token, contextual tokens)."""
        contextual = round(num_tokens * 10 / 64) if self.contextual_tokens is None else self.contextual_tokens
        return num_tokens - contextual, contextual

    def check(self, num_tokens: int, num_patches: int) -> None:
        """The class token counts, and there is no token without it."""
        super().check(num_tokens, num_patches + int(self.contextual_tokens is not None))
        dominant, contextual = self.split(num_tokens)
        if dominant < 1 or contextual < 0:
            raise ValueError(
                f"visionzip: {contextual} merged of {num_tokens} tokens leave no place for the class token; "
                f"contextual_tokens must be 0 to {num_tokens - 1}."
            )

    def reduce(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """[class token; dominant patches in raster order; merged tokens in the order of their targets]."""
        dominant, contextual = self.split(num_tokens)
        order = there(features.class_attention).argsort(dim=1, descending=True, stable=True)
        kept, rest = order[:, : dominant - 1].sort(1).values, order[:, dominant - 1 :].sort(1).values
        parts = [there(features.class_token), take(features.tokens, kept)]
        if contextual:
            parts.append(self._merged(take(features.tokens, rest), take(there(features.keys), rest), contextual))
        return torch.cat(parts, 1)

    @staticmethod
    def _merged(tokens: torch.Tensor, keys: torch.Tensor, contextual: int) -> torch.Tensor:
        """(V, R, C) left-over tokens and their keys to (V, contextual, C): evenly spaced targets plus means."""
        keys = keys / keys.norm(dim=-1, keepdim=True)
        count = tokens.shape[1]
        targets = torch.arange(contextual, device=tokens.device) * max(1, count // contextual)
        is_other = torch.ones(count, dtype=torch.bool, device=tokens.device).index_fill(0, targets, False)
        nearest = (keys[:, is_other] @ keys[:, targets].transpose(1, 2)).argmax(-1)
        member = F.one_hot(nearest, contextual).to(tokens.dtype)  # (V, others, contextual)
        sums = member.transpose(1, 2) @ tokens[:, is_other]
        return tokens[:, targets] + sums / member.sum(1).clamp(min=1).unsqueeze(-1)


@dataclass(frozen=True)
class VisPruner(PatchSelector):
    """Half the patches by class attention, the others by dropping near duplicates eight at a time.

    The left-over patches stand in the order of their attention; every other one is compared with those between, and
    the likest are dropped. Published code works only while that list is even and long enough (for 576 patches 8, 10,
    11 and 14 tokens fail, others lose a token silently); here a list of odd length has one more in its first half, and
    a round drops no more than that half. Where the published code works, the result is the same.

    Args:
        important_share: share of the budget chosen by attention, rounded down.
    """

    name = "vispruner"
    summary = "half by class attention, half by diversity"
    source = "VisPruner, arXiv 2412.01818"
    needs = ("class_attention",)
    important_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.important_share <= 1:
            raise ValueError(f"vispruner: important_share={self.important_share} must lie between 0 and 1.")

    def select(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """Important patches, then diverse ones."""
        important = int(num_tokens * self.important_share)
        order = there(features.class_attention).argsort(dim=1, descending=True, stable=True)
        kept, rest = order[:, :important], order[:, important:]
        if important == num_tokens:
            return kept
        directions = F.normalize(features.tokens, dim=-1)
        while (surplus := rest.shape[1] - (num_tokens - important)) > 0:
            even, odd = rest[:, ::2], rest[:, 1::2]
            drop = min(8, surplus, even.shape[1])
            likeness = (take(directions, even) @ take(directions, odd).transpose(1, 2)).max(-1).values
            survivors = likeness.argsort(dim=1, descending=True, stable=True)[:, drop:]
            rest = torch.cat([even.gather(1, survivors), odd], 1)
        return torch.cat([kept, rest], 1)


@dataclass(frozen=True)
class CDPruner(PatchSelector):
    """The most diverse set of patches relevant to the question: greedy maximum of a determinantal point process.

    Patches *least* similar to the question count as relevant, as published: CLIP's patch and text embeddings are
    anti-correlated. Relevance is scaled view by view (published: over all images of a call). Once the set spans all
    there is, where published code repeats a patch, the rest is filled by relevance.
    """

    name = "cdpruner"
    summary = "diverse patches that fit the question"
    source = "CDPruner, arXiv 2506.10967"
    reads_question = True
    needs = ("projected", "question_similarity")

    @staticmethod
    def relevance(question_similarity: torch.Tensor) -> torch.Tensor:
        """(V, P) similarity to (V, P) relevance in about [0, 1]; 1 everywhere where no patch differs from another."""
        relevance = -question_similarity
        low, high = relevance.min(1, keepdim=True).values, relevance.max(1, keepdim=True).values
        spread = high - low
        return torch.where(spread > 0, (relevance - low + 1e-6) / spread.clamp(min=1e-30), torch.ones_like(relevance))

    def select(self, features: TowerFeatures, num_tokens: int) -> torch.Tensor:
        """Greedy choice in float32, one patch per step for all views at once."""
        directions = F.normalize(there(features.projected), dim=-1).float()
        relevance = self.relevance(there(features.question_similarity).float())
        kernel = relevance[:, :, None] * (directions @ directions.transpose(1, 2)) * relevance[:, None, :]
        gain = kernel.diagonal(dim1=1, dim2=2).clone()
        factors = torch.zeros(num_tokens, *gain.shape, device=gain.device)  # rows of an incremental Cholesky factor
        taken = torch.zeros_like(gain, dtype=torch.bool)
        chosen = []
        for step in range(num_tokens):
            best, index = gain.masked_fill(taken, -torch.inf).max(1)
            spent = ~(best > 0)
            fallback = relevance.masked_fill(taken, -torch.inf).argmax(1)
            index = torch.where(spent, fallback, index)[:, None]
            row = kernel.gather(1, index[:, :, None].expand(-1, -1, kernel.shape[2]))[:, 0]
            known = factors[:step].gather(2, index[None].expand(step, -1, -1))
            row = (row - (known * factors[:step]).sum(0)) / best.clamp(min=1e-30).sqrt()[:, None]
            factors[step] = torch.where(spent[:, None], torch.zeros_like(row), row)
            gain = gain - factors[step] ** 2
            taken = taken.scatter(1, index, True)
            chosen.append(index)
        return torch.cat(chosen, 1)


REDUCERS: dict[str, type[TokenReducer]] = {
    kind.name: kind for kind in (RandomTokens, AverageTokens, VisionZip, VisPruner, CDPruner)
}


def build_reducer(name: str, **options: Any) -> TokenReducer:
    """A reducer by name. Raises `ValueError` naming the known ones, or the options it takes."""
    if name not in REDUCERS:
        raise ValueError(f"Unknown reducer {name!r}; reducers are {', '.join(REDUCERS)}.")
    known = [field.name for field in fields(REDUCERS[name])]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; its options are {', '.join(known) or 'none'}.")
    return REDUCERS[name](**options)


def take(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(V, P, C) and (V, k) to (V, k, C)."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
