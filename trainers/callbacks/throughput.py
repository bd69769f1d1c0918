"""Images, tokens and model FLOPs per second while training, and the share of the hardware's peak they make (MFU)."""

import time
from functools import cached_property
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fusedvlm.costs.counts import ImageWork, Shapes, count_training_flops, read_shapes

# Dense bf16 (V100: fp16) peak of one device in TFLOP/s, as its maker states it, by what its name contains; the first
# match counts.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A10G", 70.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("RTX 4090", 165.2),
    ("V100", 125.0),
    ("MI300X", 1307.0),
)


def device_peak_tflops(name: str) -> float | None:
    """Dense peak in TFLOP/s of an accelerator by its name, None when it is not known."""
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)


class Throughput(TrainerCallback):
    """Counts work between two logs; time for evaluation and saving is left out.

    Model FLOPs are those of the definition: forward and backward of what learns, the frozen LLM's backward to its
    inputs only, nothing for recomputation or for a distillation teacher.

    Args:
        model: the model that is trained.
        trainable_names: parameters that learn.
        peak_tflops: of one device; looked up by its name when not given.
    """

    def __init__(self, model: Any, trainable_names: list[str], peak_tflops: float | None = None) -> None:
        self.config = model.config
        self.vision_learns = any(".vision_tower." in name for name in trainable_names)
        answer_tower = getattr(model, "answer_tower", None)
        linear = [] if answer_tower is None else [m for m in answer_tower.modules() if isinstance(m, torch.nn.Linear)]
        self.answer_linear = sum(layer.weight.numel() for layer in linear)
        if peak_tflops is None and torch.cuda.is_available():
            peak_tflops = device_peak_tflops(torch.cuda.get_device_name())
        self.peak_tflops = peak_tflops
        self.total_flops = 0.0  # of this process since it began, resumed or not
        self._reset()

    @cached_property
    def shapes(self) -> Shapes:
        """Sizes that FLOPs follow from."""
        return read_shapes(self.config)

    def _reset(self) -> None:
        self.images = self.tokens = self.flops = self.paused = 0.0
        self.began = self.mark = time.perf_counter()

    def count(self, inputs: dict, answers: torch.Tensor | None = None) -> None:
        """Add one batch.

        Args:
            inputs: the batch as the model gets it.
            answers: (G, La) attention mask of stage 1's answers; without it the LLM reads `attention_mask` (B, L).
        """
        images = image_work(inputs)
        prompts = _integers(inputs["attention_mask"].sum(-1)) if answers is None else []
        answer_tokens = 0 if answers is None else int(answers.sum())
        self.images += len(images)
        self.tokens += sum(self._positions(image) for image in images) + sum(prompts) + answer_tokens
        flops = 6 * self.answer_linear * answer_tokens + count_training_flops(
            self.shapes,
            images,
            prompt_lengths=prompts,
            num_labels=int((inputs["labels"] != -100).sum()) if prompts else 0,
            vision_learns=self.vision_learns,
            views_are_cached="view_features" in inputs,
        )
        self.flops += flops
        self.total_flops += flops

    def _positions(self, image: ImageWork) -> int:
        """View tokens, question tokens that are read and visual tokens of one image."""
        questions = sum(image.question_lengths) if self.config.fuse_question else 0
        copies = image.num_views if self.config.connector_class.per_view else 1
        return image.num_views * self.config.tokens_per_view + questions + copies * sum(image.counts)

    def rates(self) -> dict[str, float]:
        """Rates over all ranks since the last call, and a new start."""
        seconds = time.perf_counter() - self.began - self.paused
        counted = torch.tensor([self.images, self.tokens, self.flops], dtype=torch.float64)
        ranks = 1
        if torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            parts: list = [None] * ranks
            torch.distributed.all_gather_object(parts, counted)
            counted = torch.stack(parts).sum(0)
        images, tokens, flops = (counted / max(seconds, 1e-9)).tolist()
        self._reset()
        rates = {"images_per_second": images, "tokens_per_second": tokens, "tflops_per_second": flops / 1e12}
        if self.peak_tflops is not None:
            rates["mfu"] = flops / 1e12 / (self.peak_tflops * ranks)
        return {name: float(f"{value:.4g}") for name, value in rates.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._reset()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember when the step was over."""
        self.mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What passed since the step is not training."""
        now = time.perf_counter()
        self.paused += now - max(self.mark, self.began)
        self.mark = now

    on_evaluate = on_save


def _integers(values: torch.Tensor | None) -> list[int]:
    return [] if values is None else values.flatten().tolist()


def image_work(inputs: dict) -> list[ImageWork]:
    """What the connector does for each image of a batch, as the model gets it."""
    counts = _integers(inputs.get("num_visual_tokens"))
    questions = _integers(inputs.get("question_lengths")) or [0] * len(counts)
    views, images, segment = _integers(inputs.get("image_num_views")), [], 0
    for num_views, asked in zip(views, _integers(inputs.get("image_num_questions")), strict=True):
        stop = segment + asked
        images.append(ImageWork(num_views, questions[segment:stop], counts[segment:stop]))
        segment = stop
    return images
