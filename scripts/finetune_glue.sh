#!/usr/bin/env bash
# GLUE: every task, learning rate and seed fine-tuned from one model; of each task the best rate, the median of its seeds.
#
#   INIT=checkpoints/text_base GLUE=glue_data bash scripts/finetune_glue.sh [key=value ...]
#
#   INIT      a run, an export, a fairseq file or a Hugging Face folder
#   GLUE      folder of the original TSV files or of Hugging Face's parquet files (docs/data.md), read once
#   OUT       where runs, shards and results go (default: checkpoints/glue)
#   TASKS     default: cola mnli mrpc qnli qqp rte sst2 stsb
#   LRS       default: 1e-5 2e-5 4e-5 6e-5
#   SEEDS     default: 1 2 3 4 5
#   NUM_GPUS  runs at the same time, each on one GPU of CUDA_VISIBLE_DEVICES (default: all there are); 0: one on the CPU
#   DEEPSPEED preset or file (default: zero0)
#
# Stopped at any moment, the same command goes on: finished runs are skipped, a run that was cut goes on from its last
# checkpoint. Table and $OUT/glue.json at the end; a run that fails is named, the others go on, and the exit code is 1.
set -euo pipefail
for name in INIT GLUE; do
    [ ! -e "${!name:-}" ] || printf -v "$name" %s "$(realpath "${!name}")"
done
source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh"
for argument in "$@"; do
    case "$argument" in init=* | data=* | out=* | seed=* | optim.lr=*)
        fail "$argument would be that of every run; set INIT, GLUE, OUT, SEEDS or LRS in its place" ;;
    esac
done

out="${OUT:-checkpoints/glue}"
read -ra tasks <<< "${TASKS:-cola mnli mrpc qnli qqp rte sst2 stsb}"
read -ra rates <<< "${LRS:-1e-5 2e-5 4e-5 6e-5}"
read -ra seeds <<< "${SEEDS:-1 2 3 4 5}"
gpus="${NUM_GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}"
[[ "$gpus" =~ ^[0-9]+$ ]] || fail "NUM_GPUS=$gpus must be a whole number, 0 for the CPU"
[ -n "${INIT:-}" ] || fail "set INIT to the model to fine-tune"
IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 "$((gpus - 1))")}"
[ "$gpus" -le "${#devices[@]}" ] || fail "NUM_GPUS=$gpus, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#devices[@]}"
mkdir -p "$out"
code=0
exec 9> "$out/.lock" # held by every run until it ends; other codes than 1: no locks on this disk
flock -w 10 9 || code=$?
[ "$code" -ne 1 ] || fail "runs in $out are going on, perhaps of a script that was killed; wait for them or stop them"

for task in "${tasks[@]}"; do
    if [ ! -f "$out/shards/$task/manifest.json" ]; then
        [ -n "${GLUE:-}" ] || fail "set GLUE to the folder of GLUE's files"
        d2v prepare glue "$GLUE" --task "$task" --out "$out/shards/$task"
    fi
done

runs=()
for task in "${tasks[@]}"; do
    for rate in "${rates[@]}"; do
        for seed in "${seeds[@]}"; do runs+=("$task $rate $seed"); done
    done
done

# Runs i, i + n, ... of n workers, worker i on GPU i. They go in the background, so that a signal reaches us first.
work() {
    local worker=$1 workers=$2 task rate seed run child= code
    shift 2
    trap '[ -z "$child" ] || kill -TERM "$child" 2> /dev/null; wait; exit 85' TERM
    export CUDA_VISIBLE_DEVICES="${devices[worker]:-}"
    [ "$gpus" -ne 0 ] || export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
    for ((i = worker; i < ${#runs[@]}; i += workers)); do
        kill -0 $$ 2> /dev/null || exit 1 # the script was killed
        read -r task rate seed <<< "${runs[i]}"
        run="$out/$task/lr_${rate}_seed_${seed}"
        [ "$(cat "$run/finished" 2> /dev/null)" != "$INIT $*" ] || continue
        echo "$run"
        mkdir -p "$run"
        python train.py --deepspeed "${DEEPSPEED:-zero0}" --recipe "finetune_text_$task" init="$INIT" \
            data="$out/shards/$task" optim.lr="$rate" seed="$seed" out="$run" "$@" >> "$run/output.log" 2>&1 &
        child=$! code=0
        wait "$child" || code=$?
        [ "$code" -ne 85 ] || exit 85 # stopped by a signal
        if [ "$code" -eq 0 ]; then
            echo "$INIT $*" > "$run/finished"
        else
            echo "failed: $run ($(grep '^error' "$run/output.log" | tail -1 || true))" >&2
            touch "$out/.failed"
        fi
    done
}

rm -f "$out/.failed"
workers=$((gpus > 1 ? gpus : 1))
pids=()
for ((w = 0; w < workers; w++)); do
    work "$w" "$workers" "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null; wait; exit 130' INT TERM
for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
python -m d2v_ds.tasks.sweep "$out"
[ ! -f "$out/.failed" ] || fail "some runs failed (above); the same command tries them again"
