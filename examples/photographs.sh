#!/usr/bin/env bash
# From a folder of photographs to predictions, by the command line alone.
#
#   pip install ".[finetune,export]"    # and the other packages that docs/install.md names for the command line
#   bash examples/photographs.sh
#   bash examples/photographs.sh photographs --epochs 10 --seeds 3
#
# The folder holds train, val and test with a folder for each class in each, or the folders of the classes themselves.
# What follows the folder goes to `talib_fast finetune`. Without a folder the images are generated.
set -euo pipefail

if (($# == 0)); then
  python "$(dirname "$0")/generated_images.py" runs/generated_images
  set -- runs/generated_images --image-size 64 --steps 30
fi
photographs=$1
shift

# Trains an ImageNet MobileNetV2 with both methods, and keeps the model that is best on the validation images.
python -m talib_fast finetune --data "$photographs" --method plain,stochnorm+bss --out runs/photographs "$@"

# Accuracy with its interval, figures of every class, the confusion matrix and the worst mistakes.
new=$photographs
[[ -d $photographs/test ]] && new=$photographs/test
python -m talib_fast evaluate runs/photographs "$new" --out runs/photographs/evaluation

# The three most likely classes of every image.
python -m talib_fast predict runs/photographs "$new" --top 3 --csv runs/photographs/predictions.csv

# For other programs, such as onnxruntime.
python -m talib_fast export runs/photographs runs/photographs/model.onnx
