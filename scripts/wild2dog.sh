#!/usr/bin/env bash
# Wild animal -> dog (AFHQ, 500 pictures, 256 px): all methods, and the published results beside the measured ones.
# Further flags go to benchmark.py: --quick for a trial, --processes 8 for eight GPUs, --only SDDM, --seeds 0,1,2,3,4, ...
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/tasks.sh"

task wild2dog
need "$DSE" "EGSDE's extractor; models/README.md says where it is published"
need "$VGG" "AdaIN's VGG weights; models/README.md says where they are published"
ready
SDDM="ae_sample.py --timestep_respacing 100 --area 16 --energy vgg --vgg_path '$VGG'"

# method | setting | script and its flags | published FID | published SSIM
benchmark --name "Wild animal to dog" --save_dir "$ROOT/output_wild2dog" "$@" <<TABLE
SDDM           | T0=0.5T | $SDDM --range_t 50 | 57.38 ± 0.53 | 0.328
SDDM, released | T0=0.5T | $SDDM --range_t 50 --variant released | 57.38 ± 0.53 | 0.328
EGSDE          | M=0.5T  | egsde_sample.py --t 500 --ls 500 --li 2 --dsepath '$DSE' | 59.75 | 0.343
SDEdit         | M=0.5T  | sdedit_sample.py --t 500 | 68.51 | 0.343
ILVR           | N=32    | ilvr_sample.py --timestep_respacing 100 --down_N 32 --range_t 20 | 75.33 | 0.287
TABLE
