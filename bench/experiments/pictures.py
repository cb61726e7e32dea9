"""The paper's figures, drawn from records alone: means over seeds with 95 % confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from output import into_place

from experiments.records import Group, Record, by_settings, clock_of, labels, mean_and_half, networks, survivors

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's colours, told apart by colour-blind readers; line styles beside them for print.
_GREY, _ORANGE, _SKY, _BLUE, _RED, _PINK = "#999999", "#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#CC79A7"
_STYLES: dict[tuple[str, str | None], tuple[str, Any]] = {
    ("sgd", None): (_GREY, ":"),
    ("adam", None): (_ORANGE, "-."),
    ("kfac1", "eigh"): (_SKY, "--"),
    ("kfac1", "cholesky"): (_BLUE, (0, (5, 1))),
    ("kfac2", "eigh"): (_RED, "-"),
    ("kfac2", "cholesky"): (_PINK, (0, (8, 1, 1, 1))),
}
_IN_ORDER = [(_RED, "-"), (_SKY, "--"), ("#009E73", "-."), ("#000000", ":"), (_ORANGE, "-"), (_PINK, "--")]
_MARKERS = ("", "o", "s", "^", "D", "v", "x", "+")  # tell apart what has the same colour and line
_NAMES = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
    "coarse_to_fine": "|coarse step| / |fine step|",
    "all_ones": "share of hidden weights along all-ones",
    "logits": "logit scale (root mean square)",
}
Summary = Callable[[np.ndarray], np.ndarray]  # from a row for each seed to the line and the edges of its band
_SHARES = ("train_accuracy", "test_accuracy", "all_ones")


def means(samples: np.ndarray) -> np.ndarray:
    """Return means over rows, and their 95 % confidence intervals."""
    mean, half = mean_and_half(samples)
    return np.stack([mean, mean - half, mean + half])


def medians(samples: np.ndarray) -> np.ndarray:
    """Return medians over rows, and the whole range: of few seeds an interval says little."""
    return np.stack([np.median(samples, 0), np.min(samples, 0), np.max(samples, 0)])


def losses(records: Sequence[Record], path: Path, summary: Summary = means) -> None:
    """Figure 1: training loss of each network, by epoch above and by time below."""
    columns = networks(records)
    figure, axes = _grid(max(8, 5.5 * len(columns)), len(columns))
    for (title, some), column in zip(columns.items(), axes.T, strict=True):
        _column(column, by_settings(some), "train_loss", summary)
        column[0].set_title(title)
    _finish(figure, axes, path)


def accuracies(records: Sequence[Record], path: Path) -> None:
    """Figures 2 and 3: training and test accuracy of one network, by epoch above and by time below."""
    figure, axes = _grid(11, 2)
    for metric, column in zip(("train_accuracy", "test_accuracy"), axes.T, strict=True):
        _column(column, by_settings(records), metric, means)
    figure.suptitle(records[0].settings.network)
    _finish(figure, axes, path)


def _grid(width: float, columns: int) -> tuple[Figure, np.ndarray]:
    return plt.subplots(2, columns, figsize=(width, 8), squeeze=False, layout="constrained")


def windows(records: Sequence[Record], path: Path) -> None:
    """Draw the coarse step taken in windows: what it leads to, how large it is, and what it does to the weights.

    Ratios and scales are averaged by their logarithms: an interval around a plain mean would reach below 0.
    """
    figure, axes = _grid(11, 2)
    groups, metrics = by_settings(records), ("coarse_to_fine", "all_ones", "logits")
    names = labels(groups, lambda settings: settings.window)
    for i, (group, label) in enumerate(zip(groups, names, strict=True)):
        style = *_IN_ORDER[i % len(_IN_ORDER)], _MARKERS[i // len(_IN_ORDER) % len(_MARKERS)]
        _line(axes[0, 0], _epochs(group), group, "train_loss", style, label)
        for axis, metric in zip(axes.flat[1:], metrics, strict=True):
            _line(axis, np.array(group[0].values("step")) + 1, group, metric, style, label)
    for axis, metric in zip(axes.flat[1:], metrics, strict=True):
        _name(axis, "step (the first is 1)", metric)
        axis.set_xscale("log")
    _name(axes[0, 0], "epoch", "train_loss")
    figure.suptitle(f"The coarse step taken in windows of steps: {records[0].settings.network}")
    _finish(figure, axes, path)


def _epochs(group: Group) -> list[int]:
    return list(range(1, group[0].settings.epochs + 1))


def _column(axes: Sequence[Axes], groups: Sequence[Group], metric: str, summary: Summary) -> None:
    """Draw a curve for each group, against epochs above and against the mean of their seconds below."""
    used: Counter[Any] = Counter()
    seconds, clock = clock_of(groups)
    for group, label in zip(groups, labels(groups), strict=True):
        key = group[0].settings.optimizer, group[0].settings.inverse
        style = *_STYLES[key], _MARKERS[used[key] % len(_MARKERS)]
        used[key] += 1
        time = np.mean([record.values(seconds) for record in group], axis=0)
        for axis, x in zip(axes, (_epochs(group), time), strict=True):
            _line(axis, x, group, metric, style, label, summary)
    _name(axes[0], "epoch", metric)
    _name(axes[1], f"seconds of training ({clock})", metric)


def _line(
    axis: Axes, x: Any, group: Group, metric: str, style: tuple[str, Any, str], label: str, summary: Summary = means
) -> None:
    """Draw means over the runs that did not diverge, and their intervals; geometric ones of ratios and scales."""
    colour, dashes, marker = style
    samples = [record.values(metric) for record in survivors(group)]
    if not samples:  # all diverged: the legend alone says so
        axis.plot([], [], color=colour, linestyle=dashes, marker=marker, label=label)
        return
    if metric in ("coarse_to_fine", "logits"):
        mean, low, high = np.exp(summary(np.log(samples)))
    else:
        mean, low, high = summary(np.array(samples))
    spacing = max(1, len(mean) // 10)
    if np.isfinite(mean).sum() == 1:  # no line is drawn through one point
        marker, spacing = marker or ".", 1
    (line,) = axis.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.8, label=label)
    line.set(marker=marker, markersize=4, markevery=spacing)
    axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _name(axis: Axes, x: str, metric: str) -> None:
    """Label the axes, and choose their range.

    Accuracies are shown around where training settles: what lies far below, in the first epochs mostly, runs off
    the picture. Other shares go from 0 to 1 at most; all else is drawn by its logarithm, around the means.
    """
    axis.set(xlabel=x, ylabel=_NAMES[metric])
    if x == "epoch":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axis.lines]
    curves = [curve[np.isfinite(curve)] for curve in curves if np.isfinite(curve).any()]
    if metric in _SHARES:
        low, high = axis.get_ylim()
        if metric != "all_ones" and curves:
            settled, best = min(np.median(curve) for curve in curves), max(curve.max() for curve in curves)
            low, high = settled - 2 * (best - settled) - 0.01, best + (best - settled) / 4 + 0.01
        axis.set_ylim(max(low, 0), min(high, 1))
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        return
    means = np.concatenate([np.zeros(0), *curves])
    means = means[means > 0]
    if len(means):
        axis.set(yscale="log", ylim=(means.min() / 2, means.max() * 2))


def _finish(figure: Figure, axes: np.ndarray, path: Path) -> None:
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = 2 if max(map(len, handles), default=0) * 2 < figure.get_figwidth() * 13 else 1
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    with into_place(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)
