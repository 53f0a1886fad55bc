"""Plots of curves: they show the recorded values and their averages."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastema.errors import ArgumentError, BridgeError
from fastema.tracking import MetricSmoother
from fastema.tracking.logs import Curve
from fastema.tracking.plots import plot, style
from fastema.tracking.plots.panels import Panel, averages, panels
from fastema.tracking.plots.picture import _LOOKS, thin_curve

from ..support.requirements import require_packages
from ..support.smoothing import ema, sma

BOTH = averages(20, 0.9)


def draw_curve(count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return 2.0 * np.exp(-np.arange(count) / (1 + count / 3)) + generator.normal(0.5, 0.1, count)


def by_label(panel: Panel) -> dict[str, Curve]:
    return {line.label: line.curve for line in panel.lines}


def lines_of_style(axes: Axes, style: str = "-") -> list[Any]:
    """Return the lines of a style; points and marks have the style None."""
    return [line for line in axes.get_lines() if line.get_linestyle() == style]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# With validation after every second epoch.
KERAS = SimpleNamespace(
    history={"loss": [4.0, 3.0, 2.0, 1.0], "val_loss": [3.5, 1.5]}, epoch=[0, 1, 2, 3], params={}
)
RESUMED = SimpleNamespace(history={"loss": [4.0, 3.0]}, epoch=[7, 8])
COLUMNS = {"step": [10, 20, 30], "loss": [3.0, 2.0, 1.0], "lr": [0.1] * 3, "note": ["a"] * 3}
ROWS = [
    *({"loss": np.float32(2 - i), "lr": 1e-3, "step": 10 * i, "epoch": i / 2} for i in range(3)),
    {"eval_loss": 0.5, "step": 20, "epoch": 1.0},
    {"eval_loss": 0.25, "step": 30, "epoch": 1.5},
]
STATE = SimpleNamespace(log_history=ROWS)
OF_KERAS = {"loss": ([1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0]), "val_loss": ([2, 4], [3.5, 1.5])}
OF_ROWS = {"loss": ([0, 10, 20], [2.0, 1.0, 0.0]), "eval_loss": ([20, 30], [0.5, 0.25])}
HISTORIES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "columns, one of which counts": (COLUMNS, "step", {"loss": ([10, 20, 30], [3.0, 2.0, 1.0])}),
    "a model of Keras": (SimpleNamespace(history=KERAS), "epoch", OF_KERAS),
    "what fit returns, resumed": (RESUMED, "epoch", {"loss": ([8, 9], [4.0, 3.0])}),
    "rows of Hugging Face": (ROWS, "step", OF_ROWS),
    "a trainer of Hugging Face": (SimpleNamespace(state=STATE), "step", OF_ROWS),
}


@pytest.mark.parametrize(("history", "axis", "want"), HISTORIES.values(), ids=HISTORIES)
def test_histories_of_trainers_become_panels(history: Any, axis: str, want: dict[str, Any]) -> None:
    found = panels(history, averages=BOTH)
    assert [(panel.name, panel.axis) for panel in found] == [(name, axis) for name in want]
    for panel in found:
        curve = by_label(panel)["raw"]
        assert (curve.steps.tolist(), curve.values.tolist()) == want[panel.name]


def test_data_frames_and_paths_of_logs_become_panels(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"epoch": i, "loss": 9.0 - i}) + "\n" for i in range(4)))
    (panel,) = panels(path, averages=BOTH)
    assert (panel.name, panel.axis) == ("loss", "epoch")
    require_packages("pandas")
    import pandas

    columns = {"step": [0, 0, 5, 5], "loss": [2.0, None, 1.0, None], "val": [None, 3.0, None, 2.5]}
    loss, val = panels(pandas.DataFrame(columns).assign(note="x"), averages=BOTH)
    assert by_label(loss)["raw"].steps.tolist() == [0, 5]
    assert by_label(val)["raw"].values.tolist() == [3.0, 2.5]


NO_HISTORIES: list[tuple[Any, str]] = [
    ({}, "the history is empty"),
    (SimpleNamespace(history={}, epoch=[]), "the history is empty"),
    (SimpleNamespace(history=None), "nothing recorded yet"),
    *((3.0, "float: expected a history"), ([[1.0], [2.0]], "list: expected a history")),
]


def test_invalid_history_or_option_is_refused() -> None:
    for history, complaint in NO_HISTORIES:
        with pytest.raises((ArgumentError, BridgeError), match=complaint):
            panels(history, averages=BOTH)
    wrong: dict[str, Any]
    for wrong in ({"window_size": 0}, {"decay": [0.9, -1.0]}):
        with pytest.raises(ArgumentError):
            plot([1.0, 2.0], **wrong)


def test_lines_show_the_values_and_both_averages() -> None:
    values = draw_curve(200)
    smoother = MetricSmoother(9, 0.8, record=True)
    for step, value in enumerate(values.tolist()):
        smoother.update({"loss": value}, step=3 * step)
    (panel,) = panels(smoother, averages=BOTH)
    for one, want in zip(panel.lines, (values, sma(values, 9), ema(values, 0.8)), strict=True):
        np.testing.assert_allclose(one.curve.values, want, rtol=1e-13)
        np.testing.assert_array_equal(one.curve.steps, 3 * np.arange(200))
    (axes,) = plot({"loss": values}, log=False, window_size=9, decay=0.8).axes
    lines = lines_of_style(axes)
    assert len(lines) == 3
    for line, want in zip(lines, (values, sma(values, 9), ema(values, 0.8)), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 201))
        np.testing.assert_allclose(line.get_ydata(), want, rtol=1e-13)
    assert axes.get_title(loc="left") == "loss"
    assert axes.get_xlabel() == "step"
    last = {"raw": values[-1], "SMA 9": sma(values, 9)[-1], "EMA 0.8": ema(values, 0.8)[-1]}
    assert {f"{name}\n{value:.4g}" for name, value in last.items()} <= {*texts(axes)}


SCALES: list[tuple[list[float], Any, str]] = [
    ([1e-3, 1.0, 10.0], "auto", "log"),
    ([1.0, 2.0, 3.0], "auto", "linear"),
    ([1.0, 2.0, 3.0], True, "log"),
    ([-2.0, -1.0], True, "linear"),
    ([math.nan, math.nan], True, "linear"),
]


def test_scale_is_log_only_for_suitable_values() -> None:
    for values, log, scale in SCALES:
        (axes,) = plot(values, log=log).axes
        assert axes.get_yscale() == scale
        assert any("log scale" in text for text in texts(axes)) == (scale == "log")


def test_nonfinite_values_leave_gaps_and_marks() -> None:
    values = draw_curve(50)
    values[[10, 11, 30]] = math.nan, math.inf, -math.inf
    values[[12, 14]] = values[13], math.nan  # 13 is alone between gaps
    values[12] = math.nan
    (axes,) = plot(values, window_size=None, decay=None).axes
    (line,) = lines_of_style(axes)
    np.testing.assert_array_equal(np.isfinite(line.get_ydata()), np.isfinite(values))
    points = {line.get_marker(): list(line.get_xdata()) for line in lines_of_style(axes, "None")}
    assert points == {"o": [14.0], "v": [11.0, 12.0, 13.0, 15.0, 31.0]}
    assert "5 not finite" in texts(axes)


@given(st.integers(1, 500), st.integers(1, 60), st.sets(st.integers(0, 499)), st.integers(0, 99))
def test_thinning_keeps_extremes(count: int, buckets: int, holes: set[int], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=count)
    values[[hole for hole in holes if hole < count]] = math.nan
    steps, got = thin_curve(Curve(np.arange(count), values), buckets)
    assert (np.diff(steps) > 0).all()
    np.testing.assert_array_equal(got, values[steps.astype(int)])
    assert len(got) == count if count <= 2 * buckets else len(got) <= 2 * buckets + 2
    assert (steps[0], steps[-1]) == (0, count - 1)
    size = -(-count // buckets)
    for start in range(0, count, size):
        stretch = values[start : start + size]
        inside = got[(steps >= start) & (steps < start + size)]
        assert np.isfinite(stretch).any() == np.isfinite(inside).any()
        if np.isfinite(stretch).any():
            assert np.nanmax(inside) == np.nanmax(stretch)
            assert np.nanmin(inside) == np.nanmin(stretch)


def test_picture_is_written_as_png_svg_and_pdf(tmp_path: Path) -> None:
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        out = tmp_path / f"curves.{suffix}"
        figure = plot({"loss": draw_curve(99), "acc": draw_curve(9)}, title="a run", out=out)
        assert isinstance(figure, Figure)
        assert out.read_bytes().startswith(start)
        assert [text.get_text() for text in figure.texts] == ["a run"]


def test_chosen_metrics_are_drawn_with_the_averages_of_the_history() -> None:
    names = ("loss_raw", "loss", "loss_sma", "loss_ema_0.99", "lr")
    columns = {name: draw_curve(90, seed) for seed, name in enumerate(names)}
    rate, loss = panels(columns, ["lr", "loss", "lr"], averages=BOTH, raw=False)
    assert (rate.name, list(by_label(rate))) == ("lr", ["SMA 20", "EMA 0.9"])
    assert (loss.name, list(by_label(loss))) == ("loss", ["as reported", "SMA", "EMA 0.99"])
    for line, name in zip(panels(columns, "loss", averages=BOTH)[0].lines, names, strict=False):
        np.testing.assert_array_equal(line.curve.values, columns[name])
    with pytest.raises(ArgumentError, match=r"no metric los; there are\n  - loss"):
        plot(columns, "los")


def test_metric_is_drawn_into_given_axes_and_too_many_metrics_are_counted() -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot({"step": [0, 90_000], "a": [1, 2]}, ax=right, title="mine") is figure
    assert (len(left.get_lines()), right.get_title(loc="left")) == (0, "mine")
    assert right.xaxis.get_major_formatter()(20_000, 0) == "20k"
    with pytest.raises(ArgumentError, match=r"one metric; select one with metrics=: a, b"):
        plot({"a": [1, 2], "b": [2, 1]}, ax=left)
    figure = plot({f"m{i}": [2.0, 1.0] for i in range(27)})
    assert (len(figure.axes), figure.texts[0].get_text()[:18]) == (24, "and 3 more metrics")


def contrast(color: str, ground: str) -> float:
    """Return the contrast of two colors as WCAG 2 defines it, from 1 to 21."""
    levels = []
    for red, green, blue in (to_rgb(color), to_rgb(ground)):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)
        ]
        levels.append(float(np.dot(linear, (0.2126, 0.7152, 0.0722))) + 0.05)
    return max(levels) / min(levels)


@pytest.mark.parametrize("ground", ["#ffffff", "#1e2029", "#0d1117"])
def test_colors_can_be_read_on_light_and_dark_pages(ground: str) -> None:
    for text in (style.INK, style.GREY):
        assert contrast(text, ground) > 3.8
    lines = [look.label_color for looks in _LOOKS.values() for look in looks]
    for line in (style.RAW, style.EMA, style.SMA, style.REPORTED, *lines):
        assert contrast(line, ground) > 3.0


def is_transparent(picture: Path) -> bool:
    """Return whether most of a PNG file is transparent, its corners included."""
    pixels = imread(picture)
    alpha = pixels[..., 3] if pixels.shape[-1] == 4 else np.ones(pixels.shape[:2])
    return bool(
        (alpha == 0).mean() > 0.5 and not alpha[:: len(alpha) - 1, :: len(alpha[0]) - 1].any()
    )


def test_plots_have_a_transparent_ground(tmp_path: Path) -> None:
    plot({"loss": draw_curve(50)}, out=tmp_path / "loss.png")
    assert is_transparent(tmp_path / "loss.png")


ROOT = Path(__file__).resolve().parents[2]
PICTURES = [
    *(ROOT / "docs" / "pictures").glob("*.png"),
    *(ROOT / "examples").glob("staircase.png"),
    *(ROOT / "bench" / "results").glob("quality.png"),
]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_pictures_of_the_documentation_have_a_transparent_ground(picture: Path) -> None:
    assert is_transparent(picture)
