#!/usr/bin/env bash
# Flat -> glossy 3D emoji (280 held-out pictures with a ground truth, 64 px): all methods, with the demo model and the
# features of its middle block for FID. Needs nothing but the repository, the packages of requirements.txt and npm.
# Further flags go to benchmark.py: --quick for a trial of some minutes, --only SDDM, --seeds 0, --batch_size 32, ...
# SPLIT=train takes training pictures instead: for the search of settings, with --num_samples and another --save_dir.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/tasks.sh"

task emoji
ready
SDDM="ae_sample.py --energy dct"
if [ -e "$DSE" ]; then
    REALISM="--ls 500 --dsepath '$DSE'"
else
    echo "EGSDE goes without its realism energy: there is no extractor $DSE (scripts/classifier_train.py makes one)" >&2
    REALISM="--ls 0"
fi

# method | setting | script and its flags
benchmark --name "Flat to 3D emoji" --save_dir "$ROOT/output_emoji" "$@" <<TABLE
SDDM           | 100 steps, 16x16, T0=0.3T | $SDDM --timestep_respacing 100 --area 16 --range_t 30
SDDM           | 100 steps, 8x8, T0=0.3T   | $SDDM --timestep_respacing 100 --area 8 --range_t 30
SDDM           | 100 steps, 8x8, T0=0.5T   | $SDDM --timestep_respacing 100 --area 8 --range_t 50
SDDM, released | 100 steps, 16x16, T0=0.3T | $SDDM --timestep_respacing 100 --area 16 --range_t 30 --variant released
SDDM, released | 100 steps, 8x8, T0=0.3T   | $SDDM --timestep_respacing 100 --area 8 --range_t 30 --variant released
SDDM           | 50 steps, 8x8, T0=0.3T    | $SDDM --timestep_respacing 50 --area 8 --range_t 15
SDDM           | 25 steps, 8x8, T0=0.3T    | $SDDM --timestep_respacing 25 --area 8 --range_t 7
EGSDE          | M=0.4T                    | egsde_sample.py --t 400 $REALISM --li 2 --down_N 8
EGSDE          | M=0.5T                    | egsde_sample.py --t 500 $REALISM --li 2 --down_N 8
EGSDE          | M=0.6T                    | egsde_sample.py --t 600 $REALISM --li 2 --down_N 8
SDEdit         | M=0.4T                    | sdedit_sample.py --t 400
SDEdit         | M=0.5T                    | sdedit_sample.py --t 500
SDEdit         | M=0.6T                    | sdedit_sample.py --t 600
ILVR           | N=4                       | ilvr_sample.py --timestep_respacing 100 --down_N 4 --range_t 20
ILVR           | N=8                       | ilvr_sample.py --timestep_respacing 100 --down_N 8 --range_t 20
TABLE
