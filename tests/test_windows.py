"""Folds, scaling and batches."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import TimeSeriesSplit

from smlstm.data.windows import Scaler, create_sequences, create_tpu_dataloader, fit_scaler, join_sequences, time_folds

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(
    st.integers(1, 400),
    st.integers(2, 8),
    st.integers(0, 30),
    st.none() | st.integers(1, 60),
    st.none() | st.integers(1, 60),
)
def test_folds_are_those_of_scikit_learn_and_keep_their_gap(n, splits, gap, test_size, longest):
    try:
        folds = time_folds(n, splits, gap, test_size, longest)
    except ValueError as error:
        assert len(str(error)) > 20
        return
    expected = TimeSeriesSplit(splits, gap=gap, test_size=test_size, max_train_size=longest).split(np.empty(n))
    for fold, (train, test) in zip(folds, expected):
        assert list(range(n)[fold.train]) == list(train) and list(range(n)[fold.test]) == list(test)
        assert fold.test.start - fold.train.stop == gap and len(train)
    assert [fold.number for fold in folds] == list(range(splits)) and folds[-1].test.stop == n


def table(n=50, f=3, seed=0):
    return pd.DataFrame(np.random.default_rng(seed).normal(5, 3, (n, f)), columns=[f"c{i}" for i in range(f)])


def test_the_scaler_knows_only_what_it_was_fitted_on():
    frame = table()
    scaler = fit_scaler(frame[:30])
    changed = frame.copy()
    changed[30:] = 1e9
    assert fit_scaler(changed[:30]) == scaler
    scaled = scaler.transform(frame[:30])
    assert (
        np.allclose(scaled.mean(0), 0, atol=1e-6)
        and np.allclose(scaled.std(0), 1, atol=1e-6)
        and scaled.dtype == np.float32
    )


def test_the_scaler_survives_json_and_other_orders_of_columns():
    scaler = fit_scaler(table())
    again = Scaler.from_dict(json.loads(json.dumps(scaler.to_dict())))
    frame = table(seed=1)
    assert again == scaler
    assert np.array_equal(again.transform(frame[["c2", "c0", "c1"]].assign(more=1.0)), scaler.transform(frame))


def test_the_scaler_clips_constants_and_inverts():
    frame = table().assign(constant=7.0)
    scaler = fit_scaler(frame, clip=2.0)
    scaled = scaler.transform(frame + 1000)
    assert np.abs(scaled).max() == 2.0 and np.isfinite(scaled).all()
    assert (scaler.transform(frame)[:, 3] == 0).all()
    free = fit_scaler(frame, clip=None)
    assert np.allclose(free.inverse(free.transform(frame)), frame, atol=1e-5)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda f: f.iloc[:0], "no rows"),
        (lambda f: f.assign(c1=f.c1.where(f.index != 4)), "c1"),
        (lambda f: f.assign(c2=np.inf), "c2"),
    ],
)
def test_the_scaler_refuses_what_it_cannot_fit(spoil, says):
    with pytest.raises(ValueError, match=says):
        fit_scaler(spoil(table()))


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="c1"):
        fit_scaler(table()).transform(table().drop(columns="c1"))


@QUICK
@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 3), st.integers(-1, 70), st.integers(0, 9))
def test_any_arrays_give_windows_or_a_clear_error(n, f, k, length, stride):
    x, y = np.arange(n * f, dtype=np.float32).reshape(n, f), np.arange(n * k, dtype=np.float32).reshape(n, k)
    try:
        data = create_sequences(x, y, length, augment=False, stride=stride)
    except ValueError as error:
        assert "seq_length" in str(error) and (length < 1 or length > n or stride < 1)
        return
    starts = range(0, n - length + 1, stride)
    assert len(data) == len(starts)
    for i, start in enumerate(starts):
        a, b = data[i]
        assert np.array_equal(a, x[start : start + length]) and np.array_equal(b, y[start : start + length])
    assert torch.equal(data[-1][0], data[len(data) - 1][0])
    with pytest.raises(IndexError):
        data[len(data)]


@QUICK
@given(
    st.lists(st.integers(5, 60), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 17),
    st.integers(0, 40),
    st.data(),
)
def test_moving_windows_stay_in_their_series_and_can_be_resumed(rows, length, stride, size, epoch, data):
    series = [np.arange(n, dtype=np.float32)[:, None] + 1000 * i for i, n in enumerate(rows)]
    loader = create_tpu_dataloader(
        join_sequences([create_sequences(x, x, length, True, stride, noise=0.0, moving=True) for x in series]), size
    )
    loader.set_epoch(epoch)
    batches = list(loader)
    assert {tuple(b.x.shape) for b in batches} == {(size, length, 1)} and all(torch.equal(b.x, b.y) for b in batches)
    windows = np.concatenate([b.x[b.mask > 0, :, 0].numpy() for b in batches])
    assert (np.diff(windows) == 1).all()
    phases = {
        int(w.min())
        for i, n in enumerate(rows)
        for w in [windows[windows[:, 0] // 1000 == i] - 1000 * i]
        if n - length >= stride - 1
    }
    assert len(phases) <= 1 and all(phase < stride for phase in phases)  # one phase for all
    for i, n in enumerate(rows):
        starts = np.sort(windows[windows[:, 0] // 1000 == i][:, 0] - 1000 * i)
        assert (
            len(starts) == (n - length) // stride + 1 and starts[-1] <= n - length and (np.diff(starts) <= stride).all()
        )
    skip = data.draw(st.integers(0, len(batches)))
    loader.set_epoch(epoch)
    rest = iter(loader)
    for _ in range(skip):
        next(rest)
    assert all(torch.equal(a.x, b.x) for a, b in zip(rest, batches[skip:], strict=True))


@QUICK
@given(st.integers(5, 40), st.integers(1, 5), st.integers(1, 17), st.booleans(), st.booleans())
def test_every_sequence_once_and_every_batch_of_one_shape(n, length, size, shuffle, drop):
    x = np.arange(n, dtype=np.float32)[:, None]
    data = create_sequences(x, x, length, augment=False)
    if drop and len(data) < size:
        with pytest.raises(ValueError, match="drop_last"):
            create_tpu_dataloader(data, size, shuffle, drop)
        return
    loader = create_tpu_dataloader(data, size, shuffle, drop)
    batches = list(loader)
    assert len(batches) == len(loader) and {tuple(b.x.shape) for b in batches} == {(size, length, 1)}
    seen = [int(v) for b in batches for v, m in zip(b.x[:, 0, 0], b.mask) if m]
    assert len(set(seen)) == len(seen) == (len(data) // size * size if drop else len(data))
    assert shuffle or seen == sorted(seen)
    assert all(torch.isfinite(b.x).all() and torch.isfinite(b.y).all() for b in batches)


def loader(seed=0, augment=True, **more):
    rng = np.random.default_rng(0)
    data = create_sequences(
        rng.normal(size=(200, 3)) * [1, 10, 100], rng.normal(size=(200, 2)), 20, augment=augment, seed=seed
    )
    return create_tpu_dataloader(data, 32, seed=seed, **more)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b))


def test_a_resumed_epoch_sees_what_an_uninterrupted_one_saw():
    straight = loader()
    epochs = [list(straight) for _ in range(3)]
    resumed = loader()
    resumed.set_epoch(2)
    assert all(same(a, b) for a, b in zip(epochs[2], resumed))
    assert not all(same(a, b) for a, b in zip(epochs[0], epochs[1]))
    assert not all(same(a, b) for a, b in zip(epochs[0], loader(seed=1)))


def test_noise_is_of_the_size_it_says_and_only_where_it_is_wanted():
    noisy, clean = list(loader(shuffle=False)), list(loader(augment=False, shuffle=False))
    gap = torch.cat([(a.x - b.x)[a.mask > 0] for a, b in zip(noisy, clean)]).flatten(0, 1)
    expected = 0.001 * torch.tensor([1.0, 10.0, 100.0])
    assert torch.allclose(gap.std(0), expected, rtol=0.2) and torch.allclose(
        gap.mean(0) / expected, torch.zeros(3), atol=0.1
    )
    assert all(torch.equal(a.y, b.y) for a, b in zip(noisy, clean))
    data = loader().dataset
    assert torch.equal(data[0][0], data.data[:20])  # stored rows stay clean


def test_sequences_are_views():
    x = np.random.default_rng(0).normal(size=(5000, 30)).astype(np.float32)
    data = create_sequences(x, x[:, :3], 250)
    pointers = {data[i][0].untyped_storage().data_ptr() for i in (0, 7, len(data) - 1)}
    assert pointers == {data.data.untyped_storage().data_ptr()} and data.data.numel() == x.size


@pytest.mark.parametrize(
    "x, y, says",
    [
        (np.ones((9, 2)), np.ones((8, 1)), "same n"),
        (np.ones(9), np.ones((9, 1)), "same n"),
        (np.ones((9, 2)), np.where(np.arange(9)[:, None] == 6, np.nan, 1.0), "targets.*row 6"),
        (np.where(np.arange(9)[:, None] == 2, np.inf, np.ones((9, 2))), np.ones((9, 1)), "features.*row 2"),
    ],
)
def test_unusable_arrays_are_refused(x, y, says):
    with pytest.raises(ValueError, match=says):
        create_sequences(x, y, 3)


def test_the_callers_arrays_are_not_touched():
    x = np.ones((30, 2), np.float32)
    data = create_sequences(x, x, 5)
    for _ in create_tpu_dataloader(data, 4):
        pass
    assert (x == 1).all()


def test_a_tpu_gets_whole_tiles(caplog, monkeypatch):
    x = np.ones((100, 2), np.float32)
    data = create_sequences(x, x, 5)
    assert create_tpu_dataloader(data, 60, device="xla").batch_size == 64 and "rounded up to 64" in caplog.text
    caplog.clear()
    assert (
        create_tpu_dataloader(data, 64, device="xla").batch_size == 64
        and create_tpu_dataloader(data, 60, device="cpu").batch_size == 60
    )
    assert caplog.text == ""


def test_batches_arrive_on_the_device_in_order():
    there, here = list(loader(device="cpu")), list(loader())
    assert len(there) == len(here) and all(same(a, b) for a, b in zip(there, here))


def test_the_next_batch_leaves_before_the_current_one_is_used(monkeypatch):
    from smlstm.data import windows as sequences

    made = []
    real = sequences._batches
    monkeypatch.setattr(sequences, "_batches", lambda *a: (made.append(1) or b for b in real(*a)))
    batches = iter(loader(device="cpu"))
    next(batches)
    assert len(made) == 2


@pytest.mark.parametrize("size", [0, -3, 2.5, "8", None, True])
def test_a_batch_has_at_least_one_sequence(size):
    with pytest.raises(ValueError, match="batch_size"):
        create_tpu_dataloader(loader().dataset, size)


@pytest.mark.parametrize(
    "change", [dict(gap=-1), dict(gap=1.5), dict(test_size=0), dict(test_size=-5), dict(max_train_size=0)], ids=str
)
def test_folds_that_would_overlap_or_be_empty_are_refused(change):
    assert time_folds(100, gap=0)[0] == (0, slice(0, 20), slice(20, 36))
    with pytest.raises(ValueError, match=next(iter(change))):
        time_folds(100, **change)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ((5.0,), "seq_length"),
        (("5",), "seq_length"),
        ((5, True, 1.5), "stride"),
        ((5, True, 1, 0, -1.0), "noise"),
        ((5, True, 1, 0, np.nan), "noise"),
    ],
)
def test_windows_are_counted_in_whole_rows(wrong, says):
    with pytest.raises(ValueError, match=says):
        create_sequences(np.ones((9, 2)), np.ones((9, 1)), *wrong)
