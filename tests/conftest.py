"""Shared options: long proofs carry the `slow` mark and run with `pytest --slow`."""

import os

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, so that a change is judged by itself; "search" draws new ones, as the nightly run does
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long proofs")
    parser.addoption("--fuzz", type=int, default=1, help="so many times as many cases of tests/test_outside.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long proof, run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long proof: run with --slow"))


@pytest.fixture
def yahoo(monkeypatch):
    "A local server in Yahoo's place, see yahoo_kit."
    from yahoo_kit import serve

    yield from serve(monkeypatch)


@pytest.fixture
def nowhere(monkeypatch):
    "No connection to Yahoo."
    from yahoo_kit import point_nowhere

    point_nowhere(monkeypatch)
