#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
# Trains on all nodes of a SLURM job: `sbatch examples/slurm.sh`. Each node has one
# worker, with all its GPUs; the chief, which needs none, runs here, on the first.
set -euo pipefail

# A port for each node, so that nodes may be one machine.
workers=(); for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
  workers+=("$host:$((${PORT:-2222} + ${#workers[@]}))")
done

srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c \
  'python -m towers worker --port=$((${PORT:-2222} + SLURM_NODEID)) --host=0.0.0.0' &
trap 'kill $!' EXIT

CUDA_VISIBLE_DEVICES= python examples/scheduled.py "${workers[@]}"
