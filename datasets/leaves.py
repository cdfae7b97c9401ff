#!/usr/bin/env python3
"""Make data/leaves.npz: dead leaves, images for a laptop that need no download (a few seconds).

    python datasets/leaves.py

Opaque leaves of power-law size that fell on one another, the standard generative model of
natural-image statistics (Lee, Mumford & Huang 2001; Baradad et al. 2021). Ten classes differ in the
leaves' shape, elongation, law of sizes and palette. The same bytes on every machine: only +, -, ×,
÷, √ and uniform draws are used, which IEEE 754 fixes to the last bit, where sines or powers would
differ from processor to processor.
"""
import os
from pathlib import Path

import numpy as np

LEAF = {  # is the point (±u, ±v) inside a leaf of radius 1 about the origin?
    "disc": lambda u, v: u * u + v * v < 1,
    "box": lambda u, v: np.maximum(u, v) < 0.886,
    "star": lambda u, v: np.sqrt(u) + np.sqrt(v) < 1.3,
    "ring": lambda u, v: abs(u * u + v * v - 0.85) < 0.5,
    "cross": lambda u, v: (np.minimum(u, v) < 0.35) & (np.maximum(u, v) < 1.2),
}
# leaf, √(length/width), sizes fall as r^-2 or r^-3, how far colours spread from dark to light
CLASSES = [
    ("disc", 1.0, 3, 1.0), ("disc", 2.0, 2, 0.5), ("box", 1.0, 2, 0.5), ("box", 2.0, 3, 1.0),
    ("star", 1.0, 3, 0.5), ("star", 1.6, 2, 1.0), ("ring", 1.0, 2, 1.0), ("ring", 1.6, 3, 0.5),
    ("cross", 1.0, 2, 0.5), ("cross", 1.6, 3, 1.0)]


def dead_leaves(n, n_leaves=50, size=32):
    """n images of each class, of n_leaves leaves: (10, n, size, size, 3) uint8."""
    rng = np.random.default_rng(0)
    y, x = (np.mgrid[:size, :size] + 0.5).astype(np.float32)  # of the pixels
    images = np.empty((len(CLASSES), n, 3, size, size), np.uint8)
    for canvas, (leaf, stretch, law, light) in zip(images, CLASSES):
        cx, cy, t, u, grey, *rgb = rng.random((8, n, n_leaves, 1, 1), np.float32)
        cx, cy = ((c * 1.25 - 0.125) * size for c in (cx, cy))
        t = 2 * t - 1
        cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)  # a direction within ±90°
        # radii of 1.5 to 14 pixels, by inverting the distribution function of r or r² at u
        small, large = 1.5 ** (law - 1), 14.0 ** (law - 1)
        radius = 1 / large + u * (1 / small - 1 / large)
        radius = 1 / (radius if law == 2 else np.sqrt(radius))
        colour = light * (2 * grey - 1) + (1.2 - light) * (2 * np.concatenate(rgb, axis=2) - 1)
        colour = (127.5 + 127.5 * np.clip(colour, -1, 1)).astype(np.uint8)[..., None]
        canvas[:] = colour[:, 0]  # leaf 0 is the ground
        for i in range(1, n_leaves):
            dx, dy = x - cx[:, i], y - cy[:, i]
            u = (dx * cos[:, i] + dy * sin[:, i]) / (radius[:, i] * stretch)
            v = (dy * cos[:, i] - dx * sin[:, i]) / (radius[:, i] / stretch)
            np.copyto(canvas, colour[:, i], where=LEAF[leaf](abs(u), abs(v))[:, None])
    return images.transpose(0, 1, 3, 4, 2)


def main(n_train=1000, n_test=200):
    images, labels = dead_leaves(n_train + n_test), np.arange(len(CLASSES))
    train, test = images[:, :n_train], images[:, n_train:]
    path, temporary = Path("data/leaves.npz"), Path(f"data/.tmp{os.getpid()}.npz")
    path.parent.mkdir(exist_ok=True)
    np.savez(temporary, train_x=np.concatenate(train), train_y=labels.repeat(n_train),
             test_x=np.concatenate(test), test_y=labels.repeat(n_test),
             classes=[f"{leaf} {stretch}" for leaf, stretch, *_ in CLASSES])
    temporary.replace(path)
    print(f"{path}: {n_train} + {n_test} images of each of {len(CLASSES)} classes")


if __name__ == "__main__":
    main()
