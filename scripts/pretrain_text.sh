#!/usr/bin/env bash
# Pre-trains on OpenWebText: prepares shards and a tokenizer if there are none, then trains; run again, it goes on.
#
#   bash scripts/pretrain_text.sh [key=value ...]
#
#   TEXT        openwebtext.tar.xz, or a folder of *_data.xz or parquet files (default: downloaded, 12.9 GB)
#   DATA        where shards are or go, or a URL of some (default: shards/openwebtext)
#   TOKENIZER   a tokenizer of your own (default: DATA/sentencepiece.model, trained if absent)
#   VOCABULARY  its pieces (default: 32000)
#   VAL         share of documents for validation (default: 0.0005)
#   MIRROR, CHECKSUMS   another server; a file of sha256sum in place of the published ones
#   NUM_GPUS    ranks on this machine (default: its GPUs); 0: one on the CPU
#   OUT         run folder (default: checkpoints/NAME); the same command goes on with what is there
#   RECIPE      text_base (default), or any other or FILE.yaml; of v1 add modalities.text.vocabulary=32001, the pieces and <mask>
#   DEEPSPEED   preset or file of ds_configs/ (default: zero2)
#   D2V_VENV    virtual environment, made if absent (default: .venv); none: what is active is taken as it is
#   SHARD_MIB   size of shards (default: 256)
#   key=value   any key of the recipe, paths relative to where you are; out= and data=FOLDER stand for OUT and DATA
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"

data="${DATA:-shards/openwebtext}"
set_text "$data"
settings=("${RECIPE:-text_base}" "data=$data" "${text[@]}" "$@")
check "${settings[@]}"
prepare_text "$data"
train "${settings[@]}"
