"""The `fusedvlm` command line: a table of commands, each imported only when it is named."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fusedvlm import __version__
from fusedvlm.console import say, show, useful_line

# Command -> where it is defined and the line that `fusedvlm --help` shows: the first sentence of its own help.
COMMANDS = {
    "quickstart": (
        "fusedvlm.quickstart.cli:quickstart",
        "Train a small family of variants from scratch, ask it questions, and report what each visual token buys.",
    ),
    "toy": (
        "fusedvlm.quickstart.toy:toy",
        "Write a small trained variant and a picture to ask it about, in a second: nothing is trained or downloaded.",
    ),
    "describe": ("fusedvlm.serving.cli:describe", "Ask a variant questions about images."),
    "evaluate": (
        "fusedvlm.evaluation.cli:evaluate",
        "Score a variant or a family on benchmarks and your own questions, at every m in one pass.",
    ),
    "serve": (
        "fusedvlm.serving.serve_cli:serve",
        "Serve a variant to OpenAI clients: chat with images, any m per request.",
    ),
    "info": (
        "fusedvlm.costs.cli:info",
        "Say what a variant is: sizes, number of visual tokens, backbones, parameters by group.",
    ),
    "convert": (
        "fusedvlm.conversion.cli:convert",
        "Turn a published research checkpoint into a variant, or a variant back into one.",
    ),
    "profile": ("fusedvlm.costs.cli:profile", "Say what an image and a question cost at each number of visual tokens."),
    "plan": (
        "fusedvlm.scaling.cli:plan",
        "Choose the number of visual tokens (and the LLM) that scores best within a budget.",
    ),
    "compare": (
        "fusedvlm.comparison.cli:compare",
        "Compare ways to m visual tokens: same images, frozen tower and LLM, counted training FLOPs and data order.",
    ),
    "check": ("fusedvlm.hub_cards.cli:check", "Verify that a folder or repository is a complete and sound variant."),
    "card": (
        "fusedvlm.hub_cards.cli:card",
        "Write a variant's model card, and with a license everything else its repository needs.",
    ),
    "demo": (
        "fusedvlm.hub_cards.cli:demo",
        "Open a chat page for a variant: two m side by side, follow-up questions, what each answer cost.",
    ),
    "space": (
        "fusedvlm.hub_cards.cli:space",
        "Write a Gradio Space for a variant: an m slider, an image, a question, the answer as it comes.",
    ),
    "push": (
        "fusedvlm.hub_cards.push.push_options:push",
        "Put variants on the Hub: one repository per m, one commit each, tagged, private until all are verified.",
    ),
    "hub-double": (
        "fusedvlm.hub_double.cli:hub_double",
        "Run a small Hub on this machine to try publishing on: it keeps what it is sent until it ends.",
    ),
    "scaling": ("fusedvlm.scaling.cli:app", "How much a visual token buys: fits, divergence, trade-offs and a report."),
    "data": ("fusedvlm.data.cli:app", "Training data: check, show, convert, describe, and make more of it."),
    "train": (
        "fusedvlm.trainers.cli:train",
        "Train a stage from a recipe: contrastive, then generation, then variants.",
    ),
}
# Commands of a group that lie in a higher layer than the group itself.
NESTED = {"scaling": {"lab": "fusedvlm.lab.cli:lab"}}
# Words a command begins with -> what Ctrl-C leaves, and what to do next; `train` says so itself.
GO_ON = "the same command goes on where it was"
AFTER_INTERRUPT = {
    "quickstart": "families that are finished stay; the one under way is lost, and the same command begins it again",
    "compare": f"finished cells are kept; {GO_ON}",
    "push": f"what was sent is kept, and shown to nobody before all of it is right; {GO_ON}",
    "evaluate": f"answers so far are kept; {GO_ON}",
    "scaling lab": f"finished cells are kept; {GO_ON}",
    "scaling divergence": f"with --state FILE what was measured is kept, and {GO_ON}",
    "data questions": f"answers so far are kept; {GO_ON}",
    "data documents": f"pages so far are kept; {GO_ON}",
}
# What the user named and the system refused.
WRONG_PATHS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)


def load_command(name: str) -> Any:
    """The command itself, from the module that defines it."""
    found: typer.Typer | Callable[..., Any] = _attribute(COMMANDS[name][0])
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(name)(found)
        found = alone
    for nested, place in NESTED.get(name, {}).items():
        if nested not in {one.name or one.callback.__name__ for one in found.registered_commands if one.callback}:
            found.command(nested)(_attribute(place))
    command = typer.main.get_command(found)
    command.name = name
    return command


def _attribute(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


class LazyCommands(TyperGroup):
    """Lists commands from the table; a command's module is imported when the command is named."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name, (_, help_text) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=help_text), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The named command, loaded. Ends with exit code 2 for a name that is none, as typer does."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(name or ""), rest


app = typer.Typer(
    name="fusedvlm",
    cls=LazyCommands,
    help="Vision-language models whose number of visual tokens is a dial.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def common(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    debug: bool = typer.Option(False, "--debug", help="Show full tracebacks; anywhere on the line."),
) -> None:
    """Vision-language models whose number of visual tokens is a dial."""
    if version:
        show(__version__)
        raise typer.Exit


def after_interrupt(words: list[str]) -> str:
    """What to say after Ctrl-C: what is left of the command, where anything is."""
    left = AFTER_INTERRUPT.get(" ".join(words[:2])) or AFTER_INTERRUPT.get(" ".join(words[:1]))
    return f"Interrupted: {left}." if left else "Interrupted."


def main() -> None:
    """Run a command. Exit code 0 only on success, 2 for wrong use (bad options, bad input), 1 for everything else."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    words = [word for word in sys.argv[1:] if word != "--debug"]  # anywhere on the line
    try:
        app(words)  # typer itself exits with 2 on wrong use
    except SystemExit as end:
        interrupt = getattr(end.__context__, "__cause__", None)
        if isinstance(interrupt, KeyboardInterrupt):
            say(str(interrupt) or after_interrupt(words))
        raise
    except Exception as error:  # noqa: BLE001 - the last place to tell the user
        from fusedvlm.redaction import known_secrets, redact, redacted_traceback

        secrets = known_secrets()
        if "--debug" in sys.argv:
            say(redacted_traceback(error, secrets))
        is_wrong_use = isinstance(error, (ValueError, *WRONG_PATHS))
        is_explained = is_wrong_use or type(error).__module__.startswith("fusedvlm.")
        hint = "" if is_explained or "--debug" in sys.argv else " (--debug shows where it happened)"
        say(f"fusedvlm: {redact(useful_line(error), secrets)}{hint}")
        sys.exit(2 if is_wrong_use else 1)


if __name__ == "__main__":
    main()
