"""Deliberate faults, one at a time, in a copy of the package: do the tests that should notice notice?

    python tests/mutants.py                 # all of mutants.toml
    python tests/mutants.py --sample 12     # a dozen, drawn with --seed
    python tests/mutants.py --only gate     # those whose name contains a word
    python tests/mutants.py --skip kernel   # all but those (a kernel is compiled anew for each of its mutants)

A mutant replaces one text, found exactly once in the whole package, and names the tests that must fail. It is `caught`
when they fail, `SURVIVED` when they pass, `stale` when its text is not found once, `broken` when they could not run.
The exit status is 0 when every mutant was caught."""

import argparse
import collections
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings it
    import tomli as tomllib

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "smlstm"
LIMIT = 600  # seconds for the tests of one mutant; a program that hangs has been noticed


def chosen(args):
    "The mutants that the command line asks for."
    mutants = tomllib.loads(args.list.read_text(encoding="utf-8"))["mutant"]
    mutants = [mutant for mutant in mutants if args.only in mutant["name"]]
    mutants = [mutant for mutant in mutants if not args.skip or args.skip not in mutant["name"]]
    return random.Random(args.seed).sample(mutants, min(args.sample, len(mutants))) if args.sample else mutants


def place(package, mutant):
    "The one module that holds the mutant's text, or None."
    counts = {path: path.read_text(encoding="utf-8").count(mutant["find"]) for path in package.rglob("*.py")}
    return max(counts, key=counts.get) if sum(counts.values()) == 1 else None


def run_tests(folder, tests):
    "`caught`, `SURVIVED` or `broken`: what pytest makes of the package in `folder`, and its last lines."
    names = [str(TESTS / word) if word.split("::")[0].endswith(".py") else word for word in shlex.split(tests)]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "caught", "ran out of time"
    return {0: "SURVIVED", 1: "caught"}.get(done.returncode, "broken"), "\n".join(done.stdout.splitlines()[-3:])


def verdict(folder, mutant):
    "Apply one mutant to the copy in `folder`, run its tests, and put the module back as it was, its time too."
    module = place(folder / PACKAGE.name, mutant)
    if module is None:
        return "stale", "its text is not in the package exactly once"
    text, times = module.read_text(encoding="utf-8"), module.stat()
    try:
        module.write_text(text.replace(mutant["find"], mutant["replace"]), encoding="utf-8")
        return run_tests(folder, mutant["tests"])
    finally:
        module.write_text(text, encoding="utf-8")
        os.utime(module, ns=(times.st_atime_ns, times.st_mtime_ns))  # compiled kernels are kept by time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, default=TESTS / "mutants.toml", help="the list of mutants")
    parser.add_argument("--sample", type=int, default=0, help="how many, drawn at random; 0 is all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="only mutants whose name contains this")
    parser.add_argument("--skip", default="", help="no mutants whose name contains this")
    args, tally = parser.parse_args(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PACKAGE, Path(folder) / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        mutants = chosen(args)
        print(f"{len(mutants)} mutants" + (f", drawn with seed {args.seed}" if args.sample else ""), flush=True)
        for mutant in mutants:
            start = time.monotonic()
            outcome, why = verdict(Path(folder), mutant)
            tally[outcome] += 1
            print(f"{outcome:8} {time.monotonic() - start:4.0f} s  {mutant['name']}", flush=True)
            if outcome != "caught":
                print(f"    {mutant['find']!r} -> {mutant['replace']!r}, {mutant['tests']}\n    {why}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.items())))
    return int(set(tally) != {"caught"})


if __name__ == "__main__":
    sys.exit(main())
