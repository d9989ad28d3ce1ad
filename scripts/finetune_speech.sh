#!/usr/bin/env bash
# Fine-tunes on LibriSpeech's letters by CTC: prepares shards if there are none, then trains; run again, it goes on.
#
#   INIT=checkpoints/audio_base bash scripts/finetune_speech.sh [key=value ...]
#
#   INIT        pre-trained weights: a run folder, an export, a fairseq file or a Hugging Face folder (needed)
#   RECIPE      finetune_audio_base_100h (default), or any other finetune_audio_* or FILE.yaml
#   TRAIN       shards in DATA to learn from (default: *train-clean-100*.tar)
#   TEST        shards in DATA that WER is measured on (default: *dev-clean*.tar)
#   SPEECH, PARTS, DATA, MIRROR, CHECKSUMS, NUM_GPUS, OUT, DEEPSPEED, D2V_VENV, SHARD_MIB   as in pretrain_speech.sh
#               (default of PARTS: train-clean-100 dev-clean)
#   key=value   any key of the recipe, paths relative to where you are; out=, init= and data=FOLDER stand for OUT, INIT and DATA
set -euo pipefail
PARTS="${PARTS:-train-clean-100 dev-clean}"
case "${INIT:-}" in "" | /* | *://*) ;; *) INIT="$PWD/$INIT" ;; esac # pretrain.sh changes the folder
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"
[ -n "${INIT:-}" ] || fail "set INIT to the pre-trained weights: a run folder, an export, a .pt or a Hugging Face folder"

data="${DATA:-shards/librispeech}"
settings=("${RECIPE:-finetune_audio_base_100h}" "data=$data" "init=$INIT"
    "modalities.audio.data.shards=${TRAIN:-*train-clean-100*.tar}" "task.test=${TEST:-*dev-clean*.tar}"
    task.test_every=2000 "$@")
check "${settings[@]}"
prepare_speech "$data"
train "${settings[@]}"
