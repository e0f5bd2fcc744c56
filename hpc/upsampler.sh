#!/usr/bin/env bash
# Fine-tune OpenAI's upsampler from 64 to 256 px on your own pictures.
# Edit the settings, then: bash upsampler.sh --profile NAME (of clusters.yaml), or --scheduler slurm, lsf, pbs, sge, local. Options behind the name win: -p steps=100 --gpus 8 --dry-run
set -euo pipefail

RUN=${RUN:-runs/upsampler}             # the run directory; one that holds a run goes on
DATA=${DATA:-my_pictures}          # a folder of pictures with captions, or tars

mkdir -p "$RUN"
cat > "$RUN/upsampler.yaml" <<YAML
preset: glide-upsample
data: $DATA
batch_size: 32
accumulate: 4                      # 8 pictures on the GPU at once
lr: 1e-5
epochs: 10
YAML

difflit submit train -f "$RUN/upsampler.yaml" -p "run_dir=$RUN" -p resume=auto --gpus 1 "$@"
