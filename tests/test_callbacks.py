"""Callbacks: which events come, in which order and under which name, alone, in a walk, in refits and in an ensemble."""

import sys
import types

import pytest
from test_forecaster_use import SMALL, bars

from smlstm.learning.callbacks import Callback, TensorBoard
from smlstm.using.forecaster import Forecaster


class Diary(Callback):
    "Writes down what happens."

    def __init__(self):
        self.events = []

    def on_epoch_end(self, epoch, fold):
        self.events.append(("epoch", fold, epoch.epoch))

    def on_fit_end(self, history, fold):
        self.events.append(("fit", fold, len(history.epochs)))

    def on_fold_end(self, step):
        self.events.append(("fold", f"fold{step.number}", len(next(iter(step.forecasts.values())))))


TWO = SMALL | dict(training=dict(epochs=2))


def test_events_of_a_fit():
    diary, epochs = Diary(), []
    Forecaster(**TWO).fit(bars(), progress=False, callbacks=diary, on_epoch=epochs.append)
    assert diary.events == [("epoch", "", 0), ("epoch", "", 1), ("fit", "", 2)]
    assert [epoch.epoch for epoch in epochs] == [0, 1]


def test_events_of_a_walk_over_a_panel():
    diary, both = Diary(), {"SPY": bars(), "QQQ": bars(ticker="QQQ")}
    Forecaster(**TWO).cross_validation(both, n_splits=2, test_size=40, progress=False, callbacks=[diary, Callback()])
    one = lambda fold: [("epoch", fold, 0), ("epoch", fold, 1), ("fit", fold, 2), ("fold", fold, 40)]
    assert diary.events == one("fold0") + one("fold1")


def test_events_of_refits_have_names_of_their_own():
    diary = Diary()
    options = dict(n_splits=2, test_size=40, refit_every=20, progress=False, callbacks=[diary])
    Forecaster(**SMALL).cross_validation(bars(), **options)
    fits = [event[1:] for event in diary.events if event[0] == "fit"]
    assert fits == [("fold0", 1), ("fold0/refit1", 1), ("fold1", 1), ("fold1/refit1", 1)]
    assert [event for event in diary.events if event[0] == "fold"] == [
        *[("fold", "fold0", 20)] * 2,
        *[("fold", "fold1", 20)] * 2,
    ]


def test_events_of_an_ensemble_name_its_members():
    diary = Diary()
    settings = SMALL | dict(architecture=SMALL["architecture"] | dict(scales=[1, 5]))
    Forecaster(**settings).fit(bars(), progress=False, callbacks=diary)
    names = {event[1] for event in diary.events}
    assert {"meta", "member0", "member1"} <= names and "" not in names


def test_an_exception_in_a_callback_ends_the_training():
    class Enough(Exception):
        pass

    class Stop:
        def on_epoch_end(self, epoch, fold):
            raise Enough

    forecaster = Forecaster(**TWO)
    with pytest.raises(Enough):
        forecaster.fit(bars(), progress=False, callbacks=[Stop()])
    assert forecaster.series == {}


def test_callbacks_change_nothing():
    usual, watched = (
        Forecaster(**TWO).fit(bars(), progress=False, **options).predict() for options in ({}, {"callbacks": Diary()})
    )
    assert usual.equals(watched)


@pytest.mark.parametrize("wrong", [print, [object()], "tensorboard"])
def test_what_is_no_callback_is_refused(wrong):
    with pytest.raises(ValueError, match="has none of the methods on_epoch_end, on_fit_end, on_fold_end"):
        Forecaster(**SMALL).fit(bars(), progress=False, callbacks=wrong)
    with pytest.raises(ValueError, match="has none of the methods"):
        Forecaster(**SMALL).cross_validation(bars(), n_splits=2, progress=False, callbacks=wrong)


# ---------------------------------------------------------------- TensorBoard


def test_without_tensorboard_the_error_tells_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


def test_what_the_writer_is_given(monkeypatch, tmp_path):
    "A writer in TensorBoard's place: a run for each fold, a scalar for each loss and epoch, closed at the end."
    written, closed = [], []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, tag, value, step):
            written.append((self.folder, tag, float(value), step))

        def close(self):
            closed.append(self.folder)

    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    forecaster = Forecaster(**TWO).fit(bars(), progress=False, callbacks=TensorBoard(tmp_path))
    totals = [value for folder, tag, value, step in written if tag == "total/valid"]
    assert totals == [epoch.valid.total for epoch in forecaster.history.epochs]
    assert {tag for _, tag, _, _ in written} >= {"price/train", "direction/valid", "learning_rate", "seconds"}
    assert closed == [str(tmp_path)]
    Forecaster(**SMALL).cross_validation(
        bars(), n_splits=2, test_size=40, progress=False, callbacks=TensorBoard(tmp_path)
    )
    assert closed[1:] == [str(tmp_path / "fold0"), str(tmp_path / "fold1")]


def test_events_are_read_back_by_tensorboard_itself(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    forecaster = Forecaster(**TWO).fit(bars(), progress=False, callbacks=TensorBoard(tmp_path))
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("total/valid")]
    assert found == [(e.epoch, pytest.approx(e.valid.total, rel=1e-6)) for e in forecaster.history.epochs]
