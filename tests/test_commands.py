"""The console script: its exit codes, its JSON, and what it refuses."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from test_train import SMALL

import smlstm
from smlstm.data.prices import load_prices
from smlstm.using.commands import main, parse_parameters
from smlstm.using.forecaster import Forecaster

FUNCTIONS = """
def past(prices):
    return prices.close.diff()

def ahead(prices):
    return prices.close.diff().shift(-1)

def broken(prices):
    return prices.closing
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A run of the main flow."
    return smlstm.run({"output_dir": str(tmp_path_factory.mktemp("runs")), **SMALL | {"epochs": 1}}).folder


def test_predict_gives_the_forecast_of_the_run(folder, capsys):
    assert main(["predict", str(folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    (forecast,), (banner,) = answer["forecasts"], answer["data"]
    written = pd.read_csv(folder / "forecasts.csv").iloc[-1]
    for name in ("close", "forecast_close", "up_probability", "forecast_variance", "regime_4"):
        assert forecast[name] == pytest.approx(float(written[name]), rel=1e-9), name
    assert "S&P 500" in banner
    assert main(["predict", str(folder)]) == 0
    text = capsys.readouterr().out
    shown = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith(("close", "forecast_close ")))
    assert banner in text and shown["forecast_close"] == f"{forecast['forecast_close']:,.2f}"


def test_predict_from_another_source(folder, tmp_path, capsys):
    frame = load_prices("SPY", "sample", start=SMALL["start"]).frame
    frame.iloc[:-5].to_csv(tmp_path / "prices.csv")
    assert main(["predict", str(folder), "--json", "--source", str(tmp_path / "prices.csv")]) == 0
    (forecast,) = json.loads(capsys.readouterr().out)["forecasts"]
    assert pd.Timestamp(forecast["date"]) == frame.index[-6]


def test_predict_fits_again_when_it_is_due(folder, tmp_path, capsys):
    """Forty bars after the run: not due at 41, due at 40; then the saved model has been fitted on all of them."""
    prices = load_prices("SPY", "sample", start=SMALL["start"]).frame
    prices.to_csv(tmp_path / "new.csv")
    older = shutil.copytree(folder, tmp_path / "SPY")
    Forecaster.load(older).fit({"SPY": prices.iloc[:-40]}, progress=False).save(older)
    saved = lambda: (older / "model.safetensors").read_bytes()
    ask = ["predict", str(older), "--json", "--source", str(tmp_path / "new.csv"), "--refit-every"]
    before = saved()
    assert main([*ask, "41"]) == 0 and saved() == before
    first = json.loads(capsys.readouterr().out)
    assert main([*ask, "40"]) == 0 and saved() != before
    second = json.loads(capsys.readouterr().out)
    assert "Fitted again" in second["data"][-1] and len(first["data"]) == 1
    assert second["forecasts"][0]["date"] == first["forecasts"][0]["date"]
    assert Forecaster.load(older).bars_since_fit(prices) == 0
    with pytest.raises(SystemExit):
        main([*ask, "0"])
    assert "at least 1" in capsys.readouterr().err


def test_predict_names_a_folder_without_a_model(tmp_path, capsys):
    assert main(["predict", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "config.json does not exist" in error and "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize("name, code", [("past", 0), ("ahead", 1)])
def test_audit_tells_past_from_future(tmp_path, capsys, name, code):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    load_prices("SPY", "sample", start="2017").frame.to_csv(tmp_path / "prices.csv")
    assert main(["audit", f"{tmp_path / 'mine.py'}:{name}", str(tmp_path / "prices.csv")]) == code
    assert ("causal" if code == 0 else "LEAK") in capsys.readouterr().out


def test_audit_shows_where_a_function_fails(tmp_path):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    load_prices("SPY", "sample", start="2017").frame.to_csv(tmp_path / "prices.csv")
    with pytest.raises(AttributeError, match="closing"):
        main(["audit", f"{tmp_path / 'mine.py'}:broken", str(tmp_path / "prices.csv")])


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["audit", "nowhere.py:f", "prices.csv"], "a file that exists"),
        (["train", "SPY", "-p", "epoch=3"], "did you mean 'epochs'?"),
        (["train", "SPY", "-p", "epochs=0"], "epochs=0 cannot work"),
        (["train", "SPY", "-p", "epochs"], "-p name=value"),
        (["train", "../SPY"], "ticker='../SPY' cannot work"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_two(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"date": ["2020-01-01"], "close": [1.0]}).to_csv("prices.csv")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prices.csv"]


def test_values_are_read_as_python_where_they_can_be():
    pairs = [
        "epochs=5",
        "end=None",
        "augment=False",
        "source=sample",
        "start=2010-01-01",
        "dropout=0.2",
        "output_dir=a=b",
    ]
    assert parse_parameters(pairs) == {
        "epochs": 5,
        "end": None,
        "augment": False,
        "source": "sample",
        "start": "2010-01-01",
        "dropout": 0.2,
        "output_dir": "a=b",
    }


@pytest.mark.slow
def test_train_runs_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [word for name, value in (SMALL | {"epochs": 1}).items() for word in ("-p", f"{name}={value}")]
    assert main(["train", "spy", *options]) == 0
    assert (tmp_path / "runs" / "SPY" / "report.html").is_file() and (tmp_path / "runs" / "SPY.ipynb").is_file()
    assert "holds the report" in capsys.readouterr().out


def test_help_costs_little():
    code = "import sys, time; from smlstm.using.commands import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules, time.process_time())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded, seconds = done.splitlines()[-1].split()
    assert {"train", "predict", "audit"} <= set(done.replace(",", " ").replace("{", " ").replace("}", " ").split())
    assert loaded == "False" and float(seconds) < 1.0
