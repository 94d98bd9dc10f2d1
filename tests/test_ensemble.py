"""The ensemble as others take it over: any split, any shape, exported, killed while training, damaged on disk."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kit import Window, check_pieces, state_shapes
from safetensors.torch import save_file

from smlstm.data.windows import create_sequences, create_tpu_dataloader
from smlstm.learning.checkpoints import ModelFileError, save_model
from smlstm.learning.settings import TrainConfig
from smlstm.model.losses import MultiObjectiveLoss
from smlstm.model.model import SMLSTMConfig
from smlstm.using.ensemble import (
    EnsembleConfig,
    SkillRecord,
    SMLSTMEnsemble,
    ensemble_config,
    load_ensemble,
    load_network,
    recent_correlation,
    weight_frame,
)
from smlstm.using.members import BatchedMembers, Member, MemberConfig, rolling_blocks
from smlstm.using.stacking import (
    default_members,
    distinct_specialists,
    fit_ensemble,
    fit_meta,
    inner_folds,
    is_continuing,
    weight_by_focus,
)

SMALL = SMLSTMConfig(n_features=3, hidden_size=8, n_layers=1, chunk_size=8)


def trained_like(config):
    torch.manual_seed(0)
    members = [Member(member) for member in config.members]
    for member in members:
        for head in (member.model.heads, member.model.direct):
            torch.nn.init.normal_(head.weight)
    ensemble = SMLSTMEnsemble(config, members)
    for part in (ensemble.meta_network.mixtures, ensemble.meta_network.readout, ensemble.meta_network.constant):
        torch.nn.init.normal_(part)
    return ensemble.eval()


KINDS = [
    default_members(SMALL),
    default_members(SMALL, (2, 3)),
    (MemberConfig(4, replace(SMALL, regime_transform="mlp")),),
    default_members(replace(SMALL, n_layers=2, d_state=0, value_transform="full", input_gate="sigmoid"), (1, 7)),
]


@pytest.mark.parametrize(
    "members, horizon", [*((members, 1) for members in KINDS), (KINDS[1], 3)], ids=range(len(KINDS) + 1)
)
def test_any_split_any_batch_gives_the_same_forecasts(members, horizon):
    check_pieces(
        trained_like(EnsembleConfig(members, horizon=horizon)).double(),
        torch.randn(3, 45, 3, dtype=torch.float64),
        ([45], [44, 1], [1] * 45, [9, 17, 19], [21, 21, 3]),
    )


def test_nothing_reaches_back_from_any_step():
    ensemble = trained_like(EnsembleConfig(default_members(SMALL))).double()
    x = torch.randn(1, 60, 3, dtype=torch.float64).requires_grad_()
    forecast, _ = ensemble(x)
    for t in (0, 4, 20, 41):
        (gradient,) = torch.autograd.grad(
            sum(part[0, t].sum() * w for part, w in zip(forecast, (1.0, 0.7, 0.3, 0.1))), x, retain_graph=True
        )
        assert not gradient[0, t + 1 :].any() and gradient[0, t].any()


def test_the_batch_has_the_gradients_of_the_loop():
    torch.manual_seed(0)
    members = [Member(MemberConfig(3, SMALL)).double().eval() for _ in range(3)]
    for member in members:
        torch.nn.init.normal_(member.model.heads.weight)
    together, x = BatchedMembers(members).eval(), torch.randn(2, 40, 3, dtype=torch.float64)
    torch.manual_seed(1)
    weight = torch.randn(2, 3, 40, dtype=torch.float64)
    (together(x)[0].price * weight).sum().backward()
    for m, member in enumerate(members):
        (member(x)[0].price * weight[:, m]).sum().backward()
        for name, p in member.model.named_parameters():
            batched = dict(together.model.named_parameters())[name].grad
            assert (p.grad is None) == (batched is None) or not batched[m].any()
            if p.grad is not None:
                torch.testing.assert_close(batched[m], p.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("horizon", [1, 4])
def test_a_forecast_counts_for_its_record_when_its_outcome_is_known(horizon):
    said, came = torch.randn(2, 30, 5), torch.randn(2, 30, 5)
    nothing = SkillRecord(torch.zeros(2, horizon, 5), torch.zeros(2, 3, 5))
    lately, _ = recent_correlation(said, came, nothing)
    for changed, first in ((said, 10 + horizon), (came, 10)):
        other = changed.clone()
        other[:, 10] += 1
        now, _ = recent_correlation(other if changed is said else said, other if changed is came else came, nothing)
        moved = (now != lately).any(2).any(0)
        assert not moved[:first].any() and moved[first:].all()


def test_a_member_learns_from_its_half_of_the_rows():
    (_, y), rows = data(), slice(0, 300)
    whole, half = weight_by_focus(y, None, rows), weight_by_focus(y, "continuing", rows)
    assert whole is y and set(half[:, 3]) == {0.0, 2.0} and half[rows, 3].mean() == pytest.approx(1)
    other = weight_by_focus(y, "reverting", rows)
    assert (half[:, 3] + other[:, 3] == 2).all()
    y[200:] = 5
    assert (
        weight_by_focus(y, "continuing", slice(0, 200))[:200]
        == weight_by_focus(data()[1], "continuing", slice(0, 200))[:200]
    ).all()
    with pytest.raises(ValueError, match="focus='up'"):
        MemberConfig(1, SMALL, "up")


def test_only_the_meta_network_learns():
    ensemble = trained_like(EnsembleConfig(default_members(SMALL))).train()
    assert not any(module.training for module in ensemble.groups.modules())
    ensemble(torch.randn(2, 30, 3))[0].price.sum().backward()
    assert all(
        (p.grad is None) == name.startswith("groups")
        for name, p in ensemble.named_parameters()
        if "persistence" not in name and "regimes.bias" not in name and "cell." not in name
    )


def test_the_state_does_not_grow_and_keeps_the_batch_in_front():
    ensemble = trained_like(EnsembleConfig(default_members(SMALL)))
    short, long = (state_shapes(ensemble(torch.randn(2, T, 3))[1]) for T in (3, 300))
    assert short == long and all(shape[0] == 2 for shape in short)


def test_exports(tmp_path):
    ensemble = trained_like(EnsembleConfig(default_members(SMALL, (1, 5))))
    with torch.no_grad():
        program = torch.export.export(Window(ensemble), (torch.randn(4, 22, 3),), strict=False)
    torch.export.save(program, tmp_path / "ensemble.pt2")
    again, x = torch.export.load(tmp_path / "ensemble.pt2").module(), torch.randn(4, 22, 3)
    for new, old in zip(again(x), ensemble(x)[0]):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)


def test_the_configuration_survives_json():
    config = EnsembleConfig(default_members(SMALL), width=4)
    assert ensemble_config(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, c: (t, c.replace('"scale": 5', '"scale": 0')),
        lambda t, c: (t, c.replace('"hidden_size": 8', '"hidden_size": 16')),
        lambda t, c: (dict(list(t.items())[1:]), c),
        lambda t, c: (t, c.replace('"width"', '"breadth"')),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, spoil):
    from safetensors import safe_open

    path, ensemble = tmp_path / "e.safetensors", trained_like(EnsembleConfig(default_members(SMALL)))
    save_model(ensemble, path)
    with safe_open(path, "pt") as file:
        tensors, config = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["smlstm_config"]
    tensors, config = spoil(tensors, config)
    save_file(tensors, path, {"smlstm_config": config})
    for load in (load_ensemble, load_network):
        with pytest.raises(ModelFileError, match="does not fit"):
            load(path)


def test_blocks_are_means_of_complete_blocks_however_long():
    x = torch.randn(1, 50, 2, dtype=torch.float64)
    for scale in (1, 2, 21, 60):
        blocks, rows = rolling_blocks(x, torch.zeros(1, scale - 1, 2, dtype=torch.float64), scale)
        padded = torch.cat([torch.zeros(1, scale, 2, dtype=torch.float64), x], 1)
        by_hand = torch.stack([padded[:, t + 1 : t + 1 + scale].mean(1) for t in range(50)], 1)
        torch.testing.assert_close(blocks, by_hand)
        assert rows.shape[1] == scale - 1


def test_inner_folds_never_look_ahead():
    for start, stop, folds, horizon in ((0, 1000, 2, 1), (17, 500, 3, 5), (100, 163, 2, 10)):
        for train, test in inner_folds(slice(start, stop), folds, horizon):
            assert (
                train.start == start and train.stop <= test.start - horizon and test.stop <= stop and train.stop > start
            )
        assert test.stop == stop


def data(n=400, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 3)).astype(np.float32)
    y = np.column_stack([x[:, 0] + rng.standard_normal(n), rng.standard_normal(n) > 0, rng.standard_normal(n)]).astype(
        np.float32
    )
    return x, y


def split(rows):
    middle = rows.start + round(0.8 * (rows.stop - rows.start))
    return slice(rows.start, middle), slice(middle, rows.stop)


def loaders(x, y, learn, valid, seed):
    cut = lambda rows, shuffle: create_tpu_dataloader(
        create_sequences(x[rows], y[rows], 16, False, 8), 8, shuffle, seed=seed
    )
    return cut(learn, True), cut(valid, False)


def market(two_halves, n=1200, seed=0):
    """Features, targets, and forecasts of three members: one knows the market, one always expects it to
    go on, one to revert. Where it has no halves all agree."""
    rng = np.random.default_rng(seed)
    sign = np.cumprod(np.where(rng.random(n + 1) < 0.99, 1, -1)) if two_halves else np.ones(n + 1)
    r = rng.standard_normal(n + 1)
    for t in range(n):
        r[t + 1] += 0.6 * sign[t + 1] * r[t]
    r = (r / r.std()).astype(np.float32)
    y = np.column_stack([r[1:], r[1:] > 0, np.zeros(n)]).astype(np.float32)
    opinions = np.column_stack([0.6 * sign[1:], np.full(n, 0.6), np.full(n, -0.6 if two_halves else 0.6)])
    said = (opinions * r[:-1, None])[..., None] * [1, 2, 0] + 0.4 * rng.standard_normal((n, 3, 3))
    return np.column_stack([r[:-1], np.zeros((n, 2))]).astype(np.float32), y, said.astype(np.float32)


def with_focus(*focuses):
    return EnsembleConfig(tuple(MemberConfig(1, SMALL, focus) for focus in focuses))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("two_halves", [False, True])
def test_members_for_half_of_the_market_stand_where_it_has_no_halves(two_halves, seed):
    x, y, said = market(two_halves, seed=seed)
    meta, _ = fit_meta(
        with_focus(None, "continuing", "reverting"),
        said,
        x,
        y,
        *split(slice(0, 1200)),
        loaders,
        TrainConfig(epochs=1, warmup_epochs=0, pos_weight=1.0),
        device="cpu",
        progress=False,
    )
    weights = meta.mixtures.softmax(-1).detach()[:, 1, 1:3]
    assert (weights < 1e-6).all() if two_halves else (weights > 0.15).all()


def test_who_is_half_right():
    x, y, said = market(True)
    continues = is_continuing(y, slice(0, 1200))
    half = lambda *focuses: distinct_specialists(with_focus(*focuses), said, y, continues, MultiObjectiveLoss(1.0))
    assert half(None, "continuing", "reverting") == (1, 2)
    assert half(None, "reverting", "continuing") == ()  # each is worse where it was trained
    assert half(None, None, "reverting") == (2,)  # nobody to compare with
    assert half("continuing", "continuing", "reverting") == half(None, None, None) == ()  # nobody else would be left


QUICK = dict(
    split=split, loaders=loaders, training=TrainConfig(epochs=2, warmup_epochs=1), device="cpu", progress=False
)


def test_interrupted_training_ends_where_the_uninterrupted_does(tmp_path, monkeypatch):
    import smlstm.using.stacking as stacking

    (x, y), config = data(), EnsembleConfig(default_members(SMALL, (1, 4)))
    whole, _ = fit_ensemble(config, x, y, slice(0, 300), **QUICK)
    real, calls = stacking.fit, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(stacking, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        fit_ensemble(config, x, y, slice(0, 300), checkpoint_dir=tmp_path, resume=True, **QUICK)
    monkeypatch.setattr(stacking, "fit", real)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/best.safetensors")}
    again, _ = fit_ensemble(config, x, y, slice(0, 300), checkpoint_dir=tmp_path, resume=True, **QUICK)
    assert len(before) == 5 and all(path.stat().st_mtime_ns == then for path, then in before.items())
    for one, other in zip(whole.state_dict().values(), again.state_dict().values()):
        assert torch.equal(one, other)


def test_rows_after_the_training_rows_have_no_influence():
    (x, y), config = data(), EnsembleConfig(default_members(SMALL, (1, 4)))
    one, _ = fit_ensemble(config, x, y, slice(20, 300), **QUICK)
    x[300:], y[300:] = 7, 7
    other, _ = fit_ensemble(config, x, y, slice(20, 300), **QUICK)
    same = [torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values())]
    assert all(same)
    assert weight_frame(one, x).iloc[:, :-1].sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)


def test_the_record_of_the_contest_is_whole():
    from smlstm.evidence.ensemble import CONTEST_SEEDS, PLANTED, read_scores, regret_table

    scores = read_scores(Path(__file__).parent.parent / "nbs" / "evidence" / "ensemble.json")
    rivals = [*EnsembleConfig(default_members(SMALL)).names, "equal weights", "chosen before", "ensemble"]
    assert [tuple(row) for row in scores[["series", "seed", "forecaster"]].to_numpy()] == [
        (name, seed, rival) for name in PLANTED for seed in CONTEST_SEEDS for rival in rivals
    ]
    table = regret_table(scores)
    noise = scores[scores.series == "noise"].groupby("forecaster").direction.mean()
    assert table.over_best["noise"] == pytest.approx(
        noise["ensemble"] / noise.drop(["equal weights", "chosen before", "ensemble"]).min()
    )
