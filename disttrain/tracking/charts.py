"""Pictures of a run, drawn from its journal and its evaluation.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from disttrain.files import make_folder, read_text
from disttrain.layout import CHARTS, EVALUATION, JOURNAL
from disttrain.runs.journal import read_journal
from disttrain.tracking.chart_style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    lay_out,
    new_figure,
    place,
    save_figure,
    set_title,
    short_name,
    text_width,
    tidy,
)
from disttrain.tracking.learning_curves import learning_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_NUMBERED_CLASSES = 20  # beyond these a matrix is read by its colours, not its numbers
_MAX_LABELLED_CLASSES = 40
_MAX_BARS = 40


def draw_charts(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw what the run directory has data for, into its folder `charts`; the files drawn.

    Raises OSError, ValueError or ImportError (no matplotlib).
    """
    folder = Path(run_dir) / CHARTS
    make_folder(folder)
    drawn = []
    journal = Path(run_dir) / JOURNAL
    if journal.exists():
        figure = learning_curves(read_journal(journal))
        if figure is not None:
            drawn.append(save_figure(figure, folder / "learning_curves.png"))
    evaluation_file = Path(run_dir) / EVALUATION
    if evaluation_file.exists():
        evaluation = json.loads(read_text(evaluation_file))
        classes = [str(name) for name in evaluation.get("classes", ())]
        if classes and "confusion" in evaluation:
            matrix = confusion_matrix(evaluation["confusion"], classes)
            drawn.append(save_figure(matrix, folder / "confusion_matrix.png"))
        if classes and "per_class" in evaluation:
            accuracies = [evaluation["per_class"][name] for name in classes]
            metric = str(evaluation.get("per_class_metric", "accuracy"))
            drawn.append(save_figure(per_class(accuracies, classes, metric), folder / "per_class.png"))
    return drawn


def confusion_matrix(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """How often each class (row) was taken for each class (column), as shares of the row.

    Args:
        matrix: counts, (num_classes, num_classes), true class by predicted class.
        classes: their names.
    """
    num = len(classes)
    if len(matrix) != num or any(len(row) != num for row in matrix):
        raise ValueError(f"the confusion matrix is not {num} by {num}, as {num} classes require")
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    step = 1 if num <= _MAX_LABELLED_CLASSES else math.ceil(num / 25)
    ticks = list(range(0, num, step))
    names = [short_name(classes[i]) for i in ticks]
    size = 9 if num <= 12 else 7.5 if num <= 25 else 6
    long = max((len(name) for name in classes), default=0) > 3 or num > _MAX_NUMBERED_CLASSES
    figure = new_figure(1, 1)
    width = text_width(figure, names, size)
    # Inches. Names that lean by 45 degrees are as high as they are wide.
    side = min(max(3.8, 0.52 * num), 9.0) if num <= _MAX_NUMBERED_CLASSES else 7.2
    left, bottom, top, right = 0.5 + width, (0.71 * width + 0.2 if long else 0.2) + 0.4, 0.5, 1.15
    figure.set_size_inches(left + side + right, bottom + side + top)
    axes = figure.add_subplot()
    place(figure, axes, left, bottom, side, side, to_labels=(left - 0.3, bottom - 0.3))
    # The square root spreads the small shares, which are the mistakes of interest.
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    colours = LinearSegmentedColormap.from_list("shares", ["#fbfcfd", "#c6daee", "#6aa1d3", "#2f6fb5", "#123b6b"])
    image = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    axes.set_xticks(ticks, names, fontsize=size, rotation=45 if long else 0)
    for label in axes.get_xticklabels():
        label.set(horizontalalignment="right" if long else "center", rotation_mode="anchor" if long else "default")
    axes.set_yticks(ticks, names, fontsize=size)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if num <= _MAX_LABELLED_CLASSES:  # white seams between the cells
        axes.set_xticks([i - 0.5 for i in range(1, num)], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, num)], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2 if num <= _MAX_NUMBERED_CLASSES else 0.5)
        axes.tick_params(which="minor", length=0)
    if num <= _MAX_NUMBERED_CLASSES:
        for i, row in enumerate(matrix):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if shares[i][j] > 0.25 else INK
                    axes.text(j, i, f"{count:,}", ha="center", va="center", fontsize=size - 1, color=colour)
    axes.set_xlabel("predicted class", color=MUTED, fontsize=9.5)
    axes.set_ylabel("true class", color=MUTED, fontsize=9.5)
    total, correct = sum(map(sum, matrix)), sum(matrix[i][i] for i in range(num))
    title = f"Confusion matrix: {correct:,} of {total:,} right ({100 * correct / max(total, 1):.1f} %)"
    set_title(axes, title, room=side + right - 0.1)
    beside = figure.add_subplot()
    place(figure, beside, left + side + 0.12, bottom + 0.05 * side, 0.2, 0.9 * side, to_labels=(-0.75, 0.0))
    bar = figure.colorbar(image, cax=beside, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"], fontsize=7.5, color=MUTED)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.set_label("share of the true class", color=MUTED, fontsize=8.5)
    return figure


def per_class(accuracies: Sequence[float], classes: Sequence[str], metric: str = "accuracy") -> Figure:
    """Accuracy of each class, best first; of many classes, the best and the worst.

    Args:
        accuracies: 0 to 1, or NaN for a class without samples.
        classes: their names.
        metric: what it is, if not their accuracy.
    """
    if len(accuracies) != len(classes):
        raise ValueError(f"{len(accuracies)} accuracies do not fit {len(classes)} classes")
    # JSON may hold null or "NaN" where a class has no samples.
    known = [math.nan if value is None else float(value) for value in accuracies]
    ranked = sorted((-value, name) for value, name in zip(known, classes, strict=True) if not math.isnan(value))
    values, names = [-100 * value for value, _ in ranked], [short_name(name) for _, name in ranked]
    mean = sum(values) / max(len(values), 1)
    left_out, half = len(values) - _MAX_BARS, _MAX_BARS // 2
    rows = list(range(len(values)))
    if left_out > 0:  # an empty row between the best and the worst stands for the others
        values, names = values[:half] + values[-half:], names[:half] + names[-half:]
        rows = [*range(half), *range(half + 1, 2 * half + 1)]
    figure = new_figure(6.6, 0.27 * len(rows) + 1.1)
    axes = figure.add_subplot()
    axes.barh(rows, values, color=[BLUE if value >= mean else ORANGE for value in values], height=0.66)
    for row, value in zip(rows, values, strict=True):
        axes.text(102, row, f"{value:.1f} %", va="center", fontsize=8.5, color=INK)
    if left_out > 0:
        axes.text(1, half, f"{left_out} classes between", va="center", fontsize=8.5, style="italic", color=MUTED)
    axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(mean, -0.85, f"mean {mean:.1f} %", ha="center", va="bottom", fontsize=8.5, color=INK)
    axes.set_yticks(rows, names)
    axes.set_ylim(max(rows, default=0) + 0.6, -0.75)
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g} %")
    tidy(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    set_title(axes, f"{metric[:1].upper()}{metric[1:]} by class", pad=18)
    lay_out(figure, 1, 1, left=0.2 + text_width(figure, names, 8.5), right=0.65, bottom=0.35, top=0.55)
    return figure
