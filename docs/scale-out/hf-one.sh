#!/usr/bin/env bash
# One conversion as a job of the Hugging Face Hub, billed to the account that is logged in.
#
# usage: hf auth login; ./hf-one.sh OWNER [MODEL] [RECIPE]
set -euo pipefail
owner=${1:?usage: hf-one.sh OWNER [MODEL] [RECIPE]}
model=${2:-google/gemma-4-31b}
recipe=${3:-nvfp4}

# hf passes the token as a secret, from the environment or the login. Without --timeout a job ends after half an hour.
# The job's shell expands the text in single quotes. (bash -e does not work here, because hf takes the option for its own.)
# shellcheck disable=SC2016
hf jobs run --detach --flavor h200 --timeout 2h --secrets HF_TOKEN \
    --env MODEL="$model" --env RECIPE="$recipe" --env TARGET="$owner/${model##*/}-$recipe" \
    python:3.12 bash -c 'set -e
      pip install --quiet "git+https://github.com/nvquant/nvquant"
      nvquant doctor
      nvquant convert "$MODEL" --recipe "$RECIPE" --low-disk -o out --push-to "$TARGET"
    '
