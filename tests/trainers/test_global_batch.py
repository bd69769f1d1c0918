"""Stage 1 over two uneven processes (gloo) is stage 1 over one: pairs and query states of the global batch."""

import json

import pytest
import torch

from fusedvlm.tests.trainers.test_distributed import launch

SCRIPT = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from fusedvlm.tests import tiny
from fusedvlm.tests.trainers.test_trainers import sample
from fusedvlm.trainers import ContrastiveArguments, ContrastiveTrainer
batch, folder, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
model = tiny.build_model(folder)
processor = tiny.build_tiny_processor(model)
text_only = {"messages": sample(0)["messages"]}
# One to three questions about an image, and samples without any: ranks differ in pairs, or have none.
data = [text_only if seed in (1, 4, 6) else sample(seed, turns=1 + seed % 3) for seed in range(8)]
args = ContrastiveArguments(
    output_dir=str(out) + "-logs", per_device_train_batch_size=batch, max_steps=4, learning_rate=1e-2, report_to="none",
    disable_tqdm=True, use_cpu=True, save_strategy="no", seed=0, max_grad_norm=0.0, dataloader_pin_memory=False,
    optim="sgd", lr_scheduler_type="constant", warmup_steps=0, logging_steps=1,
)
trainer = ContrastiveTrainer(
    model=tiny.build_contrastive_model(model), args=args, train_dataset=data, processing_class=processor
)
trainer.train()
if trainer.args.process_index == 0:
    torch.save(trainer.model.state_dict(), out)
    names = ("loss", "contrastive_loss", "identity_loss", "retrieval_at_1")
    rows = [{n: row[n] for n in names if n in row} for row in trainer.state.log_history if "loss" in row]
    out.with_suffix(".json").write_text(json.dumps(rows))
"""


def test_two_uneven_processes_equal_one(backbones, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launch(1, script, 2, backbones, tmp_path / "one.pt")
    launch(2, script, 1, backbones, tmp_path / "two.pt")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert len(one) == 4
    assert sum(row["contrastive_loss"] > 0 for row in one) >= 2
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, abs=2e-4)
    weights, others = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, atol=2e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
