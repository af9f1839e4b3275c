#!/usr/bin/env bash
# Launch one managed job for each line of a list of models.
#
# usage: export HF_TOKEN=…; ./sky-fleet.sh OWNER [models.txt]
set -euo pipefail
owner=${1:?usage: sky-fleet.sh OWNER [models.txt]}
here=$(cd "$(dirname "$0")" && pwd)

while read -r model recipe; do
    case $model in '' | '#'*) continue ;; esac
    name=${model##*/}-$recipe
    sky jobs launch --yes --async --name "nvquant-${name//[^A-Za-z0-9-]/-}" --secret HF_TOKEN \
        --env MODEL="$model" --env RECIPE="$recipe" --env TARGET="$owner/$name" "$here/sky-fleet.yaml" < /dev/null
done < "${2:-$here/models.txt}"
