"""Numbers that a user is shown: moves on the scale of returns from close to close, prices with the digits they need."""

import json
import re
from html import unescape

import numpy as np
import pandas as pd
import pytest

import smlstm
from smlstm.judging.plots import interactive_price_regimes, plot_forecast, plot_prices, plot_regimes
from smlstm.judging.style import number_label, price_text

SMALL = dict(ticker="ABC", epochs=1, hidden_size=8, n_heads=1, n_layers=1, n_splits=2, seq_length=64)


def planted(bars=900, deviation=0.01, level=100.0, seed=11):
    """Bars whose log return from close to close is normal with a known deviation, and whose range misses most of it.

    No bar goes beyond its open and close, so that Garman and Klass' term sees about a ninth of a move (0.114).
    """
    rng = np.random.default_rng(seed)
    close = level * np.exp(np.cumsum(rng.normal(0, deviation, bars)))
    open_ = np.append(level, close[:-1])
    frame = pd.DataFrame({"open": open_, "high": np.maximum(open_, close), "low": np.minimum(open_, close)})
    frame["close"] = close
    return frame.set_axis(pd.bdate_range("2019-01-01", periods=bars, name="date"))


def run_on(tmp_path, frame, **more):
    frame.to_csv(tmp_path / "bars.csv")
    return smlstm.run(SMALL | dict(source=str(tmp_path / "bars.csv"), output_dir=str(tmp_path / "runs")) | more)


def page_of(result):
    text = (result.folder / "report.html").read_text(encoding="utf-8")
    return unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<script>.*?</script>", "", text)))


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [1, 4])
def test_the_usual_move_covers_two_thirds(tmp_path, horizon):
    "With a planted deviation of 1% a bar, the usual move over h bars is 1% times the root of h and covers 68.3%."
    result = run_on(tmp_path, planted(), horizon=horizon)
    rows = pd.read_csv(result.folder / "forecasts.csv").dropna(subset=["actual_close"])
    right = 0.01 * horizon**0.5
    assert rows.usual_move.median() == pytest.approx(right, rel=0.12)
    covered = (np.log(rows.actual_close / rows.close).abs() < rows.usual_move).mean()
    assert covered == pytest.approx(0.683, abs=0.07)
    page = page_of(result)
    shown = [float(number) / 100 for number in re.findall(r"±(\d+\.\d+)%", page)]
    assert len(shown) == 11 and np.median(shown) == pytest.approx(right, rel=0.15)  # the next one, and ten rows
    assert "from close to close" in page
    check_scales(result, page)
    # the root of the range-based variance is what was shown before: a third of the truth
    assert np.sqrt(rows.forecast_variance.median()) < 0.5 * rows.forecast_volatility.median()


def check_scales(result, page):
    "Each column of a variance or a volatility has its scale in the manifest and in the report."
    named = json.loads((result.folder / "manifest.json").read_text())["scales"]
    columns = pd.read_csv(result.folder / "forecasts.csv", nrows=1).columns
    for key, words in named.items():
        assert all(name in columns for name in key.split(", ")) and words in page
        assert ("close to close" in words) != ("range" in words)


# ---------------------------------------------------------------- digits


@pytest.mark.parametrize(
    "price, text",
    [
        (0.00001234, "0.00001234"),  # SHIB
        (1.2345, "1.2345"),  # EURUSD
        (0.6213, "0.6213"),  # ADA
        (187.256, "187.26"),
        (45.5, "45.50"),
        (64_250.5, "64,250.50"),
        (float("nan"), "–"),
        (-37.63, "-37.63"),  # oil in April 2020
        (0.0, "0.00"),
    ],
)
def test_digits_by_the_size_of_a_price(price, text):
    assert price_text(price) == text


@pytest.mark.parametrize(
    "level, shown", [(0.0000123, r"0\.0000\d{4}"), pytest.param(1.2, r"[01]\.\d{4}", marks=pytest.mark.slow)]
)
def test_small_prices_are_seen_everywhere(tmp_path, level, shown, capsys):
    "In the report, the hover, the axes and on the console; with two decimals they were 0.00, or 1.20 to 1.20."
    from smlstm.using.commands import main
    from smlstm.using.run import forecast_text

    result = run_on(tmp_path, planted(700, deviation=0.004, level=level))
    page, forecasts = page_of(result), result.forecasts["ABC"]
    assert re.search(rf"at {shown} *: *close +{shown} *,", page)
    assert "0.00 " not in page
    figure = interactive_price_regimes(forecasts)
    decimals = 8 if level < 1 else 4
    hovers = {trace.hovertemplate for trace in figure.data if trace.name in ("forecast close", "actual close")}
    assert hovers == {f"%{{y:,.{decimals}f}}"}
    inside = [
        text
        for value, text in zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext)
        if forecasts.close.min() < value < forecasts.close.max()
    ]
    assert len(inside) >= 2 and len(set(inside)) == len(inside) and not any("e" in text for text in inside)
    prices = result.forecaster and smlstm.load_prices("ABC", str(tmp_path / "bars.csv")).frame
    for drawn in (plot_prices(prices), plot_regimes(forecasts), plot_forecast(forecasts)):
        drawn.canvas.draw()
        axes = drawn.axes[0]
        low, high = axes.get_ylim()
        labels = [t.get_text() for t in axes.get_yticklabels() if low < t.get_position()[1] < high]
        assert len(labels) >= 2 and len(set(labels)) == len(labels) and not any("e" in text for text in labels)
        assert axes.yaxis.get_offset_text().get_text() == ""
    assert main(["predict", str(result.folder)]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"(?m)^close +{shown}$", printed) and re.search(rf"(?m)^forecast_close +{shown}$", printed)
    assert re.fullmatch(shown, forecast_text(result.tomorrow["ABC"]).forecast_close)


def test_numbers_of_an_axis():
    expected = {1.5e-05: "0.000015", 7e-09: "0.000000007", 0.2: "0.2", 1.15: "1.15", 1500: "1,500", 2e6: "2,000,000"}
    assert {value: number_label(value) for value in expected} == expected
    assert number_label(-0.5) == "-0.5" and number_label(-1500) == "-1,500" and number_label(0) == "0"
