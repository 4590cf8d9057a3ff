#!/bin/bash
# One task on each node runs `disttrain node`; see docs/slurm.md.
#SBATCH --job-name=digits
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@180

run_dir=runs/digits
overrides=()

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
node=(
    disttrain node digits -o parallel.exact=true
    "${overrides[@]}" --run-dir "$run_dir"
    --nodes 3 --rendezvous "$host:$port" --job-id "$SLURM_JOB_ID"
    -n auto --max-restarts 3 --stop-grace 120
)

# Slurm warns this script alone; srun hands the signal on to `disttrain node`: all workers save and stop.
warned= again=
trap 'warned=yes again=yes; kill -USR1 "$step" 2>/dev/null' USR1
# Each task needs its own number, so the shell that expands it is the task's.
srun --kill-on-bad-exit=0 --no-kill bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' bash "${node[@]}" &
step=$!
# A signal ends `wait` before the step has ended.
while wait "$step"; code=$?; [ "$code" -gt 128 ] && [ -n "$again" ]; do again=; done

# 75: stopped, and saved. Requeued only if it was the time limit: a job that is cancelled stays away.
if [ "$code" -eq 75 ] && [ -n "$warned" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
