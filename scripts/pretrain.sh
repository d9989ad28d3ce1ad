# Sourced by the pretrain_*.sh scripts, after their settings: prepares shards that are absent, then trains.
# Their headers say which variables they take; `check` looks at the settings of the run before hours go into its data,
# `prepare_*` run `d2v prepare`, `train` runs train.py in place of the shell.

case "${1:-}" in -h | --help)
    sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"
    exit 0 ;;
esac

for name in DATA IMAGES SPEECH TEXT TOKENIZER OUT CHECKSUMS; do # environment.sh changes the folder
    value="${!name:-}"
    case "$value" in "" | /* | *://*) ;; *) printf -v "$name" %s "$PWD/$value" ;; esac
done
for name in RECIPE DEEPSPEED; do
    [ ! -f "${!name:-}" ] || printf -v "$name" %s "$(realpath "${!name}")"
done
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

any() { [ -e "$1" ]; } # any GLOB: whether it matches something

# absent DIR: whether there are no finished shards in it; what a kill left is gone on with.
absent() { [[ "$1" != *://* ]] && [ ! -f "$1/manifest.json" ] && { [ -d "$1/.prepare" ] || ! any "$1"/*.tar; }; }

# fetched NAME [SOURCE] ARGUMENTS: of `d2v prepare`, and CHECKSUMS and, without a source, MIRROR where they are set.
fetched() {
    local mirror="${MIRROR:-}"
    [[ "$2" == --* ]] || mirror=""
    d2v prepare "$@" ${mirror:+--mirror "$mirror"} ${CHECKSUMS:+--checksums "$CHECKSUMS"} \
        ${SHARD_MIB:+--shard-mib "$SHARD_MIB"}
}

prepare_images() { # IMAGES: a source; $1: where shards go
    absent "$1" || return 0
    [ -n "${IMAGES:-}" ] || fail "no shards in $1; set IMAGES to the folder of ImageNet's tars, of train/CLASS/, or of
any pictures of your own (ImageNet wants registration, so it is not downloaded)"
    [ -e "$IMAGES" ] || fail "IMAGES=$IMAGES is not there"
    if any "$IMAGES"/ILSVRC2012_img_*.tar || [ -d "$IMAGES/train" ] ||
        any "$IMAGES"/train-*.parquet || any "$IMAGES"/data/train-*.parquet; then
        d2v prepare imagenet "$IMAGES" --out "$1" ${CHECKSUMS:+--checksums "$CHECKSUMS"} \
            ${SHARD_MIB:+--shard-mib "$SHARD_MIB"}
    else
        d2v prepare folder "$IMAGES" --out "$1" --name images --modality image ${SHARD_MIB:+--shard-mib "$SHARD_MIB"}
    fi
}

prepare_speech() { # SPEECH: archives that are there, else they are downloaded; PARTS; $1: where shards go
    absent "$1" || return 0
    local parts=()
    [ -z "${PARTS:-}" ] || read -ra parts <<< "$PARTS"
    fetched librispeech ${SPEECH:+"$SPEECH"} --out "$1" ${parts[0]:+--parts "${parts[@]}"}
}

set_text() { # $1: where shards of text lie; sets `text` to the key=value of the tokenizer
    [[ "$1" != *://* || -n "${TOKENIZER:-}" ]] ||
        fail "DATA=$1 is a URL; set TOKENIZER to the file of its tokenizer, or to one that is to be written"
    tokenizer="${TOKENIZER:-$1/sentencepiece.model}"
    text=("modalities.text.data.tokenizer=$tokenizer")
    if [ -z "${TOKENIZER:-}" ] || [ -n "${VOCABULARY:-}" ]; then
        text+=("modalities.text.vocabulary=${VOCABULARY:-32000}")
    fi
}

prepare_text() { # TEXT: archives that are there, else they are downloaded; $1: where shards go
    if absent "$1"; then fetched openwebtext ${TEXT:+"$TEXT"} --out "$1" ${VAL:+--val "$VAL"}; fi
    [ -f "$tokenizer" ] ||
        d2v tokenizer train "$1"/*train*.tar --out "$tokenizer" --vocabulary "${VOCABULARY:-32000}"
}

set_arguments() { # RECIPE and more key=value; sets `gpus`, `devices` and the `arguments` of train.py
    gpus="${NUM_GPUS:-}" devices=()
    [ -n "$gpus" ] || gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
    [[ "$gpus" =~ ^(0|[1-9][0-9]*)$ ]] || fail "NUM_GPUS=$gpus must be a whole number, 0 for the CPU"
    arguments=(--deepspeed "${DEEPSPEED:-zero2}" --recipe "$1" ${OUT:+"out=$OUT"} "${@:2}")
    if [ "$gpus" = 0 ]; then
        export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
    elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        IFS=, read -ra devices <<< "$CUDA_VISIBLE_DEVICES"
        [ "$gpus" -le "${#devices[@]}" ] ||
            fail "NUM_GPUS=$gpus, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#devices[@]}"
    fi
}

check() { # as train
    set_arguments "$@"
    python -c 'import sys; from d2v_ds.training.run import check; sys.exit(check(int(sys.argv[1]), sys.argv[2:]))' \
        "$((gpus > 1 ? gpus : 1))" "${arguments[@]}"
}

train() { # RECIPE and more key=value
    set_arguments "$@"
    [ "$gpus" != 0 ] || exec python train.py "${arguments[@]}"
    local places=(--num_accelerators "$gpus")
    if [ "${#devices[@]}" -gt 0 ]; then # which deepspeed ignores beside a number
        if [[ "$CUDA_VISIBLE_DEVICES" == *[!0-9,]* ]]; then # GPU-... or MIG-..., of which deepspeed takes none
            exec python -m torch.distributed.run --standalone --nproc_per_node "$gpus" train.py "${arguments[@]}"
        fi
        places=(--include "localhost:$(IFS=,; echo "${devices[*]:0:gpus}")")
    fi
    exec deepspeed "${places[@]}" train.py "${arguments[@]}"
}
