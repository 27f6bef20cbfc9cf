# Sourced by demo.sh, test.sh and .ci/run: makes the virtual environment once, and sets PYTHON to its interpreter.
# A second run finds the stamp of the same requirements.txt and installs nothing.

venv="${VENV:-$ROOT/.venv}"
PYTHON="$venv/bin/python"
stamp="$venv/.requirements"

if ! cmp -s "$ROOT/requirements.txt" "$stamp"; then
    base="${BASE_PYTHON:-python3}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: python3 3.10 or newer is needed (found: $("$base" --version 2>&1 || true))" >&2
        exit 2
    }
    echo "installing requirements.txt into $venv (once; PyTorch alone takes some minutes to download)"
    "$base" -m venv "$venv" || {
        echo "error: cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    }
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
    cp "$ROOT/requirements.txt" "$stamp"
fi
