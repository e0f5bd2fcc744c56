#!/usr/bin/env bash
# A ControlNet for Stable Diffusion 1.5: the base stands still, a branch learns to follow edges, or a picture or map beside each picture. By PHASES also each way of fusion, side by side.
# Edit the settings, then: bash controlnet.sh --profile NAME (of clusters.yaml), or --scheduler slurm, lsf, pbs, sge, local. Options behind the name win: -p steps=100 --gpus 8 --dry-run
set -euo pipefail

RUN=${RUN:-runs/controlnet}            # the run directory; one that holds a run goes on
PHASES=${PHASES:-train}            # train, fusions (one run for each way to bring the branch's features in); both with a space between
PRESET=${PRESET:-sd15-controlnet}  # or latent-controlnet-tiny, controlnet-tiny
BASE=${BASE:-}                     # a run that is to be controlled, or a pipeline's folder; empty: the preset's
DATA=${DATA:-my_pictures}          # a folder of pictures with captions, or tars
CONTROL=${CONTROL:-edges}          # or depth=depth.png (cat.depth.png beside cat.png), segmentation:coloured (cat.segmentation.png)
CACHE=${CACHE:-cache}              # latents and embeddings

mkdir -p "$RUN"
cat > "$RUN/controlnet.yaml" <<YAML
preset: $PRESET
data: $DATA
control: $CONTROL
cache: $CACHE
${BASE:+init_from: $BASE}
YAML

for phase in $PHASES; do
    case $phase in
    train) difflit submit train -f "$RUN/controlnet.yaml" -p "run_dir=$RUN" -p resume=auto --gpus 1 "$@" ;;
    fusions) difflit submit train -f "$RUN/controlnet.yaml" --sweep control_fusion=add,concatenate,gated,film,scaled-add,learned-scale --out "$RUN/fusions" --max-parallel 3 --gpus 1 "$@" ;;
    *) echo "PHASES=$PHASES: there is train, fusions" >&2; exit 2 ;;
    esac
done
