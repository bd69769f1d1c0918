"""Two processes (gloo) see the contrastive loss of the whole batch."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from fusedvlm.tests import tiny
from fusedvlm.tests.trainers.test_trainers import sample
from fusedvlm.trainers import ContrastiveArguments, ContrastiveTrainer, GenerationArguments, GenerationTrainer
stage, batch, folder, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
model = tiny.build_model(folder)
processor = tiny.build_tiny_processor(model)
# Equal numbers of questions everywhere: the contrastive part needs as many pairs on each rank.
data = [sample(seed, turns=1) for seed in range(8)]
common = dict(output_dir=out + "-logs", per_device_train_batch_size=batch, max_steps=2, learning_rate=1e-3, report_to="none",
              disable_tqdm=True, use_cpu=True, save_strategy="no", seed=0, max_grad_norm=0.0, dataloader_pin_memory=False,
              optim="sgd", lr_scheduler_type="constant", warmup_steps=0)
if stage == "contrastive":
    model = tiny.build_contrastive_model(model)
    trainer = ContrastiveTrainer(model=model, args=ContrastiveArguments(**common, identity_loss_weight=0.0),
                                 train_dataset=data, processing_class=processor)
else:
    trainer = GenerationTrainer(model=model, args=GenerationArguments(**common), train_dataset=data, processing_class=processor)
trainer.train()
if trainer.args.process_index == 0:
    torch.save({n: p for n, p in model.state_dict().items() if "fuser" in n}, out)
"""


def launch(processes: int, *arguments) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    result = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("stage", ["contrastive", "generation"])
def test_two_processes_equal_one(stage, backbones, tmp_path):
    import torch

    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launch(1, script, stage, 4, backbones, tmp_path / "one.pt")
    launch(2, script, stage, 2, backbones, tmp_path / "two.pt")
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], atol=2e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
