"""A tiny family for all tests of evaluation."""

import pytest

FAMILY = (1, 7, 12)


@pytest.fixture(scope="session")
def family(model, processor, tmp_path_factory):
    """A family of the same weights, as the quickstart leaves one (copy it before you change it)."""
    folder = tmp_path_factory.mktemp("evaluated") / "family"
    with pytest.MonkeyPatch.context() as patch:
        for part in (model.config, processor):
            patch.setattr(part, "num_followup_visual_tokens", 1)
        patch.setattr(model.config, "text_model_name_or_path", None)  # a tiny language model is published nowhere
        for m in FAMILY:
            for part in (model.config, processor):
                patch.setattr(part, "num_visual_tokens", m)
            model.save_pretrained(folder / f"fusedvlm-m{m}", merged=True)
            processor.save_pretrained(folder / f"fusedvlm-m{m}")
    return folder
