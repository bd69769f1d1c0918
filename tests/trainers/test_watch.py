"""What is watched and measured while training."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from fusedvlm.costs.counts import ImageWork, count_training_flops, read_shapes
from fusedvlm.tests import tiny
from fusedvlm.tests.trainers.test_trainers import DATA, arguments
from fusedvlm.trainers import (
    ContrastiveArguments,
    ContrastiveTrainer,
    ConversationCollator,
    GenerationArguments,
    GenerationTrainer,
)
from fusedvlm.trainers.callbacks.invariants import fingerprint
from fusedvlm.trainers.callbacks.throughput import device_peak_tflops


class AtStep(TrainerCallback):
    """Do something to the model in front of the optimizer's second step."""

    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.action(model)


def train(backbones, processor, folder, action=None, **kwargs):
    trainer = GenerationTrainer(
        model=tiny.build_model(backbones),
        args=arguments(GenerationArguments, folder, **kwargs),
        train_dataset=DATA,
        processing_class=processor,
    )
    if action is not None:
        trainer.add_callback(AtStep(action))
    trainer.train()
    return trainer


def test_a_frozen_weight_that_changes_stops_the_run(backbones, processor, tmp_path):
    def disturb(model):
        with torch.no_grad():
            model.lm_head.weight[3, 5] += 1e-3

    with pytest.raises(RuntimeError, match=r"1 frozen parameters changed by step 2, first lm_head.weight"):
        train(backbones, processor, tmp_path, disturb, watch_steps=2)
    with pytest.raises(RuntimeError, match="changed by step 3"):
        train(backbones, processor, tmp_path, disturb)


def test_it_is_not_saved_either(backbones, processor, tmp_path):
    def disturb(model):
        model.get_parameter("model.language_model.norm.weight").data.mul_(2)

    with pytest.raises(RuntimeError, match="changed by step 2"):
        train(backbones, processor, tmp_path, disturb, save_strategy="steps", save_steps=2)
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_parameter_nothing_depends_on_stops_the_run(backbones, processor, tmp_path):
    model = tiny.build_model(backbones)
    model.model.fuser.idle = torch.nn.Parameter(torch.ones(2))
    trainer = GenerationTrainer(
        model=model, args=arguments(GenerationArguments, tmp_path), train_dataset=DATA, processing_class=processor
    )
    with pytest.raises(RuntimeError, match=r"1 of \d+ parameters .* first model.fuser.idle"):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_before_the_weights(backbones, processor, tmp_path):
    model = tiny.build_model(backbones)
    model.model.projector.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = GenerationTrainer(
        model=model, args=arguments(GenerationArguments, tmp_path), train_dataset=DATA, processing_class=processor
    )
    with pytest.raises(RuntimeError, match=r"gradient at step 0 is not finite .*model.projector.weight"):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_fingerprints_see_single_bits(dtype):
    tensor = torch.ones(7, 3).to(dtype)
    before = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == before
    tensor[4, 1] = 0 if dtype == torch.uint8 else 1 + torch.finfo(dtype).eps
    assert fingerprint(tensor) != before


def test_several_gpus_in_one_process_are_refused(backbones, processor, tmp_path):
    args = arguments(GenerationArguments, tmp_path)
    args._n_gpu = 4
    with pytest.raises(ValueError, match="One process sees 4 GPUs"):
        GenerationTrainer(model=tiny.build_model(backbones), args=args, processing_class=processor)


def test_rates_are_logged_with_mfu_where_the_peak_is_known(backbones, processor, tmp_path):
    trainer = train(backbones, processor, tmp_path, peak_tflops=2.0)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert min(row["images_per_second"], row["tokens_per_second"], row["tflops_per_second"]) > 0
        assert row["mfu"] == pytest.approx(row["tflops_per_second"] / 2.0, rel=1e-3)
    without = train(backbones, processor, tmp_path).state.log_history[0]
    assert "mfu" not in without or torch.cuda.is_available()


def test_peaks_are_found_by_name():
    assert device_peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert device_peak_tflops("NVIDIA H200") == 989
    assert device_peak_tflops("NVIDIA L40S") == 362
    assert device_peak_tflops("Some Accelerator") is None


@pytest.mark.parametrize("freeze", [[], ["model.vision_tower.", "model.merger."]])
def test_counted_flops_are_those_torch_counts(backbones, processor, tmp_path, freeze):
    """But for the upper triangle of causal attention, which the counter sees being computed."""
    model = tiny.build_model(backbones)
    model.set_attn_implementation("eager")
    args = arguments(GenerationArguments, tmp_path, freeze=freeze)
    trainer = GenerationTrainer(model=model, args=args, train_dataset=DATA[:1], processing_class=processor)
    batch = trainer.data_collator(DATA[:1])
    model.train()
    trainer.throughput._reset()
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(model, batch).backward()
    shapes = read_shapes(model.config)
    row = 2 * model.config.tokens_per_view + len(batch["question_input_ids"]) + 7
    fuser = model.config.fuser_config
    triangles = 3 * 2 * fuser.num_hidden_layers * fuser.hidden_size * row**2
    triangles += 3 * 2 * shapes.llm_layers * shapes.llm_width * batch["input_ids"].shape[1] ** 2
    assert trainer.throughput.images == 1
    assert trainer.throughput.flops == pytest.approx(counter.get_total_flops() - triangles, rel=0.01)


def test_training_flops_of_the_papers_size():
    """One 640x480 image at m = 256: three forwards of vision and fusion, two of the frozen LLM."""
    from fusedvlm.modeling_fusedvlm import FusedVLMConfig

    shapes = read_shapes(FusedVLMConfig())
    options = {"images": [ImageWork(10, [10], [256])], "prompt_lengths": [256 + 35], "num_labels": 20}
    learns = count_training_flops(shapes, **options)
    frozen = count_training_flops(shapes, **options, vision_learns=False)
    cached = count_training_flops(shapes, **options, views_are_cached=True)
    assert learns / 1e12 == pytest.approx(3 * 3.85 + 3 * 1.22 + 2 * 3.8, abs=0.3)
    assert (learns - frozen) / 1e12 == pytest.approx(2 * 3.85, abs=0.05)
    assert (frozen - cached) / 1e12 == pytest.approx(3.85, abs=0.05)


def test_stage_one_is_measured_too(model, processor, tmp_path):
    """What is counted is what torch counts, but for half of causal attention and the losses; rates are of that count."""
    trainer = ContrastiveTrainer(
        model=tiny.build_contrastive_model(model),
        args=arguments(ContrastiveArguments, tmp_path, max_steps=1, per_device_train_batch_size=len(DATA)),
        train_dataset=DATA,
        processing_class=processor,
    )
    trainer.train()
    row = trainer.state.log_history[0]
    batch = trainer.data_collator(DATA)
    trainer.model.set_attn_implementation("eager")
    trainer.throughput._reset()
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    assert trainer.throughput.flops == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert trainer.throughput.images == len(batch["image_num_views"])
    flops_per_image = trainer.throughput.flops / trainer.throughput.images
    assert 1e12 * row["tflops_per_second"] / row["images_per_second"] == pytest.approx(flops_per_image, rel=2e-3)


def test_metrics_reach_tensorboard(backbones, processor, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        backbones,
        processor,
        tmp_path,
        report_to="tensorboard",
        elastic_num_visual_tokens=[4],
    )
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(folder))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss_m_4", "train/images_per_second", "train/tokens_per_second"} <= names
    assert [event.step for event in events.Scalars("train/loss_m_4")] == [1, 2, 3]


def saved_bytes(model, batch, llm_learns: bool) -> int:
    """Bytes that one forward pass keeps for the backward pass, parameters aside."""
    for name, parameter in model.named_parameters():
        if name.startswith(("model.language_model.", "lm_head.")):
            parameter.requires_grad_(llm_learns)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    del loss
    return sum(kept.values())


def test_the_frozen_llm_keeps_no_inputs_of_its_linear_layers(backbones, processor):
    """Their only use would be the gradients of the weights: per layer q, k, v; o; gate, up; down; and the head."""
    model = tiny.build_model(backbones).train()
    batch = ConversationCollator(processor)(DATA[:2])
    frozen, learning = (saved_bytes(model, batch, llm_learns) for llm_learns in (False, True))
    config, positions = model.config.text_config, batch["input_ids"].numel()
    inputs = config.num_hidden_layers * (3 * config.hidden_size + config.intermediate_size) + config.hidden_size
    assert learning - frozen >= 4 * positions * inputs * 0.9
