#!/usr/bin/env bash
# Stable Diffusion 1.5's UNet learns to work with SDXL's autoencoder and a T5-XXL text encoder.
# Edit the settings, then: bash train_t5.sh, or sbatch train_t5.sh, or bsub < train_t5.sh. Options behind the name win: bash train_t5.sh -p lr=5e-5
# Started again with the same RUN it goes on where it was. Before the first time, where there is a network: difflit pull sd15 sdxl-vae t5-xxl
#SBATCH --job-name=train_t5 --gres=gpu:1 --cpus-per-task=8 --time=48:00:00
#BSUB -J train_t5 -n 8 -gpu "num=1" -W 48:00
set -euo pipefail

RUN=${RUN:-runs/sd15-t5}           # the run directory
DATA=${DATA:-my_pictures}          # a folder of pictures with captions, tars, or cache where only the cache is
CACHE=${CACHE:-cache}              # latents and embeddings

mkdir -p "$RUN"
cat > "$RUN/launch.yaml" <<YAML
preset: sd15-t5-sdxlvae
data: $DATA
cache: $CACHE
image_size: 512
text_length: 128                   # most tokens of a caption
projection: linear                 # or replace: new cross-attention weights at T5's width
init_from: sd15                    # or scratch
batch_size: 64
accumulate: 4                      # 16 pictures on the GPU at once
lr: 1e-4
epochs: 100
uncond_p: 0.1
YAML

export HF_HUB_OFFLINE=1            # a job never downloads
difflit cache fill -f "$RUN/launch.yaml" "$@"
difflit train -f "$RUN/launch.yaml" -p "run_dir=$RUN" -p resume=auto "$@"
