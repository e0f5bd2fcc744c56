#!/usr/bin/env bash
# Fine-tune Stable Diffusion 1.5 on your own pictures, from cached latents and embeddings: what the cache lacks is computed first.
# Edit the settings, then: bash latent.sh --profile NAME (of clusters.yaml), or --scheduler slurm, lsf, pbs, sge, local. Options behind the name win: -p steps=100 --gpus 8 --dry-run
set -euo pipefail

RUN=${RUN:-runs/latent}                # the run directory; one that holds a run goes on
DATA=${DATA:-my_pictures}          # a folder of pictures with captions, or tars
CACHE=${CACHE:-cache}              # latents and embeddings

mkdir -p "$RUN"
cat > "$RUN/latent.yaml" <<YAML
preset: sd15
data: $DATA
cache: $CACHE
image_size: 512
batch_size: 64
accumulate: 4                      # 16 pictures on the GPU at once
lr: 1e-5
epochs: 20
uncond_p: 0.1
min_snr_gamma: 5
YAML

difflit submit train -f "$RUN/latent.yaml" -p "run_dir=$RUN" -p resume=auto --gpus 1 "$@"
