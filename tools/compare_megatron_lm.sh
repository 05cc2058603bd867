#!/usr/bin/env bash
# Train an unchanged Megatron-LM pretrain_gpt.py three times on one GPU (as it is, with our attention and norms, in NVFP4)
# and print each run's losses and time of an iteration.
#
#   tools/compare_megatron_lm.sh MEGATRON_LM_CHECKOUT TOKENS_PREFIX [OUT] [ITERATIONS]
#
# MEGATRON_LM_CHECKOUT  github.com/NVIDIA/Megatron-LM, 0.20; its dataset helper is built on first use (make, g++)
# TOKENS_PREFIX         a .bin/.idx pair with a vocabulary of 32,768 (tools/prepare_data.py)
# EXTRA                 environment: more flags, such as "--tensor-model-parallel-size 2 --sequence-parallel"; GPUS=2
set -euo pipefail
megatron=$(realpath "$1") tokens=$2 out=${3:-runs/megatron_lm} iterations=${4:-100}
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
export PYTHONPATH=$megatron:$here${PYTHONPATH:+:$PYTHONPATH} CUDA_DEVICE_MAX_CONNECTIONS=1
mkdir -p "$out"

flags=(--num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024
  --micro-batch-size 4 --global-batch-size 4 --train-iters "$iterations" --lr 6e-4 --lr-decay-style constant
  --lr-warmup-iters 10 --clip-grad 1.0 --weight-decay 0.1 --adam-beta2 0.95 --bf16 --seed 1234
  --train-data-path "$tokens" --valid-data-path "$tokens" --test-data-path "$tokens"
  --tokenizer-type NullTokenizer --vocab-size 32768 --transformer-impl local --no-persist-layer-norm
  --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion --attention-softmax-in-fp32
  --position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm
  --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0 --log-interval 1 --eval-iters 1
  --eval-interval 100000 --num-workers 2 --data-cache-path "$out/cache")
read -ra extra <<<"${EXTRA:-}"

# train NAME [-m fp4dist.megatron ...]: one run, its log in $out/NAME.log
train() {
  local log=$out/$1.log
  echo "$1: log $log"
  torchrun --nproc-per-node "${GPUS:-1}" "${@:2}" "$megatron/pretrain_gpt.py" "${flags[@]}" "${extra[@]}" >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; return 1; }
  sed -nE 's/.*iteration +([0-9]+)\/.*\(ms\): ([0-9.]+).*lm loss: ([0-9.E+-]+).*/\1 \3 \2/p' "$log" |
    awk -v every=$((iterations / 4)) '$1 == 1 || $1 % every == 0 { printf "  iteration %d: loss %.4f, %s ms\n", $1, $2, $3 }'
}

train as_it_is
train provider_bf16 -m fp4dist.megatron --recipe bf16
train nvidia_nvfp4 -m fp4dist.megatron --recipe nvidia_nvfp4 --allow-reference
