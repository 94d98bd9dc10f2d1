"""Frames for properties: any frame, and plain ones."""

import numpy as np
import pandas as pd
from hypothesis import strategies as st

from smlstm.data.frames import COLUMNS

prices = st.one_of(st.floats(0.01, 1e6), st.sampled_from([np.nan, 0.0, -1.0, np.inf, 100.0, 100.0, 100.0]))
days = st.integers(0, 400).map(lambda n: pd.Timestamp("2020-01-01") + pd.Timedelta(days=n))


@st.composite
def frames(draw):
    dates = draw(st.lists(days, max_size=25))
    rows = draw(st.lists(st.tuples(*[prices] * 5), min_size=len(dates), max_size=len(dates)))
    return pd.DataFrame(rows, columns=COLUMNS, index=pd.DatetimeIndex(dates, name="date"), dtype=float)


def plain(dates, seed):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        rng.uniform(1, 9, (len(dates), 5)),
        index=pd.DatetimeIndex(sorted(set(dates)), name="date")[: len(dates)],
        columns=COLUMNS,
    )
