"""Public names are what they say, and wrong ones are refused with the right ones."""

import importlib
import types

import pytest

PACKAGES = ["", ".conversion", ".data", ".hub_cards", ".scaling", ".serving", ".trainers"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there(package):
    module = importlib.import_module(f"fusedvlm{package}")
    for name in module.__all__:
        assert not isinstance(getattr(module, name), types.ModuleType), name
    assert set(dir(module)) == set(module.__all__)


def test_a_wrong_name_is_refused():
    import fusedvlm.scaling

    with pytest.raises(
        AttributeError, match=r"'fusedvlm\.scaling' has no attribute 'nothing'; public names: .*fit_power"
    ):
        fusedvlm.scaling.nothing  # noqa: B018
