"""Every test of transformers that is not run against our classes because it cannot apply, with its reason.

Besides these, the test classes skip what the machine or the model does not have, with a message of their own: flash
attention and accelerators, DeepSpeed, models without mixture of experts, encoders-decoders, audio or video. transformers'
generation and export tests are not in its source distribution; `test_equivalences.py` stands in for the former, and a
checkout runs them (see `mixins.py`).
"""

import re
import unittest

from fusedvlm.tests import tiny

_INCOMPLETE = "loads a checkpoint that lacks trained tensors, which is refused here; see test_damaged_variants.py"
INCOMPLETE_SKIPS = {
    "test_correct_missing_keys": _INCOMPLETE,
    "test_model_weights_reload_no_missing_tied_weights": _INCOMPLETE,
}
MODEL_SKIPS: dict[str, str] = {**INCOMPLETE_SKIPS}
# Of transformers' generation tests, which only a checkout has (see `mixins.OVERRIDE`).
GENERATION_SKIPS = {
    "test_generate_compile_model_forward_fullgraph": "cuts every input by rows, and ours are packed; "
    "test_equivalences.py compiles a generation into one graph",
}
_TWO_TOWERS = "a two-tower model returns embeddings and a loss, like CLIPModel, for which transformers skips this too"
IMAGE_SKIPS: dict[str, str] = {}
if tiny.OLDEST:
    IMAGE_SKIPS = {
        "test_call_numpy_4_channels": "gives four means with pictures whose alpha is dropped, as for every RGBA picture; "
        "transformers 5.18 does not cut the means",
        "test_pil_can_load_without_torchvision": "looks for the tested class inside transformers.models",
    }
NOT_IN_OLDEST = ("test_call_arguments_not_in_attributes",)
PROCESSOR_SKIPS = {
    "test_call_arguments_not_in_attributes": "num_visual_tokens has a default from the variant and can be changed in "
    "every call: it is the dial; transformers says itself that its check may be too strict for such arguments",
}
CONTRASTIVE_SKIPS = {
    **INCOMPLETE_SKIPS,
    "test_attention_outputs": _TWO_TOWERS,
    "test_hidden_states_output": _TWO_TOWERS,
    "test_retain_grad_hidden_states_attentions": _TWO_TOWERS,
    "test_model_get_set_embeddings": "two towers have two embedding tables; transformers skips this for CLIPModel too",
    "test_eager_matches_sdpa_inference": "compares hidden states, which a two-tower model does not return; "
    "test_equivalences.py compares the embeddings",
}


def skip_listed(reasons: dict[str, str]):
    """Class decorator: skip the tests whose names begin with a listed one, and fail when a listed one is gone."""

    def decorate(test_class):
        for listed, reason in reasons.items():
            numbered = re.compile(re.escape(listed) + r"(_\d\d_.*)?")  # parameterized tests have a number and a suffix
            names = [name for name in dir(test_class) if numbered.fullmatch(name)]
            if not names and tiny.OLDEST and listed in NOT_IN_OLDEST:
                continue
            if not names:
                raise AttributeError(f"{test_class.__name__} has no test {listed} to skip.")
            for name in names:
                setattr(test_class, name, unittest.skip(reason)(getattr(test_class, name)))
        return test_class

    return decorate
