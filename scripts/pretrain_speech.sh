#!/usr/bin/env bash
# Pre-trains on LibriSpeech: prepares shards if there are none, then trains; run again, it goes on where it was.
#
#   bash scripts/pretrain_speech.sh [key=value ...]
#   PARTS="train-clean-5 dev-clean-2" DATA=shards/mini bash scripts/pretrain_speech.sh train.steps=1000     to try
#
#   SPEECH      folder of archives <part>.tar.gz or of unpacked parts (default: they are downloaded, 60 GB)
#   PARTS       which (default: all but the mini parts)
#   DATA        where shards are or go, or a URL of some (default: shards/librispeech)
#   MIRROR, CHECKSUMS   another server; a file of md5sum in place of the published ones
#   NUM_GPUS    ranks on this machine (default: its GPUs); 0: one on the CPU
#   OUT         run folder (default: checkpoints/NAME); the same command goes on with what is there
#   RECIPE      audio_base (default), or any other or FILE.yaml
#   DEEPSPEED   preset or file of ds_configs/ (default: zero2)
#   D2V_VENV    virtual environment, made if absent (default: .venv); none: what is active is taken as it is
#   SHARD_MIB   size of shards (default: 256)
#   key=value   any key of the recipe, paths relative to where you are; out= and data=FOLDER stand for OUT and DATA
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

data="${DATA:-shards/librispeech}"
settings=("${RECIPE:-audio_base}" "data=$data" "$@")
check "${settings[@]}"
prepare_speech "$data"
train "${settings[@]}"
