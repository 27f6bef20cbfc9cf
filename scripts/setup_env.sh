# Sourced by demo.sh, test.sh and .ci/run: makes the virtual environment once, and sets PYTHON to its interpreter.
# A second run finds the stamp of the same requirements.txt and installs nothing.
# TORCH_INDEX, the address of a package index: where it is set and there is no NVIDIA driver, torch and torchvision come
# from it, as in TORCH_INDEX=<PyTorch's index of CPU builds>. These are a tenth of the size. Otherwise pip chooses.

venv="${VENV:-$ROOT/.venv}"
PYTHON="$venv/bin/python"
stamp="$venv/.requirements"

pip_install() { # arguments of pip install; shows its progress on a terminal, and a dot every ten seconds elsewhere
    local pip=("$PYTHON" -m pip install --disable-pip-version-check "$@") ticker status=0
    if [ -t 1 ]; then
        "${pip[@]}"
        return
    fi
    while sleep 10 > /dev/null 2>&1; do printf .; done &
    ticker=$!
    "${pip[@]}" --quiet || status=$?
    kill "$ticker" && wait "$ticker" 2> /dev/null || true
    echo
    return "$status"
}

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
    if [ -n "${TORCH_INDEX:-}" ] && ! command -v nvidia-smi > /dev/null && ! [ -e /proc/driver/nvidia ]; then
        torch="$(sed -nE 's/^(torch(vision)?[^a-z ]*) .*/\1/p' "$ROOT/requirements.txt")"
        # An index without a build for this platform is no reason to stop: the next line takes the usual one.
        pip_install --index-url "$TORCH_INDEX" $torch || echo "TORCH_INDEX has no fitting build" >&2
    fi
    pip_install -r "$ROOT/requirements.txt"
    cp "$ROOT/requirements.txt" "$stamp"
fi
