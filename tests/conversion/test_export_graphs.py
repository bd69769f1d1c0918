"""Graphs for other runtimes: saved, loaded where none of our classes is, and asked with other sizes."""

import io

import pytest
import torch

from fusedvlm.conversion.export_graphs import export_graphs, fusion_row
from fusedvlm.tests import tiny


@pytest.fixture(scope="module")
def loaded(model):
    """The graphs of the tiny variant after a round trip through bytes."""
    graphs = export_graphs(model)
    found = []
    for graph in (graphs.views, graphs.fusion):
        buffer = io.BytesIO()
        torch.export.save(graph, buffer)
        buffer.seek(0)
        found.append(torch.export.load(buffer).module())
    return found


@torch.no_grad()
@pytest.mark.parametrize(("size", "m"), [((60, 40), 1), ((200, 30), 12), ((30, 31), 7)])
def test_graphs_give_the_models_visual_tokens(model, processor, loaded, size, m):
    views, fusion = loaded
    message = [tiny.user(tiny.picture(3, *size), text="which colour is it?")]
    inputs = processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"num_visual_tokens": m},
    )  # fmt: skip
    names = ("pixel_values", "image_num_views", "question_input_ids", "question_lengths", "num_visual_tokens")
    expected = model.get_image_features(**{name: inputs[name] for name in names}).pooler_output[0]
    tokens = views(inputs["pixel_values"])
    assert tokens.shape[0] == int(inputs["image_num_views"])
    row = fusion_row(model, tokens, inputs["question_input_ids"].tolist(), m)
    torch.testing.assert_close(fusion(row)[0, -m:], expected, atol=1e-5, rtol=1e-5)


def test_other_connectors_are_refused(backbones):
    other = tiny.build_model(
        backbones, connector="pool", fuser_config=None, num_visual_tokens=None, trained_num_visual_tokens=None,
        num_followup_visual_tokens=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="not of pool"):
        export_graphs(other)
