#!/usr/bin/env bash
# An autoencoder of your own, its latents, diffusion on them, scores: four jobs, each waiting for the one before. By PHASES also the autoencoder in several sizes, or with one thing changed at a time.
# Edit the settings, then: bash autoencoder.sh. Options behind the name go to all: --dry-run, --wait
set -euo pipefail

FOLDER=${FOLDER:-runs/autoencoder}     # holds the runs of the chain, the sweep, and their settings
WHERE=${WHERE:-scheduler: local}       # or: profile: NAME (of clusters.yaml), scheduler: slurm, lsf, pbs, sge
PHASES=${PHASES:-chain}               # chain, capacity (size and attention, each with each), ablations; several with spaces between
DATA=${DATA:-shapes}                   # data with a segmentation and a class: shapes, digits, emoji; else change heads
SIZE=${SIZE:-32}                       # pixels along a side
CACHE=${CACHE:-cache}                  # latents and embeddings

mkdir -p "$FOLDER"
cat > "$FOLDER/autoencoder.yaml" <<YAML
preset: autoencoder-tiny
data: $DATA
image_size: $SIZE
heads: segmentation=0.1, label=0.02
early_stop: val_loss               # five times in a row no better: enough
patience: 5
keep_best: 1
YAML
cat > "$FOLDER/latents.yaml" <<YAML
preset: latent-tiny
data: $DATA
image_size: $SIZE
cache: $CACHE
vae: $FOLDER/runs/autoencoder
YAML
cat > "$FOLDER/diffusion.yaml" <<YAML
preset: latent-tiny
data: $DATA
image_size: $SIZE
cache: $CACHE
vae: $FOLDER/runs/autoencoder
fill: false                        # the job before has filled it
YAML
cat > "$FOLDER/evaluate.yaml" <<YAML
models: $FOLDER/runs/diffusion
data: $DATA
YAML
cat > "$FOLDER/chain.yaml" <<YAML
$WHERE
links:
- {name: autoencoder, notebook: train, file: $FOLDER/autoencoder.yaml, folder: $FOLDER/runs/autoencoder}
- {name: latents, notebook: precompute, file: $FOLDER/latents.yaml, folder: $FOLDER/runs/latents}
- {name: diffusion, notebook: train, file: $FOLDER/diffusion.yaml, folder: $FOLDER/runs/diffusion}
- {name: evaluate, notebook: evaluate, file: $FOLDER/evaluate.yaml, folder: $FOLDER/runs/evaluate}
YAML
cat > "$FOLDER/capacity.yaml" <<YAML
settings:
  preset: autoencoder-tiny
  data: $DATA
  image_size: $SIZE
grid:                              # capacity and attention, each with each
  base_channels: [16, 32]
  latent_channels: [4, 8]
  attention: [none, middle, deep]
YAML
cat > "$FOLDER/ablations.yaml" <<YAML
settings:
  preset: autoencoder-tiny
  data: $DATA
  image_size: $SIZE
runs:                              # one thing changed at a time, against the preset
- {name: preset}
- {name: no-heads, heads: ""}
- {name: no-sampling, variational: false}
- {name: stronger-prior, kl_weight: 1e-4}
- {name: squared-error, rgb_loss: l2}
- {name: perceptual, loss_terms: perceptual=0.1}
YAML

how=(--"${WHERE%%:*}" "${WHERE#*: }")
for phase in $PHASES; do
    case $phase in
    chain) difflit submit --chain "$FOLDER/chain.yaml" "$@" ;;
    capacity | ablations) difflit submit train --ablations "$FOLDER/$phase.yaml" --out "$FOLDER/$phase" --max-parallel 4 "${how[@]}" "$@" ;;
    *) echo "PHASES=$PHASES: there is chain, capacity, ablations" >&2; exit 2 ;;
    esac
done
