"""The quickstart at its smallest: seconds, and nobody learns anything."""

from dataclasses import replace

from fusedvlm.quickstart.settings import CPU

TINY = replace(
    CPU, minutes=5.0, num_images=96, num_held_out=24, llm_steps=6, warmup_steps=4, contrastive_steps=4,
    generation_steps=14, batch_size=8, questions_per_task=4, num_visual_tokens=(1, 4),
)  # fmt: skip
