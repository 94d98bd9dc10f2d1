"""The Scalar-Matrix LSTM from its equations alone, in float64 NumPy: step by step, no stabilizer, chunks or kernels.

Nothing comes from the library but the names of parameters (`state_dict`) and of settings. One sequence at a time."""

from collections import namedtuple

import numpy as np

FAST, SLOW = 12, 26  # spans of the two moving averages, in steps
FASTEST = 1.9  # bound of |lambda| dt
Mix = namedtuple("Mix", "w A B V W a b c D s")  # coefficients of one head; A, B, V, W may be None
Memory = namedtuple("Memory", "C n X Cm")  # what one head carries, on its true scale
CellState = namedtuple("CellState", "series heads")  # the whole series of the signals, a Memory for each head


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, weight, bias):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def plain_memory(q, k, v, log_i, log_f, theta=1.0, C=0.0, n=0.0):
    "C_t = f C_{t-1} + i v k^T, n_t = f n_{t-1} + i k, h_t = C_t q / max(|n_t . q|, theta): h [T, d], C, n."
    h = []
    for t in range(len(q)):
        f, i = np.exp(log_f[t]), np.exp(log_i[t])
        C = f * C + i * np.outer(v[t], k[t])
        n = f * n + i * k[t]
        h.append(C @ q[t] / max(abs(n @ q[t]), theta))
    return np.array(h), C, n


def transformed(C, w, mix):
    "Regime transforms: sum over r of w_r A_r C B_r^T, or of w_r (c + W_r max(0, V_r c)) for every row c of C."
    total = np.zeros_like(C)
    for r in range(len(w)):
        if mix.V is not None:
            total += w[r] * np.array([c + mix.W[r] @ np.maximum(0, mix.V[r] @ c) for c in C])
            continue
        A, B = (np.eye(len(C)) if M is None else M[r] if M.ndim == 3 else np.diag(M[r]) for M in (mix.A, mix.B))
        total += w[r] * A @ C @ B.T
    return total


def mixed_memory(q, k, v, log_i, log_f, mix, theta=1.0, memory=None):
    "The memory through regimes, a diagonal state space of every entry, and persistence: h [T, d], the last Memory."
    d, N = q.shape[1], len(mix.c)
    C, n, X, Cm = memory or (np.zeros((d, d)), np.zeros(d), np.zeros((N, d, d)), np.zeros((d, d)))
    h = []
    for t in range(len(q)):
        f, i = np.exp(log_f[t]), np.exp(log_i[t])
        C = f * C + i * np.outer(v[t], k[t])
        n = f * n + i * k[t]
        Cr = transformed(C, mix.w[t], mix)
        X = np.array([mix.a[t, j] * X[j] + mix.b[t, j] * Cr for j in range(N)]).reshape(N, d, d)
        before, Cm = Cm, sum((mix.c[j] * X[j] for j in range(N)), mix.D * Cr)
        Cf = (1 - mix.s[t]) * Cm + mix.s[t] * before
        h.append(Cf @ q[t] / max(abs(n @ q[t]), theta))
    return np.array(h), Memory(C, n, X, Cm)


def ema(x, span):
    "e_0 = x_0, e_t = alpha x_t + (1 - alpha) e_{t-1}, alpha = 2 / (span + 1)."
    e, alpha = [x[0]], 2 / (span + 1)
    for value in x[1:]:
        e.append(alpha * value + (1 - alpha) * e[-1])
    return np.array(e)


def autocorrelation(window):
    "Lag-one autocorrelation of the points of one window; 0 for a flat one and for fewer than three points."
    d = window - window.mean()
    spread = np.sqrt((d**2).sum() * (d[1:] ** 2).sum())
    return (d[:-1] * d[1:]).sum() / spread if len(d) > 2 and spread > 0 else 0.0


def signals(x, window=20, eps=1e-6):
    "Volatility over its mean so far, trend strength, agreement of two averages, signed autocorrelation: [T, 4]."
    sigma = [x[max(0, t - window) : t + 1].std(ddof=1) if t else 0.0 for t in range(len(x))]
    so_far = [np.mean(sigma[: t + 1]) for t in range(len(x))]
    r = np.array([autocorrelation(x[t - window : t + 1]) if t >= window else 0.0 for t in range(len(x))])
    moves = [np.sign(np.diff(ema(x, span), prepend=x[0])) for span in (FAST, SLOW)]
    return np.stack([sigma / (np.array(so_far) + eps), (abs(r) + 1) / 2, moves[0] * moves[1], r], -1)


def state_space(p, method, volatility, trend, dt_min=0.01, dt_max=1.0):
    "Discrete a, b [T, N] of lambda < 0 at the market's step size, dt_min^(1 - share) dt_max^share."
    base, by_volatility, by_trend = p["clock.weights"]
    share = sigmoid(base + by_volatility * (volatility - 1) / (volatility + 1) + by_trend * (2 * trend - 1))
    dt = (dt_min ** (1 - share) * dt_max**share)[:, None]
    lam = -FASTEST / dt_max * sigmoid(p["rate"])
    if method == "zoh":
        return np.exp(lam * dt), (np.exp(lam * dt) - 1) / lam * p["b"]
    a = (2 + dt * lam) / (2 - dt * lam)
    return a, dt * (1 + a) / 2 * p["b"]


def inside(p, prefix):
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def cell_mix(p, settings, x, signals):
    "Mix of every head for a normalized input x [T, D] and signals [T, 4]; the regime weights [T, R] are `w` of each."
    score = np.concatenate([x, signals], -1) @ p["regimes.weight"].T + p["regimes.bias"]
    w = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    a = b = np.zeros((len(x), 0))
    c, D, s = np.zeros(0), 1.0, np.zeros(len(x))
    if settings.d_state:
        a, b = state_space(inside(p, "state_space."), settings.ssm_method, signals[:, 0], signals[:, 1])
        c, D = p["state_space.c"], p["state_space.skip"]
    if settings.trend:
        s = sigmoid(p["persistence"]) * signals[:, 1]
    sides = [p.get(name, [None] * settings.n_heads) for name in ("value_transform", "key_transform", "inner", "outer")]
    return [Mix(w, *side, a, b, c, D, s) for side in zip(*sides)]


def cell(p, settings, x, state=None):
    "One cell over x [T, D], going on from `state`: h [T, D], regime weights [T, R] and the CellState."
    size, H, d = settings.hidden_size, settings.n_heads, settings.hidden_size // settings.n_heads
    x = layer_norm(x, p["norm.weight"], p["norm.bias"])
    series = np.concatenate([state.series if state else [], x @ p["signal_proj.weight"][0]])
    mixes = cell_mix(p, settings, x, signals(series, settings.window)[-len(x) :])
    q, k, v, o, i, f = np.split(x @ p["project.weight"].T + p["project.bias"], np.cumsum([size] * 4 + [H]), -1)
    log_f = np.log(sigmoid(f))
    cap, exponential = settings.gate_cap, settings.input_gate == "exponential"
    log_i = cap * np.tanh(i / cap) if exponential else np.log(sigmoid(i))
    h, heads = [], []
    for j, mix in enumerate(mixes):
        own, memory = slice(j * d, (j + 1) * d), state.heads[j] if state else None
        parts = q[:, own], k[:, own] / np.sqrt(d), v[:, own], log_i[:, j], log_f[:, j]
        out, memory = mixed_memory(*parts, mix, settings.theta, memory)
        h.append(out)
        heads.append(memory)
    return sigmoid(o) * np.concatenate(h, -1), mixes[0].w, CellState(series, heads)


def model(p, settings, x, states=None):
    "Features x [T, F] to price, direction, volatility [T, 3], regimes [T, R], states; T = 1 and `states` is a stream."
    stream, after = x @ p["embed.weight"].T + p["embed.bias"], []
    for layer in range(settings.n_layers):
        h, regimes, state = cell(inside(p, f"cells.{layer}."), settings, stream, states[layer] if states else None)
        stream = stream + h @ p[f"outs.{layer}.weight"].T + p[f"outs.{layer}.bias"]
        after.append(state)
    heads = layer_norm(stream, p["norm.weight"], p["norm.bias"]) @ p["heads.weight"].T + p["heads.bias"]
    if settings.shortcut:
        heads = heads + x @ p["direct.weight"].T
    return heads, regimes, after
