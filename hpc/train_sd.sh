#!/usr/bin/env bash
# Fine-tune Stable Diffusion 1.5 on your own pictures, from cached latents and embeddings.
# Edit the settings, then: bash train_sd.sh, or sbatch train_sd.sh, or bsub < train_sd.sh. Options behind the name win: bash train_sd.sh -p lr=5e-6
# Started again with the same RUN it goes on where it was. Before the first time, where there is a network: difflit pull sd15
#SBATCH --job-name=train_sd --gres=gpu:1 --cpus-per-task=8 --time=24:00:00
#BSUB -J train_sd -n 8 -gpu "num=1" -W 24:00
set -euo pipefail

RUN=${RUN:-runs/sd15}              # the run directory
DATA=${DATA:-my_pictures}          # a folder of pictures with captions, tars, or cache where only the cache is
CACHE=${CACHE:-cache}              # latents and embeddings

mkdir -p "$RUN"
cat > "$RUN/launch.yaml" <<YAML
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
lora_rank: 0                       # 16 trains adapters, in less memory
YAML

export HF_HUB_OFFLINE=1            # a job never downloads
difflit cache fill -f "$RUN/launch.yaml" "$@"
difflit train -f "$RUN/launch.yaml" -p "run_dir=$RUN" -p resume=auto "$@"
