#!/usr/bin/env bash
# Pre-trains on images: prepares shards if there are none, then trains; run again, it goes on where it was.
#
#   IMAGES=/data/ILSVRC bash scripts/pretrain_image.sh [key=value ...]
#
#   IMAGES      folder of ImageNet's tars, of train/CLASS/, of its parquet files, or of any pictures of your own
#   DATA        where shards are or go, or a URL of some (default: shards/imagenet)
#   CHECKSUMS   file of md5sum, in place of the published ones
#   NUM_GPUS    ranks on this machine (default: its GPUs); 0: one on the CPU
#   OUT         run folder (default: checkpoints/NAME); the same command goes on with what is there
#   RECIPE      image_base (default), or any other or FILE.yaml
#   DEEPSPEED   preset or file of ds_configs/ (default: zero2)
#   D2V_VENV    virtual environment, made if absent (default: .venv); none: what is active is taken as it is
#   SHARD_MIB   size of shards (default: 256)
#   key=value   any key of the recipe, paths relative to where you are; out= and data=FOLDER stand for OUT and DATA
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

data="${DATA:-shards/imagenet}"
settings=("${RECIPE:-image_base}" "data=$data" "$@")
check "${settings[@]}"
prepare_images "$data"
train "${settings[@]}"
