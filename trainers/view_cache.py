"""View tokens of images on disk, for training with a frozen vision tower: CLIP and merge run once per image.

    <folder>/<tower key>/<first two digits>/<image digest>.safetensors    view_features (views, tokens per view, width)

The tower key is a digest of everything that turns pixels into view tokens (weights, dtype, settings, code, library
versions), the image digest one of the image's own bytes. Whatever changes gets another name, so nothing stale is found.
"""

import hashlib
import importlib.metadata
import inspect
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fusedvlm.console import progress
from fusedvlm.data.mixing.grouped import source_names
from fusedvlm.data.records import plain_image
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import VISION_PREFIXES
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image

LIBRARIES = ("torch", "torchvision", "transformers", "pillow")


def tower_key(model: Any, image_processor: Any) -> str:
    """Digest of everything that turns an image's bytes into its view tokens.

    Args:
        model: a FusedVLM model, both stages.
        image_processor: `FusedVLMImageProcessor`, either backend.
    """
    digest, connector = hashlib.sha256(), model.model.connector
    for part in (model.model.vision_tower, *connector.view_parts()):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = {
        "vision": model.config.vision_config.to_dict(),
        **connector.view_settings(),
        "image_processor": image_processor.to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    code = Path(inspect.getfile(type(image_processor))).parent
    classes = [kind for kind in type(connector).__mro__ if hasattr(kind, "encode_views")]
    modeling = sorted({Path(inspect.getfile(kind)) for kind in (*classes, *map(type, connector.view_parts()))})
    for path in [*sorted(code.glob("image_processing*.py")), *modeling]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def image_digest(image: Any) -> str:
    """Digest of an image's content: a file's bytes, else the pixels.

    Args:
        image: path, bytes, `{"bytes": ...}` or `{"path": ...}` as `datasets` has them, base64 string, or PIL image.

    Raises:
        ValueError: for a URL, whose content may change, and for what is not an image.
    """
    image = plain_image(image)
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, (str, Path)):
        if str(image).startswith(("http://", "https://")):
            raise ValueError(f"{image}: what a URL shows may change, so it cannot be cached; download it first.")
        if os.path.isfile(image):
            return hashlib.sha256(Path(image).read_bytes()).hexdigest()
    picture = load_image(image)
    return hashlib.sha256(f"{picture.size} ".encode() + picture.tobytes()).hexdigest()


class ViewCache:
    """View tokens by image.

    Args:
        folder: created when missing; may be shared by any number of towers and runs.
        model: a FusedVLM model whose tower and merge will not change; moved nowhere.
        image_processor: the processor's image processor.
    """

    def __init__(self, folder: str | Path, model: Any, image_processor: Any) -> None:
        self.model, self.image_processor = model, image_processor
        self.folder = Path(folder) / tower_key(model, image_processor)

    def path(self, image: Any) -> Path:
        """File of an image's view tokens, whether it is there or not."""
        digest = image_digest(image)
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def has(self, image: Any) -> bool:
        """Whether an image's view tokens are there."""
        try:
            return self.path(image).is_file()
        except ValueError:
            return False

    def load(self, image: Any) -> torch.Tensor:
        """(views, tokens per view, width) of an image.

        Raises:
            ValueError: naming the image or the file, when it is not cached or its file is damaged.
        """
        path = self.path(image)
        try:
            return load_file(path)["view_features"]
        except FileNotFoundError:
            raise ValueError(
                f"No cached view tokens for {_shown(image)}: it is new or has changed; start again."
            ) from None
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it and start again.") from error

    def fill(self, samples: Any, batch_size: int = 8, rank: int = 0, ranks: int = 1) -> int:
        """Compute what is missing of the samples' images; a killed run goes on where it stopped.

        Args:
            samples: conversation samples, with a length.
            batch_size: images encoded together.
            rank, ranks: this process does every `ranks`-th image.

        Returns:
            Number of images encoded here.
        """
        missing: dict[Path, object] = {}
        for index in progress(range(len(samples)), description="looking for cached view tokens"):
            for image in samples[index].get("images") or []:
                try:
                    path = self.path(image)
                except ValueError:  # met again, and told, when its row is asked for
                    continue
                if int(path.stem, 16) % ranks == rank and path not in missing and not path.exists():
                    missing[path] = image
        todo = list(missing.items())
        for start in progress(range(0, len(todo), batch_size), description="caching view tokens"):
            readable = [
                (path, image) for path, image in todo[start : start + batch_size] if why_unreadable(image) is None
            ]
            if readable:
                self._encode(readable)
        return len(todo)

    @torch.no_grad()
    def _encode(self, batch: list[tuple[Path, object]]) -> None:
        pictures = self.image_processor.fetch_images([plain_image(image) for _, image in batch])
        inputs = self.image_processor(pictures, return_tensors="pt")
        tower = self.model.model
        features, _ = tower.get_view_features(inputs["pixel_values"].to(tower.device))
        for (path, _), views in zip(batch, features.split(inputs["image_num_views"].tolist()), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file({"view_features": views.contiguous().cpu()}, partial)
            partial.replace(path)


class CachedViews(torch.utils.data.Dataset):
    """Conversation samples with `view_features` in place of `images`.

    Args:
        samples: as for `ViewCache.fill`.
        cache: filled for them.
        rank, ranks: as for `ViewCache.fill`.
    """

    def __init__(self, samples: Any, cache: ViewCache, rank: int = 0, ranks: int = 1) -> None:
        self.samples, self.cache, self.rank, self.ranks = samples, cache, rank, ranks

    def start_epoch(self, epoch: int) -> None:
        """Pass a new epoch on to a mixture, which may show other images in it: they are encoded first."""
        if hasattr(self.samples, "start_epoch"):
            self.samples.start_epoch(epoch)
            self.fill()

    def fill(self) -> None:
        """Encode on all ranks what is missing."""
        self.cache.fill(self.samples, rank=self.rank, ranks=self.ranks)
        if self.ranks > 1:
            torch.distributed.barrier()

    def source_names(self) -> np.ndarray:
        """The samples' sources, see `fusedvlm.data.mixing.grouped.source_names`."""
        return source_names(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        rest = {name: value for name, value in sample.items() if name != "images"}
        features = []
        for image in sample.get("images") or []:
            problem = why_unreadable(image) if not self.cache.has(image) else None
            if problem is not None:  # the collator leaves such a row out, or refuses it by its id
                return {**rest, "view_features": [], "problem": problem}
            features.append(self.cache.load(image))
        return {**rest, "view_features": features}

    def __getstate__(self) -> dict:
        """Data-loader workers need no copy of the model."""
        cache = ViewCache.__new__(ViewCache)
        cache.folder = self.cache.folder
        return {**self.__dict__, "cache": cache}


def cached_views(
    samples: Any,
    folder: str | Path,
    model: Any,
    image_processor: Any,
    trainable_names: Iterable[str],
    rank: int = 0,
    ranks: int = 1,
) -> CachedViews:
    """Fill the cache on all ranks and read the samples through it.

    Args:
        samples, folder, model, image_processor, rank, ranks: see `ViewCache`.
        trainable_names: parameters that learn.

    Raises:
        ValueError: when the vision tower or the merge learns, or the samples have no length.
    """
    learns = [name for name in trainable_names if any(part in name for part in VISION_PREFIXES)]
    if learns:
        raise ValueError(
            f"view_cache needs a frozen vision tower and merge, but {len(learns)} of their parameters learn (first "
            f"{learns[0]}); set freeze to {' '.join(VISION_PREFIXES)}, or leave view_cache out."
        )
    connector = model.model.connector
    if not connector.cacheable_views:
        raise ValueError(f"The {connector.name} connector's view tokens cannot be cached; leave view_cache out.")
    if not hasattr(samples, "__len__"):
        raise ValueError("view_cache needs a dataset with a length, not a stream: its images are encoded beforehand.")
    cache = ViewCache(folder, model, image_processor)
    cached = CachedViews(samples, cache, rank, ranks)
    cached.fill()
    return cached


def why_unreadable(image: Any) -> str | None:
    """What keeps an image from being opened, or None."""
    try:
        load_image(plain_image(image))
    except ValueError as error:
        return str(error)
    return None


def _shown(image: Any) -> str:
    return str(image)[:200] if isinstance(image, (str, Path)) else f"a {type(image).__name__}"
