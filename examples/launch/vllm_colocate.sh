#!/usr/bin/env bash
# Topology: trainer and vLLM in the same processes; vLLM generates the student's rollouts, the teacher is in them too.
# Hardware: GPUs of 40 GB for the default recipe, as many as TRAINER_GPUS names. Not run here on GPUs.
#
#     pip install ".[vllm]"
#     bash examples/launch/vllm_colocate.sh [--any_field value ...]
#
# Further arguments go to examples/train.py. To set, in the environment:
#   RECIPE         recipe of the trainer                           TRAINER_GPUS    CUDA_VISIBLE_DEVICES
#   SHARE          of each GPU's memory for vLLM: a second copy of the student's weights and its KV cache
#   SLEEP          true: vLLM gives that share back while the student is trained, which costs time at each step
#   MAX_MODEL_LEN  longest prompt + completion, in tokens          ACCELERATE      configuration for accelerate
#   LAUNCH         command that runs a training script
set -euo pipefail
cd "$(dirname "$0")/../.."

RECIPE=${RECIPE:-examples/configs/qwen3_lora_24gb.yaml}
TRAINER_GPUS=${TRAINER_GPUS:-0,1}
ACCELERATE=${ACCELERATE:-examples/accelerate/ddp.yaml}
SHARE=${SHARE:-0.3}
SLEEP=${SLEEP:-true}
MAX_MODEL_LEN=${MAX_MODEL_LEN:-1536}
IFS=, read -ra gpus <<<"$TRAINER_GPUS"
read -ra launch <<<"${LAUNCH:-accelerate launch --config_file $ACCELERATE --num_processes ${#gpus[@]}}"

CUDA_VISIBLE_DEVICES=$TRAINER_GPUS exec "${launch[@]}" examples/train.py --config "$RECIPE" \
    --use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization "$SHARE" \
    --vllm_enable_sleep_mode "$SLEEP" --vllm_max_model_length "$MAX_MODEL_LEN" "$@"
