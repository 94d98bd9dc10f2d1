"""What may be asked for."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smlstm.data.request import InvalidRequest, check_ticker

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(st.text(max_size=25) | st.none() | st.integers())
def test_a_ticker_is_plain_or_refused(text):
    try:
        symbol = check_ticker(text)
    except InvalidRequest:
        return
    assert symbol == symbol.upper() and symbol.isascii() and not set(symbol) & set("/\\:\0\n ") and ".." not in symbol


@pytest.mark.parametrize("symbol", ["NIFTY_FIN_SERVICE.NS", "^NSEI", "BRK-B", "M&M.NS", "0700.HK", "BTC-USD", "ES=F"])
def test_symbols_of_yahoo_are_accepted(symbol):
    assert check_ticker(symbol.lower()) == symbol


@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_was_a_symbol_that_yaml_took(value):
    with pytest.raises(InvalidRequest, match="quote it"):
        check_ticker(value)
