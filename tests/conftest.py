"""Shared options: long proofs carry the `slow` mark and run with `pytest --slow`."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long proofs")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long proof, run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long proof: run with --slow"))
