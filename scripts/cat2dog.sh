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
SDDM="ae_sample.py --preset cat2dog --energy vgg --vgg_path '$VGG'"
EGSDE="egsde_sample.py --preset cat2dog --dsepath '$DSE'"

# method | setting | script and its flags | published FID | published SSIM
benchmark --name "Cat to dog" --save_dir "$ROOT/output_cat2dog" "$@" <<TABLE
SDDM           | T0=0.5T | $SDDM | 62.29 ± 0.63 | 0.422 ± 0.001
SDDM           | T0=0.6T | $SDDM --range_t 0.6 | 49.43 ± 0.23 | 0.361 ± 0.001
SDDM, released | T0=0.5T | $SDDM --variant released | 62.29 ± 0.63 | 0.422 ± 0.001
SDDM, released | T0=0.6T | $SDDM --range_t 0.6 --variant released | 49.43 ± 0.23 | 0.361 ± 0.001
EGSDE          | M=0.5T  | $EGSDE
EGSDE          | M=0.6T  | $EGSDE --t 0.6 | 51.04 ± 0.37 | 0.360 ± 0.001
SDEdit         | M=0.5T  | sdedit_sample.py --preset cat2dog
ILVR           | N=32    | ilvr_sample.py --preset cat2dog
TABLE
