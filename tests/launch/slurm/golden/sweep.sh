#!/bin/bash
# One task on each node runs `disttrain node`; see docs/slurm.md.
#SBATCH --job-name=digits
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --array=0-3
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#SBATCH --signal=B:USR1@180

case "$SLURM_ARRAY_TASK_ID" in
    0) run_dir=runs/digits/optim.lr=0.1+optim.momentum=0.8; overrides=(-o optim.lr=0.1 -o optim.momentum=0.8) ;;
    1) run_dir=runs/digits/optim.lr=0.1+optim.momentum=0.9; overrides=(-o optim.lr=0.1 -o optim.momentum=0.9) ;;
    2) run_dir=runs/digits/optim.lr=0.01+optim.momentum=0.8; overrides=(-o optim.lr=0.01 -o optim.momentum=0.8) ;;
    3) run_dir=runs/digits/optim.lr=0.01+optim.momentum=0.9; overrides=(-o optim.lr=0.01 -o optim.momentum=0.9) ;;
    *) echo "no such job in this sweep: $SLURM_ARRAY_TASK_ID" >&2; exit 2 ;;
esac

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
node=(
    disttrain node digits
    "${overrides[@]}" --run-dir "$run_dir"
    --nodes 1 --rendezvous "$host:$port" --job-id "$SLURM_JOB_ID"
    -n 2 --max-restarts 3 --stop-grace 120
)

# Slurm warns this script alone; srun hands the signal on to `disttrain node`: all workers save and stop.
warned= again=
trap 'warned=yes again=yes; kill -USR1 "$step" 2>/dev/null' USR1
# Each task needs its own number, so the shell that expands it is the task's.
srun --kill-on-bad-exit=0 bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' bash "${node[@]}" &
step=$!
# A signal ends `wait` before the step has ended.
while wait "$step"; code=$?; [ "$code" -gt 128 ] && [ -n "$again" ]; do again=; done

# 75: stopped, and saved. Requeued only if it was the time limit: a job that is cancelled stays away.
if [ "$code" -eq 75 ] && [ -n "$warned" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
