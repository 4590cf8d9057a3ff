"""Loss, accuracy, learning rate and speed over the steps of a job, across its restarts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from disttrain.tracking.chart_style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, new_figure, set_title, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]


def learning_curves(records: Iterable[Mapping[str, Any]]) -> Figure | None:
    """Loss, accuracy, learning rate and speed over the steps; None when the records hold no metrics of training."""
    curves, restarts = _curves(records)
    panels = [panel for panel in (_loss, _accuracy, _learning_rate, _speed) if panel(None, curves)]
    if not panels:
        return None
    from matplotlib.ticker import MaxNLocator

    last = max(steps[-1] for steps, _ in curves.values()) or 1
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(5.6 * columns, 3.6 * rows)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(w_pad=0.12, h_pad=0.12)  # type: ignore[call-arg]
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        panel(axes, curves)
        tidy(axes, grid="y")
        if index >= len(panels) - columns:
            axes.set_xlabel("step", color=MUTED, fontsize=9.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
        axes.set_xlim(-0.02 * last, 1.02 * last)  # the same steps above each other
        for step in restarts:
            axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
    if restarts:
        figure.text(1, 0, "dotted: restart", ha="right", va="bottom", fontsize=7.5, color=MUTED)
    return figure


def _curves(records: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Curve], list[int]]:
    """Each metric as steps and values, and the steps at which the job was started again."""
    curves: dict[str, Curve] = {}
    restarts: list[int] = []
    last = 0
    for record in records:
        if record.get("kind") == "metrics":
            last = max(last, record["step"])
            for name, value in record["metrics"].items():
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
        elif record.get("kind") == "event" and record.get("name") == "resume":
            step = record.get("step", last)
            restarts.append(step if isinstance(step, int) else last)
    return curves, restarts


def _loss(axes: Axes | None, curves: Mapping[str, Curve]) -> bool:
    if "train/loss" not in curves and "eval/loss" not in curves:
        return False
    if axes is not None:
        if "train/loss" in curves:
            steps, values = curves["train/loss"]
            smooth = _smoothed(values)
            if len(values) > 20:
                axes.plot(steps, values, color=BLUE, alpha=0.22, linewidth=0.8)
            line = smooth if len(values) > 20 else values
            marker = "o" if len(values) <= 20 else ""
            axes.plot(steps, line, color=BLUE, linewidth=1.8, marker=marker, markersize=4, label="training")
        if "eval/loss" in curves:
            _plot_evaluation(axes, curves["eval/loss"])
        set_title(axes, "Loss")
        _legend(axes)
    return True


def _accuracy(axes: Axes | None, curves: Mapping[str, Curve]) -> bool:
    if "eval/accuracy" not in curves:
        return False
    if axes is not None:
        steps, values = curves["eval/accuracy"]
        percent = [100 * value for value in values]
        if "train/accuracy" in curves:
            train_steps, train_values = curves["train/accuracy"]
            axes.plot(train_steps, [100 * v for v in train_values], color=BLUE, linewidth=1.8, label="training")
        _plot_evaluation(axes, (steps, percent))
        best = max(range(len(percent)), key=lambda i: percent[i] if math.isfinite(percent[i]) else -1)
        axes.axhline(percent[best], color=ORANGE, linewidth=0.8, linestyle=(0, (2, 3)), alpha=0.7)
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g} %")
        set_title(axes, f"Accuracy: best {percent[best]:.2f} % at step {steps[best]:,}")
        if "train/accuracy" in curves:
            _legend(axes)
    return True


def _learning_rate(axes: Axes | None, curves: Mapping[str, Curve]) -> bool:
    name = next((name for name in ("train/lr", "train/learning_rate") if name in curves), None)
    if name is None:
        return False
    if axes is not None:
        axes.plot(*curves[name], color=PURPLE, linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        set_title(axes, "Learning rate")
    return True


def _speed(axes: Axes | None, curves: Mapping[str, Curve]) -> bool:
    if "train/images_per_second" not in curves:
        return False
    if axes is not None:
        steps, values = curves["train/images_per_second"]
        axes.plot(steps, values, color=GREEN, linewidth=1.8, marker="o" if len(values) <= 30 else "", markersize=3.5)
        axes.set_ylim(bottom=0, top=1.15 * max((value for value in values if math.isfinite(value)), default=1.0))
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
        set_title(axes, "Images per second")
    return True


def _plot_evaluation(axes: Axes, curve: Curve) -> None:
    marker = "o" if len(curve[0]) <= 40 else ""
    axes.plot(*curve, color=ORANGE, linewidth=1.8, marker=marker, markersize=4, label="evaluation")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running mean that follows a fiftieth of the curve; what is not finite is skipped."""
    keep = 1 - 1 / max(len(values) / 50, 2)
    smooth: list[float] = []
    mean, weight = 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
        smooth.append(mean / weight if weight else math.nan)
    return smooth


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
