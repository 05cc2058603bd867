#!/usr/bin/env bash
# llama3-8b-tray: 4 ranks on 1 x 1 nodes of gb200_nvl72, dp only mbs2, dp4
# Run it in the repository: llama3-8b-tray.sh
set -euo pipefail
# The same on every rank: each compares it with FP4DIST_ENV_HASH.
export FP4DIST_WORLD_SIZE=4
export NCCL_DEBUG=WARN
export NCCL_NVLS_ENABLE=0
export NCCL_GRAPH_REGISTER=0
export NCCL_MNNVL_ENABLE=0
export NCCL_CUMEM_ENABLE=1
export NCCL_NET_GDR_C2C=1
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export FP4DIST_ENV_NAMES=FP4DIST_WORLD_SIZE,NCCL_CUMEM_ENABLE,NCCL_DEBUG,NCCL_GRAPH_REGISTER,NCCL_MNNVL_ENABLE,NCCL_NET_GDR_C2C,NCCL_NVLS_ENABLE,PYTORCH_CUDA_ALLOC_CONF,TORCH_NCCL_AVOID_RECORD_STREAMS
export FP4DIST_ENV_HASH=9c20148108d1bda4
export MASTER_PORT=${MASTER_PORT:-29500}
exec deepspeed --num_gpus 4 --master_port "$MASTER_PORT" --no_python --no_local_rank launch/rank.sh --gpus-per-numa 2 python -u launch/pretrain.py --config launch/examples/gb200_tray/run.yaml "$@"
