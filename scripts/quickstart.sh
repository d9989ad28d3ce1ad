#!/usr/bin/env bash
# From nothing to a trained multimodal model, on any machine with two cores: installs, trains on the sample
# shards, exports, loads the export and probes it. 5 to 12 minutes without a GPU.
#
#   bash scripts/quickstart.sh            OUT=checkpoints/other bash scripts/quickstart.sh [key=value ...]
set -euo pipefail
began=$SECONDS
D2V_EXTRAS="${D2V_EXTRAS-}" # training needs none
for name in OUT DIGITS; do # environment.sh changes the folder
    case "${!name:-}" in "" | /*) ;; *) printf -v "$name" %s "$PWD/${!name}" ;; esac
done
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
echo "installed after $((SECONDS - began)) s"

out="${OUT:-checkpoints/quickstart}"
digits="${DIGITS:-data/digits}"
if ! ls "$digits"/images-test-*.tar > /dev/null 2>&1; then
    python -m shards.sample --images-only --out "$digits"
fi

deepspeed --num_accelerators "${NUM_GPUS:-2}" train.py --deepspeed ds_configs/zero3.json out="$out" "$@"

d2v export "$out" --out "$out/export"
echo "loading $out/export back, and probing what its features hold (ridge regression, labels of the digits):"
for modality in image audio text; do
    case $modality in
        image) train="$digits/images-train-*.tar"; test="$digits/images-test-*.tar" ;;
        *) train="shards/sample/multimodal-train-*.tar"; test="shards/sample/multimodal-val-*.tar" ;;
    esac
    echo; echo "$modality:"
    d2v probe "$out/export" --modality "$modality" --train "$train" --test "$test"
done
echo
echo "weights      $out/export/model.safetensors"
echo "loss curves  $out/losses.png"
echo "TensorBoard  tensorboard --logdir $out/tensorboard"
echo "done after $((SECONDS - began)) s"
