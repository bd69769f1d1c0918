"""What `fusedvlm scaling divergence` leaves: a JSON document, a figure, a table in the terminal."""

from pathlib import Path
from typing import Any

from fusedvlm.charts import save_figure
from fusedvlm.console import emit_json, say, show
from fusedvlm.files import write_json
from fusedvlm.scaling.divergence.estimators import DivergenceResult

from .figures import bound_against_distance
from .text_tables import divergence_text


def write_divergence(
    record: dict[str, Any], result: DivergenceResult, output: Path | None, plot: Path | None, json_output: bool
) -> None:
    """Write and print one measurement of `measure_divergence`."""
    if output is not None:
        write_json(output, record, indent=1)
        say(f"Document: {output}")
    if plot is not None:
        save_figure(bound_against_distance({Path(record["model"]).name: result}), plot)
        say(f"Figure: {plot}")
    if json_output:
        emit_json(record)
    else:
        show(divergence_text(result))
