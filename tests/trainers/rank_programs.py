"""Trainings of both stages on data made in memory, as one rank of several or alone; called in processes of their own."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from fusedvlm.tests import tiny
from fusedvlm.trainers import ContrastiveArguments, ContrastiveTrainer, GenerationArguments, GenerationTrainer
from fusedvlm.trainers.callbacks.skipped_rows import SkippedRows

# Plain steps, whose differences are those of the gradients.
PLAIN = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "seed": 0,
    "max_grad_norm": 0.0,
    "dataloader_pin_memory": False,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}


def train_even(stage: str, batch_size: int, backbones: Path, out: Path) -> dict[str, Any]:
    """Two steps on samples with one question each; returns the fuser's weights."""
    from fusedvlm.tests.trainers.test_trainers import sample

    model = tiny.build_model(backbones)
    processor = tiny.build_tiny_processor(model)
    # Equal numbers of questions everywhere: the contrastive part needs as many pairs on each rank.
    data = [sample(seed, turns=1) for seed in range(8)]
    common = {
        **PLAIN,
        "output_dir": str(out),
        "per_device_train_batch_size": batch_size,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    if stage == "contrastive":
        model = tiny.build_contrastive_model(model)
        args: Any = ContrastiveArguments(**common, identity_loss_weight=0.0)
        trainer = ContrastiveTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    elif stage == "grouped":
        # Sources in micro-batches of their own, each with its m; answers of different lengths; one loss over all ranks.
        data = [{**sample(seed, turns=1 + seed % 2), "source": "ab"[seed % 2]} for seed in range(12)]
        args = GenerationArguments(
            **common,
            batch_groups={"a": batch_size, "b": batch_size // 2},
            elastic_range=[1, 8],
            elastic_by_source={"b": [12, "2-4"]},
            elastic_followup=[1, 2],
            loss_per="answer",
            until_loss=0.01,
        )
        trainer = GenerationTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    else:
        args = GenerationArguments(**common)
        trainer = GenerationTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if "fuser" in name}


def train_uneven(batch_size: int, backbones: Path, out: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Four steps of stage 1 on samples that differ in their questions; returns the logged rows and all weights."""
    from fusedvlm.tests.trainers.test_trainers import sample

    model = tiny.build_model(backbones)
    processor = tiny.build_tiny_processor(model)
    text_only = {"messages": sample(0)["messages"]}
    # One to three questions about an image, and samples without any: ranks differ in pairs, or have none.
    data = [text_only if seed in (1, 4, 6) else sample(seed, turns=1 + seed % 3) for seed in range(8)]
    args = ContrastiveArguments(
        **PLAIN,
        output_dir=str(out),
        per_device_train_batch_size=batch_size,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
    )
    trainer = ContrastiveTrainer(
        model=tiny.build_contrastive_model(model), args=args, train_dataset=data, processing_class=processor
    )
    trainer.train()
    names = ("loss", "contrastive_loss", "identity_loss", "retrieval_at_1")
    rows = [{n: row[n] for n in names if n in row} for row in trainer.state.log_history if "loss" in row]
    return rows, {name: tensor.numpy() for name, tensor in trainer.model.state_dict().items()}


def skip_rows(limit: int, folder: Path) -> tuple[int, str]:
    """Two rows that cannot be trained on a rank, one of which every rank meets; how many all know of, or the refusal."""
    state = PartialState(cpu=True)
    count = SkippedRows(folder, limit, state.process_index)
    for name in ("both", f"row {state.process_index}"):
        count.count(1, [{"id": name, "source": "s", "reason": "too long", "detail": ""}])
        try:
            count.tell_all(state.device)
        except ValueError as error:
            return len(count.of_all), str(error)
    count.tell_all(state.device)  # nothing new
    return len(count.of_all), ""
