#!/usr/bin/env bash
# A run notebook on Slurm. Edit the settings, then: sbatch slurm.sh
# The run is told before its time is over, saves a checkpoint, and the job queues again: it goes on in report.1.ipynb. A run that failed does not.
# >>> settings: `difflit submit` writes these lines anew and leaves all others as they are
#SBATCH --job-name=train
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
# Eight GPUs of a node: --gres=gpu:8, --cpus-per-task=64, and PROCESSES=8. Two such nodes: also --nodes=2, and NODES=2.
# An array of four runs, two at a time: --array=0-3%2, --output=%x-%A_%a.log, and RUNS=runs.txt. No GPU: without --gres.
FOLDER=$PWD                        # where relative paths begin
NOTEBOOK=nbs/train.ipynb
RUN=runs/first                     # the run directory; one that holds a run goes on
RUNS=                              # of an array: a file with a run directory a line, each with its settings in launch.yaml
PARAMETERS=(-p preset shapes)      # or -f settings.yaml
NODES=1
PROCESSES=1                        # on each node: one for each GPU
REQUEUES=10                        # so often at most
MODULES=                           # such as "cuda/12.4 python/3.11"
ENVIRONMENT=$VIRTUAL_ENV           # folder of a virtual environment
IMAGE=                             # or an Apptainer image: difflit.sif
SCRATCH=                           # folder for temporary files on the node's own disk
# <<< settings

# --- Slurm's own
task=$SLURM_ARRAY_TASK_ID JOB=$SLURM_JOB_ID
[[ -n $task ]] && JOB=${SLURM_ARRAY_JOB_ID}_$task  # the number alone means the whole array
on_every_node() { srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'exec bash "$0" node "$SLURM_NODEID"' "$file"; }
again() { [[ $(squeue -h -j "$JOB" -o %T) = RUNNING ]] && scontrol requeue "$JOB"; }  # not what somebody has cancelled

# --- The same in all scripts of this folder
cd "$FOLDER" || exit 1
[[ -n $task && -n $RUNS ]] && RUN=$(sed -n "$((task + 1))p" "$RUNS")
[[ -n $RUN ]] || { echo "no run directory for task '$task'"; exit 1; }
# shellcheck disable=SC2086
[[ -n $MODULES ]] && { module load $MODULES || exit 1; }
[[ -n $ENVIRONMENT ]] && export PATH=$ENVIRONMENT/bin:$PATH DIFFLIT_PREFIX=$ENVIRONMENT
[[ -n $IMAGE ]] && export DIFFLIT_IMAGE=$IMAGE
[[ -n $SCRATCH ]] && mkdir -p "$SCRATCH" && export TMPDIR=$SCRATCH
export JUPYTER_PREFER_ENV_PATH=1 HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # the environment's own kernel; a job never downloads
head=$(hostname) port=$((20000 + 10#0${JOB//[^0-9]/} % 20000)) file=$RUN/logs/job.sh
export DIFFLIT_JOB=$JOB DIFFLIT_MARK=$JOB-$head-$$

inside() { if [[ -n $IMAGE ]]; then apptainer exec --nv "$IMAGE" "$@"; else "$@"; fi; }

inside python -m difflit.schedulers begin "$RUN" || exit 1

report=$RUN/report.ipynb number=0
while [[ -e $report ]]; do number=$((number + 1)) report=$RUN/report.$number.ipynb; done
settings=("${PARAMETERS[@]}")
[[ -e $RUN/launch.yaml ]] && settings+=(-f "$RUN/launch.yaml")

process() {  # one kernel: rank 0's copy of the notebook is the report, the others' are logs
    [[ ${RANK:-0} = 0 ]] || report=$RUN/logs/rank-$RANK.ipynb
    exec papermill --no-progress-bar "$NOTEBOOK" "$report" "${settings[@]}" -p run_dir "$RUN" -p resume auto
}

node() {  # what node number $1 runs. Signals to everybody are ignored: papermill has to outlive the kernel's last checkpoint
    trap '' INT TERM USR1 USR2 URG
    local where=(--standalone)
    ((NODES > 1)) && where=(--nnodes "$NODES" --node-rank "$1" --master-addr "$head" --master-port "$port" --rdzv-id "$DIFFLIT_MARK")
    if ((NODES * PROCESSES == 1)); then inside bash "$file" process
    else inside torchrun "${where[@]}" --nproc-per-node "$PROCESSES" --no-python bash "$file" process; fi
}

tell() {  # pass the signal on to the kernel that status.json names, if this job has started it
    local pid signal=$asked
    [[ $signal = INT ]] && signal=TERM
    pid=$(sed -n 's/.*"pid": *\([0-9][0-9]*\).*/\1/p' "$RUN/status.json" 2>/dev/null)
    [[ -n $pid ]] && grep -qsFxz "DIFFLIT_MARK=$DIFFLIT_MARK" "/proc/$pid/environ" && kill -"$signal" "$pid"
}

{
    declare -p RUN NOTEBOOK IMAGE NODES PROCESSES report settings head port file
    declare -p PATH PYTHONPATH LD_LIBRARY_PATH TMPDIR HF_HOME HF_HUB_OFFLINE JUPYTER_PREFER_ENV_PATH "${!DIFFLIT_@}" "${!NCCL_@}" 2>/dev/null
    declare -f inside process node
    echo '"$@"'
} >"$file"  # for other processes and other nodes

asked='' told=''
trap 'asked=USR2' USR1 USR2 URG
trap 'asked=TERM' TERM
trap 'asked=INT' INT
if ((NODES == 1)); then node 0 & else on_every_node & fi
child=$!
while kill -0 "$child" 2>/dev/null; do
    if [[ -z $asked || -n $told ]]; then wait "$child"
    elif tell; then told=yes
    else sleep 1; fi  # the run has not begun to listen yet
done
wait "$child"
code=$?

(trap '' TERM INT USR1 USR2 URG; inside python -m difflit.schedulers end "$RUN" --code "$code" --asked "$asked" --requeues "$REQUEUES")
code=$?
((code == 75)) && again
exit "$code"
