#!/usr/bin/env bash
# Run the test suite, a process on every core; arguments go to pytest, as in: bash scripts/test.sh tests/test_sddm.py -x
# The part that takes less than 90 seconds on two cores: bash scripts/test.sh -m "not slow"
# In one process, for a debugger: bash scripts/test.sh -n 0 --pdb
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/setup_env.sh"

cd "$ROOT"
# One thread each: networks are tiny here, and threads of several processes would get into each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers="$("$PYTHON" -c 'import os; print(min(8, os.cpu_count() or 1))')"
exec "$PYTHON" -m pytest -q -n "$workers" --dist loadfile "$@"
