"""What every figure shares: a palette for color-blind readers, the axis of m, figures as PNG and as data URIs.

Colors are Okabe and Ito's; markers and line styles carry the same information, so that a gray print keeps it. Nothing
here touches pyplot's global state.
"""

import base64
import io
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#B8A800",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
# One color and marker per task of the quickstart's world, the same in every figure.
TASK_STYLES = {
    "colour": (BLUE, "o"),
    "shape": (ORANGE, "s"),
    "letter": (GREEN, "^"),
    "list": (RED, "D"),
    "read": (PURPLE, "v"),
}


def task_styles(tasks: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(color, marker) of each task; those of the quickstart keep theirs, others take the free ones in turn."""
    tasks = list(tasks)
    taken = [TASK_STYLES[task] for task in tasks if task in TASK_STYLES]
    free = cycle([style for style in zip(COLORS, MARKERS, strict=True) if style not in taken])
    return {task: TASK_STYLES[task] if task in TASK_STYLES else next(free) for task in tasks}


def token_axis(axes: Axes, m: Iterable[float], gap: float = 1.9) -> None:
    """Logarithmic axis that names the measured m, leaving out names closer than a factor `gap`."""
    shown: list[float] = []
    for value in sorted(set(m)):
        if not shown or value >= shown[-1] * gap:
            shown.append(value)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [f"{value:g}" for value in shown])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens m")
    axes.grid(alpha=0.3)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format that the file's ending names (png, svg, pdf)."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def png_bytes(figure: Figure, dpi: int = 130) -> bytes:
    """A figure as PNG, the same bytes for the same figure drawn by the same version of matplotlib, which is named."""
    buffer = io.BytesIO()
    drawn_by = {"Software": f"matplotlib {matplotlib.__version__}"}
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi, metadata=drawn_by)
    return buffer.getvalue()


def data_uri(png: bytes) -> str:
    """A PNG as the address of an image inside a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def figure_uri(figure: Figure, dpi: int = 130) -> str:
    """A figure as the address of an image inside a page."""
    return data_uri(png_bytes(figure, dpi))
