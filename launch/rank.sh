#!/usr/bin/env bash
# One rank of a job, under any launcher: completes what srun leaves out, stays near its GPU, becomes the given program.
#
#     srun ... launch/rank.sh --gpus-per-numa 2 python -u launch/pretrain.py --config X
#
# The GPUs of a node lie in order on its NUMA nodes, so rank r of a node belongs to NUMA node r / gpus-per-numa: two
# GPUs beside each Grace of a GB200 or GB300 tray, four beside each socket of an HGX box. 0 leaves it to Linux.
set -euo pipefail

gpus_per_numa=0
if [[ "${1:-}" == --gpus-per-numa ]]; then
  gpus_per_numa=$2
  shift 2
fi

if [[ -z "${RANK:-}" && -n "${SLURM_PROCID:-}" ]]; then
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  tasks=${SLURM_STEP_TASKS_PER_NODE:-${SLURM_TASKS_PER_NODE:-$SLURM_NTASKS}} # such as 4(x16)
  export LOCAL_WORLD_SIZE=${tasks%%[(,]*}
fi

if ((gpus_per_numa > 0)); then
  if command -v numactl >/dev/null; then
    node=$((${LOCAL_RANK:-0} / gpus_per_numa))
    exec numactl --cpunodebind="$node" --preferred="$node" "$@"
  fi
  echo "launch/rank.sh: numactl is missing, rank ${RANK:-0} is not bound to a NUMA node; install numactl" >&2
fi
exec "$@"
