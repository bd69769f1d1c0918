"""Every connector: refused in one line where it cannot, trained, saved, loaded elsewhere, batched as one by one."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fusedvlm.costs.counts import count_flops, read_shapes
from fusedvlm.costs.meta_model import count_parameters
from fusedvlm.costs.profile import Workload, check_counts
from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration, load_connector
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connectors import CONNECTORS
from fusedvlm.processing import FusedVLMProcessor
from fusedvlm.tests import tiny
from fusedvlm.trainers import GenerationArguments, GenerationTrainer

# {case: (connector, fields, counts it gives)} on the tiny tower's 6 x 6 grid.
CASES = {
    "dense": ("dense", {}, [36]),
    "pool": ("pool", {"num_followup_visual_tokens": 1}, [1, 4, 9, 36]),
    "pool first": ("pool", {"connector_config": {"order": "pool_first"}}, [1, 4, 16, 25]),
    "resampler": ("resampler", {"num_followup_visual_tokens": 2}, [2, 5, 16]),
    "resampler, keys see the image": ("resampler", {"connector_config": {"keys": "image"}}, [1, 9]),
    "anchored": ("anchored", {}, [1, 4, 6, 12]),
    "anchored without the question": ("anchored", {"fuse_question": False}, [4, 12]),
    "quecc": ("quecc", {}, [9]),
}
CONVERSATION = [
    tiny.user(tiny.picture(1), text="what is it?"),
    tiny.assistant("a cat"),
    tiny.user(text="what colour has it?"),
    tiny.assistant("red"),
]


def build(folder, case: str, **fields):
    connector, own, counts = CASES[case]
    fields = {"num_visual_tokens": max(counts), "num_followup_visual_tokens": None, **own, **fields}
    fields.setdefault("trained_num_visual_tokens", counts)
    return tiny.build_model(folder, connector=connector, fuser_config=None, **fields)


@pytest.fixture(scope="module", params=CASES)
def built(request, backbones):
    model = build(backbones, request.param)
    return request.param, model, tiny.build_tiny_processor(model)


def ask(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, **kwargs},  # one place for all: older transformers take one or the other
    )


def answers(model, processor, messages, **kwargs) -> list[list[int]]:
    inputs = ask(processor, messages, **kwargs)
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def test_every_connector_is_tried_here():
    assert {connector for connector, _, _ in CASES.values()} | {"fused"} == set(CONNECTORS)


def test_placeholders_are_as_many_as_visual_tokens(built):
    case, model, processor = built
    for count in CASES[case][2]:
        inputs = ask(processor, [CONVERSATION[:3]], num_visual_tokens=count)
        features = model.get_image_features(
            **{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}, return_dict=True
        )
        found = (inputs["input_ids"] == model.config.image_token_id).sum().item()
        assert found == len(features.pooler_output[0]) == features.visual_tokens_per_sample[0]
        views = int(inputs["image_num_views"].sum()) if model.model.connector.per_view else 1
        later = processor.counts.default_followup(count, model.config.num_followup_visual_tokens)
        assert found == (count + later) * views


def test_mixed_batches_answer_as_one_by_one(built):
    case, model, processor = built
    counts = [CASES[case][2][0], CASES[case][2][-1], CASES[case][2][0], CASES[case][2][-1]]
    prompts = [
        CONVERSATION[:3],
        [tiny.user(tiny.picture(2, 30, 90), tiny.picture(3), text="the same or not?")],
        [tiny.user(text="hello")],
        CONVERSATION[:1],
    ]
    together = answers(model, processor, prompts, num_visual_tokens=counts)
    for prompt, count, expected in zip(prompts, counts, together, strict=True):
        assert answers(model, processor, [prompt], num_visual_tokens=count)[0] == expected


def test_a_step_trains_the_connector_and_what_is_saved_loads_again(built, tmp_path):
    case, model, processor = built
    model = build(model_folder(model), case)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    choices = CASES[case][2]
    args = GenerationArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        freeze=["model.vision_tower."],
        elastic_num_visual_tokens=choices if len(choices) > 1 else None,
        view_cache=str(tmp_path / "views"),
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    data = [{"messages": strip(CONVERSATION), "images": [tiny.picture(n)]} for n in range(4)]
    trainer = GenerationTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("model.connector.") for name in moved)
    assert trainer.throughput.shapes.parameters["fusion"] == sum(p.numel() for p in model.model.connector.parameters())
    model.save_pretrained(tmp_path / "variant")
    processor.save_pretrained(tmp_path / "variant")
    again = FusedVLMForConditionalGeneration.from_pretrained(tmp_path / "variant").eval()
    loaded = FusedVLMProcessor.from_pretrained(tmp_path / "variant")
    expected = answers(model.eval(), processor, [CONVERSATION[:3]])
    assert answers(again, loaded, [CONVERSATION[:3]]) == expected
    assert {name: (tensor != dict(model.named_parameters())[name]).sum().item() for name, tensor in
            again.named_parameters()} == dict.fromkeys(before, 0)  # fmt: skip


def test_layers_of_the_tower_that_are_not_read_do_not_learn(backbones):
    from fusedvlm.trainers.parameter_groups import select_trainable

    model = build(backbones, "dense")
    names = select_trainable(model, "generation")
    views = model.get_image_features(torch.randn(1, 3, 24, 24), return_dict=True).pooler_output[0]
    views.sum().backward()
    moved = {name for name, tensor in model.named_parameters() if tensor.grad is not None and tensor.requires_grad}
    assert set(names) == moved
    assert any("encoder.layers.0." in name for name in names)
    assert not any("encoder.layers.1." in name for name in names)


def model_folder(model):
    from pathlib import Path

    return Path(model.config.text_model_name_or_path).parent


def strip(messages):
    """The conversation format: text beside images."""
    return [
        {"role": m["role"], "content": ("<image>" if any(p["type"] == "image" for p in m["content"]) else "")
         + "".join(p.get("text", "") for p in m["content"])} for m in messages
    ]  # fmt: skip


def test_flops_and_parameters_are_counted(built):
    case, model, _ = built
    shapes = read_shapes(model.config)
    for count in CASES[case][2][:2]:
        check_counts(model.config, shapes, count, Workload(3, 9, 4))
        assert count_flops(shapes, count, 3, 9, 4).fusion > 0
    assert sum(count_parameters(model.config).values()) == sum(p.numel() for p in model.parameters())


PROBE = """
import json, sys
sys.modules["fusedvlm"] = None  # importing the package fails
import torch
torch.set_num_threads(1)
from transformers import AutoModelForImageTextToText, AutoProcessor
found = []
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "image", "path": sys.argv[1]}, {"type": "text", "text": "what is it?"}]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
    found.append([type(model.model.connector).__module__.split(".")[0], tokens])
print(json.dumps(found))
"""


def test_saved_variants_answer_without_the_package(backbones, tmp_path):
    picture, folders, expected = tmp_path / "picture.png", [], []
    tiny.picture(8).save(picture)
    messages = [
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": "what is it?"}]}
    ]
    for number, case in enumerate(CASES):
        model = build(backbones, case)
        processor = tiny.build_tiny_processor(model)
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
        processor.save_pretrained(folders[-1])
        expected.append(["transformers_modules", answers(model, processor, [messages])[0]])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home"),
                   "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}  # fmt: skip
    command = [sys.executable, "-c", PROBE, str(picture), *map(str, folders)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout.strip().splitlines()[-1]) == expected


def test_the_processor_refuses_what_the_model_refuses(built):
    _, model, processor = built
    kind = model.config.connector_class
    possible = [m for m in kind.counts(model.config) if m <= model.config.max_num_visual_tokens]
    for count in (0, 1, 5, 8, 16, 36, 37):
        if count in possible:
            model.config.check_num_visual_tokens(count)
            processor.encode_prompts("<image>what?", num_visual_tokens=count, image_num_views=[1])
            continue
        with pytest.raises(ValueError, match=f"num_visual_tokens={count}") as by_model:
            model.config.check_num_visual_tokens(count)
        with pytest.raises(ValueError, match=f"num_visual_tokens={count}") as by_processor:
            processor.encode_prompts("<image>what?", num_visual_tokens=count, image_num_views=[1])
        for error in (by_model, by_processor):
            assert "\n" not in str(error.value)
            assert len(str(error.value)) <= 300


def test_a_question_is_refused_where_none_is_read(built):
    _, model, processor = built
    if model.config.fuse_question:
        pytest.skip("reads the question")
    views = torch.zeros(1, 36, model.model.connector.view_width())
    with pytest.raises(ValueError, match="reads no question, but question_input_ids has 2 tokens"):
        model.get_image_features(view_features=views, question_input_ids=torch.tensor([3, 4]), question_lengths=[2])
    with pytest.raises(ValueError, match="reads no question; leave questions= out"):
        processor.encode_prompts("<image>what?", questions="what?", image_num_views=[1])


VISION = {"model_type": "clip_vision_model", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 24, "patch_size": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"connector": "nothing"}, "connector='nothing' is not registered; there are .*dense"),
        ({"connector": "dense", "num_visual_tokens": 16}, "dense connector gives every patch of a 6 x 6 grid; take 36"),
        ({"connector": "dense", "fuse_question": True}, "dense connector reads no question"),
        ({"connector": "dense", "num_followup_visual_tokens": 4}, "is not nested.*set it to 36 or 0"),
        ({"connector": "dense", "fuser_config": {"num_hidden_layers": 2}}, "has no fusion decoder"),
        ({"connector": "dense", "connector_config": {"mlp": 2}}, "'mlp'; the dense connector knows mlp_layers"),
        (
            {"connector": "quecc", "num_visual_tokens": 16},
            "16 cannot be given.*must divide a 6 x 6 grid; .* 1, 4, 9, 36",
        ),
        (
            {"connector": "quecc", "connector_config": {"kernel_size": 3, "stride": 1}},
            "4 x 4 queries do not divide a 6",
        ),
        ({"connector": "quecc", "num_visual_tokens": 9, "num_followup_visual_tokens": 4}, "is not nested.*set it to 9"),
        ({"connector": "quecc", "fuse_question": False}, "quecc connector reads the question"),
        ({"connector": "quecc", "connector_config": {"layers": [1, 9]}}, "must be hidden states 0 to 2"),
        ({"connector": "quecc", "connector_config": {"num_heads": 5}}, "num_heads=5"),
        ({"connector": "pool", "num_visual_tokens": 16}, "whole squares of a 6 x 6 grid; take 9 or 36"),
        ({"connector": "pool", "connector_config": {"order": "pool_first"}, "num_visual_tokens": 10}, "take 9 or 16"),
        ({"connector": "pool", "connector_config": {"order": "pool_first"}, "num_visual_tokens": 49}, "take 36"),
        (
            {
                "connector": "pool",
                "connector_config": {"order": "pool_first"},
                "num_visual_tokens": 9,
                "num_followup_visual_tokens": 4,
            },
            "not nested",
        ),
        ({"connector": "pool", "connector_config": {"order": "both"}}, "must be project_first or pool_first"),
        ({"connector": "pool", "trained_num_visual_tokens": [4, 8], "num_visual_tokens": 4}, "=8 cannot.*take 4 or 9"),
        ({"connector": "resampler", "connector_config": {"num_queries": 10}}, "10 is not a square.*take 9 or 16"),
        (
            {"connector": "resampler", "connector_config": {"num_queries": 4}, "num_visual_tokens": 5},
            "=5 .* 1 to 4 visual",
        ),
        ({"connector": "resampler", "connector_config": {"keys": "both"}}, "must be positions or image"),
        ({"connector": "anchored", "connector_config": {"anchor_grids": [4]}}, "divide the 6 x 6 grid"),
        ({"connector": "anchored", "connector_config": {"anchor_grids": [2, 3]}, "num_visual_tokens": 3}, "=3 "),
        ({"connector": "anchored", "num_visual_tokens": 9, "num_followup_visual_tokens": 4}, "is not nested"),
    ],
)
def test_what_a_connector_cannot_do_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        FusedVLMConfig(vision_config=VISION, **fields)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


def test_a_file_that_is_no_python_is_refused_as_a_connector(tmp_path):
    (tmp_path / "mine.txt").write_text("x = 1")
    with pytest.raises(ValueError, match=r"mine\.txt: not a Python file"):
        load_connector(tmp_path / "mine.txt")
