#!/usr/bin/env bash
# Ablation: which energies, and summed or multi-objective. TASK=emoji bash scripts/ablation_energy.sh takes another task
# than male2female. Further flags go to benchmark.py.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/tasks.sh"

TASK="${TASK:-male2female}"
task "$TASK"
[ "$VGG" = none ] || need "$VGG" "AdaIN's VGG weights; models/README.md says where they are published"
need "$DSE" "a domain-specific extractor: EGSDE's, see models/README.md, or one made by scripts/classifier_train.py"
ready
ONE="" SUM="" BOTH=""
if [ "$TASK" = emoji ]; then
    SDDM="ae_sample.py --preset emoji --area 8 --range_t 0.3 --down_N 8" OWN="--energy dct"
else
    SDDM="ae_sample.py --preset $TASK" OWN="--energy vgg --vgg_path '$VGG'"
    [ "$TASK" != male2female ] || ONE="| 44.37 | 0.526" SUM="| 44.23 | 0.532" BOTH="| 42.24 | 0.535"
fi
DSE="--dsepath '$DSE'"

# method | setting | script and its flags | published FID | published SSIM
benchmark --name "Energies ($TASK)" --save_dir "$ROOT/output_ablation_energy_$TASK" "$@" <<TABLE
SDDM | no energy                        | $SDDM --energy none
SDDM | block statistics of features     | $SDDM $OWN $ONE
SDDM | dse                              | $SDDM --energy dse $DSE
SDDM | low_pass                         | $SDDM --energy low_pass
SDDM | dse + low_pass, linear sum       | $SDDM --energy dse,low_pass $DSE --moo linear $SUM
SDDM | dse + low_pass, multi-objective  | $SDDM --energy dse,low_pass $DSE $BOTH
TABLE
