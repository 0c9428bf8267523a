#!/bin/bash
# A sweep on SLURM, from a folder that all nodes see and that holds sweep.toml:
#
#     sbatch slurm.sh [more options of gradhpo sweep]
#
# Before the time limit the generation in flight is finished and saved, and the job queued again; it
# then goes on from the storage. A preempted job does the same as far as its grace time allows, and
# SLURM queues it again. `scancel` ends it.
#SBATCH --job-name=gradhpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

STOPPED=130 # what gradhpo returns when it was told to stop before the end

export RAY_TMPDIR="/tmp/gradhpo-$SLURM_JOB_ID" # of this job alone, on every node
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# Only this job's processes, which have the token, may talk to its Ray.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(ray get-auth-token --generate)
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]} # where this script runs
read -r ip _ < <(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
port=$((20000 + SLURM_JOB_ID % 10000))
srun --overlap --ntasks-per-node=1 mkdir -p "$RAY_TMPDIR"

steps=()
finish() {
  ((${#steps[@]} == 0)) || kill "${steps[@]}" 2>/dev/null || true
  wait
  srun --overlap --ntasks-per-node=1 rm -rf "$RAY_TMPDIR" || true
}
trap finish EXIT

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --include-dashboard=false --disable-usage-stats \
  --node-ip-address="$ip" --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" &
steps+=($!)
for _ in {1..120}; do
  (exec 3<>"/dev/tcp/$ip/$port") 2>/dev/null && break
  sleep 0.5
done
if ((${#nodes[@]} > 1)); then
  srun --overlap --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --exclude="$head" \
    ray start --block --address="$ip:$port" --num-cpus="$SLURM_CPUS_PER_TASK" &
  steps+=($!)
fi

export RAY_ADDRESS="$ip:$port"
gradhpo sweep sweep.toml "$@" &
sweep=$!
told='' requeue=''
trap 'told=1 requeue=1; kill -TERM "$sweep" || true' USR1 # the time limit comes near
trap 'told=1; kill -TERM "$sweep" || true' TERM           # preempted (SLURM requeues), or cancelled
status=0
wait "$sweep" || status=$?
if [[ $told ]] && ((status > 128 && status != STOPPED)); then # the signal only ended the wait
  status=0
  wait "$sweep" || status=$?
fi
if [[ $requeue ]] && ((status == STOPPED)); then
  finish
  steps=()
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
