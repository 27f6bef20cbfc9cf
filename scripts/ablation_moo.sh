#!/usr/bin/env bash
# Ablation: minimum-norm point or sum of the directions, block-AdaIN or low-pass manifold.
# TASK=emoji bash scripts/ablation_moo.sh takes another task than cat2dog. Further flags go to benchmark.py.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/tasks.sh"

TASK="${TASK:-cat2dog}"
task "$TASK"
[ "$VGG" = none ] || need "$VGG" "AdaIN's VGG weights; models/README.md says where they are published"
ready
MOO="" LINEAR="" LOW_PASS=""
if [ "$TASK" = emoji ]; then
    SDDM="ae_sample.py --preset emoji --area 8 --range_t 0.3" N=8
else
    SDDM="ae_sample.py --preset $TASK --energy vgg --vgg_path '$VGG'" N=32
    [ "$TASK" != cat2dog ] || MOO="| 62.29 | 0.422" LINEAR="| 64.93 | 0.421" LOW_PASS="| 67.56 | 0.411"
fi

# method | setting | script and its flags | published FID | published SSIM
benchmark --name "Merging and manifold ($TASK)" --save_dir "$ROOT/output_ablation_moo_$TASK" "$@" <<TABLE
SDDM | minimum norm, block AdaIN | $SDDM $MOO
SDDM | linear sum, block AdaIN   | $SDDM --moo linear $LINEAR
SDDM | minimum norm, low-pass    | $SDDM --manifold low_pass --down_N $N $LOW_PASS
SDDM | linear sum, low-pass      | $SDDM --manifold low_pass --down_N $N --moo linear
TABLE
