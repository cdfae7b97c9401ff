#!/usr/bin/env python3
"""Make data/cifar5m-<n>.npz: CIFAR10 and images of CIFAR-5M up to n training images (Fig. 4).

    python datasets/cifar5m.py 100000        then: distill.py --dataset cifar5m-100000

CIFAR-5M (Nakkiran et al. 2021) has to be fetched by hand: put its parts, *.npz with X
(k, 32, 32, 3) uint8 and Y (k,), into data/cifar5m/ (https://github.com/preetum/cifar5m). CIFAR10 is
downloaded, from DATA_MIRROR if that is set to the URL of a directory with its archive.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make data/cifar5m-<n>.npz")
    parser.add_argument("n", type=int, help="training images, more than CIFAR10's 50,000")
    n, folder = parser.parse_args(argv).n, Path("data")
    host = os.environ.get("DATA_MIRROR") or CIFAR10.url.rpartition("/")[0]
    CIFAR10.url = f"{host.rstrip('/')}/{CIFAR10.filename}"
    try:
        train, test = (CIFAR10(folder, part, download=True) for part in (True, False))
    except Exception as error:
        sys.exit(f"cannot download {CIFAR10.url} ({str(error).splitlines()[:1]}): set DATA_MIRROR "
                 "to the URL of a directory that holds it")
    images, labels = [train.data], [train.targets]
    try:
        for path in sorted((folder / "cifar5m").glob("*.npz")):
            if sum(map(len, images)) < n:
                with np.load(path) as part:
                    images.append(part["X"])
                    labels.append(part["Y"])
        images, labels = np.concatenate(images)[:n], np.concatenate(labels)[:n]
    except Exception as error:
        sys.exit(f"{path} is damaged or no part of CIFAR-5M ({error}): download it again")
    if len(images) < n or len(images) <= len(train):
        sys.exit(f"{n:,} training images cannot be had: there are {len(images):,} in CIFAR10 and "
                 f"the parts in {folder}/cifar5m/, and CIFAR10 alone has {len(train):,}")
    path, temporary = folder / f"cifar5m-{n}.npz", folder / f".tmp{os.getpid()}.npz"
    np.savez(temporary, train_x=images, train_y=labels, test_x=test.data, test_y=test.targets,
             classes=train.classes)
    temporary.replace(path)
    print(f"{path}: {n:,} + {len(test):,} images")


if __name__ == "__main__":
    main()
