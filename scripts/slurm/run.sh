# Sourced by the sbatch files: `run_training ARGUMENTS` is `srun python train.py ARGUMENTS`, one task a rank, and, when
# that was stopped or a machine failed, this job put back into the queue. docs/cluster.md explains it.
#
#   D2V_PYTHON      the python to use (default: .venv/bin/python of the checkout if there, else python)
#   D2V_LOGS        what each rank prints goes to the folder JOB in it (default: slurm-logs)
#   D2V_CONTAINER   an image: a .sif for apptainer, anything else for pyxis (srun --container-image); default: none
#   D2V_MOUNTS      what the container sees besides this checkout: /data:/data,/scratch:/scratch
#   D2V_RETRIES     restarts after a failure without a new checkpoint in between (default: 3)

cd "${D2V_ROOT:-$SLURM_SUBMIT_DIR}" || exit 2

run_training() {
    local out="" argument
    for argument in "$@"; do case "$argument" in out=*) out="${argument#out=}" ;; esac; done
    [ -n "$out" ] || { echo "error: give out=DIR, the run that a restarted job goes on with" >&2; exit 2; }

    local name="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    local logs="${D2V_LOGS:-slurm-logs}/$name"
    mkdir -p "$logs" || exit 1

    local python="${D2V_PYTHON:-python}"
    if [ -z "${D2V_PYTHON:-}" ] && [ -z "${D2V_CONTAINER:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
    local options=(--kill-on-bad-exit=1 --open-mode=append "--output=$logs/rank_%t.txt") wrapper=()
    local mounts="$PWD:$PWD${D2V_MOUNTS:+,$D2V_MOUNTS}"
    case "${D2V_CONTAINER:-}" in
        "") ;;
        *.sif) wrapper=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$D2V_CONTAINER") ;;
        *) options+=("--container-image=$D2V_CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD") ;;
    esac

    # Where the ranks find each other; said here, since a container has no scontrol.
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 50000))
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
    export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

    echo "$(date -Is) start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST; output of the ranks: $logs/rank_*.txt"
    export D2V_EXIT_FILE="$PWD/$logs/exit_code" # of the first rank to end; srun has the highest
    [[ "$logs" != /* ]] || D2V_EXIT_FILE="$logs/exit_code"
    rm -f "$D2V_EXIT_FILE"
    local code=0
    srun "${options[@]}" "${wrapper[@]}" "$python" -u train.py "$@" || code=$?
    if [ -s "$D2V_EXIT_FILE" ]; then code="$(cat "$D2V_EXIT_FILE")"; fi
    echo "$(date -Is) exit code $code"
    case "$code" in
        0) exit 0 ;;
        85) requeue ;;                    # asked to stop, saved
        86 | 87) retry "$out" "$logs" ;;  # hung, or a rank was lost
        *) if [ "$code" -gt 128 ]; then retry "$out" "$logs"; fi ;; # killed by a signal
    esac
    exit "$code"
}

requeue() {
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "error: the job could not be requeued; submit it again, it goes on" >&2
    exit 85
}

# Requeues after a failure that may be the machine's, but not for ever: a fault of the run comes back each time.
retry() {
    local latest seen="" count=0
    latest="$(cat "$1/latest" 2>/dev/null || echo none)"
    if [ -f "$2/failures" ]; then read -r seen count < "$2/failures"; fi
    [ "$seen" = "$latest" ] || count=0
    echo "$latest $((count + 1))" > "$2/failures"
    if [ "$count" -lt "${D2V_RETRIES:-3}" ]; then requeue; fi
    echo "error: $((count + 1)) failures in a row at checkpoint $latest; the job is not started again" >&2
}
