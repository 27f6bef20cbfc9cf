#!/usr/bin/env bash
# Ablation: the number of blocks. TASK=emoji bash scripts/ablation_area.sh takes another task than cat2dog.
# Further flags go to benchmark.py: --quick for a trial, --processes 8 for eight GPUs, ...
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/tasks.sh"

TASK="${TASK:-cat2dog}"
task "$TASK"
[ "$VGG" = none ] || need "$VGG" "AdaIN's VGG weights; models/README.md says where they are published"
ready
if [ "$TASK" = emoji ]; then
    SDDM="ae_sample.py --preset emoji --range_t 0.3"
    SIZES=(4 8 16) PUBLISHED=("" "" "")
else
    SDDM="ae_sample.py --preset $TASK --energy vgg --vgg_path '$VGG'"
    SIZES=(8 16 32) PUBLISHED=("" "" "")
    [ "$TASK" != cat2dog ] || PUBLISHED=("| 54.56 | 0.359" "| 62.29 | 0.422" "| 68.03 | 0.426")
fi

# method | setting | script and its flags | published FID | published SSIM
for k in 0 1 2; do
    echo "SDDM | ${SIZES[k]}x${SIZES[k]} blocks | $SDDM --area ${SIZES[k]} ${PUBLISHED[k]}"
done | benchmark --name "Blocks ($TASK)" --save_dir "$ROOT/output_ablation_area_$TASK" "$@"
