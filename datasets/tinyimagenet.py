#!/usr/bin/env python3
"""Make data/tinyimagenet.npz: download Tiny ImageNet and scale its images (some minutes).

    python datasets/tinyimagenet.py                         250 MB, from the public host
    DATA_MIRROR=URL python datasets/tinyimagenet.py         from a directory with the same archive
    python datasets/tinyimagenet.py --size 64               as large as they come

100,000 training images of 200 classes; the labelled validation part is the test part. The archive
and its images stay in data/; its MD5 sum is checked.
"""
import argparse
import os
import sys
from pathlib import Path

from folder import make_npz
from torchvision.datasets.utils import download_and_extract_archive

NAME, MD5 = "tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make data/tinyimagenet.npz")
    parser.add_argument("--size", type=int, choices=(32, 64), default=32, help="pixels a side")
    size, host = parser.parse_args(argv).size, os.environ.get("DATA_MIRROR")
    url = f"{(host or 'http://cs231n.stanford.edu').rstrip('/')}/{NAME}"
    try:
        download_and_extract_archive(url, "data", md5=MD5)
    except Exception as error:
        sys.exit(f"cannot download {url} ({str(error).splitlines()[:1]}): put it into data/ by "
                 "hand, or set DATA_MIRROR to the URL of a directory that holds it")
    # train/<class>/images/*.JPEG, but in val all classes are in one folder, with a list
    train, val = (Path("data", Path(NAME).stem, part) for part in ("train", "val"))
    for row in (val / "val_annotations.txt").read_text().splitlines():
        image, label, *_ = row.split("\t")
        (val / label).mkdir(exist_ok=True)
        (val / "images" / image).replace(val / label / image)
    (val / "images").rmdir()
    make_npz("tinyimagenet", train, val, size)


if __name__ == "__main__":
    main()
