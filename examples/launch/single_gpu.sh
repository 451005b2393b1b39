#!/usr/bin/env bash
# Topology: all on one GPU: student, teacher and generation in one process.
# Hardware: one GPU of 24 GB, or of 16 GB with RECIPE=examples/configs/qwen3_qlora_16gb.yaml. Not run here on GPUs.
#
#     bash examples/launch/single_gpu.sh [--any_field value ...]
#
# It first prints what memory the recipe is estimated to need. Further arguments go to examples/train.py. To set, in the
# environment:
#   RECIPE         recipe of the trainer                           TRAINER_GPUS    CUDA_VISIBLE_DEVICES, one of them
#   ACCELERATE     configuration for accelerate                    LAUNCH          command that runs a training script
#   PYTHON         command that runs the estimate
set -euo pipefail
cd "$(dirname "$0")/../.."

RECIPE=${RECIPE:-examples/configs/qwen3_lora_24gb.yaml}
TRAINER_GPUS=${TRAINER_GPUS:-0}
ACCELERATE=${ACCELERATE:-examples/accelerate/single_gpu.yaml}
read -ra launch <<<"${LAUNCH:-accelerate launch --config_file $ACCELERATE}"

"${PYTHON:-python}" examples/memory.py --config "$RECIPE" --accelerate_config "$ACCELERATE"
CUDA_VISIBLE_DEVICES=$TRAINER_GPUS exec "${launch[@]}" examples/train.py --config "$RECIPE" "$@"
