"""Load a variant and ask it once, in a process that knows nothing of this package: `python -I loading_probe.py FILE`.

FILE is JSON: `folder` (the variant), `paths` (where Python finds its libraries), `readable`, `writable`, `limits`,
`answer` (where the result goes), `sandbox` (folder of sandbox.py).
"""

import json
import sys
from typing import Any


def main(wanted: dict) -> None:
    """Lock up, load, ask, and write what was seen."""
    sys.path[:] = [wanted["sandbox"], *wanted["paths"]]
    import sandbox  # type: ignore[import-not-found]  # the file beside this one, by the path above

    del sys.path[0]
    sys.modules["fusedvlm"] = None  # type: ignore[assignment]  # importing it fails from here on
    held = sandbox.lock(wanted["readable"], wanted["writable"], wanted["limits"])
    write(wanted["answer"], {"isolation": held})
    write(wanted["answer"], {**ask(wanted["folder"]), "isolation": held})


def write(path: str, document: dict) -> None:
    """Leave JSON where the checking process looks for it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file)


def ask(folder: str) -> dict:
    """What is seen when the variant is loaded and asked about a picture."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    model, report = loaded
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.eval().generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    connector = getattr(model.model, "connector", None)
    copies = int(inputs["image_num_views"][0]) if getattr(connector, "per_view", False) else 1
    finite = [bool(torch.isfinite(logits).any()) and not bool(logits.isnan().any()) for logits in output.logits]
    return {
        "missing": sorted(report["missing_keys"]),
        "mismatched": sorted(map(str, report["mismatched_keys"])),
        "placeholders": int((inputs["input_ids"] == model.config.image_token_id).sum()),
        "m": model.config.num_visual_tokens * copies,
        "new_tokens": output.sequences.shape[1] - inputs["input_ids"].shape[1],
        "finite": all(finite),
    }


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file))
