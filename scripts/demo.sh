#!/usr/bin/env bash
# Translate the drawings in ref_imgs/ into glossy 3D emoji with the small model in models/.
# Further flags are passed on, as in: bash scripts/demo.sh --base_samples my_pictures --save_dir output_mine
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/setup_env.sh"

exec "$PYTHON" "$ROOT/scripts/ae_sample.py" \
    --preset emoji --base_samples "$ROOT/ref_imgs" --save_dir "$ROOT/output_demo" --batch_size 7 "$@"
