"""The list of mutants fits the library as it is, and the script tells what is caught from what is not."""

import re
import shlex
from argparse import Namespace

import mutants
import pytest

LISTED = mutants.chosen(Namespace(list=mutants.TESTS / "mutants.toml", only="", skip="", sample=0, seed=0))


def test_at_least_a_hundred_with_names_of_their_own():
    assert len({mutant["name"] for mutant in LISTED}) == len(LISTED) >= 100


def test_every_mutant_finds_its_text_once():
    "Whoever changes such a line changes the list with it."
    texts = [path.read_text(encoding="utf-8") for path in mutants.PACKAGE.rglob("*.py")]
    counts = {mutant["name"]: sum(text.count(mutant["find"]) for text in texts) for mutant in LISTED}
    assert {name: count for name, count in counts.items() if count != 1} == {}


def test_every_mutant_names_tests_that_are_there():
    files = {word for mutant in LISTED for word in shlex.split(mutant["tests"]) if re.fullmatch(r"test_\w+\.py", word)}
    assert files and [name for name in files if not (mutants.TESTS / name).is_file()] == []


@pytest.mark.parametrize(
    "replace, outcome", [("3 * x", "caught"), ("x + x", "SURVIVED"), ("2 *", "broken"), (None, "stale")]
)
def test_outcomes(tmp_path, replace, outcome):
    "Of a package of one line with one test; afterwards it is as it was."
    package, tests = tmp_path / mutants.PACKAGE.name, tmp_path / "test_toy.py"
    package.mkdir()
    (package / "__init__.py").write_text("double = lambda x: 2 * x\n", encoding="utf-8")
    tests.write_text("from smlstm import double\n\n\ndef test_double():\n    assert double(4) == 8\n", encoding="utf-8")
    mutant = {"find": "2 * x" if replace else "4 * x", "replace": replace, "tests": str(tests)}
    assert mutants.verdict(tmp_path, mutant)[0] == outcome
    assert (package / "__init__.py").read_text(encoding="utf-8") == "double = lambda x: 2 * x\n"
