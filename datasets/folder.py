#!/usr/bin/env python3
"""Make data/<name>.npz of your own images, in train/<class>/ and test/<class>/ (or val/<class>/).

    python datasets/folder.py path/to/flowers             then: distill.py --dataset flowers
    python datasets/folder.py path/to/flowers --size 64   larger: distill.py --image-size 64
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder


def make_npz(name, train, test, size):
    """Write data/<name>.npz from two folders <class>/*: the middle square of each image, scaled to
    `size` pixels a side. Exits with one line if something is missing or cannot be read.
    """
    def read_square(path):
        try:
            image = Image.open(path)
            if image.mode[0] in "IF":  # to make 8 bits of these, PIL would clip them
                raise ValueError("more than 8 bits a channel")
            return ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR)
        except Exception as error:  # a decoder may raise anything
            sys.exit(f"cannot read the image {path} ({error}): mend or delete it")

    try:
        parts = [ImageFolder(folder, loader=read_square) for folder in (train, test)]
    except OSError as error:
        sys.exit(f"there must be an image in every <class>/ of {train} and {test} ({error})")
    if parts[0].classes != parts[1].classes:
        sys.exit(f"{train} and {test} must have the same classes")
    (train_x, train_y), (test_x, test_y) = (map(np.array, zip(*part)) for part in parts)
    path, temporary = Path(f"data/{name}.npz"), Path(f"data/.tmp{os.getpid()}.npz")
    path.parent.mkdir(exist_ok=True)
    np.savez(temporary, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y,
             classes=parts[0].classes)
    temporary.replace(path)
    print(f"{path}: {len(train_y):,} + {len(test_y):,} images, {size} pixels a side")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    args = parser.parse_args(argv)
    name, test = args.folder.resolve().name, args.folder / "test"
    if name in "cifar10 cifar100 stl10 noise leaves tinyimagenet".split():
        sys.exit(f"{name} is the name of another data set: rename {args.folder}")
    make_npz(name, args.folder / "train", test if test.is_dir() else args.folder / "val", args.size)


if __name__ == "__main__":
    main()
