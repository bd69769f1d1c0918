"""transformers' tests of image processors and processors, run against ours."""

import unittest

from transformers.testing_utils import require_torch, require_vision

from fusedvlm.processing import FusedVLMImageProcessor, FusedVLMImageProcessorPil, FusedVLMProcessor
from fusedvlm.tests import tiny
from fusedvlm.tests.common import mixins, testers
from fusedvlm.tests.common.skips import IMAGE_SKIPS, PROCESSOR_SKIPS, skip_listed

images = mixins.load("test_image_processing_common")
processors = mixins.load("test_processing_common")
images.load_test_image = lambda url: tiny.picture(0, 640, 480)  # instead of a download
# The mixin compares with the tokenizer's reading of the rendered text, so the template renders no markers but <image>.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' }}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{{ '\n' if not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class FusedVLMImageProcessingTester(images.ImageProcessingTester):
    """One view per image where the mixin expects one row per image, local views everywhere else."""

    def __init__(self, parent, **kwargs):
        rows = any(name in parent.id() for name in ("test_call", "test_convert_to_rgb"))
        super().__init__(parent, size={"height": 24, "width": 24}, max_local_views=0 if rows else 3, **kwargs)

    def _get_image_processing_classes(self):
        return {"torchvision": FusedVLMImageProcessor, "pil": FusedVLMImageProcessorPil}

    def expected_output_image_shape(self, images):
        return self.num_channels, 24, 24


@require_torch
@require_vision
@skip_listed(IMAGE_SKIPS)
class FusedVLMImageProcessingTest(images.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = FusedVLMImageProcessingTester
    backend_equivalence_atol = 1e-6  # both resize with the same filters


@require_torch
@require_vision
@skip_listed(PROCESSOR_SKIPS)
class FusedVLMProcessingTest(processors.ProcessorTesterMixin, unittest.TestCase):
    processor_class = FusedVLMProcessor
    # The texts of these tests with their visual tokens are longer than the mixin's own numbers.
    images_text_kwargs_max_length = 420
    images_text_kwargs_override_max_length = 410
    images_unstructured_max_length = 400
    chat_template_max_length = 40

    @classmethod
    def _setup_from_components(cls):
        # The mixin counts one row of pixels per image.
        return testers.build_processor(chat_template=PLAIN_TEMPLATE, max_local_views=0)

    @staticmethod
    def prepare_processor_dict():
        return {"num_visual_tokens": 5, "num_followup_visual_tokens": 3, "max_num_visual_tokens": 5}
