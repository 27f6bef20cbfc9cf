#!/usr/bin/env bash
# Run the test suite; arguments go to pytest, as in: bash scripts/test.sh tests/test_sddm.py -x
# The part that takes less than 90 seconds on two cores: bash scripts/test.sh -m "not slow"
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/setup_env.sh"

cd "$ROOT"
exec "$PYTHON" -m pytest -q "$@"
