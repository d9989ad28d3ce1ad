#!/usr/bin/env bash
# Pre-trains one model on ImageNet, LibriSpeech and OpenWebText: prepares what is absent of shards and tokenizer, then
# trains; run again, it goes on where it was.
#
#   IMAGES=/data/ILSVRC bash scripts/pretrain_multimodal.sh [key=value ...]
#
#   DATA        holds imagenet/, librispeech/ and openwebtext/ (default: shards)
#   IMAGES, SPEECH, PARTS, TEXT, TOKENIZER, VOCABULARY, VAL   as pretrain_image.sh, _speech.sh and _text.sh have them
#   MIRROR, CHECKSUMS   another server; a file of checksums in place of the published ones
#   NUM_GPUS    ranks on this machine (default: its GPUs); 0: one on the CPU
#   OUT         run folder (default: checkpoints/NAME); the same command goes on with what is there
#   RECIPE      multimodal_base (default), or any other or FILE.yaml
#   DEEPSPEED   preset or file of ds_configs/ (default: zero2)
#   D2V_VENV    virtual environment, made if absent (default: .venv); none: what is active is taken as it is
#   SHARD_MIB   size of shards (default: 256)
#   key=value   any key of the recipe, paths relative to where you are; out= and data=FOLDER stand for OUT and DATA
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

data="${DATA:-shards}"
set_text "$data/openwebtext"
settings=("${RECIPE:-multimodal_base}" "data=$data" "${text[@]}" "$@")
check "${settings[@]}"
prepare_images "$data/imagenet"
prepare_speech "$data/librispeech"
prepare_text "$data/openwebtext"
train "${settings[@]}"
