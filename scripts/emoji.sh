#!/usr/bin/env bash
# Flat -> glossy 3D emoji (280 held-out pictures with a ground truth, 64 px): all methods, with the demo model and the
# features of its middle block for the distances. Needs nothing but the repository, the packages of requirements.txt and
# npm. Every method has the setting that benchmarks/emoji/search.py found for it on training pictures (table.txt); the
# last rows are the presets, which demo and documents recommend.
# Further flags go to benchmark.py: --quick for a trial of some minutes, --only SDDM or --seeds 0 for a piece (a later run
# with all resumes from there), --flags '--precision fp32', ...
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/tasks.sh"

task emoji
need "$DSE" "the extractor, which comes with the repository"
ready

table="$(cat "$ROOT/benchmarks/emoji/table.txt")
SDDM | preset emoji | ae_sample.py --preset emoji
SDDM | preset fast | ae_sample.py --preset fast"
benchmark --name "Flat to 3D emoji" --save_dir "$ROOT/output_emoji" --flags "--precision bf16" --batch_size 20 "$@" \
    <<<"${table//\$DSE/"'$DSE'"}"
