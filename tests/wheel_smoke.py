"""What an installed wheel must do by itself: `python tests/wheel_smoke.py` with the Python of an environment that has it.

Knows nothing of the checkout, so a file that did not travel is found here.
"""

import contextlib
import importlib
import importlib.util
import json
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

FUSEDVLM = str(Path(sys.executable).parent / "fusedvlm")
COMMANDS = [
    ["--help"],
    ["--version"],
    ["train", "recipes"],
    ["train", "contrastive", "--help"],
    ["scaling", "fit", "paper"],
    ["plan", "--help"],
    ["quickstart", "--help"],
    ["hub-double", "--help"],
]
READY_SECONDS = 60
ELSEWHERE = (".templates.", ".vllm_plugin.")  # modules that run in a Space, and in vLLM's environment
# Tools that a few modules plug into, and which no extra installs; and what the extra `serve` brings.
OPTIONAL = {"lmms_eval", "vlmeval", "starlette", "uvicorn", "httpx", "prometheus_client"}


def import_everything() -> int:
    """Import every module and look up every public name; returns how many names there are."""
    package = importlib.import_module("fusedvlm")
    names = 0
    for found in pkgutil.walk_packages(package.__path__, "fusedvlm."):
        if not found.name.endswith("__main__") and not any(part in found.name for part in ELSEWHERE):
            with without_extras():
                module = importlib.import_module(found.name)
                for name in getattr(module, "__all__", ()):
                    with without_extras():
                        getattr(module, name)
                        names += 1
    return names + len([getattr(package, name) for name in package.__all__])


@contextlib.contextmanager
def without_extras() -> Iterator[None]:
    """Goes on after an import of something that is not part of the plain installation, and of nothing else."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise


def check_data_files() -> None:
    """Recipes resolve with their presets, and templates compile."""
    import jinja2

    from fusedvlm.trainers.recipes.recipe_files import load_recipe, shipped_presets, shipped_recipes

    for name in shipped_recipes():
        load_recipe(name)
    assert len(shipped_recipes()) >= 3
    assert len(shipped_presets()) >= 3
    folder = Path(importlib.import_module("fusedvlm").__file__).parent
    templates = [path for path in folder.rglob("*.jinja") if path.parent.name != "processing"]
    assert len(templates) >= 5, templates
    for path in templates:
        jinja2.Environment(autoescape=False).parse(path.read_text(encoding="utf-8"))
    assert (folder / "py.typed").exists()


def run(*words: str) -> str:
    """What a command prints; it must end well and say something."""
    done = subprocess.run([FUSEDVLM, *words], capture_output=True, text=True)
    assert done.returncode == 0, (words, done.returncode, done.stderr)
    assert done.stdout.strip(), words
    return done.stdout


def check_commands() -> None:
    """The light commands work and say something."""
    for words in COMMANDS:
        run(*words)


def check_toy(folder: Path) -> None:
    """The weights that ship answer a question rightly, in one visual token."""
    toy = folder / "toy"
    run("toy", str(toy))
    question = ["--question", "colour at a3", "-m", "1", "--json"]
    said = run("describe", str(toy / "scene.png"), "--model", str(toy / "fusedvlm-m32"), *question)
    (answer,) = json.loads(said)["answers"]
    assert (answer["answer"], answer["num_visual_tokens"]) == ("red", 1), said


def check_hub(folder: Path) -> None:
    """The small Hub starts, says where it is, knows its user, and takes its file along when it ends."""
    env = folder / "hub.env"
    hub = subprocess.Popen([FUSEDVLM, "hub-double", "--env", str(env)], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + READY_SECONDS
        while not env.exists():
            assert hub.poll() is None, "the small Hub ended before it was ready"
            assert time.monotonic() < end, "the small Hub does not start"
            time.sleep(0.05)
        lines = [line.removeprefix("export ").partition("=") for line in env.read_text().splitlines()]
        variables = {name: value for name, _, value in lines}
        address, token = f"{variables['HF_ENDPOINT']}/api/whoami-v2", variables["HF_TOKEN"]
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
        directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with directly.open(request) as answer:
            assert json.load(answer)["name"] == "ada"
        hub.send_signal(signal.SIGTERM)
        assert (hub.wait(READY_SECONDS), env.exists()) == (0, False)
    finally:
        hub.kill()
        hub.communicate()


def main() -> None:
    """Raises `AssertionError`, or whatever an import raises, when the wheel is not whole."""
    assert importlib.util.find_spec("fusedvlm.tests") is None, "the wheel holds tests"
    names = import_everything()
    check_data_files()
    check_commands()
    with tempfile.TemporaryDirectory() as folder:
        check_toy(Path(folder))
        check_hub(Path(folder))
    sys.stdout.write(f"wheel of {importlib.import_module('fusedvlm').__file__}: {names} public names, works\n")


if __name__ == "__main__":
    main()
