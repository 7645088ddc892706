"""Write data.npz, the part of Fashion-MNIST that ships with this example.

x, y: the first 3000 test images; x_train, y_train: training images, the same number from each class.
"""

import argparse
from pathlib import Path

import numpy as np
from train import DATA_DIR, load, to_input

TEST = 3000
TRAIN_PER_CLASS = 200
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("data.npz"))
    args = parser.parse_args()

    images, labels = load("t10k", args.data_dir)
    train_images, train_labels = load("train", args.data_dir)
    rng = np.random.default_rng(SEED)
    chosen = [
        rng.choice(np.flatnonzero(train_labels.numpy() == c), TRAIN_PER_CLASS, replace=False)
        for c in range(10)
    ]
    pick = rng.permutation(np.concatenate(chosen))
    np.savez_compressed(
        args.out,
        x=to_input(images[:TEST]).numpy(),
        y=labels[:TEST].numpy(),
        x_train=to_input(train_images[pick]).numpy(),
        y_train=train_labels[pick].numpy(),
    )
    print(f"{args.out.name}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
