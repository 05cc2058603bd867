#!/usr/bin/env bash
# Any run on GB200 NVL72 trays without a scheduler: start this on every tray, with its number from 0.
#
#     launch/gb200_nvl72.sh RUN.yaml TRAYS NUMBER ADDRESS_OF_TRAY_0 [deepspeed|torchrun]
#
# It checks the tray (versions, GPUs, NVLink fabric, IMEX, NICs), then starts its four ranks. Trays of a rack must have
# consecutive numbers: ranks are numbered in this order, and the fastest axes of the layout must stay inside a rack.
set -euo pipefail

run=${1:?a run file, as python -m fp4dist.cluster plan --write makes it} trays=${2:?number of trays}
number=${3:?number of this tray, from 0} master=${4:?address of tray 0} launcher=${5:-deepspeed}
topology=${TOPOLOGY:-gb200_nvl72}
out="runs/launch/$(basename "$run" .yaml)-$trays/$number" # the folder may be shared by all trays

python -m fp4dist.cluster launch --config "$run" --topology "$topology" --name job --gpus $((trays * 4)) --out "$out"
# shellcheck disable=SC1090 # the job's variables, so that preflight sees what the ranks will
source <(grep '^export ' "$out/job.sbatch" | grep -v MASTER_ADDR)
python -m fp4dist.cluster preflight --topology "$topology" --segment $((trays < 18 ? trays : 18)) --config "$run" \
  --gpus-per-node 4 --wait-imex $((trays > 1 ? 120 : 0))
if ((trays == 1)); then
  exec "$out/job.sh"
fi
exec "$out/job.node.sh" "$number" "$master" "$launcher"
