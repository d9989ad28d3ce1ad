#!/usr/bin/env bash
# Fine-tunes an image encoder to classes: prepares shards if there are none, then trains; run again, it goes on.
#
#   INIT=checkpoints/image_base IMAGES=/data/ILSVRC bash scripts/finetune_image.sh [key=value ...]
#   INIT=checkpoints/image_base DATASET=photos IMAGES=photos/ bash scripts/finetune_image.sh
#   DATASET=digits NUM_GPUS=0 bash scripts/finetune_image.sh
#
#   INIT        a run, an export, a fairseq file or a Hugging Face folder; none: random weights, as a control
#   DATASET     imagenet (default), digits, or a name for pictures of your own in folders of classes
#   IMAGES      what the shards are made of, if there are none; not of digits
#   VAL         share of your own pictures that is kept for the test (default: 0.1)
#   DATA        where shards are or go (default: shards/DATASET, of digits data/digits)
#   NUM_GPUS    ranks on this machine (default: its GPUs); 0: one on the CPU
#   OUT         run folder (default: checkpoints/NAME); the same command goes on with what is there
#   RECIPE      finetune_image_base (default; of digits finetune_image_tiny), or any other or FILE.yaml
#   DEEPSPEED   preset or file of ds_configs/ (default: zero2)
#   D2V_VENV    virtual environment, made if absent (default: .venv); none: what is active is taken as it is
#   SHARD_MIB   size of shards (default: 256)
#   key=value   any key of the recipe, paths relative to where you are; out=, init= and data=FOLDER stand for OUT, INIT and DATA
set -euo pipefail
[ ! -e "${INIT:-}" ] || INIT="$(realpath "$INIT")"
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

dataset="${DATASET:-imagenet}" train="*train*.tar" test="*val*.tar" recipe=finetune_image_base
data="${DATA:-shards/$dataset}"
[ "$dataset" != digits ] ||
    data="${DATA:-data/digits}" train="images-train-*.tar" test="images-test-*.tar" recipe=finetune_image_tiny
case "$dataset" in digits | imagenet) own=() ;; *) own=(task.labels=null) ;; esac # their number is not known yet
check "${RECIPE:-$recipe}" "data=$data" "task.test=$test" ${INIT:+"init=$INIT"} "$@" "${own[@]}"
case "$dataset" in
    digits)
        any "$data"/$test || python -m shards.sample --images-only --out "$data"
        ;;
    imagenet) prepare_images "$data" ;;
    *)
        if absent "$data"; then
            [ -d "${IMAGES:-}" ] || fail "no shards in $data; set IMAGES to a folder with a folder of pictures for each class"
            d2v prepare folder "$IMAGES" --labels folder --modality image --val "${VAL:-0.1}" --out "$data" \
                ${SHARD_MIB:+--shard-mib "$SHARD_MIB"}
        fi
        ;;
esac

settings=("data=$data" "modalities.image.data.shards=$train" ${INIT:+"init=$INIT"})
if [ -f "$data/classes.json" ]; then # as many outputs as classes
    classes="$(python -c 'import json, sys; print(len(json.load(open(sys.argv[1]))))' "$data/classes.json")"
    [ "$classes" -gt 1 ] || fail "$data/classes.json names one class alone; two or more are needed, a folder of pictures for each"
    settings+=("task.outputs=$classes")
fi
if any "$data"/$test; then settings+=("task.test=$test"); fi
train "${RECIPE:-$recipe}" "${settings[@]}" "$@"
