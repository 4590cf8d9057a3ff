"""One look for all charts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from disttrain.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#24292f"
MUTED = "#6e7781"
GRID = "#e6e9ec"
BLUE = "#2f6fb5"
ORANGE = "#d9622b"
GREEN = "#3c8d5a"
PURPLE = "#7a5ba6"
_DPI = 150
_PADDING = 0.12  # inches


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches, with no window system and none of pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=_PADDING, h_pad=_PADDING)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, grid: str) -> None:
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
    axes.grid(axis="y" if grid == "y" else "x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.tick_params(axis="y" if grid == "y" else "x", length=0)


def set_title(axes: Axes, text: str, pad: float = 10) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold", color=INK, pad=pad)


def short_name(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"


def save_figure(figure: Figure, path: Path) -> Path:
    picture = io.BytesIO()
    # Not with bbox_inches="tight", which would lay everything out a second time: half of the work.
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
    return path
