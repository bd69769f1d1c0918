"""Parameter names of the published checkpoints and ours, in both directions (docs/reference.md, "Tensors")."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

# Longest first: the first pair whose prefix matches decides. The same table read right to left gives the way back.
VISION = [
    ("token_LF", "model.merger.newline"),
    ("vision_embed_merge.", "model.merger.conv."),
    # Their last norm has a name of its own because it is applied to every token; it sits where CLIP keeps its pooled
    # norm, so it takes that place here.
    ("pos_layrnorm.", "model.vision_tower.post_layernorm."),
    ("", "model.vision_tower."),
]
GENERATION = [
    *((f"imgque_backbone.clip_model.vision_model.{theirs}", ours) for theirs, ours in VISION),
    ("imgque_backbone.imgque_model.", "model.fuser."),
    ("fusion_backbone.imgque_proj.", "model.projector."),
    ("llm_backbone.model.", "model.language_model."),
    ("llm_backbone.lm_head.", "lm_head."),
]
CONTRASTIVE = [
    *((f"clip_model.vision_model.{theirs}", ours) for theirs, ours in VISION),
    ("imgque_model.", "model.fuser."),
    ("clip_model.text_model.", "answer_tower."),
    ("clip_model.text_projection.", "answer_projection."),
    ("imgque_projection.", "image_projection."),
    ("logit_scale", "logit_scale"),
]
# What a published file may hold and this package has no use for.
DROPPED = [
    (
        re.compile(r"(^|\.)clip_model\.vision_model\.post_layernorm\."),
        "CLIP's norm of the pooled token, which the published forward pass never reads",
    ),
    (re.compile(r"\.position_ids$"), "a constant"),
    (re.compile(r"\.rotary_emb\.inv_freq$"), "computed from the config"),
]
OLD_VISION_LEVEL = "clip_model.vision_model.vision_model."


@dataclass
class KeyReport:
    """What happened to every key of a checkpoint.

    `used` kept their names, `renamed` are (old, new) pairs, `dropped` are (name, reason) pairs.
    """

    used: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)


def published_stage(names: Iterable[str]) -> str:
    """ "generation" for a full published model, "contrastive" for a stage-1 one.

    Raises:
        ValueError: when the names belong to neither.
    """
    names = list(names)
    if any(name.startswith("imgque_backbone.") for name in names):
        return "generation"
    if any(name.startswith("imgque_model.") for name in names):
        return "contrastive"
    shown = ", ".join(sorted(names)[:5])
    raise ValueError(
        "This is not a published checkpoint: no key starts with imgque_backbone. (full model) or imgque_model. "
        f"(stage 1). It starts with: {shown or 'nothing'}."
    )


def to_ours(names: Iterable[str], stage: str) -> KeyReport:
    """Names of a published checkpoint in this package.

    Raises:
        ValueError: naming every key that the published model does not have.
    """
    return _rename(names, GENERATION if stage == "generation" else CONTRASTIVE)


def to_published(names: Iterable[str], stage: str) -> KeyReport:
    """Names of a state dict of this package in a published checkpoint. Raises `ValueError` naming unknown keys."""
    table = GENERATION if stage == "generation" else CONTRASTIVE
    return _rename(names, [(ours, theirs) for theirs, ours in table])


def _rename(names: Iterable[str], table: list[tuple[str, str]]) -> KeyReport:
    report, unknown = KeyReport(), []
    for name in sorted(names):
        # Older checkpoints have one level more above the vision tower.
        flat = name.replace(OLD_VISION_LEVEL, OLD_VISION_LEVEL.removesuffix("vision_model."))
        reason = next((text for pattern, text in DROPPED if pattern.search(flat)), None)
        pair = next(((old, new) for old, new in table if flat.startswith(old)), None)
        if reason is not None:
            report.dropped.append((name, reason))
        elif pair is None:
            unknown.append(name)
        elif (renamed := pair[1] + flat[len(pair[0]) :]) == name:
            report.used.append(name)
        else:
            report.renamed.append((name, renamed))
    if unknown:
        raise ValueError(f"{len(unknown)} keys have no place in the model: {', '.join(unknown)}.")
    return report
