#!/usr/bin/env bash
# The same training with one thing changed at a time, each with three seeds: a job for every run, four at a time.
# Edit the settings, then: bash ablations.sh --profile NAME (of clusters.yaml), or --scheduler slurm, lsf, pbs, sge, local. Options behind the name win: --dry-run
set -euo pipefail

FOLDER=${FOLDER:-runs/ablations}   # holds the settings that all have in common
SEEDS=${SEEDS:-1..3}

mkdir -p "$FOLDER"
cat > "$FOLDER/ablations.yaml" <<YAML
preset: shapes
YAML

for change in uncond_p=0,0.1,0.2 ema_decay=0.99,0.999 lr=1e-4,3e-4,1e-3; do
    difflit submit train -f "$FOLDER/ablations.yaml" --sweep "$change" "seed=$SEEDS" --max-parallel 4 --gpus 1 "$@"
done
