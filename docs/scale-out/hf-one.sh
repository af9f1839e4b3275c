#!/usr/bin/env bash
# One conversion as a job of the Hugging Face Hub, billed to the account that is logged in.
#
# usage: hf auth login; ./hf-one.sh OWNER [MODEL] [RECIPE]
set -euo pipefail
owner=${1:?usage: hf-one.sh OWNER [MODEL] [RECIPE]}
model=${2:-google/gemma-4-31b}
recipe=${3:-nvfp4}

# The token goes as a secret, read from the environment or the login. Without --timeout a job ends after half an hour.
# What stands in single quotes is for the job's shell. (Not bash -e: hf would take that option for its own.)
# shellcheck disable=SC2016
hf jobs run --detach --flavor h200 --timeout 2h --secrets HF_TOKEN \
    --env MODEL="$model" --env RECIPE="$recipe" --env TARGET="$owner/${model##*/}-$recipe" \
    python:3.12 bash -c 'set -e
      pip install --quiet "git+https://github.com/nvquant/nvquant"
      nvquant doctor
      nvquant convert "$MODEL" --recipe "$RECIPE" --low-disk -o out --push-to "$TARGET"
    '
