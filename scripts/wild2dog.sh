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
SDDM="ae_sample.py --preset wild2dog --energy vgg --vgg_path '$VGG'"
EGSDE="egsde_sample.py --preset wild2dog --dsepath '$DSE'"

# method | setting | script and its flags | published FID | published SSIM
benchmark --name "Wild animal to dog" --save_dir "$ROOT/output_wild2dog" "$@" <<TABLE
SDDM           | T0=0.5T | $SDDM | 57.38 ± 0.53 | 0.328
SDDM, released | T0=0.5T | $SDDM --variant released | 57.38 ± 0.53 | 0.328
EGSDE          | M=0.5T  | $EGSDE | 59.75 | 0.343
SDEdit         | M=0.5T  | sdedit_sample.py --preset wild2dog | 68.51 | 0.343
ILVR           | N=32    | ilvr_sample.py --preset wild2dog | 75.33 | 0.287
TABLE
