#!/usr/bin/env bash
# llama3-70b-rack: 64 ranks on 1 x 16 nodes of gb200_nvl72, tp2 pp4 vpp5 mbs1, dp8
# Run on every node, in the repository: llama3-70b-rack.node.sh NODE_NUMBER ADDRESS_OF_NODE_0 [deepspeed|torchrun]
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
node=${1:?number of this node, from 0} master=${2:?address of node 0} launcher=${3:-deepspeed}
export MASTER_PORT=${MASTER_PORT:-29500}
if [[ "$launcher" == torchrun ]]; then
  exec torchrun --nproc-per-node 4 --nnodes 16 --node-rank "$node" --master-addr "$master" --master-port "$MASTER_PORT" --no-python launch/rank.sh --gpus-per-numa 2 python -u launch/pretrain.py --config launch/examples/gb200_rack/run.yaml
fi
hostfile="$(dirname "$0")"/llama3-70b-rack.hostfile
if [[ ! -f "$hostfile" ]]; then # DeepSpeed needs names to count nodes; without ssh it calls none of them
  hostfile=$(mktemp)
  for ((i = 0; i < 16; i++)); do echo "node$i slots=4"; done >"$hostfile"
fi
exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$node" --master_addr "$master" --master_port "$MASTER_PORT" --no_python --no_local_rank launch/rank.sh --gpus-per-numa 2 python -u launch/pretrain.py --config launch/examples/gb200_rack/run.yaml
