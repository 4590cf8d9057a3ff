"""One look for all charts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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


def new_figure(width: float, height: float, *, is_grid: bool = False) -> Figure:
    """A figure of its own, in inches, with no window system and none of pyplot's global state.

    `lay_out` lays out a grid; matplotlib, when it draws, anything else.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = None if is_grid else ConstrainedLayoutEngine(w_pad=_PADDING, h_pad=_PADDING)
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


def lay_out(figure: Figure, rows: int, columns: int) -> None:
    """Give the panels of a grid, row by row, one size and room for what is written around them.

    As matplotlib's own layout does, which measures all of it twice: half of the time that a picture takes.
    """
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # FigureCanvasAgg has one
    left, right, bottom, top = ([0.0] * count for count in (columns, columns, rows, rows))
    for index, axes in enumerate(figure.axes):
        row, column = divmod(index, columns)
        inner, outer = axes.get_window_extent(renderer), axes.get_tightbbox(renderer, for_layout_only=True)
        if outer is not None:
            left[column] = max(left[column], inner.x0 - outer.x0)
            right[column] = max(right[column], outer.x1 - inner.x1)
            bottom[row] = max(bottom[row], inner.y0 - outer.y0)
            top[row] = max(top[row], outer.y1 - inner.y1)
    padding = _PADDING * figure.dpi
    full_width, full_height = figure.bbox.width, figure.bbox.height
    width = (full_width - sum(left) - sum(right) - 2 * padding * columns) / columns
    height = (full_height - sum(bottom) - sum(top) - 2 * padding * rows) / rows
    for index, axes in enumerate(figure.axes):
        row, column = divmod(index, columns)
        x = sum(left[: column + 1]) + sum(right[:column]) + padding * (2 * column + 1) + width * column
        y = full_height - sum(top[: row + 1]) - sum(bottom[:row]) - padding * (2 * row + 1) - height * (row + 1)
        axes.set_position((x / full_width, y / full_height, width / full_width, height / full_height))


def save_figure(figure: Figure, path: Path) -> Path:
    from PIL import Image

    # Not with bbox_inches="tight", which would lay everything out a second time: half of the work.
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))  # type: ignore[attr-defined]
    picture = io.BytesIO()
    # Without transparency, and less compressed: half of the time, and files that are 4 % larger.
    pixels.convert("RGB").save(picture, "png", compress_level=3, dpi=(_DPI, _DPI))
    replace_file(path, picture.getvalue())
    return path
