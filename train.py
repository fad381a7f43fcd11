"""The training script: ``python train.py --config recipes/ham10000.yaml --data.path manifest.csv --out runs/ham``."""

import sys

from protopush.cli.program import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
