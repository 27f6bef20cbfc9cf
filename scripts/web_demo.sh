#!/usr/bin/env bash
# Serve the page of scripts/web_demo.py on this machine; its address is printed. The first run installs
# requirements-demo.txt into the project's environment. Flags are passed on, as in: bash scripts/web_demo.sh --port 8000
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/setup_env.sh"

demo_stamp="$venv/.requirements-demo"
if ! cmp -s "$ROOT/requirements-demo.txt" "$demo_stamp"; then
    echo "installing requirements-demo.txt into $venv (once, about 250 MB)"
    pip_install -r "$ROOT/requirements-demo.txt"
    cp "$ROOT/requirements-demo.txt" "$demo_stamp"
fi

exec "$PYTHON" "$ROOT/scripts/web_demo.py" "$@"
