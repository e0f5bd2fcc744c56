#!/usr/bin/env bash
# Look for copies of training pictures in what a model draws.
# Edit the settings, then: bash audit.sh --profile NAME (of clusters.yaml), or --scheduler slurm, lsf, pbs, sge, local. Options behind the name win: -p steps=100 --gpus 8 --dry-run
set -euo pipefail

RUN=${RUN:-runs/audit}                 # the run directory; one that holds a run goes on
MODEL=${MODEL:-runs/base}          # a run, a checkpoint, a name

mkdir -p "$RUN"
cat > "$RUN/audit.yaml" <<YAML
model: $MODEL
YAML

difflit submit audit -f "$RUN/audit.yaml" -p "run_dir=$RUN" -p resume=auto --gpus 1 "$@"
