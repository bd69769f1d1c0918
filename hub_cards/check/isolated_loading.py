"""Does a variant load and answer where this package is not installed?"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Runs in a process of its own, in an empty folder; importing the package fails there.
PROBE = """
import json, sys
sys.modules["fusedvlm"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model, report = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.linear_gradient("L").convert("RGB")
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
output = model.eval().generate(
    **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
)
connector = getattr(model.model, "connector", None)
copies = int(inputs["image_num_views"][0]) if getattr(connector, "per_view", False) else 1
print(json.dumps({
    "missing": sorted(report["missing_keys"]),
    "mismatched": sorted(map(str, report["mismatched_keys"])),
    "placeholders": int((inputs["input_ids"] == model.config.image_token_id).sum()),
    "m": model.config.num_visual_tokens * copies,
    "new_tokens": output.sequences.shape[1] - inputs["input_ids"].shape[1],
    "finite": all(bool(torch.isfinite(logits).any()) and not bool(logits.isnan().any()) for logits in output.logits),
}))
"""


def loading_problem(folder: Path, timeout: float = 3600) -> str | None:
    """What goes wrong when a variant is loaded and asked without this package; None when nothing does.

    Runs the code in the folder.
    """
    with tempfile.TemporaryDirectory(prefix="fusedvlm-load-") as empty:
        environment = {**os.environ, "HF_MODULES_CACHE": f"{empty}/modules", "TRANSFORMERS_VERBOSITY": "error"}
        try:
            run = subprocess.run(
                [sys.executable, "-c", PROBE, str(Path(folder).resolve())],
                capture_output=True,
                text=True,
                env=environment,
                cwd=empty,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"did not load and answer within {timeout:.0f} seconds"
    if run.returncode != 0:
        return f"does not load and answer without this package: {_last_line(run.stderr)}"
    return _judge(json.loads(run.stdout.strip().splitlines()[-1]))


def _judge(seen: dict) -> str | None:
    """What a run of the probe found wrong."""
    for what in ("missing", "mismatched"):
        if seen[what]:
            return f"loads with {len(seen[what])} {what} tensors, {seen[what][0]} first"
    if seen["placeholders"] != seen["m"]:
        return f"shows an image as {seen['placeholders']} tokens instead of m = {seen['m']}"
    if seen["new_tokens"] < 1 or not seen["finite"]:
        return "loads, but does not answer: no tokens, or logits that are not numbers"
    return None


def _last_line(text: str) -> str:
    """The exception at the end of a traceback: its first line, not the hints below it."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    starts = [line for line in lines if line[:1].isalpha() and ("Error: " in line or "Exception: " in line)]
    return (starts or lines or ["it stopped without a word"])[-1]
