#!/usr/bin/env bash
# Score models on the same prompts and seeds; the first is the one to compare with.
# Edit the settings, then: bash evaluate.sh --profile NAME (of clusters.yaml), or --scheduler slurm, lsf, pbs, sge, local. Options behind the name win: -p steps=100 --gpus 8 --dry-run
set -euo pipefail

RUN=${RUN:-runs/evaluate}              # the run directory; one that holds a run goes on
MODELS=${MODELS:-runs/base}        # runs, checkpoints, names; comma between

mkdir -p "$RUN"
cat > "$RUN/evaluate.yaml" <<YAML
models: $MODELS
YAML

difflit submit evaluate -f "$RUN/evaluate.yaml" -p "run_dir=$RUN" -p resume=auto --gpus 1 "$@"
