#!/usr/bin/env bash
# Cat -> dog (AFHQ, 500 pictures, 256 px): all methods, and the published results beside the measured ones.
# Further flags go to benchmark.py: --quick for a trial, --processes 8 for eight GPUs, --only SDDM, --seeds 0,1,2,3,4, ...
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/tasks.sh"

task cat2dog
need "$DSE" "EGSDE's extractor; models/README.md says where it is published"
need "$VGG" "AdaIN's VGG weights; models/README.md says where they are published"
ready
SDDM="ae_sample.py --timestep_respacing 100 --area 16 --energy vgg --vgg_path '$VGG'"

# method | setting | script and its flags | published FID | published SSIM
benchmark --name "Cat to dog" --save_dir "$ROOT/output_cat2dog" "$@" <<TABLE
SDDM           | T0=0.5T | $SDDM --range_t 50 | 62.29 ± 0.63 | 0.422 ± 0.001
SDDM           | T0=0.6T | $SDDM --range_t 60 | 49.43 ± 0.23 | 0.361 ± 0.001
SDDM, released | T0=0.5T | $SDDM --range_t 50 --variant released | 62.29 ± 0.63 | 0.422 ± 0.001
SDDM, released | T0=0.6T | $SDDM --range_t 60 --variant released | 49.43 ± 0.23 | 0.361 ± 0.001
EGSDE          | M=0.5T  | egsde_sample.py --t 500 --ls 500 --li 2 --dsepath '$DSE'
EGSDE          | M=0.6T  | egsde_sample.py --t 600 --ls 500 --li 2 --dsepath '$DSE' | 51.04 ± 0.37 | 0.360 ± 0.001
SDEdit         | M=0.5T  | sdedit_sample.py --t 500
ILVR           | N=32    | ilvr_sample.py --timestep_respacing 100 --down_N 32 --range_t 20
TABLE
