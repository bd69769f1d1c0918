"""Markers that transformers' test classes use."""

MARKERS = (
    "accelerate_tests",
    "flash_attn_2_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "all_flash_attn_test",
    "flex_attention_test",
    "generate",
    "is_flaky",
    "not_device_test",
    "torch_compile_test",
    "torch_export_test",
    "training_ci",
    "is_tensor_parallel_test",
    "bitsandbytes",
    "slow",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: used by transformers")
