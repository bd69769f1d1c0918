"""transformers' tests of model classes and configs, run against ours."""

import inspect
import unittest

from transformers import set_seed
from transformers.testing_utils import require_torch

from fusedvlm.modeling_fusedvlm import (
    FusedVLMConfig,
    FusedVLMForConditionalGeneration,
    FusedVLMForContrastiveLearning,
    FusedVLMModel,
)
from fusedvlm.tests.common import mixins, testers
from fusedvlm.tests.common.skips import CONTRASTIVE_SKIPS, GENERATION_SKIPS, MODEL_SKIPS, skip_listed

common = mixins.load("test_modeling_common")
config_tests = mixins.load("test_configuration_common")


class FusedVLMModelTester:
    """What the mixin asks about the model under test."""

    def __init__(self, parent):
        self.parent = parent
        config = testers.build_config()
        self.batch_size = 7
        self.is_training = True
        self.image_token_id = config.image_token_id
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads
        self.vocab_size = config.text_config.vocab_size
        self.seq_length = testers.build_inputs()["input_ids"].shape[1]

    def get_config(self) -> FusedVLMConfig:
        return testers.build_config()

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), testers.build_inputs(self.batch_size)


HAS_GENERATION_TESTS = hasattr(common.GenerationTesterMixin, "test_greedy_generate")


@require_torch
@skip_listed(MODEL_SKIPS | (GENERATION_SKIPS if HAS_GENERATION_TESTS else {}))
class FusedVLMModelTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (FusedVLMModel, FusedVLMForConditionalGeneration)
    pipeline_model_mapping = {}
    _is_composite = True
    test_torch_exportable = False

    def setUp(self):
        set_seed(0)
        self.model_tester = FusedVLMModelTester(self)
        self.config_tester = config_tests.ConfigTester(
            self, config_class=FusedVLMConfig, has_text_modality=False, common_properties=[]
        )
        if (
            "training" in self._testMethodName
        ):  # a base model has no loss; the mixin knows those of transformers by name
            self.all_model_classes = (FusedVLMForConditionalGeneration,)

    def _image_features_prepare_config_and_inputs(self):
        """The mixin keeps what is named after images; a variant that reads the question needs the rest of them too."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        names = inspect.signature(FusedVLMModel.get_image_features).parameters
        return config, {name: inputs[name] for name in names if name in inputs}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """The mixin finds out by class name who takes labels, and drops all but two inputs in its attention test."""
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        ids = inputs.get("input_ids")
        if ids is not None and (ids == self.model_tester.image_token_id).any() and "pixel_values" not in inputs:
            inputs.update(testers.build_inputs(len(ids)) | inputs)
        if return_labels and model_class is FusedVLMForConditionalGeneration:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        """The mixin cuts a batch by rows of each input; ours are packed, so a smaller batch is built instead."""
        config, _ = super().prepare_config_and_inputs_for_generate(batch_size)
        return config, testers.build_inputs(batch_size)

    def test_config(self):
        self.config_tester.run_common_tests()


class ContrastiveModelTester(FusedVLMModelTester):
    """Stage 1: the same images and questions, with an answer each."""

    def get_config(self) -> FusedVLMConfig:
        return testers.build_config(answer_config=testers.answer_config(), projection_dim=28)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), testers.build_contrastive_inputs(self.batch_size)


@require_torch
@skip_listed(CONTRASTIVE_SKIPS)
class FusedVLMContrastiveTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (FusedVLMForContrastiveLearning,)
    pipeline_model_mapping = {}
    _is_composite = True
    test_torch_exportable = False
    test_resize_embeddings = False

    def setUp(self):
        set_seed(0)
        self.model_tester = ContrastiveModelTester(self)

    def _image_features_prepare_config_and_inputs(self):
        """The mixin keeps what is named after images; a variant that reads the question needs the rest of them too."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        names = inspect.signature(FusedVLMModel.get_image_features).parameters
        return config, {name: inputs[name] for name in names if name in inputs}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        return {**inputs, "return_loss": True} if return_labels else inputs
