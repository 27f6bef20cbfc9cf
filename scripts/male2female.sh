#!/usr/bin/env bash
# Male -> female (CelebA-HQ, 1000 pictures, 256 px): SDDM with its own and with EGSDE's energies, and the baselines.
# Further flags go to benchmark.py: --quick for a trial, --processes 8 for eight GPUs, --only SDDM, --num_samples 500, ...
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/tasks.sh"

task male2female
need "$DSE" "EGSDE's extractor; models/README.md says where it is published"
need "$VGG" "AdaIN's VGG weights; models/README.md says where they are published"
ready
SDDM="ae_sample.py --preset male2female"
BOTH="--energy dse,low_pass --dsepath '$DSE'"

# method | setting | script and its flags | published FID | published SSIM
benchmark --name "Male to female" --save_dir "$ROOT/output_male2female" "$@" <<TABLE
SDDM           | vgg            | $SDDM --energy vgg --vgg_path '$VGG' | 44.37 | 0.526
SDDM           | dse + low_pass | $SDDM $BOTH | 40.08 ± 0.13
SDDM, released | vgg            | $SDDM --energy vgg --vgg_path '$VGG' --variant released | 44.37 | 0.526
SDDM, released | dse + low_pass | $SDDM $BOTH --variant released | 40.08 ± 0.13
EGSDE          | M=0.5T         | egsde_sample.py --preset male2female --dsepath '$DSE' | 41.93 ± 0.11
SDEdit         | M=0.5T         | sdedit_sample.py --preset male2female
ILVR           | N=32           | ilvr_sample.py --preset male2female
TABLE
