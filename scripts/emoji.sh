#!/usr/bin/env bash
# Flat -> glossy 3D emoji (280 held-out pictures with a ground truth, 64 px): every method as a curve over its settings, with
# the demo model, judged by a network that no method uses. Needs nothing but the repository, the packages of
# requirements.txt and npm. Rows: benchmarks/emoji/table.txt. Results: benchmarks/emoji/fronts.md, its charts and pictures.
# A run that was stopped resumes. First every setting with one seed, then those on or near a front with three.
# Flags go to benchmark.py for a piece of it, without the comparison: --quick, --only SDEdit, --flags '--precision fp32', ...
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/tasks.sh"

task emoji
need "$DSE" "the extractor, which comes with the repository"
ready

SAVE="$ROOT/output_emoji"
sample() ( # FILE of rows, further flags; a subshell, which becomes the benchmark
    table="$(cat "$1")"
    benchmark --name "Flat to 3D emoji" --save_dir "$SAVE" --flags "--precision auto --upscale False" --batch_size 20 "${@:2}" \
        <<<"${table//\$DSE/"'$DSE'"}"
)
compare() { "$PYTHON" "$ROOT/benchmarks/emoji/fronts.py" --save_dir "$SAVE" --data "$DATA"; }

if [ $# -gt 0 ]; then
    sample "$ROOT/benchmarks/emoji/table.txt" "$@"
    exit
fi
sample "$ROOT/benchmarks/emoji/table.txt" --seeds 0
compare
sample "$SAVE/near.txt"
compare
