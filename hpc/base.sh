#!/usr/bin/env bash
# Fine-tune OpenAI's GLIDE at 64 px on your own pictures.
# Edit the settings, then: bash base.sh --profile NAME (of clusters.yaml), or --scheduler slurm, lsf, pbs, sge, local. Options behind the name win: -p steps=100 --gpus 8 --dry-run
set -euo pipefail

RUN=${RUN:-runs/base}                  # the run directory; one that holds a run goes on
DATA=${DATA:-my_pictures}          # a folder of pictures with captions, or tars

mkdir -p "$RUN"
cat > "$RUN/base.yaml" <<YAML
preset: glide-base
data: $DATA
batch_size: 64
accumulate: 4                      # 16 pictures on the GPU at once
lr: 1e-5
epochs: 20
uncond_p: 0.2
YAML

difflit submit train -f "$RUN/base.yaml" -p "run_dir=$RUN" -p resume=auto --gpus 1 "$@"
