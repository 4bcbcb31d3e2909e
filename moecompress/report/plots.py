"""Plots as SVG text. Each is drawn on a figure of its own, without matplotlib's global state."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moecompress.allocate.plan import Plan
from moecompress.calibrate.prediction import RANGE
from moecompress.calibrate.statistics import Statistics

WIDTH = 9.6  # inches
#: Told apart by readers with any colour vision (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
UNREACHED = "#d55e00"
GREY = "#5f6b76"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "moecompress",  # ids are the same in every run
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
}


def data_uri(svg: str) -> str:
    """For <img src>: ids inside one plot cannot clash with those of another."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def expert_use(statistics: Statistics) -> str:
    """Heatmap of calibration tokens by layer and expert; experts that no token reached stand out."""
    layers = list(statistics.layers)
    counts = _padded([statistics.layers[layer].counts.numpy() for layer in layers])
    shown = np.ma.masked_where(~(counts > 0), counts)
    with rc_context(STYLE):
        figure = Figure((WIDTH, _height(len(layers))), layout="constrained")
        axes = figure.subplots()
        colours = ListedColormap(_blues(256)).with_extremes(bad=UNREACHED)
        norm = LogNorm(max(1, shown.min()), max(2, shown.max())) if shown.count() else None
        image = axes.imshow(shown, colours, norm, aspect="auto", interpolation="nearest")
        _name_axes(axes, layers)
        figure.colorbar(image, ax=axes, label="tokens", pad=0.01)
        if (counts == 0).any():
            axes.set_title("orange: no token reached the expert", color=GREY)
        return _svg(figure)


def bits(plan: Plan) -> str:
    """Heatmap of the plan, one panel a projection: which scheme every expert matrix is stored in."""
    units = [(*_place(choice.unit), choice) for choice in plan.choices]
    layers = sorted({layer for layer, *_ in units})
    projections = list(dict.fromkeys(projection for _, _, projection, _ in units))
    size = {name: np.mean([8 * c.bytes / (c.rows * c.cols) for *_, c in units if c.candidate == name])
            for name in {choice.candidate for choice in plan.choices}}  # fmt: skip
    names = sorted(size, key=lambda name: size[name])
    experts = 1 + max(expert for _, expert, *_ in units)
    tables = {projection: np.full((len(layers), experts), np.nan) for projection in projections}
    for layer, expert, projection, choice in units:
        tables[projection][layers.index(layer), expert] = names.index(choice.candidate)
    beside = experts <= 32
    with rc_context(STYLE):
        tall = _height(len(layers))
        figure = Figure((WIDTH, tall if beside else tall * len(projections)), layout="constrained")
        rows, columns = (1, len(projections)) if beside else (len(projections), 1)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        colours = ListedColormap(_blues(len(names)))
        norm = BoundaryNorm(np.arange(len(names) + 1) - 0.5, len(names))
        for axes, projection in zip(grid, projections, strict=True):
            axes.imshow(np.ma.masked_invalid(tables[projection]), colours, norm, aspect="auto", interpolation="nearest")
            axes.set_title(projection)
            _name_axes(axes, layers)
            axes.label_outer()
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(grid), ticks=range(len(names)), pad=0.01)
        bar.ax.set_yticklabels([f"{name}: {size[name]:.2f} bits" for name in names])
        return _svg(figure)


def errors(errors: Mapping[str, Mapping[int, Sequence[float]]], statistics: Statistics,
           router: Mapping[str, Mapping[str, float]]) -> str:  # fmt: skip
    """Three panels over the layers: relative output errors, sensitivity, and agreement of routing.

    ``errors``: kind -> layer -> values. ``router``: label -> layer -> Jaccard.
    """
    panels = 2 + bool(router)
    with rc_context(STYLE):
        figure = Figure((WIDTH, 1.2 + 1.7 * panels), layout="constrained")
        grid = figure.subplots(panels, sharex=True, height_ratios=[2.2, 1, 1][:panels])
        for number, (kind, layers) in enumerate(errors.items()):
            color = COLORS[number % len(COLORS)]
            shift = (number - (len(errors) - 1) / 2) * 0.7 / max(1, len(errors))
            x = np.array(sorted(layers))
            values = [np.maximum(layers[layer], 1e-12) for layer in x]
            low, middle, high = (np.array([np.quantile(v, q) for v in values]) for q in (0, 0.5, 1))
            grid[0].vlines(x + shift, low, high, color=color, alpha=0.35, linewidth=3)
            grid[0].plot(x + shift, middle, "o", color=color, markersize=4, label=kind)
        grid[0].set(yscale="log", title="relative output error: every matrix (bar) and their median (dot)")
        if errors:  # nothing was rounded otherwise
            grid[0].legend(frameon=False, ncols=len(errors), loc="upper left", bbox_to_anchor=(0, -0.02), fontsize=8)
        grid[1].bar(list(statistics.layers), [s.sensitivity for s in statistics.layers.values()], 0.6, color=COLORS[0])
        grid[1].set_title("sensitivity: nats of final KL for a unit of squared error of the experts' output")
        for label, color in zip(router, COLORS, strict=False):
            at, agreement = zip(*((int(layer), 100 * value) for layer, value in router[label].items()), strict=True)
            grid[2].plot(at, agreement, "o-", color=color, markersize=3.5, linewidth=1, label=label)
            grid[2].set_title("routing agreement with the original (Jaccard of the chosen experts), %")
            grid[2].legend(frameon=False, fontsize=8, loc="lower left")
        grid[-1].set_xlabel("layer")
        grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in grid:
            axes.grid(axis="y", color="#e3e7eb", linewidth=0.6)
            axes.set_axisbelow(True)
        return _svg(figure)


def size_against_divergence(points: Sequence[Mapping[str, Any]]) -> str:
    """Bytes of the weight files against mean KL with its 95 % interval; the original lies at KL 0."""
    looks = {"original": ("D", "#222222"), "plan": ("o", COLORS[0]), "uniform": ("s", COLORS[1])}
    with rc_context(STYLE):
        figure = Figure((WIDTH, 3.4), layout="constrained")
        axes = figure.subplots()
        others = 0
        for point in points:
            marker, color = looks.get(point["kind"], ("^", COLORS[2 + others % 4]))
            others += point["kind"] not in looks
            low, high = point["interval"]
            around = [[max(0.0, point["kl"] - low)], [max(0.0, high - point["kl"])]]
            axes.errorbar([point["bytes"]], [point["kl"]], around, fmt=marker, color=color, capsize=3, markersize=7,
                          label=point["label"])  # fmt: skip
        positive = [point["kl"] for point in points if point["kl"] > 0]
        if positive and max(positive) > 20 * min(positive):
            axes.set_yscale("symlog", linthresh=min(positive) / 2)
            axes.set_ylim(bottom=-min(positive) / 8)
        else:
            axes.set_ylim(bottom=-0.04 * max(positive, default=1))
        axes.set_xlim(0, 1.05 * max(point["bytes"] for point in points))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
        axes.set(xlabel="size of all weight files", ylabel="mean KL(original ‖ compressed), nats")
        axes.grid(color="#e3e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize=8, loc="upper right")
        return _svg(figure)


def prediction(units: Mapping[str, Mapping[str, Any]]) -> str:
    """Scatter of predicted against measured output errors of single matrices, coloured by scheme, shaped by projection.

    ``units``: unit -> scheme, predicted, measured. Around the diagonal: the range that counts as well predicted.
    """
    schemes = sorted({row["scheme"] for row in units.values()})
    colours = dict(zip(schemes, _blues(len(schemes)) if len(schemes) > len(COLORS) else COLORS, strict=False))
    marks = dict(zip(dict.fromkeys(_place(unit)[2] for unit in units), "osD", strict=False))
    low, high = (pick(max(row[key], 1e-30) for row in units.values() for key in ("predicted", "measured")) for pick in (min, max))
    ends = np.array([low / 1.5, high * 1.5])
    with rc_context(STYLE):
        figure = Figure((WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(ends, RANGE[0] * ends, RANGE[1] * ends, color="#e3e7eb", linewidth=0)
        axes.plot(ends, ends, color=GREY, linewidth=0.8)
        for scheme in schemes:
            for projection, mark in marks.items():
                rows = [row for unit, row in units.items() if row["scheme"] == scheme and _place(unit)[2] == projection]
                axes.plot([row["predicted"] for row in rows], [max(row["measured"], 1e-30) for row in rows], mark, color=colours[scheme],
                          markersize=4, alpha=0.75, label=f"{scheme}, {projection}" if rows else None)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="predicted squared error of the expert's output",
                 ylabel="measured")  # fmt: skip
        axes.legend(frameon=False, fontsize=7, ncols=1 + len(schemes) // 5, loc="upper left", bbox_to_anchor=(1, 1))
        return _svg(figure)


def size_text(count: float) -> str:
    """Decimal units with as many digits as there are: 800 kB, 44 MB, 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _place(unit: str) -> tuple[int, int, str]:
    layer, expert, projection = unit.split(".")
    return int(layer[1:]), int(expert[1:]), projection


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one table, NaN where a layer has fewer experts."""
    table = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def _height(layers: int) -> float:
    return 0.9 + min(5.0, max(1.2, 0.17 * layers))


def _blues(count: int) -> list[tuple[float, float, float]]:
    """``count`` colours from light to dark."""
    light, dark = np.array([0.86, 0.91, 0.97]), np.array([0.03, 0.16, 0.38])
    return [tuple(light + (dark - light) * (index / max(1, count - 1))) for index in range(count)]


def _name_axes(axes: Any, layers: Sequence[int]) -> None:
    step = -(-len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)


def _svg(figure: Figure) -> str:
    target = io.StringIO()
    # Without the date two reports of the same folder are the same bytes.
    figure.savefig(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    return text[text.index("<svg") :]
