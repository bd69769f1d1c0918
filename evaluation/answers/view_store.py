"""View tokens of pictures, computed once for all questions and every m: in memory, and in 16 bits on the disk."""

import io
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fusedvlm.evaluation.tasks.task import ImageData
from fusedvlm.processing.image_processing_fusedvlm_loading import load_image
from fusedvlm.trainers.view_cache import tower_key

MEMORY = 2 << 30  # bytes
MOST_VIEWS = 64  # through the tower at once


class ViewStore:
    """View tokens by the digest of a picture.

    Args:
        model, image_processor: of a variant.
        folder: where they are kept in 16 bits from run to run; None keeps them in memory alone. With a folder they go
            through 16 bits also when they were computed just now, so that answers are the same with and without it.
        memory: bytes at most in memory; what was not used for the longest time goes.
    """

    def __init__(self, model: Any, image_processor: Any, folder: Path | None = None, memory: int = MEMORY) -> None:
        self.model, self.image_processor, self.memory = model, image_processor, memory
        self.folder = None if folder is None else Path(folder) / f"{tower_key(model, image_processor)}-16"
        self.kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.size = 0
        self.encoded = 0  # pictures that went through the tower

    @property
    def storage_dtype(self) -> torch.dtype | None:
        """What is kept: 16 bits with a folder, None for what the tower gives."""
        if self.folder is None:
            return None
        return torch.bfloat16 if self.model.dtype == torch.bfloat16 else torch.float16

    def get(self, images: Sequence[ImageData]) -> list[torch.Tensor]:
        """(views, tokens per view, width) of each picture, on the model's device and in its dtype.

        Raises:
            ValueError: naming a picture that cannot be read, or a file of the folder that is damaged.
        """
        wanted = {image.digest: image for image in images}
        found = {digest: self._known(digest) for digest in wanted}
        missing = [image for digest, image in wanted.items() if found[digest] is None]
        found.update(self._encode(missing))
        result = []
        for image in images:
            tokens = found[image.digest]
            assert tokens is not None
            result.append(tokens.to(self.model.device, self.model.dtype))
        return result

    def _known(self, digest: str) -> torch.Tensor | None:
        if digest in self.kept:
            self.kept.move_to_end(digest)
            return self.kept[digest]
        path = self._path(digest)
        if path is None or not path.is_file():
            return None
        try:
            return self._keep(digest, load_file(path)["view_features"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it and start again.") from error

    def _path(self, digest: str) -> Path | None:
        return None if self.folder is None else self.folder / digest[:2] / f"{digest}.safetensors"

    def _keep(self, digest: str, tokens: torch.Tensor) -> torch.Tensor:
        self.kept[digest] = tokens
        self.size += tokens.nbytes
        while self.size > self.memory and len(self.kept) > 1:
            self.size -= self.kept.popitem(last=False)[1].nbytes
        return tokens

    @torch.inference_mode()
    def _encode(self, images: Sequence[ImageData]) -> dict[str, torch.Tensor]:
        if not images:
            return {}
        pictures = [read_picture(image) for image in images]
        inputs = self.image_processor(pictures, return_tensors="pt")
        pixels, counts = inputs["pixel_values"], inputs["image_num_views"].tolist()
        parts = [self.model.model.get_view_features(part.to(self.model.device))[0] for part in pixels.split(MOST_VIEWS)]
        self.encoded += len(images)
        found = {}
        for image, tokens in zip(images, torch.cat(parts).split(counts), strict=True):
            stored = tokens.cpu() if self.storage_dtype is None else tokens.cpu().to(self.storage_dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(f"{image.name}: its view tokens are not finite numbers in {stored.dtype}.")
            found[image.digest] = self._keep(image.digest, stored.clone())
            self._save(image.digest, found[image.digest])
        return found

    def _save(self, digest: str, tokens: torch.Tensor) -> None:
        path = self._path(digest)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"view_features": tokens.contiguous()}, partial)
        partial.replace(path)


def read_picture(image: ImageData) -> Image.Image:
    """A picture, upright and RGB. Raises `ValueError` naming it when it is damaged."""
    try:
        return load_image(io.BytesIO(image.read()))
    except (ValueError, OSError) as error:
        raise ValueError(f"{image.name}: {error}"[:300]) from error
