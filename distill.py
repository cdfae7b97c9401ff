#!/usr/bin/env python3
"""Distil a student from a frozen, randomly initialised teacher: no labels, no augmentation.

    python distill.py --arch resnet18 --init-eps 0.0          the paper's run: CIFAR10, 100 epochs (wants a GPU)
    python distill.py --arch resnet20 --dataset leaves --out-dim 1024 --batch-size 128 --steps 400       (a laptop)
    python distill.py --arch vgg11 --init-eps inf --dataset path/to/images       (holds train/<class>/ and test/<class>/)

Method: "Random Teachers are Good Teachers", Sarnthein et al., ICML 2023, arXiv 2302.12091. This file, in the order the
data flows: models, data, student initialisation, loss, the training loop, checkpoints, main.
"""
import argparse, csv, fcntl, hashlib, io, json, math, os, pickle, platform, re, shutil, signal, socket, subprocess, sys, time
import warnings, zipfile, zlib
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import transforms
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3
from torchvision.models.vgg import cfgs as VGG_PLANS, make_layers as vgg_layers


class Problem(Exception):
    """Something the user can put right; its text is one line that says how."""


# ---- Models: network = projector ∘ encoder (Table 5, App. E) ---------------------------------------------------------

def vgg(plan):
    """VGG without batch norm: torchvision's `features`, then the mean over what is left of the image (1×1 at 32×32)."""
    encoder = nn.Sequential()
    encoder.add_module("features", vgg_layers(VGG_PLANS[plan]))  # the name makes the keys torchvision's own
    encoder.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    return encoder


def imagenet_resnet(name, image_size):
    """torchvision's ResNet without `fc`; up to 64 px its stem is a 3×3 stride-1 convolution and no max-pool."""
    encoder = torchvision.models.get_model(name)
    encoder.fc = nn.Identity()
    if image_size <= 64:
        encoder.conv1, encoder.maxpool = conv3x3(3, 64), nn.Identity()
    return encoder


def cifar_resnet(n_blocks):
    """He et al. 2016, §4.2: three stages of 16-32-64 channels, `n_blocks` basic blocks each; 1×1-conv shortcuts."""
    layers, width = [conv3x3(3, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True)], 16
    for channels in (16, 32, 64):
        for block in range(n_blocks):
            stride = 2 if block == 0 and channels > 16 else 1
            shortcut = nn.Sequential(conv1x1(width, channels, stride), nn.BatchNorm2d(channels)) if stride == 2 else None
            layers.append(BasicBlock(width, channels, stride, shortcut))
            width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) whose 12 pre-norm layers are one: they share their weights.

    So the paper's parameter counts have it, with patches of 16 pixels, though its text says 8 (vit-*-p8). Emits the class
    token. The paper's own ViT attends over heads, not tokens: its numbers are those of another network.
    """
    def __init__(self, width, patch, image_size):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch) ** 2, width))
        self.layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, dropout=0.0, activation=F.gelu,
                                                batch_first=True, norm_first=True)
        attention, bound = self.layer.self_attn, width**-0.5
        for p in (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.bias):
            nn.init.uniform_(p, -bound, bound)  # as torch initialises its Linear; its attention does otherwise
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        for _ in range(12):
            tokens = self.layer(tokens)
        return self.norm(tokens[:, 0])


ARCHS = {  # name: (encoder for an image size, embedding width r)
    "vgg11": (lambda size: vgg("A"), 512), "vgg13": (lambda size: vgg("B"), 512),
    "vgg16": (lambda size: vgg("D"), 512), "vgg19": (lambda size: vgg("E"), 512),
    "resnet18": (lambda size: imagenet_resnet("resnet18", size), 512),
    "resnet34": (lambda size: imagenet_resnet("resnet34", size), 512),
    "resnet50": (lambda size: imagenet_resnet("resnet50", size), 2048),
    "resnet20": (lambda size: cifar_resnet(3), 64), "resnet56": (lambda size: cifar_resnet(9), 64),
    **{f"vit-{name}{suffix}": (partial(ViT, width, patch), width) for suffix, patch in (("", 16), ("-p8", 8))
       for name, width in (("tiny", 192), ("small", 384), ("medium", 512), ("base", 768))},
}
NORMS = {  # what may stand in for a ResNet's batch norm over c channels (Fig. 11)
    "batch": nn.BatchNorm2d, "instance": lambda c: nn.GroupNorm(c, c), "group": lambda c: nn.GroupNorm(c // 8, c),
    "layer": lambda c: nn.GroupNorm(1, c), "none": lambda c: nn.Identity(),
}


class Network(nn.Module):
    """Encoder, projector MLP and L2 bottleneck (App. E.1): logits(bottleneck(x)) are the m logits, here cosines in [-1, 1].

    `bottleneck` names the parts of its two halves, to 256 and from there to m logits (Fig. 12): w, the rows of the layer's
    weight are normalised; l, the linear layer itself; f, its output is normalised. The paper's text has lf/wl; its released
    code computes lf/l, so that logits shrink by the rows' norm, about 0.02·√256 = 0.32, and the KL by about its square.
    """
    def __init__(self, arch, out_dim, image_size=32, norm="batch", bottleneck="lf/wl"):
        super().__init__()
        build, r = ARCHS[arch]
        self.encoder = build(image_size)
        if norm != "batch":
            for module in list(self.encoder.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(module, name, NORMS[norm](child.num_features))
        self.parts = bottleneck.split("/")
        self.mlp = nn.Sequential(nn.Linear(r, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU())
        self.first = nn.Linear(2048, 256) if "l" in self.parts[0] else None
        self.last = nn.Linear(256 if self.first else 2048, out_dim, bias=False) if "l" in self.parts[1] else None

    def embed(self, images, autocast):
        """(B, 3, s, s) normalised images -> (B, r) float32 embeddings.

        Only the encoder runs under autocast. What the student learns from are logit differences of about 1e-3, and a
        16-bit logit has steps as large as that: from the embedding on, everything stays in float32.
        """
        with autocast:
            embedding = self.encoder(images)
        return embedding.float()

    def half(self, i, linear, x):
        """One half of the bottleneck, with the parts that are switched on."""
        if "l" in self.parts[i]:
            x = F.linear(x, F.normalize(linear.weight, dim=1) if "w" in self.parts[i] else linear.weight, linear.bias)
        return F.normalize(x, dim=1) if "f" in self.parts[i] else x

    def project(self, embedding):
        """(B, r) embeddings -> (B, 256) unit vectors, or what `bottleneck` makes of them."""
        return self.half(0, self.first, self.mlp(embedding))

    def bottleneck(self, images, autocast):
        """(B, 3, s, s) normalised images -> (B, 256) float32 unit vectors."""
        return self.project(self.embed(images, autocast))

    def logits(self, vectors):
        """(B, 256) vectors -> (B, m) logits."""
        return self.half(1, self.last, vectors)

    def forward(self, images, autocast):
        """(B, 3, s, s) normalised images -> (B, m) float32 logits."""
        return self.logits(self.bottleneck(images, autocast))


SHAPE = ("arch", "out_dim", "image_size", "norm", "bottleneck")  # the settings that shape a Network, in its order


def random_network(seed, *shape, **settings):
    """A freshly initialised Network, on the CPU; the same `seed` gives the same weights."""
    with torch.random.fork_rng(devices=[]):  # ViTs keep torch's own initialisation, from its global generator
        torch.manual_seed(seed)
        network = Network(*shape, **settings)
    generator = torch.Generator().manual_seed(seed)
    for name, module in network.named_modules():
        if isinstance(network.encoder, ViT) and name.startswith("encoder"):
            continue
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return network.to(memory_format=torch.channels_last)  # norm layers: weight 1, bias 0, mean 0, variance 1 from torch


# ---- Data: uint8 images, all of them resident on the device ----------------------------------------------------------

class Data(NamedTuple):
    """Images (n, 3, s, s) uint8, labels (n,) int64 in 0..classes-1; a set without labels has no test part."""
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    classes: list

    def to(self, device):
        return Data(*(part.to(device) for part in self[:4]), self.classes)


ARCHIVES = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100, "stl10": torchvision.datasets.STL10}
DATASETS = (*ARCHIVES, "tinyimagenet", "cifar5m", "leaves", "noise")


def load_data(name, image_size=32, data_dir="data", mirror=None, n=None):
    """Load a data set by name, or any folder with train/<class>/* and test/<class>/* (or val/) images, as `Data`.

    `n` is how many training images are wanted: cifar5m loads no more, noise makes no fewer. Raises Problem for an unknown
    name, a folder without train/, a failed download, an unreadable image.
    """
    if name == "leaves":
        data = dead_leaves()
    elif name == "noise":  # the paper's control (Fig. 4): σ=1 after normalisation; 8 bits hold ±4σ in steps of σ/32
        rng, x = np.random.default_rng(0), torch.empty(max(n or 0, 50_000), 3, image_size, image_size, dtype=torch.uint8)
        for block in x.split(10_000):
            pixels = rng.standard_normal(block.shape, np.float32)
            block.copy_(torch.from_numpy((pixels * 32 + 128).round().clip(0, 255)))
        y = torch.zeros(len(x), dtype=torch.int64)
        data = Data(x, y, x[:0], y[:0], ["noise"])
    elif name in ARCHIVES:
        data = archive(name, data_dir, mirror)
    elif name == "tinyimagenet":
        data = image_folder(tiny_imagenet(data_dir, mirror), image_size, data_dir)
    elif name == "cifar5m":
        data = cifar5m(archive("cifar10", data_dir, mirror), Path(data_dir) / "cifar5m", n)
    elif Path(name).is_dir():
        data = image_folder(Path(name), image_size, data_dir)
    else:
        raise Problem(f"no data set or folder called '{name}'; there are {', '.join(DATASETS)}, or any folder of images")
    if data.train_x.shape[-1] != image_size:
        resize = transforms.Resize((image_size, image_size), antialias=True)
        data = data._replace(train_x=resize(data.train_x), test_x=resize(data.test_x))
    return data


def stratified_subset(labels, n):
    """Sorted indices of `n` items, each class in its share of `labels` (n_total,) up to one item; always the same ones.

    Raises Problem if n exceeds n_total.
    """
    if n > len(labels):
        raise Problem(f"--n-samples {n:,} is more than the {len(labels):,} training images there are")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    y = labels[shuffled]
    share = torch.empty(len(y))
    for c in y.unique():  # the k-th item of a class of K stands at k/K: the n lowest marks take each class evenly
        share[y == c] = (torch.arange((y == c).sum()) + 0.5) / (y == c).sum()
    return shuffled[share.argsort(stable=True)[:n]].sort().values


@contextmanager
def downloading(url, folder, size):
    """Say what is about to be downloaded, if `folder` is not there, and turn what may go wrong into one line.

    Of jobs that start together one downloads, and the others wait for its lock.
    """
    with suppress(OSError):  # a read-only folder, or a file system without locks: then without
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / ".downloading", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, as it is when this function has ended
    if not folder.exists():
        print(f"downloading {url} ({size}) to {folder.parent}/; from a mirror: --mirror URL; without a download: "
              f"--dataset leaves", flush=True)
    socket.setdefaulttimeout(60)  # a silent host is an error, not a wait for ever
    try:
        yield
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise Problem(f"cannot download {url} ({str(error).splitlines()[0]}): use --dataset leaves, a folder of images, or "
                      f"--mirror URL of a directory that holds {url.rpartition('/')[2]}")


def archive(name, data_dir, mirror):
    """CIFAR10/100 and STL10 by torchvision's downloader, which checks the MD5 sum wherever the file comes from."""
    source = ARCHIVES[name]
    if mirror:
        source.url = f"{mirror.rstrip('/')}/{source.filename}"
    size = "2.6 GB" if name == "stl10" else "170 MB; the original host can be slow: 55 kB/s, an hour in all, was seen in 2026"
    with downloading(source.url, Path(data_dir) / source.base_folder, size):
        if name == "stl10":  # 5,000 labelled training images; the 100,000 without labels are not used
            parts = [source(data_dir, split=split, download=True) for split in ("train", "test")]
            arrays = [torch.from_numpy(a) for part in parts for a in (part.data, part.labels.astype(np.int64))]
        else:
            parts = [source(data_dir, train=train, download=True) for train in (True, False)]
            arrays = [a for part in parts for a in (torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))]
    return Data(*arrays, parts[0].classes)


def tiny_imagenet(data_dir, mirror):
    """Download Tiny ImageNet's zip, sort its validation images into folders by class, and return its folder."""
    folder = Path(data_dir) / "tiny-imagenet-200"
    url = f"{(mirror or 'http://cs231n.stanford.edu').rstrip('/')}/tiny-imagenet-200.zip"
    with downloading(url, folder, "240 MB"):
        annotations = folder / "val/val_annotations.txt"  # val/ is last in the archive: complete, if all of it is there
        images = len(list((folder / "val").glob("**/*.JPEG")))
        if not annotations.exists() or images != len(annotations.read_text().splitlines()):
            download_and_extract_archive(url, data_dir, md5="90528d7ca1a48142e341f4ef8d21d0de")
        if (unsorted := folder / "val/images").exists():  # all in one folder, classes in a text file: move them apart
            for line in annotations.read_text().splitlines():
                image, wordnet_id = line.split("\t")[:2]
                (folder / "val" / wordnet_id).mkdir(exist_ok=True)
                if (unsorted / image).exists():  # else an interrupted call has moved it
                    (unsorted / image).rename(folder / "val" / wordnet_id / image)
            unsorted.rmdir()
        shutil.rmtree(folder / "test", ignore_errors=True)  # images without labels, which one would take for the test part
    return folder


def cifar5m(cifar10, folder, n):
    """CIFAR10 with as many images of CIFAR-5M (Nakkiran et al. 2021) as make `n` for training, or all (Fig. 4).

    `folder` holds CIFAR-5M's parts, *.npz with X (k, 32, 32, 3) uint8 and Y (k,), as they come; only what is used is read.
    """
    images, labels = [cifar10.train_x], [cifar10.train_y]
    missing = (n or 10**9) - len(cifar10.train_y)
    for path in sorted(folder.glob("*.npz")):
        if missing <= 0:
            break
        try:
            with zipfile.ZipFile(path) as file:
                for name, parts in (("X", images), ("Y", labels)):
                    with file.open(f"{name}.npy") as member:
                        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                        (k, *shape), _, dtype = header[np.lib.format.read_magic(member)](member)
                        rows = np.frombuffer(member.read(min(k, missing) * math.prod(shape) * dtype.itemsize), dtype)
                        parts.append(torch.from_numpy(rows.reshape(-1, *shape).copy()))
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
            raise Problem(f"{path} is damaged or no part of CIFAR-5M ({type(error).__name__}): download it again")
        images[-1], labels[-1] = images[-1].permute(0, 3, 1, 2), labels[-1].long()
        missing -= len(labels[-1])
    if len(images) == 1 and missing > 0:
        raise Problem(f"{folder} holds no part of CIFAR-5M: put its .npz files there (https://github.com/preetum/cifar5m)")
    return cifar10._replace(train_x=torch.cat(images), train_y=torch.cat(labels))


def image_folder(folder, image_size, data_dir):
    """Decode a folder that torchvision's ImageFolder reads, once; later calls read the cache in data_dir/cache/."""
    test = "test" if (folder / "test").is_dir() else "val"
    for part in ("train", test):
        if not (folder / part).is_dir():
            raise Problem(f"{folder} has no {part}/: it needs train/<class>/ and test/<class>/ (or val/) folders of images")
    crop = transforms.Compose([transforms.Resize(image_size), transforms.CenterCrop(image_size)])
    try:
        sets = [torchvision.datasets.ImageFolder(folder / part, crop) for part in ("train", test)]
    except FileNotFoundError as error:
        raise Problem(f"{folder}: {str(error).splitlines()[0]}")
    if sets[0].classes != sets[1].classes:
        raise Problem(f"{folder}: train/ and {test}/ must hold the same classes")
    stats = ((path, os.stat(path)) for part in sets for path, _ in part.samples)
    files = [(os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = hashlib.sha256(repr((image_size, files)).encode()).hexdigest()[:16]  # any file changed: another cache
    cache = Path(data_dir) / "cache" / f"{folder.name}-{key}.npy"
    if cache.exists():
        images = np.load(cache, allow_pickle=False)
    else:
        print(f"decoding {len(files):,} images of {folder} (once; then cached in {cache})", flush=True)
        images = np.empty((len(files), 3, image_size, image_size), np.uint8)
        for i, (path, label) in enumerate(sets[0].samples + sets[1].samples):
            try:
                images[i] = np.asarray(crop(sets[0].loader(path))).transpose(2, 0, 1)
            except (OSError, SyntaxError) as error:
                raise Problem(f"cannot read the image {path} ({error}): mend or delete it")
        write_atomically(cache, lambda file: np.save(file, images))
    n, images = len(sets[0]), torch.from_numpy(images)
    return Data(images[:n], torch.tensor(sets[0].targets), images[n:], torch.tensor(sets[1].targets), sets[0].classes)


LEAF = {  # is the point (u, v) inside a leaf of radius 1 about the origin?
    "disc": lambda u, v: u * u + v * v < 1,
    "box": lambda u, v: np.maximum(abs(u), abs(v)) < 0.886,
    "star": lambda u, v: np.sqrt(abs(u)) + np.sqrt(abs(v)) < 1.3,
    "ring": lambda u, v: abs(u * u + v * v - 0.85) < 0.5,
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.35) & (np.maximum(abs(u), abs(v)) < 1.2)}
LEAF_CLASSES = [  # leaf, √(length/width), sizes fall as r^-2 or r^-3, how far colours spread from dark to light
    ("disc", 1.0, 3, 1.0), ("disc", 2.0, 2, 0.5), ("box", 1.0, 2, 0.5), ("box", 2.0, 3, 1.0), ("star", 1.0, 3, 0.5),
    ("star", 1.6, 2, 1.0), ("ring", 1.0, 2, 1.0), ("ring", 1.6, 3, 0.5), ("cross", 1.0, 2, 0.5), ("cross", 1.6, 3, 1.0)]


def dead_leaves(n_train=1000, n_test=200, n_leaves=50, size=32):
    """Dead-leaves images, `n_train` + `n_test` of each class: opaque leaves of power-law size, fallen on one another.

    The standard generative model of natural-image statistics (Lee, Mumford & Huang 2001; Baradad et al. 2021). Classes
    differ in the leaves' shape, elongation, law of sizes and palette. Only +, -, ×, ÷, √ and uniform draws are used,
    which IEEE 754 fixes to the last bit: sines or powers would give other bytes on another processor.
    """
    rng, n = np.random.default_rng(0), n_train + n_test
    y, x = (np.mgrid[:size, :size] + 0.5).astype(np.float32)[:, None]  # (1, size, size) each, in pixels
    images = np.empty((len(LEAF_CLASSES), n, 3, size, size), np.uint8)
    for images_of_class, (leaf, stretch, law, light) in zip(images, LEAF_CLASSES):
        cx, cy, t, u, grey, *rgb = rng.random((8, n, n_leaves, 1, 1), np.float32)
        cx, cy = ((c * 1.25 - 0.125) * size for c in (cx, cy))
        t = 2 * t - 1
        cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)  # a direction within ±90°
        if law == 2:  # radii from 1.5 to 14 pixels, by inverting the distribution function at u
            radius = 1 / (1 / 14 + u * (1 / 1.5 - 1 / 14))
        else:
            radius = 1 / np.sqrt(1 / 14**2 + u * (1 / 1.5**2 - 1 / 14**2))
        colours = [np.clip(light * (2 * grey - 1) + (1.2 - light) * (2 * c - 1), -1, 1) for c in rgb]
        colours = [(127.5 + 127.5 * c).astype(np.uint8).reshape(n, n_leaves) for c in colours]
        for start in range(0, n, 100):  # small blocks stay in the processor's cache
            block = slice(start, start + 100)
            top = np.zeros((len(cx[block]), size, size), np.uint8)  # the leaf on top of each pixel; leaf 0 is the ground
            for i in range(1, n_leaves):
                dx, dy = x - cx[block, i], y - cy[block, i]
                u = (dx * cos[block, i] + dy * sin[block, i]) / (radius[block, i] * stretch)
                v = (dy * cos[block, i] - dx * sin[block, i]) / (radius[block, i] / stretch)
                np.copyto(top, i, where=LEAF[leaf](u, v))
            for channel, colour in enumerate(colours):
                pixels = np.take_along_axis(colour[block], top.reshape(len(top), -1), axis=1)
                images_of_class[block, channel] = pixels.reshape(top.shape)
    train, test = (torch.from_numpy(part.reshape(-1, 3, size, size)) for part in (images[:, :n_train], images[:, n_train:]))
    labels = torch.arange(len(LEAF_CLASSES))
    return Data(train, labels.repeat_interleave(n_train), test, labels.repeat_interleave(n_test),
                [f"{leaf}-{stretch}-r{law}" for leaf, stretch, law, _ in LEAF_CLASSES])


def channel_stats(images):
    """Mean and standard deviation of uint8 images (n, 3, s, s) by channel, each (1, 3, 1, 1) float32 in 0..255."""
    levels = torch.arange(256, dtype=torch.float64)
    count = lambda block: torch.stack([torch.bincount(block[:, c].reshape(-1), minlength=256) for c in range(3)])
    counts = sum(map(count, images.split(10_000))).double().cpu()  # in blocks: bincount takes 8 bytes a pixel
    mean = counts @ levels / counts.sum(1)
    std = (counts @ levels**2 / counts.sum(1) - mean**2).clamp(min=1e-6).sqrt()
    return tuple(stat.float().view(1, 3, 1, 1).to(images.device) for stat in (mean, std))


def normalise(images, stats):
    """uint8 (B, 3, s, s) -> float32 with mean 0 and variance 1 in each channel over the training set, channels-last."""
    mean, std = stats
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


# ---- Student initialisation and loss (§2, §3) ------------------------------------------------------------------------

@torch.no_grad()
def init_student(teacher, draw, eps):
    """Turn the independent `draw` into the student at θ_S = (θ_T + ε·θ̃)/√(1 + ε²), and return it.

    ε = 0 copies the teacher, ε = inf keeps the draw; the paper's α is ε/(1+ε). The root keeps the variance of the weights.
    Every parameter moves, as in the released code; norm weights, 1 in both draws, become (1+ε)/√(1+ε²), at most √2.
    Buffers (batch-norm statistics) start fresh.
    """
    scale = math.hypot(1, eps)
    for theta_t, theta in zip(teacher.parameters(), draw.parameters()):
        if eps < math.inf:
            theta.copy_(theta_t / scale + theta * (eps / scale))
    return draw


class KLDivergence(torch.autograd.Function):
    """KL(softmax teacher ‖ softmax student) in nats (≥ 0), mean over the batch, from logits (B, m) in float32; call `.apply`.

    The KL here is about 1e-6 nats: two log-softmaxes, whose entries sit near −ln 65536 = −11, would lose most of it to
    float32 rounding. With p the teacher's softmax and d = student − teacher logits, shifted so that Σ p·d = 0, it is
    log(1 + s) for s = Σ p·(e^d − 1 − d): a sum of small terms ≥ 0, not a difference of large ones. The gradient,
    p_student − p, is p·(e^d − 1 − s)/(1 + s) by the same algebra, and exactly 0 where the logits agree.
    """
    @staticmethod
    def forward(ctx, teacher_logits, student_logits):
        p = teacher_logits.softmax(1)
        d = student_logits - teacher_logits
        d -= (p * d).sum(1, keepdim=True)
        growth = d.expm1()  # e^d − 1
        s = (p * (growth - d)).sum(1, keepdim=True)
        ctx.save_for_backward(p.mul_(growth.sub_(s)).div_((1 + s) * len(p)))
        return s.log1p().mean()

    @staticmethod
    def backward(ctx, upstream):
        return None, ctx.saved_tensors[0] * upstream


def kl_by_log_softmax(teacher_logits, student_logits):
    """The same KL as one usually writes it, by autograd; kept for its rounding noise (README, "The fixed point")."""
    log_p, log_q = teacher_logits.log_softmax(1), student_logits.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


LOSSES = {"kl": KLDivergence.apply, "kl-log-softmax": kl_by_log_softmax, "mse": F.mse_loss}


def distance(parameters, start):
    """‖θ − θ_start‖₂ over two equally long lists of tensors, as a float."""
    return torch.stack([(p.detach() - q).norm() for p, q in zip(parameters, start)]).norm().item()


# ---- The training loop -----------------------------------------------------------------------------------------------

def train(batch_loss, n, optimizer, scaler, *, steps, batch_size, seed, start=0):
    """Train, and yield (step, loss) after every optimiser step: step start+1..steps, loss a detached scalar on the device.

    `batch_loss(index)` maps a batch of indices (B,) int64 into 0..n-1 to a scalar loss; whatever distinguishes
    distillation from supervised training is in that function, and the caller logs, probes and saves between steps.
    The order of the data depends on (seed, epoch) alone: stopping after any step and going on from `start` changes nothing.
    """
    device = optimizer.param_groups[0]["params"][0].device
    per_epoch = math.ceil(n / batch_size)
    for step in range(start, steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n)).to(device)
        loss = batch_loss(order[i * batch_size:(i + 1) * batch_size])  # the last, smaller batch of an epoch is kept
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()  # the scaler does something with fp16 alone: gradients of 1e-9 would round to 0
        scaler.step(optimizer)
        scaler.update()
        yield step + 1, loss.detach()


def join_processes(device):
    """(rank, number of processes): joins those that torchrun started, one for each GPU; (0, 1) without torchrun."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise Problem(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc_per_node")
        torch.cuda.set_device(local)  # from here on "cuda" is this process's GPU
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2),  # the others wait for probes
                            device_id=torch.device("cuda", local) if device.type == "cuda" else None)
    return dist.get_rank(), dist.get_world_size()


def pick_device(name):
    """The torch.device for --device auto, cpu or cuda. Raises Problem for cuda where there is none."""
    torch.backends.cudnn.benchmark = True  # one shape of batch: worth finding its fastest convolution
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 is float32; --amp is for less
    if name == "cuda" and not torch.cuda.is_available():
        raise Problem("--device cuda, but torch sees no CUDA device here: use --device cpu")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def pick_amp(amp, device, arch, norm="batch"):
    """Resolve --amp auto: bf16 where the hardware multiplies it fast, else fp16 on CUDA, else float32 ("off").

    Float32 also where there is no batch norm: in the one bf16 run we measured (README, "Real images") VGG11 hardly learned,
    while ResNet20 learns as in float32.
    """
    if amp != "auto":
        return amp
    if not arch.startswith("resnet") or norm != "batch":
        return "off"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "bf16" if "amx_bf16" in flags or "avx512_bf16" in flags else "off"


def amp_tools(amp, device):
    """The autocast context for the encoder and the gradient scaler for `amp` in bf16, fp16, off."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return (torch.autocast(device.type, dtype=dtype, enabled=amp != "off"),
            torch.amp.GradScaler(device.type, enabled=amp == "fp16"))


# ---- Supervised training by the same loop, for prune.py and landscape.py ----------------------------------------------

def classifier(encoder, r, n_classes, seed):
    """`encoder` and a linear head of torch's default initialisation; the same `seed` gives the same head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(r, n_classes)
    return nn.ModuleDict({"encoder": encoder.requires_grad_(True).train(), "head": head})


def augment(images, seed, step, padding=4):
    """uint8 (B, 3, s, s) -> the same shape: flipped left to right or not, padded with black, cropped at random.

    The draws depend on (seed, step) alone, so that rewinding to a step brings back its very images.
    """
    n, s = len(images), images.shape[-1]
    rng = np.random.default_rng((seed, step, 1))  # 1: another stream than (seed, epoch), the order of the data
    draw = lambda high: torch.from_numpy(rng.integers(high, size=(n, 1))).to(images.device)
    rows, columns = (draw(2 * padding + 1) + torch.arange(s, device=images.device) for _ in range(2))  # (B, s) each
    columns = torch.where(draw(2) == 1, s + 2 * padding - 1 - columns, columns)  # counted from the right: flipped
    image = torch.arange(n, device=images.device)[:, None, None]
    return F.pad(images, [padding] * 4)[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def learning_rate(base, step, steps):
    """`base`, a tenth of it from half of the steps on, a hundredth from three quarters on (epochs 80 and 120 of 160)."""
    return base * 0.1 ** sum(step >= round(milestone * steps) for milestone in (0.5, 0.75))


def classify(network, images, stats, autocast):
    """Logits (B, classes) float32 of uint8 images (B, 3, s, s); as in distillation, only the encoder runs under autocast."""
    with autocast:
        embedding = network["encoder"](normalise(images, stats))
    return network["head"](embedding.float())


@torch.no_grad()
def test_accuracy(network, images, labels, stats, autocast):
    """Share of uint8 images (n, 3, s, s) classified right, in %, in eval mode; leaves the network in train mode."""
    network.eval()
    correct = 0
    for x, y in zip(images.split(500), labels.split(500)):
        correct += (classify(network, x, stats, autocast).argmax(1) == y).sum()
    network.train()
    return 100 * correct.item() / len(labels)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

FORMATS = {"distill.py": "random-teachers-2", "prune.py": "random-teachers-prune-1", "landscape.py": "random-teachers-connect-1"}


def write_atomically(path, write):
    """Call `write(file)` on a temporary neighbour of `path`, then rename it: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise Problem(f"cannot write {path} ({str(error).splitlines()[0]}): is the disk full or read-only?")
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, result):
    """Write a dict, a key a line or so, for people and for scripts."""
    write_atomically(path, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))


def read_json(path):
    """The dict in a file that write_json wrote. Raises Problem."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise Problem(f"{path} is truncated or not ours ({type(error).__name__}): delete it and make it again") from None


def write_csv(path, columns, rows):
    """Write a list of dicts as a table with these columns; what a row lacks stays empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_checkpoint(path, script="distill.py"):
    """The whole checkpoint of a run directory or .pt file of `script`, on the CPU, as a dict of plain values and tensors.

    Raises Problem if it is missing, truncated or not one of ours. No pickled code runs, so a stranger's file is safe.
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise Problem(f"no checkpoint at {path}: make one with {script}, or name its run directory")
    with open(path, "rb") as file, warnings.catch_warnings():  # a file that cannot be opened is an OSError that names it
        warnings.simplefilter("ignore")  # what torch thinks of foreign files; ours get a line of their own below
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError):
            raise Problem(f"{path} is truncated or not a checkpoint: delete it and run {script} again") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMATS[script]:
        raise Problem(f"{path} is not a checkpoint of {script} ({FORMATS[script]}): name a run directory that {script} made")
    return checkpoint


def load_networks(path):
    """(teacher, student, config dict) of a run directory or .pt file: whole Networks, on the CPU. Raises Problem."""
    checkpoint, networks = read_checkpoint(path), []
    for role in ("teacher", "student"):
        try:
            network = Network(*(checkpoint["config"][key] for key in SHAPE))
            network.load_state_dict(checkpoint[role])
        except (KeyError, RuntimeError) as error:
            raise Problem(f"{path} does not fit this version of distill.py ({str(error).splitlines()[0]}): distil again")
        networks.append(network.to(memory_format=torch.channels_last))
    return *networks, checkpoint["config"]


def student_of(path, config):
    """The student of another run, for --teacher (Fig. 18). Raises Problem if its shape is not that of `config`."""
    _, student, other = load_networks(path)
    for key in SHAPE:
        if other[key] != config[key]:
            raise Problem(f"--teacher {path} has --{key.replace('_', '-')} {other[key]}, not {config[key]}: give both the same")
    return student.eval()  # with the batch-norm statistics of its training


def load_checkpoint(path, device="cpu"):
    """(teacher encoder, student encoder, config dict) of a run directory or .pt file, in eval mode and frozen.

    Encoders map normalised images (B, 3, s, s) to embeddings (B, r); s is config["image_size"]. Raises Problem.
    """
    *networks, config = load_networks(path)
    return *(network.encoder.eval().requires_grad_(False).to(device) for network in networks), config


def provenance(device):
    """On what, and by which version of this code: {"hardware", "torch", "commit"}, kept beside every result."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search("model name.*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    hardware = (torch.cuda.get_device_name() if device.type == "cuda" else
                f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.processor() or platform.machine()}")
    commit = ""
    if shutil.which("git"):
        git = lambda *words: subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True)
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        commit += "-dirty" * (git("diff", "--quiet", "HEAD", "--", "*.py", "run_all.sh").returncode == 1)  # not for a new report
    return {"hardware": hardware, "torch": torch.__version__, "commit": commit}


def fingerprint(module):
    """A string that two modules of one kind share if their weights and buffers are equal."""
    return hashlib.sha256(b"".join(t.cpu().contiguous().numpy().tobytes() for t in module.state_dict().values())).hexdigest()


# ---- Main ------------------------------------------------------------------------------------------------------------

def at_least(low, kind):
    """An argparse type: a number of `kind`, int or float, that is at least `low`."""
    def number(text):
        value = kind(text)
        if not value >= low:  # so written, it refuses nan too
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return value
    return number


def bottleneck_parts(text):
    """An argparse type: the parts of two halves, such as lf/wl."""
    if not re.fullmatch("(w?lf?|f?)/(w?lf?|f?)", text):
        raise argparse.ArgumentTypeError("wants two halves of w, l and f, such as lf/wl; w goes with l")
    return text


def make_parser(doc, prog=None):
    """(parser, add): add(name, help, default, ...) adds an option whose help ends with its default."""
    parser = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, help, default=None, **options):
        shown = "" if default is None or default is False else f" (default: {default})"
        parser.add_argument(name, default=default, help=help + shown, **options)
    return parser, add


def parse_args(argv=None):
    (parser, add), positive = make_parser(__doc__), at_least(1, int)
    add("--arch", "encoder; on a CPU take resnet20", "resnet18", choices=ARCHS)
    add("--init-eps", "student = (teacher + ε·draw)/√(1+ε²): 0 starts at the teacher, inf independently of it; the paper's "
        "α = ε/(1+ε), so α=0.5 is ε=1 and α=0.6 is ε=1.5. Without batch norm (vgg*, vit*) 0 is a fixed point that only rounding "
        "leaves; the paper's α≈0 is 1e-10", 0.0, type=at_least(0, float), metavar="ε")
    add("--dataset", f"{', '.join(DATASETS)}, or a folder that holds train/<class>/ and test/<class>/ (or val/)", "cifar10")
    add("--probe-dataset", "labelled data for the probes (default: --dataset); noise needs it")
    add("--n-samples", "distil on a stratified subset of so many training images (default: all)", type=positive)
    add("--image-size", "images are resized to so many pixels square; those of a folder keep their shape and are cropped", 32,
        type=at_least(8, int))
    add("--out-dim", "number of logits m; 1024 spares a CPU much work and costs little (Fig. 10)", 2**16, type=positive)
    add("--norm", "what normalises a ResNet's activations (Fig. 11)", "batch", choices=NORMS)
    add("--bottleneck", "parts of the projector's two last layers that are on: w, rows of unit length; l, the linear layer; f, "
        "output of unit length (Fig. 12). lf/l is the released code: the KL is 10 times smaller", "lf/wl", type=bottleneck_parts)
    add("--teacher", "run directory whose student is the teacher, in place of a random network: a second round (Fig. 18)",
        metavar="RUN")
    add("--teacher-mode", "train: the teacher's batch norms use each batch's statistics", "eval", choices=("eval", "train"))
    add("--live-teacher", "run the teacher at every step instead of once: the same result, slower", False, action="store_true")
    add("--loss", "kl-log-softmax is the KL computed the usual way, off by several per cent at 1e-6 nats; mse is that of the "
        "logits", "kl", choices=LOSSES)
    add("--optimizer", "sgd has momentum 0.9 and wants a far higher --lr", "adamw", choices=("adamw", "sgd"))
    add("--epochs", "passes over the training images", 100, type=positive)
    add("--steps", "stop after so many steps, if that is earlier", type=positive)
    add("--batch-size", "images a step", 256, type=positive)
    add("--lr", "constant learning rate; weight decay is 0", 1e-3, type=at_least(0, float))
    add("--seed", "of the teacher, the student's draw and the order of the data", 0, type=at_least(0, int))
    add("--device", "auto: cuda where there is one", "auto", choices=("auto", "cpu", "cuda"))
    add("--amp", "16-bit encoder; auto: where the hardware is fast at it and the encoder has batch norm; VGG needs float32", "auto",
        choices=("auto", "bf16", "fp16", "off"))
    add("--log-every", "steps between log lines (default: an epoch, at most 100)", type=positive)
    add("--eval-every", "steps between probes, with a checkpoint each (default: a tenth of the run)", type=positive)
    add("--out", "run directory (default: runs/<dataset>-<arch>-eps<ε>-seed<seed>)", type=Path)
    add("--resume", "go on from the run directory's checkpoint, if there is one", False, action="store_true")
    add("--data-dir", "where downloads and caches go", "data")
    add("--mirror", "URL of a directory with the archives to download; or set DATA_MIRROR", os.environ.get("DATA_MIRROR"))
    args = parser.parse_args(argv)
    if args.dataset == "noise" and args.probe_dataset in (None, "noise"):
        parser.error("noise has no labels: name a labelled data set with --probe-dataset, for example leaves")
    if args.seed >= 2**62:
        parser.error("--seed must be below 2**62")
    if args.arch.startswith("vgg") and args.image_size < 32:
        parser.error("VGG halves the image five times: --image-size must be at least 32")
    if args.arch.startswith("vit") and args.image_size % (patch := 8 if args.arch.endswith("-p8") else 16):
        parser.error(f"--image-size must be a multiple of the patch size, {patch}")
    if args.norm != "batch" and not args.arch.startswith("resnet"):
        parser.error("--norm is for ResNets: VGG has no norm, and a ViT has its own")
    args.out = args.out or Path(f"runs/{Path(args.dataset).name}-{args.arch}-eps{args.init_eps:g}-seed{args.seed}")
    return args


MAY_CHANGE = {"epochs", "steps", "log_every", "eval_every", "resume", "device", "out", "data_dir", "mirror"}  # on --resume
PROBES = {"linear_paper": "linear (paper)", "linear_converged": "linear (converged)", "knn": "k-NN"}  # by probe.py
LOG_COLUMNS = ("step", "epoch", "kl", "distance", "images_per_s", "linear_paper", "linear_paper_last", "linear_converged", "knn")


def open_run(out, config, script="distill.py", may_change=MAY_CHANGE):
    """The checkpoint to go on from in the run directory `out`, or None. Raises Problem rather than mix or lose runs."""
    path = out / "last.pt"
    if out.exists() and not out.is_dir():
        raise Problem(f"{out} is a file: name a directory with --out")
    if not path.exists():
        return None
    if not config["resume"]:
        raise Problem(f"{path} exists: add --resume to go on with that run, or name another directory with --out")
    checkpoint = read_checkpoint(path, script)
    if config["amp"] == "auto":
        config["amp"] = checkpoint["config"]["amp"]
    check_same(out, checkpoint["config"], config, may_change)
    return checkpoint


def check_same(out, before, config, may_change):
    """Raise Problem if a setting that must not change differs between `config` and the one that `out` was begun with."""
    for key, value in config.items():
        if before.get(key) != value and key not in may_change:
            raise Problem(f"cannot go on from {out}: it was run with --{key.replace('_', '-')} {before.get(key)}, not {value}")


def main(argv=None):
    from probe import evaluate  # here, because probe.py imports this file
    args = parse_args(argv)
    device = pick_device(args.device)
    rank, processes = join_processes(device)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all, and saves and probes
    config, path = {**vars(args), "out": str(args.out)}, args.out / "last.pt"
    checkpoint = open_run(args.out, config)
    args.amp = config["amp"] = pick_amp(config["amp"], device, args.arch, args.norm)
    if processes > 1:
        dist.all_gather_object(found := [None] * processes, checkpoint and checkpoint["step"])
        if len(set(found)) > 1:
            raise Problem(f"not all processes see the same {path}: put --out on a disk that all nodes share")
    same_length = checkpoint and all(checkpoint["config"][key] == config[key] for key in ("epochs", "steps"))
    if same_length and checkpoint["step"] == checkpoint["steps"] and "knn" in checkpoint["log"][-1]:
        return print(f"{args.out}: all {checkpoint['steps']:,} steps are done")

    # Data: the student sees `images` alone; labels are for the probes
    load = lambda name, n=None: load_data(name, args.image_size, args.data_dir, args.mirror, n)
    if rank > 0:
        dist.barrier()  # until the first process has downloaded and decoded
    data = load(args.dataset, args.n_samples)
    probe_data = (load(args.probe_dataset) if args.probe_dataset else data).to(device)
    if rank == 0 and processes > 1:
        dist.barrier()
    some = args.n_samples not in (None, len(data.train_y))
    images = data.train_x[stratified_subset(data.train_y, args.n_samples) if some else slice(None)].to(device)
    stats, n = channel_stats(images), len(images)
    per_epoch = math.ceil(n / args.batch_size)
    steps = min(args.epochs * per_epoch, args.steps or math.inf)
    step, log = (checkpoint["step"], checkpoint["log"]) if checkpoint else (0, [])
    if step > steps or step == steps and "knn" in log[-1]:
        return print(f"{args.out}: all {steps:,} steps are done")
    if (n % args.batch_size or args.batch_size) < processes:
        raise Problem(f"an epoch's last batch has {n % args.batch_size or args.batch_size} images for {processes} processes: take "
                      f"another --batch-size")
    log_every, eval_every = args.log_every or min(per_epoch, 100), args.eval_every or max(1, steps // 10)

    # Teacher and student. The teacher is in eval mode: its batch norms use their initial statistics, mean 0 and variance 1,
    # while the student's use each batch's own. So with batch norm the two differ even at ε=0. (Seeds: teachers are even.)
    shape = [config[key] for key in SHAPE]
    teacher = random_network(2 * args.seed, *shape)
    if checkpoint:
        teacher.load_state_dict(checkpoint["teacher"])
    elif args.teacher:
        teacher = student_of(args.teacher, config)
    student = init_student(teacher, random_network(2 * args.seed + 1, *shape), args.init_eps)
    teacher.requires_grad_(False).train(args.teacher_mode == "train").to(device)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # even in train mode it keeps its initial statistics for the probes: the teacher is frozen
    student.train().to(device)
    model = DistributedDataParallel(student) if processes > 1 else student  # averages the processes' gradients
    theta = list(student.parameters())
    theta_0 = [p.detach().clone() for p in theta]
    optimizer = (torch.optim.AdamW(theta, lr=args.lr, weight_decay=0, fused=True) if args.optimizer == "adamw" else
                 torch.optim.SGD(theta, lr=args.lr, momentum=0.9, fused=True))
    autocast, scaler = amp_tools(args.amp, device)
    if checkpoint:
        for name, part in (("student", student), ("optimizer", optimizer), ("scaler", scaler)):
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        print(f"resuming {args.out} after step {step:,} of {steps:,}")

    # The teacher runs once: it is frozen, the images are not augmented, and in eval mode its output for an image does not
    # depend on the rest of the batch. So n bottleneck vectors hold all it will ever say, and a step costs no teacher encoder.
    full_precision, table = amp_tools("off", device)[0], None
    if args.teacher_mode == "eval" and not args.live_teacher:
        print(f"running the teacher once over {n:,} images, then probing it", flush=True)
        with torch.no_grad():
            table = torch.cat([teacher.bottleneck(normalise(x, stats), full_precision) for x in images.split(args.batch_size)])

    def batch_loss(index):
        """Indices (B,) of images -> the KL of the student from the teacher, or another --loss.

        With several processes each takes its share of the batch, and the mean of what they return is the loss of the batch.
        """
        share = index.tensor_split(processes)[rank]
        x = normalise(images[share], stats)
        with torch.no_grad():
            target = table[share] if table is not None else teacher.bottleneck(x, full_precision)
            teacher_logits = teacher.logits(target)
        return LOSSES[args.loss](teacher_logits, model(x, autocast)) * (len(share) * processes / len(index))

    def save():
        if rank == 0:
            write_atomically(path, lambda file: torch.save({
                "format": FORMATS["distill.py"], "config": config, "teacher": teacher.state_dict(), "student": student.state_dict(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
                "step": step, "steps": steps, "log": log}, file))

    def probe(encoder):
        return evaluate(encoder, probe_data) if rank == 0 else {}

    def anyone(flag):
        """Whether `flag` is true in any process: all of them must stop after the same step."""
        flag = torch.tensor(float(bool(flag)), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    scores = lambda probes: "".join(f"{probes[probe]:20.2f}" for probe in PROBES if probes)

    def log_row(kl, speed):
        """Add a row to the log: mean KL and images/s since the last one. Its probes (%) come later, if it has any."""
        log.append({"step": step, "epoch": step / per_epoch, "kl": kl, "distance": distance(theta, theta_0), "images_per_s": speed})

    def show_row(probes):
        """Complete the last row of the log, on the screen and in log.csv."""
        log[-1].update(probes)
        if rank == 0:
            write_csv(args.out / "log.csv", LOG_COLUMNS, log)
        kl, far, speed = (log[-1][key] for key in ("kl", "distance", "images_per_s"))
        eta = timedelta(seconds=round((steps - step) * args.batch_size / speed)) if speed else ""
        print(f"{step:7d} {step / per_epoch:7.1f} {kl:10.3e} {far:9.3f} {speed:9.0f} {eta!s:>9}" + scores(probes), flush=True)

    print(f"{args.arch} on {args.dataset}: {n:,} images, {steps:,} steps of {args.batch_size}, m={args.out_dim:,}, "
          f"ε={args.init_eps:g}, seed {args.seed}, {device.type}{f' x {processes}' * (processes > 1)}, amp {args.amp} "
          f"-> {args.out}")
    print(f"{'step':>7} {'epoch':>7} {'MSE' if args.loss == 'mse' else 'KL (nats)':>10} {'from init':>9} {'images/s':>9} {'ETA':>9}"
          + "".join(f"{title:>20}" for title in PROBES.values()), flush=True)
    before = read_json(args.out / "run.json") if checkpoint and (args.out / "run.json").exists() else {}
    teacher_probes = before.get("teacher_probes") or probe(teacher.encoder)
    print(f"{'teacher':>7}{'':49}" + scores(teacher_probes), flush=True)
    made = [*before.get("made", []), {**provenance(device), "processes": processes, "from_step": step}]  # it may go on elsewhere
    if rank == 0:
        about = {"n_images": n, "total_steps": steps, "teacher_probes": teacher_probes, "made": made}
        write_json(args.out / "run.json", {**config, **about})
    if step == 0:  # at ε=0 the student's encoder is still the teacher's
        log_row(math.nan, 0)
        show_row(teacher_probes if args.init_eps == 0 else probe(student.encoder))
    elif (step == steps or step % eval_every == 0) and log[-1]["step"] == step and "knn" not in log[-1]:
        show_row(probe(student.encoder))  # it was killed while it probed
        save()

    # Train, and between the steps log, probe and save
    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, or a cluster that wants its node back: stop after this step
        signal.signal(number, lambda number, frame: interrupted.append(number))
    losses, first, started = [], step, time.time()
    clock = saved = started
    for step, loss in train(batch_loss, n, optimizer, scaler, steps=steps, batch_size=args.batch_size, seed=args.seed, start=step):
        losses.append(loss)  # left on the device: to ask for its value at every step would keep the GPU waiting
        if device.type == "cpu" and step == first + 5 and (hours := (steps - step) * (time.time() - started) / 5 / 3600) > 1:
            print(f"this CPU needs about {hours:.0f} hours for {steps:,} steps; going on, but `bash run_all.sh quick` shows the "
                  f"effect in minutes", flush=True)
        probing, logging = step == steps or step % eval_every == 0, step % log_every == 0
        stopping = interrupted if processes == 1 else (probing or logging) and anyone(interrupted)
        if not (probing or logging or stopping):
            continue
        losses = torch.stack(losses)
        if processes > 1:
            dist.all_reduce(losses)
        losses, probing = (losses / processes).tolist(), probing and (step == steps or not stopping)
        for i, value in enumerate(losses + [distance(theta, theta_0)], step - len(losses) + 1):
            if not math.isfinite(value):  # the distance stands for the next step's loss
                raise Problem(f"the loss became {value} at step {i}: lower --lr or take --amp off; what {args.out} held is kept")
        speed = len(losses) * args.batch_size / (time.time() - clock)
        log_row(sum(losses) / len(losses), speed)
        if probing:
            save()  # a probe can take longer than its steps, and fail
        show_row(probe(student.encoder) if probing else {})
        if log[-1]["kl"] == log[-1]["distance"] == 0 and len(log) == 2:
            print("the student has not moved: without batch norm ε=0 is a fixed point, and here nothing rounds it away "
                  "(README, \"The fixed point\"); take --init-eps 1e-10", flush=True)
        if probing or stopping or time.time() - saved > 600:
            save()
            saved = time.time()
        if stopping and step < steps:
            print(f"stopped after step {step:,}; the same command with --resume goes on from here")
            sys.exit(128 + (interrupted or [signal.SIGTERM])[0])
        losses, clock = [], time.time()
    if processes > 1:
        dist.destroy_process_group()
    for name, title in PROBES.items() if rank == 0 else ():
        before, after = teacher_probes[name], log[-1][name]
        best = max((row for row in log if name in row), key=lambda row: row[name])
        print(f"{title:>20}: teacher {before:.2f} -> student {after:.2f} ({after - before:+.2f}); "
              f"best {best[name]:.2f} at step {best['step']:,}")


def run_cli(main):
    """Run a script's main: a Problem, or an OSError such as a full disk, ends in one line on stderr and exit status 1."""
    try:
        main()
    except (Problem, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except torch.cuda.OutOfMemoryError:
        sys.exit(f"{Path(sys.argv[0]).name}: error: the GPU's memory is full: lower --batch-size, or take --device cpu")
    except ModuleNotFoundError as error:  # matplotlib, which is imported only where it draws
        sys.exit(f"{Path(sys.argv[0]).name}: error: the package {error.name} is missing: pip install -r requirements.txt")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    import distill  # the scripts import this file under its name: run that one copy of it, not a second called __main__
    distill.run_cli(distill.main)
