"""Each metric of training and evaluation over the steps of a job, across its restarts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from disttrain.errors import in_digits
from disttrain.tracking.chart_style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, lay_out, new_figure, set_title, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]
Panel = Callable[["Axes"], None]
_TRAIN, _EVAL, _PER_SECOND = "train/", "eval/", "_per_second"
# Drawn in a panel of their own kind, or (epochs) a function of the step.
_KNOWN = ("loss", "accuracy", "learning_rate", "lr", "epoch", "epoch_seconds")
_MOST_PANELS = 12
_NUM_CHARACTERS = 9  # of a number left of a panel, as wide as digits
_BELOW = 0.25  # inches, for what is written under the last row


def learning_curves(records: Iterable[Mapping[str, Any]]) -> Figure | None:
    """A panel for each metric of training and evaluation over the steps; None when the records hold none."""
    curves, restarts = _curves(records)
    panels = _panels(curves)[:_MOST_PANELS]
    if not panels:
        return None
    from matplotlib.ticker import MaxNLocator

    last = max(steps[-1] for steps, _ in curves.values()) or 1
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(5.6 * columns, 3.6 * rows + _BELOW)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.yaxis.set_major_formatter(lambda value, position: _short(value))
        panel(axes)
        tidy(axes, grid="y")
        if index >= len(panels) - columns:
            axes.set_xlabel("step", color=MUTED, fontsize=9.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(lambda value, position: _whole(value))
        axes.set_xlim(-0.02 * last, 1.02 * last)  # the same steps above each other
        for step in restarts:
            axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)
    lay_out(figure, rows, columns, left=0.75, right=0.25, bottom=0.3, top=0.42, below=_BELOW)
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


def _panels(curves: Mapping[str, Curve]) -> list[Panel]:
    """What to draw, in the order of its weight: loss, accuracy, other metrics, learning rate, speed."""
    named = [name.removeprefix(prefix) for prefix in (_EVAL, _TRAIN) for name in curves if name.startswith(prefix)]
    rates = {name: curves[name] for name in curves if name.startswith(("train/learning_rate", "train/lr"))}
    speeds = [name for name in named if name.endswith(_PER_SECOND)]
    others = dict.fromkeys(
        name for name in named if name not in _KNOWN and name not in speeds and f"{_TRAIN}{name}" not in rates
    )
    panels: list[Panel] = []
    if "loss" in named:
        panels.append(partial(_metric, name="loss", curves=curves))
    if "eval/accuracy" in curves:
        panels.append(partial(_accuracy, curves=curves))
    panels += [partial(_metric, name=name, curves=curves) for name in others]
    if rates:
        panels.append(partial(_learning_rates, rates=rates))
    panels += [partial(_speed, name=name, curve=curves[f"{_TRAIN}{name}"]) for name in speeds]
    return panels


def _metric(axes: Axes, *, name: str, curves: Mapping[str, Curve]) -> None:
    trained, evaluated = curves.get(f"{_TRAIN}{name}"), curves.get(f"{_EVAL}{name}")
    if trained is not None:
        steps, values = trained
        if len(values) > 20:
            axes.plot(steps, values, color=BLUE, alpha=0.22, linewidth=0.8)
        line = _smoothed(values) if len(values) > 20 else values
        marker = "o" if len(values) <= 20 else ""
        axes.plot(steps, line, color=BLUE, linewidth=1.8, marker=marker, markersize=4, label="training")
    if evaluated is not None:
        _plot_evaluation(axes, evaluated)
    title = _in_words(name)
    if trained is None and evaluated is not None and name != "loss":
        title = f"{title}: {in_digits(evaluated[1][-1])} at step {evaluated[0][-1]:,}"
    set_title(axes, title)
    _legend(axes)


def _accuracy(axes: Axes, *, curves: Mapping[str, Curve]) -> None:
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


def _learning_rates(axes: Axes, *, rates: Mapping[str, Curve]) -> None:
    for number, (name, curve) in enumerate(rates.items()):
        label = "" if number == 0 else _in_words(name.removeprefix(_TRAIN)).removeprefix("Learning rate ")
        axes.plot(*curve, color=PURPLE, linewidth=1.8, alpha=1 if number == 0 else 0.5, label=label)
    axes.set_ylim(bottom=0)
    set_title(axes, "Learning rate")
    if len(rates) > 1:
        _legend(axes)


def _speed(axes: Axes, *, name: str, curve: Curve) -> None:
    steps, values = curve
    axes.plot(steps, values, color=GREEN, linewidth=1.8, marker="o" if len(values) <= 30 else "", markersize=3.5)
    axes.set_ylim(bottom=0, top=1.15 * max((value for value in values if math.isfinite(value)), default=1.0))
    axes.yaxis.set_major_formatter(lambda value, position: _whole(value))
    set_title(axes, _in_words(name))


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value < 1e7 else _short(value)


def _short(value: float) -> str:
    """A number beside an axis: with six digits, or with as many as there is room for."""
    written = f"{value:.6g}"
    if "e" in written or len(written) > _NUM_CHARACTERS:
        shorter = (_with_exponent(value, num_digits) for num_digits in range(6, 0, -1))
        written = next(one for one in shorter if len(one) <= _NUM_CHARACTERS)
    return written.replace("-", "\N{MINUS SIGN}")


def _with_exponent(value: float, num_digits: int) -> str:
    digits, exponent = f"{value:.{num_digits - 1}e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _in_words(name: str) -> str:
    """A metric's name as a title: "grad_norm" becomes "Grad norm"."""
    words = " ".join(name.replace("_", " ").split())
    return words[:1].upper() + words[1:]


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
