#!/usr/bin/env bash
# Fill the caches of latents and text embeddings of a latent run, before it is trained.
# Edit the settings, then: bash precompute.sh --profile NAME (of clusters.yaml), or --scheduler slurm, lsf, pbs, sge, local. Options behind the name win: -p steps=100 --gpus 8 --dry-run
set -euo pipefail

RUN=${RUN:-runs/precompute}            # the run directory; one that holds a run goes on
DATA=${DATA:-my_pictures}          # a folder of pictures with captions, or tars
CACHE=${CACHE:-cache}              # latents and embeddings

mkdir -p "$RUN"
cat > "$RUN/precompute.yaml" <<YAML
preset: sd15
data: $DATA
cache: $CACHE
image_size: 512
YAML

difflit submit precompute -f "$RUN/precompute.yaml" -p "run_dir=$RUN" -p resume=auto --gpus 1 "$@"
