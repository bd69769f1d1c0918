"""Published folders to variants and back."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from fusedvlm.conversion.convert import ConversionOptions, convert_published, load_published
from fusedvlm.conversion.published_export import export_published
from fusedvlm.modeling_fusedvlm import FusedVLMForContrastiveLearning
from fusedvlm.tests import tiny
from fusedvlm.tests.modeling_fusedvlm import oracle

VISION = "imgque_backbone.clip_model.vision_model."


@pytest.fixture
def published(tmp_path):
    """A published folder a test may change."""
    return oracle.publish(tmp_path / "published")


def rewrite(folder, change):
    """Pass the weights of a folder through `change`."""
    state = load_file(folder / "model.safetensors")
    save_file(change(dict(state)), folder / "model.safetensors")


def rename_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_every_key_is_reported_and_every_tensor_arrives(published, tmp_path):
    report = convert_published(published, tmp_path / "variant")
    theirs = load_file(published / "model.safetensors")
    assert {old for old, _ in report.renamed} == set(theirs)
    assert (report.used, report.dropped) == ([], [])
    loaded, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "variant", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert loaded.dtype == torch.float16  # as stored
    state = loaded.state_dict()
    for old, new in report.renamed:
        assert torch.equal(state[new], theirs[old]), old


def test_the_variant_works_as_a_whole(published, tmp_path):
    convert_published(published, tmp_path / "variant", ConversionOptions(dtype="float32", max_local_views=2))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "variant")
    processor = AutoProcessor.from_pretrained(tmp_path / "variant")
    assert model.config.fusion_row_per_turn is False  # the published row is packed
    assert json.loads((tmp_path / "variant" / "config.json").read_text())["fusion_row_per_turn"] is False
    assert processor.image_processor.size.height == 84
    assert processor.image_processor.max_local_views == model.config.max_local_views == 2
    inputs = processor.apply_chat_template(
        [tiny.user(tiny.picture(1), text="What is in the image?")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 6
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert 1 <= new.shape[1] <= 4
    assert model.config.image_token_id not in new


def test_round_trip_gives_the_published_folder_back(published, tmp_path):
    (published / "preprocessor_config.json").write_text(json.dumps({"num_crops": 16}))
    convert_published(published, tmp_path / "variant")
    export_published(tmp_path / "variant", tmp_path / "back")
    theirs, back = load_file(published / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(theirs) == set(back)
    assert all(torch.equal(theirs[name], back[name]) for name in theirs)
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())["num_crops"] == 16
    clip = AutoTokenizer.from_pretrained(tmp_path / "back" / "clip")
    assert clip.convert_tokens_to_ids([f"<|placeholder_qed_{i}|>" for i in range(5)]) == [320, 321, 322, 323, 324]
    # What the research code reads of its config is the same as before.
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (published, tmp_path / "back"))
    for name in ("model_type", "fusion_name", "hidden_size", "length_que_end", "length_que_end_short"):
        assert before[name] == after[name], name
    fusion = ("model_type", "vocab_size", "num_hidden_layers", "hidden_size", "append_special_padding")
    for name in fusion:
        assert before["imgque_config"][name] == after["imgque_config"][name], name
    for part in ("vision_config", "text_config"):
        wanted = after["imgque_config"][part]
        shared = {name for name in wanted if part == "vision_config"} | {"vocab_size"} & set(wanted)
        assert {n: before["imgque_config"][part][n] for n in shared} == {n: wanted[n] for n in shared}
    llm = ("model_type", "vocab_size", "num_attention_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    for name in llm:
        assert before["llm_config"][name] == after["llm_config"][name], name
    # And it converts to the same variant again.
    again = convert_published(tmp_path / "back", tmp_path / "again")
    assert again.sizes == convert_published(published, tmp_path / "once_more").sizes


def test_an_export_says_that_the_research_code_packs_turns(published, tmp_path):
    convert_published(published, tmp_path / "variant")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "variant")
    model.config.fusion_row_per_turn = True
    model.save_pretrained(tmp_path / "variant", merged=True)
    notes = export_published(tmp_path / "variant", tmp_path / "back").notes
    assert any("one question per conversation" in note for note in notes)


def test_stage_one_round_trip(tmp_path):
    source = oracle.publish_stage_one(tmp_path / "published")
    report = convert_published(source, tmp_path / "variant")
    assert report.stage == "contrastive"
    assert any("No processor was written" in note for note in report.notes)
    loaded = FusedVLMForContrastiveLearning.from_pretrained(tmp_path / "variant")
    assert not loaded.config.zero_large_answer_entries
    export_published(tmp_path / "variant", tmp_path / "back")
    theirs, back = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(theirs) == set(back)
    assert all(torch.equal(theirs[name], back[name]) for name in theirs)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == "modeling_image_hd_multi_query_clip"
    assert config["text_config"]["max_position_embeddings"] == 40


def test_older_vision_level_is_flattened_and_the_unused_norm_dropped(published):
    def age(state):
        old = {}
        for name, tensor in state.items():
            old[name.replace("clip_model.vision_model.", "clip_model.vision_model.vision_model.")] = tensor
        for name in ("weight", "bias"):
            old[f"{VISION}vision_model.post_layernorm.{name}"] = torch.full((128,), 9.0, dtype=torch.float16)
        old[f"{VISION}vision_model.embeddings.position_ids"] = torch.arange(37)
        old["llm_backbone.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)
        return old

    expected = load_published(published)[0].state_dict()
    rewrite(published, age)
    model, report = load_published(published)
    assert [name.rpartition(".")[2] for name, _ in report.dropped] == ["position_ids", "bias", "weight", "inv_freq"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_sizes_come_from_the_tensors_where_the_config_is_wrong(published):
    def spoil(config):
        fusion = config["imgque_config"]
        fusion["vocab_size"] = 320  # the enlarged table is not saved by the research code
        fusion["num_hidden_layers"] = 7
        fusion["vision_config"].update(hidden_size=999, image_size=336, enable_local_merge=True, enable_token_crlf=True)
        config["llm_config"]["vocab_size"] = 3

    rename_config(published, spoil)
    rewrite(
        published,
        lambda state: {n: t for n, t in state.items() if "vision_embed_merge" not in n and "token_LF" not in n},
    )
    config = load_published(published)[0].config
    assert (config.merge_views, config.newline_token, config.tokens_per_view) == (False, False, 36)
    assert (config.fuser_config.vocab_size, config.fuser_config.num_hidden_layers) == (325, 2)
    assert (config.vision_config.image_size, config.vision_config.hidden_size) == (84, 128)
    assert config.text_config.vocab_size == 439


def test_queries_are_found_in_a_tokenizer_with_placeholders(published, tmp_path):
    clip = AutoTokenizer.from_pretrained(published / "clip")
    clip.add_tokens([f"<|placeholder_qed_{i}|>" for i in range(5)])
    clip.save_pretrained(published / "clip")
    convert_published(published, tmp_path / "variant")
    processor = AutoProcessor.from_pretrained(tmp_path / "variant")
    assert len(processor.query_tokenizer) == 320
    # So that nobody can type a query: the text becomes ordinary tokens.
    ids = processor.encode_prompts("<image>look at <|placeholder_qed_1|> now")["question_input_ids"]
    assert max(ids) < 320


def test_the_published_1_8_becomes_1_1(published):
    rename_config(published, lambda config: config.update(length_que_end=1, length_que_end_short=8))
    model, report = load_published(published)
    assert (model.config.num_visual_tokens, model.config.num_followup_visual_tokens) == (1, 1)
    assert any("m'=8 exceeds m=1" in note for note in report.notes)


def test_queries_that_differ_only_in_position(published):
    rename_config(published, lambda config: config.update(append_special_padding=False))
    assert not load_published(published)[0].config.distinct_queries


@pytest.mark.parametrize("kind", ["bin", "sharded safetensors", "sharded bin"])
def test_other_weight_files(published, kind):
    expected = load_published(published)[0].state_dict()
    state = load_file(published / "model.safetensors")
    (published / "model.safetensors").unlink()
    names = sorted(state)
    halves = [names] if kind == "bin" else [names[:30], names[30:]]
    suffix = "safetensors" if "safetensors" in kind else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    places = {}
    for number, half in enumerate(halves):
        file = f"{stem}.{suffix}" if kind == "bin" else f"{stem}-{number}.{suffix}"
        part = {name: state[name] for name in half}
        if suffix == "safetensors":
            save_file(part, published / file)
        else:
            torch.save(part, published / file)
        places.update(dict.fromkeys(half, file))
    if kind != "bin":
        (published / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    found = load_published(published)[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if kind == "sharded bin":
        (published / "pytorch_model-1.bin").unlink()
        with pytest.raises(ValueError, match=r"shards that are not there: pytorch_model-1\.bin"):
            load_published(published)


class Payload:
    """Runs code when unpickled the unsafe way."""

    def __reduce__(self):
        return (print, ("pickled code was run",))


def test_pickled_code_is_never_run(published, capsys):
    (published / "model.safetensors").unlink()
    with (published / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Payload()}, file)
    with pytest.raises(ValueError, match="more than tensors"):
        load_published(published)
    torch.save({"weight": Payload()}, published / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        load_published(published)
    assert "pickled code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {**s, "surprise.weight": torch.ones(1), "extra": torch.ones(2)},
            r"2 keys .*: extra, surprise\.weight",
        ),
        (
            lambda s: {n: t for n, t in s.items() if not n.endswith("imgque_model.layers.1.mlp.up_proj.weight")},
            r"missing model\.fuser\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (
            lambda s: {**s, "fusion_backbone.imgque_proj.weight": torch.ones(96, 64)},
            r"model\.projector\.weight has shape \(96, 64\) instead of \(96, 128\)",
        ),
        (
            lambda s: {**s, "llm_backbone.model.layers.0.self_attn.q_proj.bias": torch.ones(96)},
            r"unexpected model\.language_model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (lambda s: {"model.weight": torch.ones(1)}, "not a published checkpoint"),
    ],
    ids=["unexpected", "missing", "shape", "unexpected inside", "something else"],
)
def test_keys_that_do_not_fit_are_named(published, change, message):
    rewrite(published, change)
    with pytest.raises(ValueError, match=message):
        load_published(published)


def test_referring_to_the_llm_checks_that_it_is_the_same(published, tmp_path):
    model = load_published(published, ConversionOptions(dtype="float32"))[0]
    llm = LlamaForCausalLM(model.config.text_config)
    llm.load_state_dict(
        {
            name.replace("model.language_model.", "model."): tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(("model.language_model.", "lm_head."))
        }
    )
    llm.save_pretrained(tmp_path / "llm")
    options = ConversionOptions(text_model=str(tmp_path / "llm"))
    convert_published(published, tmp_path / "variant", options)
    kept = load_file(tmp_path / "variant" / "model.safetensors")
    assert not any(name.startswith(("model.language_model.", "lm_head.")) for name in kept)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "variant", dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, llm.lm_head.weight)
    with torch.no_grad():
        llm.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    llm.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"not the LLM of this checkpoint: 1 of 21 .*layers\.1\.mlp\.down_proj"):
        convert_published(published, tmp_path / "other", options)


def test_towers_the_published_model_cannot_hold_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "variant")
    with pytest.raises(ValueError, match=r"heads of 64 \(0 here\); this variant has 2"):
        export_published(tmp_path / "variant", tmp_path / "back")


def test_command_line(published, tmp_path):
    import typer

    from fusedvlm.conversion.cli import convert

    app = typer.Typer()
    app.command()(convert)
    run = CliRunner()
    result = run.invoke(app, [str(published), str(tmp_path / "variant"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert len(document["renamed"]) == 83
    assert {"from": f"{VISION}token_LF", "to": "model.merger.newline"} in document["renamed"]
    assert document["sizes"]["fusion"]["embedding_rows"] == 325
    result = run.invoke(app, [str(tmp_path / "variant"), str(tmp_path / "back"), "--to-published"])
    assert result.exit_code == 0, result.output
    assert f"renamed  model.merger.newline -> {VISION}token_LF" in result.stdout
    assert "83 keys (generation): 0 kept, 83 renamed, 0 dropped" in result.stdout
    refused = run.invoke(app, [str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert isinstance(refused.exception, ValueError)
    assert "is not a folder" in str(refused.exception)
