#!/bin/sh
# Sets up what the README's commands need: a virtual environment in .venv, and the folder runs.
# Does nothing where both are there and as new as the files they are made from. Another Python: PYTHON=python3.12 ./setup.sh
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
mkdir -p runs

stale=no
for source in settings.ini setup.py constraints.txt; do
    [ .venv/ready -nt "$source" ] || stale=yes
done
[ $stale = yes ] || exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "smlstm needs Python 3.10 to 3.13, and $python is $("$python" --version 2>&1). Name another one: PYTHON=python3.12 ./setup.sh" >&2
    exit 1
}
"$python" -m venv .venv
.venv/bin/python -m pip install --editable ".[dev]" --constraint constraints.txt
touch .venv/ready
