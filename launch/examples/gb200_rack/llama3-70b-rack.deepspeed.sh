#!/usr/bin/env bash
# llama3-70b-rack: 64 ranks on 1 x 16 nodes of gb200_nvl72, tp2 pp4 vpp5 mbs1, dp8
# Run on one node with ssh to all, in the repository: llama3-70b-rack.deepspeed.sh
set -euo pipefail
# The same on every rank: each compares it with FP4DIST_ENV_HASH.
export FP4DIST_WORLD_SIZE=64
export NCCL_DEBUG=WARN
export NCCL_NVLS_ENABLE=0
export NCCL_GRAPH_REGISTER=0
export NCCL_MNNVL_ENABLE=1
export NCCL_CUMEM_ENABLE=1
export NCCL_NET_GDR_C2C=1
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export FP4DIST_ENV_NAMES=CUDA_DEVICE_MAX_CONNECTIONS,FP4DIST_WORLD_SIZE,NCCL_CUMEM_ENABLE,NCCL_DEBUG,NCCL_GRAPH_REGISTER,NCCL_MNNVL_ENABLE,NCCL_NET_GDR_C2C,NCCL_NVLS_ENABLE,PYTORCH_CUDA_ALLOC_CONF,TORCH_NCCL_AVOID_RECORD_STREAMS
export FP4DIST_ENV_HASH=7f60e17e2911c518
hostfile="$(cd "$(dirname "$0")" && pwd)/llama3-70b-rack.hostfile"
if [[ ! -f "$hostfile" ]]; then
  echo "$hostfile is missing; DeepSpeed would start on this node alone" >&2
  exit 23
fi
# pdsh carries few variables; DeepSpeed adds the lines of this file to them
export DS_ENV_FILE="${hostfile%.hostfile}.deepspeed_env"
exec deepspeed --hostfile "$hostfile" --launcher pdsh --master_addr gb-r01-t01 --master_port 29500 --no_python --no_local_rank launch/rank.sh --gpus-per-numa 2 python -u launch/pretrain.py --config launch/examples/gb200_rack/run.yaml
