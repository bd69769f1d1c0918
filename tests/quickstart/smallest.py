"""The quickstart at its smallest: seconds, and nobody learns anything."""

from dataclasses import replace

from fusedvlm.quickstart.settings import CPU

TINY = replace(
    CPU, minutes=60.0, num_images=96, num_held_out=24, llm_steps=6, warmup_steps=4, contrastive_steps=4,
    generation_steps=14, batch_size=8, questions_per_task=4, num_visual_tokens=(1, 4), between=(3,),
    look_up_steps=4, groups=(("one_word", 3), ("follow_up", 2), ("dense", 3), ("dense_first", 2)), followups=(1, 2),
    second_turn_questions=3,
)  # fmt: skip
