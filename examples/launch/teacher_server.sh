#!/usr/bin/env bash
# Topology: a teacher on a vLLM server, and the trainer, on the same machine or on two.
# Hardware: by default 8 GPUs of 80 GB, two for the server and six for the trainer. Not run here on GPUs.
#
#     bash examples/launch/teacher_server.sh [--any_field value ...]                # both on this machine
#     SERVER_URLS="http://host:8000" bash examples/launch/teacher_server.sh [...]   # servers that run; one URL or more
#
# Further arguments go to examples/train.py. To set, in the environment:
#   TEACHER        path or hub id of the teacher                   RECIPE          recipe of the trainer
#   SERVER_GPUS    CUDA_VISIBLE_DEVICES of the server              TRAINER_GPUS    those of the trainer
#   MAX_MODEL_LEN  longest prompt + completion + 1, in tokens      PORT            of the server, on this machine
#   MAX_LOGPROBS   likeliest ids a token that it may be asked for  SERVE_ARGS      further flags of the server
#   SERVE          command that serves, before the model's name
#   ACCELERATE     configuration for accelerate                    LAUNCH          command that runs a training script
#   WAIT           seconds until the server must answer            LOG             file of the server's output
#   GRACE          seconds a signalled trainer has to save
#   VLLM_API_KEY   if set, the server asks for it and the trainer sends it
set -euo pipefail
cd "$(dirname "$0")/../.."

TEACHER=${TEACHER:-Qwen/Qwen3-32B}
RECIPE=${RECIPE:-examples/configs/qwen3_full_zero3_server.yaml}
SERVER_GPUS=${SERVER_GPUS:-6,7}
TRAINER_GPUS=${TRAINER_GPUS:-0,1,2,3,4,5}
ACCELERATE=${ACCELERATE:-examples/accelerate/zero3.yaml}
PORT=${PORT:-8000}
WAIT=${WAIT:-1800}
GRACE=${GRACE:-300}
LOG=${LOG:-teacher_server.log}
MAX_MODEL_LEN=${MAX_MODEL_LEN:-5120}
MAX_LOGPROBS=${MAX_LOGPROBS:-64} # teacher_top_k's default
count() { local list; IFS=, read -ra list <<<"$1"; echo "${#list[@]}"; }
# prompt log-probs take tokens x vocabulary in fp32 a prefill chunk, hence the small chunk; and prefix caching has
# answered with stale ones in some versions of vLLM
SERVE_ARGS=${SERVE_ARGS:---tensor-parallel-size $(count "$SERVER_GPUS") --max-num-batched-tokens 2048
    --no-enable-prefix-caching --gpu-memory-utilization 0.85}
read -ra serve <<<"${SERVE:-vllm serve}"
read -r -d '' -a serve_args <<<"$SERVE_ARGS" || true
read -ra launch <<<"${LAUNCH:-accelerate launch --config_file $ACCELERATE --num_processes $(count "$TRAINER_GPUS")}"

server= trainer=
stop() {
    if [[ -n $trainer ]]; then # which ends its step, for that it needs the server, and saves
        kill -- "-$trainer" 2>/dev/null || true
        for _ in $(seq "$GRACE"); do
            kill -0 -- "-$trainer" 2>/dev/null || break
            sleep 1
        done
        kill -9 -- "-$trainer" 2>/dev/null || true
    fi
    [[ -n $server ]] || return 0
    kill "$server" 2>/dev/null || return 0
    for _ in $(seq 30); do
        kill -0 "$server" 2>/dev/null || return 0
        sleep 1
    done
    kill -9 "$server" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
healthy() {
    local url
    for url in "${urls[@]}"; do
        curl --fail --silent --max-time 5 --output /dev/null "$url/health" || return 1
    done
}

if [[ -n ${SERVER_URLS:-} ]]; then
    read -ra urls <<<"$SERVER_URLS"
else
    urls=("http://127.0.0.1:$PORT")
    if healthy; then
        echo "Something answers at ${urls[*]} already: set PORT, or SERVER_URLS=${urls[*]} to use it." >&2
        exit 1
    fi
    echo "Serving $TEACHER at ${urls[*]}, output in $LOG"
    CUDA_VISIBLE_DEVICES=$SERVER_GPUS "${serve[@]}" "$TEACHER" --host 127.0.0.1 --port "$PORT" \
        --max-model-len "$MAX_MODEL_LEN" --max-logprobs "$MAX_LOGPROBS" "${serve_args[@]}" >"$LOG" 2>&1 &
    server=$!
fi

deadline=$((SECONDS + WAIT))
until healthy; do
    if [[ -n $server ]] && ! kill -0 "$server" 2>/dev/null; then
        echo "The server ended before it answered; the end of $LOG:" >&2
        tail -n 20 "$LOG" >&2
        exit 1
    fi
    if ((SECONDS >= deadline)); then
        echo "No answer from ${urls[*]} (/health) after $WAIT s." >&2
        exit 1
    fi
    sleep 2
done
echo "The teacher answers at ${urls[*]} after $SECONDS s"

# in the background, for bash hears a signal only while it waits; a group of its own, for a launcher may not pass one on
CUDA_VISIBLE_DEVICES=$TRAINER_GPUS setsid "${launch[@]}" examples/train.py --config "$RECIPE" \
    --teacher_model_name_or_path "$TEACHER" --teacher_server_url "${urls[@]}" "$@" &
trainer=$!
wait "$trainer"
