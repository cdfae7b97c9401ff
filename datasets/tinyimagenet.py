#!/usr/bin/env python3
"""Make data/tinyimagenet.npz: download Tiny ImageNet and scale its images (some minutes).

    python datasets/tinyimagenet.py                         250 MB, from the public host
    DATA_MIRROR=URL python datasets/tinyimagenet.py         from a directory with the same archive
    python datasets/tinyimagenet.py --size 64               as large as they come

100,000 training images of 200 classes; the labelled validation part is the test part. The archive
stays in data/; its MD5 sum is checked.
"""
import argparse
import io
import os
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image
from torchvision.datasets.utils import download_url

NAME, MD5 = "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


def read_images(archive, labels, classes, size):
    """Of {name of a JPEG in the archive: class}: images (n, size, size, 3) uint8, labels (n,)."""
    images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in labels]
    return (np.stack([image.resize((size, size), Image.BILINEAR) for image in images]),
            np.array([classes.index(label) for label in labels.values()]))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make data/tinyimagenet.npz")
    parser.add_argument("--size", type=int, choices=(32, 64), default=32, help="pixels a side")
    size, folder = parser.parse_args(argv).size, Path("data")
    host = os.environ.get("DATA_MIRROR") or "http://cs231n.stanford.edu"
    try:
        download_url(f"{host.rstrip('/')}/{NAME}", folder, md5=MD5)
    except Exception as error:
        sys.exit(f"cannot download {NAME} from {host} ({str(error).splitlines()[:1]}): put it into "
                 f"{folder}/ by hand, or set DATA_MIRROR to the URL of a directory that holds it")

    with ZipFile(folder / NAME) as archive:
        # train/<class>/images/<image>.JPEG; in val all classes are in one folder, with a list
        train = {name: name.split("/")[2] for name in sorted(archive.namelist())
                 if "/train/" in name and name.endswith(".JPEG")}
        val = f"{Path(NAME).stem}/val"
        rows = archive.read(f"{val}/val_annotations.txt").decode().splitlines()
        test = {f"{val}/images/{row.split()[0]}": row.split()[1] for row in rows}
        classes = sorted(set(train.values()))
        train_x, train_y = read_images(archive, train, classes, size)
        test_x, test_y = read_images(archive, test, classes, size)
    path, temporary = folder / "tinyimagenet.npz", folder / f".tmp{os.getpid()}.npz"
    np.savez(temporary, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y,
             classes=classes)
    temporary.replace(path)
    print(f"{path}: {len(train):,} + {len(test):,} images, {len(classes)} classes, {size} pixels")


if __name__ == "__main__":
    main()
