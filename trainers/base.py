"""What both trainers share: who learns, metrics between logs, losses that must stay finite."""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import seed_worker
from transformers.utils import logging

from fusedvlm.console import say
from fusedvlm.data.mixing.grouped import GroupedBatches
from fusedvlm.files import read_json, write_json
from fusedvlm.lazy import late_function
from fusedvlm.trainers.callbacks.invariants import WeightWatch
from fusedvlm.trainers.callbacks.skipped_rows import SkippedRows
from fusedvlm.trainers.callbacks.throughput import Throughput
from fusedvlm.trainers.callbacks.until_loss import UntilLoss

from .arguments import FusedVLMArguments
from .checkpoints import AtomicCheckpoints, outliving_signals
from .collators import IGNORED, ConversationCollator, decode_ids
from .lora import add_lora
from .parameter_groups import describe_groups, group_parameters, select_trainable
from .view_cache import cached_views

if TYPE_CHECKING:
    from fusedvlm.processing import FusedVLMProcessor

logger = logging.get_logger(__name__)
# The card is written by a layer above.
write_trainer_card = late_function("fusedvlm.hub_cards.push_to_hub", "write_trainer_card")


def check_parts(trainer: type["FusedVLMTrainer"], model: Any, args: Any, processing_class: Any) -> None:
    """Refuse a model, arguments or a processor of another kind.

    Raises:
        ValueError: naming what was given and what belongs there.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if trainer.model_class not in [kind.__name__ for kind in type(inner).__mro__]:
        raise ValueError(f"{trainer.__name__} trains a {trainer.model_class}, not a {type(inner).__name__}.")
    if not isinstance(args, trainer.arguments_class):
        raise ValueError(
            f"{trainer.__name__} takes args={trainer.arguments_class.__name__}, not {type(args).__name__}."
        )
    if processing_class is not None and not hasattr(processing_class, "query_tokenizer"):
        raise ValueError(
            f"processing_class must be the FusedVLMProcessor, which has the tokenizers and the image processor; got "
            f"{type(processing_class).__name__}."
        )


class FusedVLMTrainer(AtomicCheckpoints, Trainer):
    """`transformers.Trainer` over conversations. Subclasses name their stage.

    Logged beside the loss: tokens, images and model FLOPs per second over all ranks, and MFU where the device's peak is
    known.

    Args:
        processing_class: the `FusedVLMProcessor`; saved with every checkpoint.
        data_collator: by default a `ConversationCollator` for the stage.
        kwargs: as in `transformers.Trainer`.

    Raises:
        ValueError: when no processor is given and no collator either, one process sees several GPUs, or the model, the
            arguments or the processor are of another kind than the stage takes.
    """

    stage: str
    model_class: str  # by name: remote code has a class of its own
    arguments_class: type[FusedVLMArguments] = FusedVLMArguments
    args: FusedVLMArguments
    model: Any
    processing_class: Any
    # {mode: {metric: [sum of weighted values, sum of weights]}}
    _metrics: dict[str, dict[str, list]]
    _tag_names = ["fusedvlm"]

    def __init__(
        self,
        model: Any,
        args: FusedVLMArguments,
        processing_class: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        check_parts(type(self), model, args, processing_class)
        for dataset in (kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            read_streams_on_every_rank(args, dataset)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("Give processing_class (the FusedVLMProcessor) or a data_collator.")
            data_collator = self.default_collator(processing_class, args, model)
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs, and packed image inputs cannot be split among them by row: start "
                "one process per GPU (accelerate launch, torchrun), or show one (CUDA_VISIBLE_DEVICES=0)."
            )
        if args.lora:
            model = add_lora(
                model,
                args.lora,
                rank=args.lora_rank,
                alpha=args.lora_alpha,
                dropout=args.lora_dropout,
                train_also=args.lora_train_also,
            )
        self.trainable_names = select_trainable(model, self.stage, tuple(args.freeze))
        super().__init__(
            model=model, args=args, processing_class=processing_class, data_collator=data_collator, **kwargs
        )
        if args.view_cache:
            self.train_dataset = self._read_through_cache(self.train_dataset)
            self.eval_dataset = self._read_through_cache(self.eval_dataset)
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.skipped = SkippedRows(str(args.output_dir), args.max_skipped_rows, args.process_index)
        self.skipped_in_evaluation = SkippedRows(Path(str(args.output_dir)) / "evaluation", args.max_skipped_rows)
        self.add_callback(self.skipped)
        self.throughput = Throughput(model, self.trainable_names, args.peak_tflops)
        self.add_callback(self.throughput)
        self.add_callback(WeightWatch(self.trainable_names, args.watch_steps))
        self.step_loss: torch.Tensor | float = 0.0  # of the micro-batches of this step so far
        self.until_loss = None if args.until_loss is None else UntilLoss(self, args.until_loss, args.until_loss_steps)
        if self.until_loss is not None:
            self.add_callback(self.until_loss)

    def prepare_to_resume(self, checkpoint: Path) -> None:
        """Read turns as the run did so far: one begun before `fusion_row_per_turn` goes on with packed rows."""
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        path = checkpoint / "config.json"
        if model.config.connector_class.turn_rows != "optional" or not path.is_file():  # an adapter has no config
            return
        begun = bool(read_json(path).get("fusion_row_per_turn"))
        if begun != model.config.fusion_row_per_turn:
            if self.is_world_process_zero():
                say(
                    f"{checkpoint.name} was trained with fusion_row_per_turn={begun}, so the run goes on with it; to "
                    "change it, begin a new run from those weights."
                )
            model.config.fusion_row_per_turn = begun

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write this package's card where transformers would write its own; arguments as in `transformers.Trainer`."""
        if self.is_world_process_zero():
            write_trainer_card(self, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As `Trainer`'s, without the pickle of its arguments: nothing reads it, and nobody should have to trust it."""
        super()._save(output_dir, state_dict=state_dict)
        (Path(str(output_dir or self.args.output_dir)) / "training_args.bin").unlink(missing_ok=True)

    def default_collator(
        self, processor: "FusedVLMProcessor", args: FusedVLMArguments, model: Any, **kwargs: Any
    ) -> ConversationCollator:
        """Collator of the stage, with further arguments of `ConversationCollator`."""
        return ConversationCollator(
            processor,
            with_ids=True,
            max_length=args.max_length,
            overlong=args.overlong,
            skip_untrainable=True,
            **kwargs,
        )

    def _read_through_cache(self, dataset: Any) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self._read_through_cache(part) for name, part in dataset.items()}
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        images = self.processing_class.image_processor
        rank, ranks = self.args.process_index, self.args.world_size
        return cached_views(dataset, str(self.args.view_cache), model, images, self.trainable_names, rank, ranks)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Optimizer over the parameters that learn, with the vision tower's own rate where one is set."""
        if self.optimizer is None:
            groups = group_parameters(
                self.model, self.args.learning_rate, self.args.weight_decay, self.args.vision_learning_rate
            )
            logger.info("Parameters that learn at stage %s:\n%s", self.stage, describe_groups(groups))
            optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            optimizer_kwargs.pop("lr", None)
            self.optimizer = optimizer_class(
                [
                    {"params": group.parameters, "lr": group.learning_rate, "weight_decay": group.weight_decay}
                    for group in groups
                ],
                **optimizer_kwargs,
            )
        return self.optimizer

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As `Trainer`'s; with `batch_groups` every micro-batch is of one source.

        Raises:
            ValueError: when the dataset does not tell the sources of its rows, or does not have one of the groups.
        """
        args = self.args
        if args.batch_groups is None:
            return super().get_train_dataloader()
        seed = args.seed if args.data_seed is None else args.data_seed
        groups: Any = args.batch_groups
        rows: Any = self.train_dataset
        batches = GroupedBatches(rows, groups, args.per_device_train_batch_size, args.world_size, seed)
        loader = torch.utils.data.DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        return outliving_signals(self.accelerator.prepare(loader))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer`'s, remembering the loss for `until_loss`."""
        loss = super().training_step(*args, **kwargs)
        self.step_loss = self.step_loss + loss
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The stage's loss; a value that is not finite stops the run before it reaches the weights."""
        inputs = dict(inputs)
        ids = inputs.pop("sample_ids", None)
        self._count_rows(inputs, inputs.pop("skipped_rows", None))
        result = self.stage_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not torch.isfinite(loss):
            self._stop_at(loss, ids, inputs)
        return result

    def _count_rows(self, inputs: dict, skipped: torch.Tensor | None) -> None:
        entries = [] if skipped is None else [json.loads(text) for text in decode_ids(skipped)]
        is_placeholder = bool(entries) and not bool((inputs["labels"] != IGNORED).any())
        kept = 0 if is_placeholder or "input_ids" not in inputs else len(inputs["input_ids"])
        (self.skipped if self.model.training else self.skipped_in_evaluation).count(kept, entries)

    def stage_loss(self, model: Any, inputs: dict, return_outputs: bool, num_items_in_batch: Any) -> Any:
        """As `Trainer.compute_loss`."""
        raise NotImplementedError

    def record(self, weight: float | torch.Tensor = 1.0, **values: float | torch.Tensor) -> None:
        """Remember metrics of this batch; their weighted means over batches and ranks are logged."""
        store = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            value = value.detach() if isinstance(value, torch.Tensor) else value
            total = store[name] or [0.0, 0.0]
            store[name] = [total[0] + value * weight, total[1] + weight]  # tensors stay on their device until logged

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the recorded metrics, over all ranks."""
        mode = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        own = {name: [float(part) for part in pair] for name, pair in self._metrics[mode].items()}
        ranks = gather_object([own]) if self.args.world_size > 1 else [own]
        for name in dict.fromkeys(name for rank in ranks for name in rank):
            totals, weights = zip(*(rank[name] for rank in ranks if name in rank), strict=True)
            logs[f"{prefix}{name}"] = sum(totals) / sum(weights)
        self._metrics[mode].clear()
        if mode == "train":
            counts = [len(self.skipped.of_all)]
        else:
            counts = [len(self.skipped_in_evaluation.rows)]
            counts = gather_object(counts) if self.args.world_size > 1 else counts
        if sum(counts):
            logs[f"{prefix}skipped_rows"] = sum(counts)
        if "loss" in logs:
            logs.update(self.throughput.rates())
        super().log(logs, *args, **kwargs)

    def _stop_at(self, loss: torch.Tensor, ids: torch.Tensor | None, inputs: dict) -> None:
        """Write down the batch whose loss is not finite, and stop."""
        step, rank = self.state.global_step, self.args.process_index
        record = {"step": step, "rank": rank, "loss": str(loss.item()), "ids": None if ids is None else decode_ids(ids)}
        if self.processing_class is not None and "input_ids" in inputs:
            rows = [row[kept.bool()] for row, kept in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
            record["prompts"] = self.processing_class.tokenizer.batch_decode(rows)
        path = Path(str(self.args.output_dir)) / f"nonfinite_step{step}_rank{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        named = f" (samples {', '.join(record['ids'])})" if record["ids"] and any(record["ids"]) else ""
        raise ValueError(
            f"The loss is {loss.item()} at step {step}{named}; the weights before this step are unharmed. The batch is "
            f"in {path}; look at it, or lower the learning rate ({self._get_learning_rate():g} now)."
            if self.model.training
            else f"The loss is {loss.item()} in evaluation after step {step}{named}; the batch is in {path}."
        )


def read_streams_on_every_rank(args: FusedVLMArguments, dataset: Any) -> None:
    """Let each process read a stream by itself, on one process too.

    accelerate would read it on the first and cut batches into rows for the others, and packed images have no rows.

    Raises:
        ValueError: when the arguments ask for just that.
    """
    parts = dataset.values() if isinstance(dataset, dict) else [dataset]
    if not any(isinstance(part, torch.utils.data.IterableDataset) for part in parts):
        return
    settings: Any = args.accelerator_config  # a dict or a file's name until `TrainingArguments` has read it
    if settings.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches cuts batches by rows, and packed images have none; leave it out."
        )
    settings.dispatch_batches = False
