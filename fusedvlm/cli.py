"""The `fusedvlm` command line. Each folder brings its own commands; this module only mounts them."""

import os
import sys

import typer

from fusedvlm.comparison.cli import compare
from fusedvlm.console import say, useful_line
from fusedvlm.conversion.cli import convert
from fusedvlm.costs.cli import info, profile
from fusedvlm.data.cli import app as data
from fusedvlm.hub_cards.cli import card, check, space
from fusedvlm.hub_cards.push.push_options import push
from fusedvlm.quickstart.cli import quickstart
from fusedvlm.scaling.cli import app as scaling, plan
from fusedvlm.serving.cli import describe
from fusedvlm.trainers.cli import train

app = typer.Typer(
    name="fusedvlm",
    help="Vision-language models whose number of visual tokens is a dial.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(quickstart)
app.command()(describe)
app.command()(info)
app.command()(convert)
app.command()(profile)
app.command()(plan)
app.command()(compare)
app.command()(check)
app.command()(card)
app.command()(space)
app.command()(push)
app.add_typer(scaling, name="scaling")
app.add_typer(data, name="data")
app.add_typer(train, name="train")


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    debug: bool = typer.Option(False, "--debug", help="Show full tracebacks."),
) -> None:
    """Vision-language models whose number of visual tokens is a dial."""
    from fusedvlm import __version__
    from fusedvlm.console import show

    if version:
        show(__version__)
        raise typer.Exit
    context.obj = {"debug": debug}


def main() -> None:
    """Run a command. Exit code 0 only on success, 2 for wrong use (bad options, bad input), 1 for everything else."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()  # typer itself exits with 2 on wrong use
    except KeyboardInterrupt:
        say("Interrupted.")
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        say(f"fusedvlm: {useful_line(error)}")
        sys.exit(2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    main()
