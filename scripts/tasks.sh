# Sourced by the benchmark scripts: the files of every task, and a check that they are there.
# Each variable may be set beforehand, as in: MODEL=my_dogs.pt bash scripts/cat2dog.sh

task() { # cat2dog, wild2dog, male2female or emoji
    VGG="${VGG:-$ROOT/models/vgg_normalised.pth}"
    case "$1" in
    cat2dog | wild2dog)
        SOURCES="${SOURCES:-$ROOT/data/afhq/val/${1%2dog}}"
        TARGETS="${TARGETS:-$ROOT/data/afhq/val/dog}"
        MODEL="${MODEL:-$ROOT/models/afhq_dog_4m.pt}"
        DSE="${DSE:-$ROOT/models/${1}_dse.pt}"
        PROTOCOL=(--protocol egsde)
        need "$MODEL" "ILVR's AFHQ-dog model; models/README.md says where it is published"
        need "$SOURCES" "AFHQ, first version; datasets/README.md says how to get it"
        need "$TARGETS" "AFHQ, first version; datasets/README.md says how to get it"
        ;;
    male2female)
        SOURCES="${SOURCES:-$ROOT/data/celeba_hq/val/male}"
        TARGETS="${TARGETS:-$ROOT/data/celeba_hq/val/female}"
        MODEL="${MODEL:-$ROOT/models/celebahq_female_ddpm.pth}"
        DSE="${DSE:-$ROOT/models/male2female_dse.pt}"
        PROTOCOL=(--protocol egsde-male2female)
        need "$MODEL" "EGSDE's CelebA-HQ-female model; models/README.md says where it is published"
        need "$SOURCES" "CelebA-HQ; datasets/README.md says how to get it"
        need "$TARGETS" "CelebA-HQ; datasets/README.md says how to get it"
        ;;
    emoji)
        DATA="${DATA:-$ROOT/data/emoji}"
        SPLIT="${SPLIT:-test}"
        PREPARE=yes
        SOURCES="${SOURCES:-$DATA/twitter/$SPLIT}"
        TARGETS="${TARGETS:-$DATA/fluent3d/$SPLIT}"
        MODEL="${MODEL:-$ROOT/models/fluent3d_64.safetensors}"
        DSE="${DSE:-$ROOT/models/fluent3d_64_dse.safetensors}"
        VGG=none # the filter bank `dct` stands in, so that the result does not depend on a download
        PROTOCOL=(--truth "$TARGETS" --features "$ROOT/models/emoji_judge_64.safetensors" --image_size 64)
        need "$MODEL" "the demo model, which comes with the repository"
        ;;
    *)
        echo "error: TASK is '$1'; it can be cat2dog, wild2dog, male2female or emoji" >&2
        exit 2
        ;;
    esac
}

MISSING=() PREPARE=no
need() { # FILE "where to get it"
    [ -e "$1" ] || MISSING+=("$1 ($2)")
}

ready() { # stops with the list of all that is missing, before anything is installed; makes the emoji set
    local file
    if [ "${#MISSING[@]}" -gt 0 ]; then
        echo "error: ${#MISSING[@]} files or folders are missing:" >&2
        for file in "${MISSING[@]}"; do echo "  $file" >&2; done
        exit 2
    fi
    . "$ROOT/scripts/setup_env.sh"
    if [ "$PREPARE" = yes ] && { ! [ -d "$SOURCES" ] || ! [ -d "$TARGETS" ]; }; then
        "$PYTHON" "$ROOT/datasets/prepare_emoji.py" --size 64 --out "$DATA"
    fi
}

benchmark() { # flags of benchmark.py; the table comes on standard input
    exec "$PYTHON" "$ROOT/scripts/benchmark.py" --model_path "$MODEL" --base_samples "$SOURCES" --targets "$TARGETS" \
        "${PROTOCOL[@]}" "$@"
}
