#!/usr/bin/env python3
"""Distil a student from a frozen, randomly initialised teacher: no labels, no augmentation.

    python distill.py --arch resnet18 --init-eps 0.0    the paper's run on CIFAR10 (wants a GPU)
    python distill.py --arch resnet20 --dataset leaves --out-dim 1024 --batch-size 128 --steps 400
    python distill.py --arch vgg11 --init-eps inf --dataset path/to/images

The second is for a laptop and needs no download; the folder of the third holds train/<class>/ and
test/<class>/.

Method: "Random Teachers are Good Teachers", Sarnthein et al., ICML 2023, arXiv 2302.12091. First
comes what one batch meets on its way: models, student initialisation, KL, the training loop. If you
want the experiment alone, go on at "Main", at the end; between the two are data, checkpoints and
options.
"""
import argparse
import hashlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import OrderedDict, namedtuple
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from glob import glob
from pathlib import Path
from tempfile import TemporaryFile
from zipfile import ZipFile

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision.datasets.folder import is_image_file
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3
from torchvision.models.vgg import cfgs as VGG_PLANS, make_layers
from torchvision.transforms.functional import resize


# ---- Normalisation of the images -----------------------------------------------------------------

def channel_stats(images):
    """Mean and std of uint8 images (n, 3, s, s) by channel: (1, 3, 1, 1) float32 in 0..255.

    From histograms: exact, and 15 times as fast as from the pixels.
    """
    shares = torch.stack([channel.flatten().bincount(minlength=256)
                          for channel in images.unbind(1)]).double() / images[:, 0].numel()
    values = torch.arange(256).to(shares)
    mean, square = shares @ values, shares @ values**2
    std = (square - mean**2).clamp(min=1e-6).sqrt()
    return tuple(moment.float().view(1, 3, 1, 1) for moment in (mean, std))


def normalise(images, stats):
    """uint8 (B, 3, s, s) -> float32, with mean 0 and variance 1 in each channel over all images."""
    mean, std = stats
    return ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)


# ---- Models: network = last layer ∘ projector ∘ encoder (Table 5, App. E) ------------------------

def vgg(plan, *_):
    """torchvision's VGG `features`, without batch norm, then the mean over the image (1×1 at
    32×32).
    """
    return nn.Sequential(OrderedDict(
        features=make_layers(VGG_PLANS[plan]), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))


NORMS = {  # what may stand in for a ResNet's batch norm over c channels (Fig. 11)
    "batch": nn.BatchNorm2d,
    "instance": lambda c: nn.GroupNorm(c, c),
    "group": lambda c: nn.GroupNorm(c // 8, c),
    "layer": lambda c: nn.GroupNorm(1, c),
    "none": nn.Identity,  # which takes any argument
}


def imagenet_resnet(n_layers, image_size, norm):
    """torchvision's ResNet without `fc`; up to 64 px its stem is a 3×3 stride-1 conv and no
    max-pool.
    """
    encoder = torchvision.models.get_model(f"resnet{n_layers}", norm_layer=NORMS[norm])
    encoder.fc = nn.Identity()
    if image_size <= 64:
        encoder.conv1, encoder.maxpool = conv3x3(3, 64), nn.Identity()
    return encoder


def cifar_resnet(n_blocks, image_size, norm):
    """He et al. 2016, §4.2: three stages of 16-32-64 channels, `n_blocks` basic blocks each."""
    norm, width = NORMS[norm], 16
    layers = [conv3x3(3, 16), norm(16), nn.ReLU(inplace=True)]
    for channels in (16, 32, 64):
        for block in range(n_blocks):
            stride, shortcut = 1, None
            if channels > width:
                stride, shortcut = 2, nn.Sequential(conv1x1(width, channels, 2), norm(channels))
            layers.append(BasicBlock(width, channels, stride, shortcut, norm_layer=norm))
            width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) that applies one pre-norm layer twelve times.

    That sharing and patches of 16 pixels fit the paper's parameter counts; its text says 8 pixels
    (vit-*-p8). Emits the class token. In the paper's released code the heads of a token attend to
    each other; here, as usual, tokens attend to tokens.
    """
    def __init__(self, width, patch, image_size, norm):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch) ** 2, width))
        self.layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True,
            norm_first=True)
        attention, bound = self.layer.self_attn, width**-0.5
        for p in (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.bias):
            # as torch initialises its Linear; its attention does otherwise
            nn.init.uniform_(p, -bound, bound)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        for _ in range(12):
            tokens = self.layer(tokens)
        return self.norm(tokens[:, 0])


VITS = {"vit-tiny": 192, "vit-small": 384, "vit-medium": 512, "vit-base": 768}
# name: (what builds the encoder for an image size and a norm, width r of its embedding); those
# called resnet*, and no others, have batch norm and take --norm
ARCHS = {
    **{f"vgg{layers}": (partial(vgg, plan), 512) for layers, plan in zip((11, 13, 16, 19), "ABDE")},
    **{f"resnet{layers}": (partial(imagenet_resnet, layers), r)
       for layers, r in ((18, 512), (34, 512), (50, 2048))},
    **{f"resnet{6 * n_blocks + 2}": (partial(cifar_resnet, n_blocks), 64) for n_blocks in (3, 9)},
    **{name: (partial(ViT, width, 16), width) for name, width in VITS.items()},
    **{f"{name}-p8": (partial(ViT, width, 8), width) for name, width in VITS.items()},
}


class NormalizedLinear(nn.Module):
    """A linear layer whose rows and outputs may have length 1; `parts` names what is on (Fig. 12).

    l: the linear map itself; w: the rows of its weight have length 1; f: its output vector has
    length 1. The projector and the network each end in one.
    """
    def __init__(self, parts, width, out_dim, bias):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, out_dim, bias) if "l" in parts else None

    def forward(self, x):
        if "l" in self.parts:
            weight = self.linear.weight
            if "w" in self.parts:
                weight = F.normalize(weight, dim=1)
            x = F.linear(x, weight, self.linear.bias)
        return F.normalize(x, dim=1) if "f" in self.parts else x


class Network(nn.Module):
    """Encoder (B, r), projector to unit vectors (B, 256), last layer to m logits (B, m) (App. E.1).

    With lf/wl a logit is the cosine of the image's vector with one of m rows, so it lies in
    [-1, 1], and no KL between two networks exceeds 2 nats (Hoeffding's lemma); random ones have
    logits of about ±1/16 and a KL of 4e-3. `bottleneck` has the parts of the projector's last layer
    and of the network's. The paper's text says lf/wl; its released code computes lf/l, so that
    logits shrink by the rows' norm, 0.02·√256 = 0.32, and the KL tenfold.
    """
    def __init__(self, arch, out_dim, image_size=32, norm="batch", bottleneck="lf/wl"):
        super().__init__()
        build_encoder, r = ARCHS[arch]
        to_vector, to_logits = bottleneck.split("/")
        self.encoder = build_encoder(image_size, norm)
        self.projector = nn.Sequential(
            nn.Linear(r, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(),
            NormalizedLinear(to_vector, 2048, 256, bias=True))
        width = 256 if "l" in to_vector else 2048
        self.last_layer = NormalizedLinear(to_logits, width, out_dim, bias=False)

    def forward(self, images, amp="off"):
        """(B, 3, s, s) normalised images -> (B, m) float32 logits."""
        return self.last_layer(self.projector(embed(self.encoder, images, amp)))


# the settings of a Network, in its order
SETTINGS = ("arch", "out_dim", "image_size", "norm", "bottleneck")


def random_network(seed, *args, **settings):
    """A freshly initialised Network(*args, **settings), on the CPU; a `seed` fixes its weights."""
    torch.manual_seed(seed)  # ViTs keep torch's own initialisation, from its global generator
    network, generator = Network(*args, **settings), torch.Generator().manual_seed(seed)
    for name, module in network.named_modules():
        if isinstance(network.encoder, ViT) and name.startswith("encoder"):
            continue
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu",
                                    generator=generator)
        elif isinstance(module, nn.Linear):
            # not trunc_normal_, the paper's: it cuts at 100 std, and its draws change with torch
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    # norms: weight 1, mean 0, variance 1 from torch
    return network.to(memory_format=torch.channels_last)


def autocast(device, amp):
    """The context in which convolutions run in 16 bits, for `amp` in bf16, fp16, off."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=amp != "off")


def embed(encoder, images, amp="off"):
    """(B, 3, s, s) normalised images -> (B, r) float32 embeddings.

    Only the encoder runs in 16 bits. What the student learns from are logit differences of about
    1e-3, and a bfloat16 near a typical logit, 1/16, has steps of 5e-4: from the embedding on,
    everything stays in float32.
    """
    with autocast(images.device, amp):
        return encoder(images).float()


# ---- Student initialisation (§2) -----------------------------------------------------------------

@torch.no_grad()
def init_student(teacher, student, eps):
    """Move `student`, an independent random network θ̃, to θ_S = (θ_T + ε·θ̃)/√(1 + ε²); return it.

    ε = 0 copies the teacher, ε = inf keeps θ̃; the paper's locality α is ε/(1+ε). The root keeps
    the variance of the weights. Every parameter moves, as in the released code: norm weights, 1 in
    both networks, become (1+ε)/√(1+ε²), at most √2. Buffers (batch-norm statistics) stay fresh.
    The paper's "α ≈ 0", ε = 1e-10, is below float32's resolution but for the smallest weights, of
    which it changes the last bit: enough to leave a fixed point (README).
    """
    scale = math.hypot(1, eps)
    for theta_t, theta in zip(teacher.parameters(), student.parameters()):
        if eps < math.inf:
            theta.copy_(theta_t / scale + theta * (eps / scale))
    return student


def distance(parameters, start):
    """‖θ − θ_start‖₂ over two equally long lists of tensors, as a float."""
    return torch.stack([(p.detach() - q).norm() for p, q in zip(parameters, start)]).norm().item()


# ---- Loss (§3) -----------------------------------------------------------------------------------

class KLDivergence(torch.autograd.Function):
    """KL(softmax teacher ‖ softmax student) in nats, mean over the batch; call `.apply`.

    Takes float32 logits (B, m) of the teacher, then of the student. Only the student's get a
    gradient.

    Why not the cross-entropy? It has the same gradient, but it is the KL plus the teacher's
    entropy, about ln 65536 = 11.09, beside which a KL of 1e-5 cannot be seen.

    Why not two log-softmaxes? Their entries sit near −11, too, and float32 rounding would eat most
    of the KL. With p the teacher's softmax and d = student − teacher logits, shifted so that
    Σ p·d = 0, the student's softmax is p·e^d / Σ p·e^d, and the KL is log(1 + s) for
    s = Σ p·(e^d − 1 − d). All terms are ≥ 0, and what cancels in them is of the size of d, a
    thousandth, not of 11. The gradient, p_student − p, is p·(e^d − 1 − s)/(1 + s) by the same
    algebra, and exactly 0 where the logits agree.
    """
    @staticmethod
    def forward(ctx, teacher_logits, student_logits):
        p = teacher_logits.softmax(1)
        d = student_logits - teacher_logits
        d -= (p * d).sum(1, keepdim=True)
        growth = d.expm1()  # e^d − 1
        s = (p * (growth - d)).sum(1, keepdim=True)
        growth -= s
        p *= growth
        ctx.save_for_backward(p.div_((1 + s) * len(p)))  # in place: p is 67 MB
        return s.log1p().mean()

    @staticmethod
    def backward(ctx, upstream):
        return None, ctx.saved_tensors[0] * upstream


def kl_by_log_softmax(teacher_logits, student_logits):
    """The same KL as one usually writes it, kept for its rounding noise (README, "The fixed
    point"); landscape.py takes it in float64.
    """
    return F.kl_div(student_logits.log_softmax(1), teacher_logits.log_softmax(1),
                    reduction="batchmean", log_target=True)


def constant_student_kl(teacher_logits):
    """The KL in nats, from teacher logits (n, m), of the best student that gives every image the
    same answer: the teacher's mean softmax. Without batch norm students may get stuck there.
    """
    # its logits; × m, so that they are near 0
    constant = (teacher_logits.softmax(1).mean(0) * teacher_logits.shape[1]).log()
    return KLDivergence.apply(teacher_logits, constant.expand_as(teacher_logits)).item()


LOSSES = {"kl": KLDivergence.apply, "kl-log-softmax": kl_by_log_softmax, "mse": F.mse_loss}


# ---- The training loop ---------------------------------------------------------------------------

def train(batch_loss, n, optimizer, scaler, learning_rate, *, steps, batch_size, seed, start=0):
    """Train, and yield (step, loss), a scalar on the device, after each step start+1..steps.

    `batch_loss(index, step)` maps a batch of indices (B,) int64 into 0..n-1 to a scalar. Both
    distillation and supervised training use this loop; between the steps the caller logs, probes,
    prunes and saves. `learning_rate(step)` takes the steps already made, from 0. The order of the
    data depends on (seed, epoch) alone, so to stop after any step and go on from there, as `start`,
    changes nothing.
    """
    device = optimizer.param_groups[0]["params"][0].device
    per_epoch = math.ceil(n / batch_size)
    for step in range(start, steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n)).to(device)
        index = order[i * batch_size:(i + 1) * batch_size]  # the last, smaller batch is kept
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = batch_loss(index, step)
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # but for fp16 these three are an ordinary step
        scaler.step(optimizer)
        scaler.update()
        yield step + 1, loss.detach()


# ---- Messages ------------------------------------------------------------------------------------

class Problem(Exception):
    """Something the user can put right; its text is one line that says how."""


def say(text=""):
    """Print a line at once. When nobody can read any more (`| head`), go on in silence."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- Data: uint8 images, all of them resident on the device --------------------------------------

# images (n, 3, s, s) uint8, labels (n,) int64 in 0..classes-1; without labels there is no test part
Data = namedtuple("Data", "train_x train_y test_x test_y classes")


ARCHIVES = ("cifar10", "cifar100", "stl10")
DATASETS = (*ARCHIVES, "tinyimagenet", "cifar5m", "leaves", "noise")


def load_data(name, image_size=32, data_dir="data", mirror=None, n=None, device="cpu"):
    """The Data of a data set by name, or of a folder with train/<class>/* and test/<class>/* (or
    val/).

    `n` counts for two: of cifar5m no more training images are read, and of noise, if need be, more
    than 50,000 are drawn. Raises Problem for an unknown name, a folder without train/, a failed
    download, an unreadable image.
    """
    if name == "leaves":
        data = dead_leaves()
    elif name == "noise":
        data = gaussian_noise(max(n or 0, 50_000), image_size)
    elif name in ARCHIVES:
        data = archive(name, data_dir, mirror)
    elif name == "tinyimagenet":
        data = image_folder(tiny_imagenet(data_dir, mirror), image_size)
    elif name == "cifar5m":
        data = cifar5m(archive("cifar10", data_dir, mirror), Path(data_dir) / name, n or 10**9)
    elif Path(name).is_dir():
        data = image_folder(Path(name), image_size)
    else:
        raise Problem(f"no data set or folder called '{name}'; there are {', '.join(DATASETS)}, or "
                      "any folder of images")
    train_x, train_y, test_x, test_y = (part.to(device) for part in data[:4])
    # as they are, if they have this size; all images are square
    train_x, test_x = (resize(images, image_size) for images in (train_x, test_x))
    return Data(train_x, train_y, test_x, test_y, data.classes)


def stratified_subset(x, y, n):
    """n of the images x (N, ...) and labels y (N,), each class in its share up to one; None keeps
    all.

    This looks at labels, as the paper's balanced subsets do (Fig. 4). Raises Problem if n exceeds
    what there is.
    """
    if n in (None, len(y)):
        return x, y
    if n > len(y):
        raise Problem(f"--n-samples {n:,} is more than the {len(y):,} training images there are")
    labels, rank = y.cpu(), torch.empty(len(y))
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        # the k-th of K members ranks at (k − 1/2)/K: the n lowest take each class evenly
        rank[members] = (torch.arange(len(members)) + 0.5) / len(members)
    chosen = rank.argsort(stable=True)[:n].sort().values
    return x[chosen], y[chosen]


@contextmanager
def downloading(url, folder):
    """Say what is about to be downloaded, if `folder` is not there, and turn what may go wrong into
    one line.
    """
    if not folder.exists():
        say(f"downloading {url} to {folder.parent}/ (CIFAR's host can take an hour); from a "
            f"mirror: --mirror URL; without a download: --dataset leaves")
    socket.setdefaulttimeout(60)  # a silent host is an error, not a wait for ever
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise Problem(f"cannot download {url} ({reason}): use --dataset leaves, a folder of images "
                      f"or --mirror URL of a directory that holds {Path(url).name}") from None


def stack(pairs, read=np.asarray):
    """n pairs of an image, as `read` understands it, and a label: images (n, 3, s, s) uint8 and
    labels (n,).
    """
    images, labels = zip(*((read(image), label) for image, label in pairs))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def archive(name, data_dir, mirror):
    """CIFAR or STL10 by torchvision's downloader, which checks the MD5 sum of what it gets."""
    source = getattr(torchvision.datasets, name.upper())
    # of STL10 5,000 labelled images; 100,000 without labels are not used
    splits = ("train", "test") if name == "stl10" else (True, False)
    if mirror:
        source.url = f"{mirror.rstrip('/')}/{source.filename}"
    with downloading(source.url, Path(data_dir) / source.base_folder):
        train, test = (source(data_dir, split, download=True) for split in splits)
    return Data(*stack(train), *stack(test), train.classes)


def tiny_imagenet(data_dir, mirror):
    """Download Tiny ImageNet's zip, and return the folder of what was in it."""
    folder, unpacking = Path(data_dir) / "tiny-imagenet-200", Path(data_dir) / "unpacking"
    url = f"{(mirror or 'http://cs231n.stanford.edu').rstrip('/')}/tiny-imagenet-200.zip"
    if not folder.exists():
        with downloading(url, folder):
            download_and_extract_archive(url, data_dir, unpacking,
                                         md5="90528d7ca1a48142e341f4ef8d21d0de")
            (unpacking / folder.name).rename(folder)  # so that what has this name is complete
    return folder


def cifar5m(cifar10, folder, n):
    """CIFAR10 and images of CIFAR-5M (Nakkiran et al. 2021) up to n, or to the last (Fig. 4).

    `folder` holds the parts of CIFAR-5M as they come: *.npz, X (k, 32, 32, 3) uint8 and Y (k,).
    """
    images, labels, *_ = cifar10
    for path in sorted(folder.glob("*.npz")):
        if len(labels) < n:
            try:
                with np.load(path) as part:
                    x, y = torch.from_numpy(part["X"]), torch.from_numpy(part["Y"])
                images = torch.cat([images, x.permute(0, 3, 1, 2)])[:n]
                labels = torch.cat([labels, y.long()])[:n]
            except Exception as error:
                raise Problem(f"{path} is damaged or no part of CIFAR-5M ({error}): download it "
                              "again") from None
    if len(labels) < n and images is cifar10.train_x:
        raise Problem(f"{folder} holds no part of CIFAR-5M: put its .npz files there "
                      "(https://github.com/preetum/cifar5m)")
    return cifar10._replace(train_x=images, train_y=labels)


def read_image(path, size):
    """The middle square of an image, scaled to (size, size, 3) uint8."""
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":  # to make 8 bits of these, PIL would clip them
            raise ValueError("more than 8 bits a channel")
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR))
    except Exception as error:  # a decoder may raise anything
        raise Problem(f"cannot read the image {path} ({error}): mend or delete it") from None


def image_folder(folder, image_size):
    """A folder with train/<class>/* and test/<class>/* (or val/); hidden files do not count."""
    parts = []
    for part in ("train", "test", "val"):
        names = sorted(glob("*/**/*", root_dir=folder / part, recursive=True))
        parts.append({folder / part / name: Path(name).parts[0]
                      for name in names if is_image_file(name)})
    annotations = folder / "val" / "val_annotations.txt"
    if annotations.exists():  # Tiny ImageNet as it comes, with all classes in one folder
        rows = re.findall(r"(\S+)\t(\S+).*", annotations.read_text())
        parts.append({folder / "val" / "images" / name: label for name, label in rows})
    # a class without any readable image is an error, not one class less
    classes = sorted(Path(name).name for name in glob("*/", root_dir=folder / "train"))
    train, *tests = ([(path, classes.index(label)) for path, label in part.items()]
                     if {*part.values()} == {*classes} else [] for part in parts)
    test = next(filter(None, tests), None)
    if train and test:
        read = partial(read_image, size=image_size)
        return Data(*stack(train, read), *stack(test, read), classes)
    raise Problem(f"{folder} needs train/<class>/ and test/<class>/ (or val/) folders of images, "
                  "with the same classes in both")


def gaussian_noise(n, image_size):
    """The paper's control (Fig. 4): σ = 1 after normalisation; 8 bits hold ±4σ in steps of σ/32."""
    pixels = np.random.default_rng(0).standard_normal((n, 3, image_size, image_size), np.float32)
    x = torch.from_numpy((pixels * 32 + 128).round().clip(0, 255).astype(np.uint8))
    y = torch.zeros(n, dtype=torch.int64)
    return Data(x, y, x[:0], y[:0], ["noise"])


LEAF = {  # is the point (±u, ±v) inside a leaf of radius 1 about the origin?
    "disc": lambda u, v: u * u + v * v < 1,
    "box": lambda u, v: np.maximum(u, v) < 0.886,
    "star": lambda u, v: np.sqrt(u) + np.sqrt(v) < 1.3,
    "ring": lambda u, v: abs(u * u + v * v - 0.85) < 0.5,
    "cross": lambda u, v: (np.minimum(u, v) < 0.35) & (np.maximum(u, v) < 1.2),
}
# leaf, √(length/width), sizes fall as r^-2 or r^-3, how far colours spread from dark to light
LEAF_CLASSES = [
    ("disc", 1.0, 3, 1.0), ("disc", 2.0, 2, 0.5), ("box", 1.0, 2, 0.5), ("box", 2.0, 3, 1.0),
    ("star", 1.0, 3, 0.5), ("star", 1.6, 2, 1.0), ("ring", 1.0, 2, 1.0), ("ring", 1.6, 3, 0.5),
    ("cross", 1.0, 2, 0.5), ("cross", 1.6, 3, 1.0)]


def dead_leaves(n_train=1000, n_test=200, n_leaves=50, size=32):
    """Images of opaque leaves of power-law size that fell on one another; n_train + n_test a class.

    The standard generative model of natural-image statistics (Lee, Mumford & Huang 2001; Baradad et
    al. 2021). Classes differ in the leaves' shape, elongation, law of sizes and palette. Only +, -,
    ×, ÷, √ and uniform draws are used, which IEEE 754 fixes to the last bit: sines or powers would
    give other bytes on another processor.
    """
    rng, n = np.random.default_rng(0), n_train + n_test
    y, x = (np.mgrid[:size, :size] + 0.5).astype(np.float32)  # of the pixels
    images = torch.empty(len(LEAF_CLASSES), n, 3, size, size, dtype=torch.uint8)
    for canvas, (leaf, stretch, law, light) in zip(images.numpy(), LEAF_CLASSES):
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
    labels = torch.arange(len(LEAF_CLASSES))
    return Data(images[:, :n_train].flatten(0, 1), labels.repeat_interleave(n_train),
                images[:, n_train:].flatten(0, 1), labels.repeat_interleave(n_test),
                [f"{leaf} {stretch}" for leaf, stretch, *_ in LEAF_CLASSES])


# ---- The training loop with labels, for prune.py and landscape.py --------------------------------

def classifier(encoder, r, n_classes, args, device):
    """(network, optimizer, scaler) for `fine_tune`: `encoder`, with embeddings of width r, and a
    linear head, which args.seed fixes; and what trains them.
    """
    torch.manual_seed(args.seed)
    network = nn.Sequential(OrderedDict(encoder=encoder.requires_grad_(True),
                                        head=nn.Linear(r, n_classes))).train().to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    return network, optimizer, torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")


def classify(network, images, stats, amp):
    """uint8 images (B, 3, s, s) -> (B, classes) float32 logits of a classifier."""
    return network.head(embed(network.encoder, normalise(images, stats), amp))


def augment(images, seed, step):
    """uint8 (B, 3, s, s) -> the same shape: flipped left to right or not, padded with 4 black
    pixels a side, cropped at random.

    The random numbers depend on (seed, step) alone, so that rewinding to a step brings back its
    very images.
    """
    n, size = len(images), images.shape[-1]
    rng = np.random.default_rng((seed, step, 1))  # 1: not the stream (seed, epoch) of the order
    top, left, flip = (torch.from_numpy(rng.integers(high, size=n)).to(images.device)
                       for high in (9, 9, 2))  # 9 places for a crop, each way
    padded = F.pad(images, [4] * 4)
    padded = torch.where(flip.view(n, 1, 1, 1) == 1, padded.flip(3), padded)
    crops = padded.unfold(2, size, 1).unfold(3, size, 1)  # (B, 3, 9, 9, s, s): all, as a view
    return crops[torch.arange(n, device=images.device), :, top, left]


def fine_tune(network, optimizer, scaler, images, labels, args, order_seed, start=0):
    """`train` a classifier for args.epochs epochs with labels, flips and crops.

    The learning rate args.lr falls tenfold at half and at three quarters of the steps (epochs 80
    and 120 of 160). Trainings with one args.seed differ at most in their `order_seed`, that of the
    order of the data.
    """
    stats, steps = channel_stats(images), args.epochs * math.ceil(len(images) / args.batch_size)

    def batch_loss(index, step):
        crops = augment(images[index], args.seed, step)
        return F.cross_entropy(classify(network, crops, stats, args.amp), labels[index])

    def learning_rate(step):
        return args.lr * 0.1 ** sum(step >= round(milestone * steps) for milestone in (0.5, 0.75))

    return train(batch_loss, len(images), optimizer, scaler, learning_rate, steps=steps,
                 batch_size=args.batch_size, seed=order_seed, start=start)


@torch.no_grad()
def classification_accuracy(network, images, labels, stats, amp):
    """Share of uint8 images (n, 3, s, s) classified right, in %; eval mode, then train mode."""
    network.eval()
    predicted = torch.cat([classify(network, x, stats, amp).argmax(1) for x in images.split(500)])
    network.train()
    return 100 * (predicted == labels).double().mean().item()


# ---- The machine ---------------------------------------------------------------------------------

def pick_device(name):
    """The torch.device for --device auto, cpu or cuda. Raises Problem where there is no CUDA."""
    torch.backends.cudnn.benchmark = True  # batches of one shape: find the fastest convolution
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # 10 bits
    if name == "cuda" and not torch.cuda.is_available():
        raise Problem("--device cuda, but torch sees no CUDA device here: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def cpuinfo():
    """What Linux says of the processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def has_batch_norm(arch, norm="batch"):
    return arch.startswith("resnet") and norm == "batch"


def pick_amp(amp, device, arch, norm="batch"):
    """Resolve --amp auto: bf16 where the hardware multiplies it fast, else fp16 on CUDA, else
    float32 ("off").

    Float32 also where there is no batch norm: in bf16 VGG11 hardly learned, in the one run that we
    measured, while ResNet20 learns as in float32 (results/README.md).
    """
    if amp != "auto":
        return amp
    if not has_batch_norm(arch, norm):
        return "off"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if re.search("amx_bf16|avx512_bf16", cpuinfo()) else "off"


def git(*words):
    """What a git command says of this repository; nothing without git."""
    command = ["git", "-C", Path(__file__).parent, *words]
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def provenance(device):
    """On what, and by which version of this code: {"hardware", "torch", "commit"}, kept beside
    every result.
    """
    processor = re.search("model name.*: (.*)|$", cpuinfo())[1] or "an unknown processor"
    hardware = f"{os.cpu_count()} cores of {processor}"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    ours = git("ls-files", Path(__file__).name)  # or of a repository in which this code merely lies
    commit = git("describe", "--always", "--dirty", "--exclude=*") if ours else ""  # no tag
    return {"hardware": hardware, "torch": str(torch.__version__), "commit": commit}


# ---- Files and checkpoints -----------------------------------------------------------------------

def write_atomically(path, write):
    """Call `write(file)` on a temporary neighbour of `path`, then rename it: readers see the old
    file or the new one.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise Problem(f"cannot write {path} ({str(error).splitlines()[0]}): is the disk full or "
                      "read-only?") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, result):
    """Write a dict, a key a line or so, for people and for scripts."""
    write_text(path, f"{json.dumps(result, indent=2)}\n")


def read_json(path):
    """The dict in a file that write_json wrote. Raises Problem."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise Problem(f"{path} is truncated or not ours ({type(error).__name__}): name another "
                      "file, or make this one again") from None


def table(columns, rows):
    """A list of dicts as the text of a .csv file; what a row lacks stays empty."""
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    return "".join(f"{','.join(map(str, line))}\n" for line in lines)


def write_csv(path, columns, rows):
    text = table(columns, rows)
    if not path.exists() or path.read_text() != text:  # a finished run may be read-only
        write_text(path, text)


def check_undisturbed(path, columns, rows):
    """Raise Problem if another process has written the .csv file since we wrote these rows."""
    if path.exists() and path.read_text() != table(columns, rows):
        raise Problem(f"another process writes to {path.parent}, too, and goes on alone: give each "
                      "run an --out of its own")


def save_checkpoint(path, script, **content):
    """Write a checkpoint of `script`: plain values, tensors, and dicts and lists of them."""
    content["format"] = f"random teachers 3, {script}"
    write_atomically(path, lambda file: torch.save(content, file))


def run_folder(path):
    """The directory of a run that is named by it, or by a checkpoint in it."""
    return path.parent if path.suffix == ".pt" or path.is_file() else path


def read_checkpoint(path, script="distill.py"):
    """What is in a run directory or .pt file of `script`, as a dict, with tensors on the CPU.

    Raises Problem if it is missing, truncated, damaged or not one of ours. No pickled code runs, so
    a stranger's file is safe.
    """
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise Problem(f"no checkpoint at {path}: make one with {script}, or name its run directory")
    warnings.filterwarnings("ignore", module="torch._weights_only_unpickler")  # on foreign files
    try:
        damaged = ZipFile(path).testzip()  # by its checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        weights = [t for part in checkpoint.values() if isinstance(part, dict)
                   for t in part.values() if torch.is_tensor(t)]
    except Exception as error:  # torch has many, one for each way in which a file can be broken
        raise Problem(f"{path} is truncated or no checkpoint ({type(error).__name__}): name "
                      f"another, or run {script} again") from None
    if checkpoint.get("format") != f"random teachers 3, {script}":
        raise Problem(f"{path} is not a checkpoint of {script} of this version: name a run "
                      "directory that it made")
    if damaged or not all(t.isfinite().all() for t in weights):
        raise Problem(f"{path} is damaged, or holds weights that are not finite: name another, or "
                      f"run {script} again")
    return checkpoint


def load_networks(path):
    """(teacher, student, config) of a run directory or .pt file: whole Networks, on the CPU.

    The config says how far the run is, too: "step" and "total_steps". Raises Problem.
    """
    checkpoint = read_checkpoint(Path(path))
    try:
        config = {**checkpoint["config"], "step": int(checkpoint["step"]),
                  "total_steps": int(checkpoint["about"]["total_steps"])}
        for key, default in to_config(parse_args([])).items():
            if not (default is None or key in MAY_CHANGE or type(config[key]) is type(default)):
                raise TypeError(f"--{key.replace('_', '-')} is {config[key]}")
        networks = [Network(*(config[key] for key in SETTINGS)) for _ in range(2)]
        for network, role in zip(networks, ("teacher", "student")):
            network.to(memory_format=torch.channels_last).load_state_dict(checkpoint[role])
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise Problem(f"{path} does not fit this distill.py ({reason}): distil again") from None
    return *networks, config


def progress(config):
    """' (step 21 of 400)' for a run with this config of load_networks; '' if it is finished."""
    step, total = config["step"], config["total_steps"]
    return f" (step {step:,} of {total:,})" if step < total else ""


def load_checkpoint(path, device="cpu"):
    """(teacher encoder, student encoder, config dict) of a run directory or .pt file, in eval mode
    and frozen.

    Encoders map normalised images (B, 3, s, s) to embeddings (B, r); s is config["image_size"].
    Raises Problem.
    """
    *networks, config = load_networks(path)
    return *(network.encoder.eval().requires_grad_(False).to(device)
             for network in networks), config


def fingerprint(module):
    """A string that two modules of one kind share if their weights and buffers are equal, and how
    group norms divide their channels.
    """
    parts = [t.cpu().numpy().tobytes() for t in module.state_dict().values()]
    parts += [b"%d " % m.num_groups for m in module.modules() if isinstance(m, nn.GroupNorm)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def to_config(args):
    """The options as a dict that JSON and checkpoints can hold."""
    return json.loads(json.dumps(vars(args), default=str))


MAY_CHANGE = {"epochs", "steps", "log_every", "eval_every", "resume", "device", "out", "data_dir",
              "mirror"}


def check_same(out, begun_with, config, may_change=MAY_CHANGE):
    """Raise Problem if a setting that must not change differs from the one that `out` was begun
    with.
    """
    for key in config:
        if begun_with.get(key) != config[key] and key not in may_change:
            raise Problem(f"{out} does not fit: it was run with --{key.replace('_', '-')} "
                          f"{begun_with.get(key)}, not {config[key]}: name another")


def checkpoint_to_resume(args, script="distill.py", may_change=MAY_CHANGE):
    """The checkpoint in the directory args.out to go on from, or None: then the directory is made.

    Raises Problem rather than mix or lose runs.
    """
    if not (args.out / "last.pt").exists():
        if any((args.out / name).exists() for name in ("log.csv", "connect.npz")):
            raise Problem(f"{args.out} holds results without their last.pt: name another directory "
                          "with --out")
        args.out.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=args.out).close()  # if it cannot be written, say so now
        return None
    if not args.resume:
        raise Problem(f"{args.out}/last.pt exists: add --resume to go on with it, or name another "
                      "directory with --out")
    checkpoint = read_checkpoint(args.out, script)
    if args.amp == "auto":
        args.amp = checkpoint["config"]["amp"]
    check_same(args.out, checkpoint["config"], to_config(args), may_change)
    return checkpoint


# ---- Options and figures -------------------------------------------------------------------------

def number(kind, low, high=math.inf):
    """An argparse type: a number of `kind`, int or float, from `low` to `high`."""
    def number(text):  # so argparse says "invalid number value"
        value = kind(text)
        if not low <= value <= high:  # so written, it refuses nan too
            raise argparse.ArgumentTypeError(f"must be at least {low} and at most {high}")
        return value
    return number


POSITIVE, SEED = number(int, 1, 2**31), number(int, 0, 2**62)


def picture(text):
    """An argparse type: the path of a picture that matplotlib can write."""
    if not text.endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError("wants a name that ends in .png, .pdf or .svg")
    return Path(text)


def make_parser(doc, prog=None):
    """(parser, add): add(name, help, default, ...) adds an option whose help ends with its default.
    """
    parser = argparse.ArgumentParser(prog=prog, description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, help, default=None, **options):
        shown = "" if default is None or default is False else f" (default: {default})"
        parser.add_argument(name, default=default, help=help + shown, **options)
    return parser, add


def add_common_options(add, amp="auto"):
    """The options that all scripts share."""
    add("--device", "auto: cuda where there is one", "auto", choices=("auto", "cpu", "cuda"))
    add("--amp", "16-bit encoder; auto: where the hardware is fast at it and the encoder has batch "
        "norm", amp, choices=dict.fromkeys((amp, "bf16", "fp16", "off")))
    add("--resume", "go on with what an interrupted call left, on a CPU to the same numbers", False,
        action="store_true")
    add("--data-dir", "where downloads go", "data")
    add("--mirror", "URL of a directory with the archives (or set DATA_MIRROR)",
        os.environ.get("DATA_MIRROR"))


def add_fine_tuning_options(add):
    """The options of supervised training, as the paper has it for Fig. 8."""
    add("--epochs", "epochs of a training; the learning rate falls tenfold at 1/2 and 3/4 of them",
        160, type=POSITIVE)
    add("--lr", "SGD's first learning rate, momentum 0.9, weight decay 1e-4 (default: 0.1, for "
        "resnet20 0.05)", type=number(float, 0))
    add("--batch-size", "images a step", 256, type=POSITIVE)
    add("--dataset", "labelled data to train on (default: the one the run was probed on)")
    add("--n-samples", "train on so many images, each class in its share (default: all)",
        type=POSITIVE)
    add("--seed", "of the linear classifier, the order of the data and the crops (default: the "
        "run's)", type=SEED)


def fill_defaults(args, distilled):
    """Set the options of fine-tuning that depend on the distilled run, of config `distilled`."""
    args.dataset = args.dataset or distilled["probe_dataset"] or distilled["dataset"]
    args.seed = distilled["seed"] if args.seed is None else args.seed
    if args.lr is None:
        args.lr = 0.05 if distilled["arch"] == "resnet20" else 0.1


def new_figure(*shape, **options):
    """matplotlib's subplots; imported here, so that all numbers come out without it."""
    os.environ["MPLBACKEND"] = "agg"  # nothing but files, whatever a notebook has set
    import matplotlib.pyplot
    return matplotlib.pyplot.subplots(*shape, layout="constrained", **options)


def save_figure(figure, path):
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))
    say(f"the picture: {path}")


def parse_args(argv=None):
    parser, add = make_parser(__doc__)
    add("--arch", "encoder; on a CPU take resnet20", "resnet18", choices=ARCHS)
    add("--init-eps", "student = (teacher + ε·independent)/√(1+ε²): 0 starts at the teacher, inf "
        "independently of it; the paper's α is ε/(1+ε), so α=0.5 is ε=1 and α=0.6 is ε=1.5. "
        "Without batch norm (vgg*, vit*) 0 is a fixed point that only rounding leaves; the paper's "
        "α≈0 is 1e-10", 0.0, type=number(float, 0), metavar="ε")
    add("--dataset", f"{', '.join(DATASETS)}, or a folder that holds train/<class>/ and "
        "test/<class>/ (or val/)", "cifar10")
    add("--probe-dataset", "labelled data for the probes (default: --dataset); noise needs it")
    add("--n-samples", "distil on so many training images, each class in its share (default: all)",
        type=POSITIVE)
    add("--image-size", "images become so many pixels square; those of a folder keep their shape "
        "and are cropped", 32, type=number(int, 16))
    add("--out-dim", "number of logits m; 1024 spares a CPU much work and costs little (Fig. 10)",
        2**16, type=POSITIVE)
    add("--norm", "what normalises a ResNet's activations (Fig. 11)", "batch", choices=NORMS)
    add("--bottleneck", "what of the projector's and the network's last layers is on: w, rows of "
        "unit length; l, the linear map; f, output of unit length (Fig. 12). lf/l is the released "
        "code: the KL is 10 times smaller", "lf/wl",
        choices=("lf/wl", "lf/l", "l/wl", "l/l", "f/wl", "lf/"))
    add("--teacher", "run directory whose student is the teacher, not a random network: a second "
        "round (Fig. 18)")
    add("--loss", "kl-log-softmax is the KL computed the usual way, off by several per cent at "
        "1e-6 nats; mse is that of the logits", "kl", choices=LOSSES)
    add("--optimizer", "sgd has momentum 0.9 and wants a far higher --lr", "adamw",
        choices=("adamw", "sgd"))
    add("--epochs", "passes over the training images", 100, type=POSITIVE)
    add("--steps", "stop after so many steps, if that is earlier", type=POSITIVE)
    add("--batch-size", "images a step", 256, type=POSITIVE)
    add("--lr", "learning rate; VGG11 on few images gains more at 3e-4 (README); weight decay is 0",
        1e-3, type=number(float, 0))
    add("--warmup", "steps in which the learning rate rises to --lr; the paper has none",
        0, type=number(int, 0))
    add("--seed", "of the teacher, the student's start and the order of the data", 0, type=SEED)
    add("--log-every", "steps between log lines (default: an epoch, at most 100)", type=POSITIVE)
    add("--eval-every", "steps between probes, with a checkpoint each (default: a 25th of the "
        "run, at least 100)", type=POSITIVE)
    add("--out", "run directory (default: runs/<dataset>-<arch>-eps<ε>-seed<seed>)", type=Path)
    add_common_options(add)
    args = parser.parse_args(argv)
    if (args.probe_dataset or args.dataset) == "noise":
        parser.error("noise has no labels: name a labelled data set with --probe-dataset, for "
                     "example leaves")
    if args.arch.startswith("vgg") and args.image_size < 32:
        parser.error("VGG halves the image five times: --image-size must be at least 32")
    patch = 8 if args.arch.endswith("-p8") else 16
    if args.arch.startswith("vit") and args.image_size % patch:
        parser.error(f"--image-size must be a multiple of the patch size, {patch}")
    if args.norm != "batch" and not args.arch.startswith("resnet"):
        parser.error("--norm is for ResNets: VGG has no norm, and a ViT has its own")
    args.out = args.out or Path(
        f"runs/{Path(args.dataset).name}-{args.arch}-eps{args.init_eps:g}-seed{args.seed}")
    return args


# ---- What a run prints ---------------------------------------------------------------------------

# of probe.py
PROBES = {"linear_paper": "linear (paper)", "linear_converged": "linear (converged)", "knn": "k-NN"}
LOG_COLUMNS = ("step", "epoch", "kl", "distance", "images_per_s", *PROBES)


def show(row, eta=""):
    """Print a row of the log, with its probes if it has any."""
    say(f"{row['step']:7d} {row['epoch']:7.1f} {row['kl']:10.3e} {row['distance']:9.3f} "
        f"{row['images_per_s']:9.0f} {eta!s:>9}{scores(row)}")


def scores(row):
    """The probes of a row as they stand on the screen."""
    return "".join(f"{row[probe]:20.2f}" for probe in PROBES if probe in row)


def print_header(args, n_images, steps, device, constant_kl):
    say(f"{args.arch} on {args.dataset}: {n_images:,} images, {steps:,} steps of "
        f"{args.batch_size}, m={args.out_dim:,}, ε={args.init_eps:g}, seed {args.seed}, "
        f"{device.type}, amp {args.amp} -> {args.out}")
    say(f"a student with the same answer for every image would have a KL of {constant_kl:.2e} nats")
    say(f"{'step':>7} {'epoch':>7} {'MSE' if args.loss == 'mse' else 'KL (nats)':>10} from init "
        f" images/s       ETA{''.join(f'{title:>20}' for title in PROBES.values())}")


def on_plateau(log, constant_kl):
    """Whether the KL was within 20 % of the constant student's in all of the last 200 steps."""
    last = log[-1]["step"]
    return last >= 200 and all(abs(row["kl"] - constant_kl) < 0.2 * constant_kl
                               for row in log if row["step"] > last - 200)


def give_advice(args, log, constant_kl):
    """Say below the log's last row if the student does not move, or has come to the plateau of a
    constant student.
    """
    if len(log) == 2 and log[1]["distance"] == 0:
        say("the student has not moved at all")
        if args.init_eps == 0 and not has_batch_norm(args.arch, args.norm):
            say("without batch norm ε=0 is a fixed point, and here nothing rounds it away (README, "
                "\"The fixed point\"): take --init-eps 1e-10")
    elif (args.loss != "mse" and on_plateau(log, constant_kl)
          and not on_plateau(log[:-1], constant_kl)):
        say("for 200 steps the KL has been that of a student with the same answer for every image; "
            "it may stay so for long; a VGG11's has not with --lr 3e-4 or --warmup 200 (README, "
            "\"VGG's plateau\")")


def catch_signals():
    """From now on Ctrl-C, a cluster that wants its node and a closed terminal do not end the
    process: they append to the list that this returns.
    """
    interrupts = []
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, lambda signum, frame: interrupts.append(signum))
    return interrupts


# ---- Main: the experiment ------------------------------------------------------------------------

def networks_of(args, settings, checkpoint):
    """(teacher, student) as they are before the first step, also for a run that goes on: distances
    are from there.
    """
    if checkpoint:
        teacher, *_ = load_networks(args.out)
    elif args.teacher:
        _, teacher, other = load_networks(args.teacher)
        check_same(args.teacher, other, settings)
        say(f"the teacher is the student of {args.teacher}{progress(other)}")
    else:
        teacher = random_network(2 * args.seed, **settings)
    student = init_student(teacher, random_network(2 * args.seed + 1, **settings), args.init_eps)
    return teacher, student


def main(argv=None):
    from probe import evaluate  # here, because probe.py imports this file
    args = parse_args(argv)
    device = pick_device(args.device)
    checkpoint = checkpoint_to_resume(args)
    args.amp = pick_amp(args.amp, device, args.arch, args.norm)
    config = to_config(args)

    # Data. The student sees `images` alone; labels are for the probes, and for --n-samples, which
    # keeps the classes' shares
    load = partial(load_data, image_size=args.image_size, data_dir=args.data_dir,
                   mirror=args.mirror, device=device)
    data = load(args.dataset, n=args.n_samples)
    probe_data = load(args.probe_dataset) if args.probe_dataset else data
    images, _ = stratified_subset(data.train_x, data.train_y, args.n_samples)
    stats, per_epoch = channel_stats(images), math.ceil(len(images) / args.batch_size)
    steps = min(args.epochs * per_epoch, args.steps or math.inf)
    log_every = args.log_every or min(per_epoch, 100)
    eval_every = args.eval_every or max(steps // 25, 100)
    # `about` is what run.json tells beside the options: the teacher's probes, and under "made" by
    # which hardware and which commit each part of the run was made
    start, log, about = 0, [], {"made": []}
    if checkpoint:
        start, log, about = checkpoint["step"], checkpoint["log"], checkpoint["about"]
        check_same(args.out, about, {"n_images": len(images)})
        write_csv(args.out / "log.csv", LOG_COLUMNS, log)  # a kill may have come before it
    if start >= steps:
        return say(f"{args.out}: all {steps:,} steps are done")

    # In eval mode a random teacher's batch norms use their initial statistics, mean 0 and variance
    # 1, while the student's use each batch's own: so with batch norm the two differ even at ε = 0
    teacher, student = networks_of(args, {key: config[key] for key in SETTINGS}, checkpoint)
    teacher.requires_grad_(False).eval().to(device)
    student.train().to(device)
    parameters = list(student.parameters())
    parameters_0 = [p.detach().clone() for p in parameters]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0, fused=True)
    else:
        optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9, fused=True)
    # With fp16 the loss is scaled up, or the gradients of so small a KL would round to 0: from 2^24
    # on, not the usual 2^16, at which ResNet18 lost most of them (results/README.md)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**24, growth_interval=100,
                                  enabled=args.amp == "fp16")
    state = {"teacher": teacher, "student": student, "optimizer": optimizer, "scaler": scaler}

    # The teacher runs once. It is frozen, the images are not augmented, and in eval mode its output
    # for an image does not depend on the rest of the batch: so n vectors of 256 numbers hold all
    # that it will ever say (its n·m logits would take 13 GB), and a step costs no teacher encoder.
    # They are made in float32 also where the student's encoder runs in 16 bits: for ResNet20 that
    # was measured to do no harm (results/README.md)
    say(f"running the teacher once over {len(images):,} images, then probing it")
    with torch.no_grad():
        vectors = torch.cat([teacher.projector(embed(teacher.encoder, normalise(x, stats)))
                             for x in images.split(args.batch_size)])
        # from some 1,000 images, evenly taken
        constant_kl = constant_student_kl(
            teacher.last_layer(vectors[::math.ceil(len(vectors) / 1000)]))

    def batch_loss(index, step):
        """Indices (B,) of images -> the KL of the student from the teacher, or another --loss, a
        scalar. (All but mse are logged, and advised on, as a KL.)
        """
        x = normalise(images[index], stats)
        with torch.no_grad():
            teacher_logits = teacher.last_layer(vectors[index])
        student_logits = student(x, args.amp)
        return LOSSES[args.loss](teacher_logits, student_logits)

    def learning_rate(step):
        """Constant, after a linear --warmup."""
        return args.lr * min(1, (step + 1) / max(args.warmup, 1))

    print_header(args, len(images), steps, device, constant_kl)
    about |= {"n_images": len(images), "total_steps": steps, "constant_student_kl": constant_kl}
    about["made"].append({**provenance(device), "from_step": start})

    def save(name, *parts):
        """Write a checkpoint with these parts of `state`."""
        save_checkpoint(args.out / name, "distill.py", config=config, about=about,
                        step=log[-1]["step"], log=log,
                        **{part: state[part].state_dict() for part in parts})

    def add_to_log(row, saving):
        """Log a row: in the checkpoint, in log.csv, and at last on the screen."""
        check_undisturbed(args.out / "log.csv", LOG_COLUMNS, log)
        log.append(row)
        if saving:
            # the paper's Fig. 9 takes the student of the best probe; we do in Tables 2 and 4, too
            probed = [row for row in log[1:] if "linear_paper" in row]
            if row is max(probed, key=lambda row: row["linear_paper"], default=None):
                save("best.pt", "teacher", "student")
            save("last.pt", *state)
            write_json(args.out / "run.json", {**config, **about})
        write_csv(args.out / "log.csv", LOG_COLUMNS, log)
        seconds = (steps - row["step"]) * args.batch_size / (row["images_per_s"] or 1)
        show(row, eta=timedelta(seconds=round(seconds)) if row["step"] else "")

    if checkpoint:
        try:
            for name, part in state.items():
                part.load_state_dict(checkpoint[name])
        except Exception as error:
            raise Problem(f"{args.out}/last.pt does not fit this distill.py "
                          f"({type(error).__name__}): name another --out") from None
        show(log[-1])
    else:
        probes = about["teacher_probes"] = evaluate(teacher.encoder, probe_data)
        say(f"{'teacher':>7}{'':49}{scores(probes)}")
        if args.init_eps > 0 or args.teacher:  # else the student is still its teacher
            probes = evaluate(student.encoder, probe_data)
        add_to_log({"step": 0, "epoch": 0.0, "kl": math.nan, "distance": 0.0, "images_per_s": 0,
                    **probes}, saving=True)

    # Train, and between the steps log, probe and save
    interrupts, losses, clock = catch_signals(), [], time.time()
    for step, loss in train(batch_loss, len(images), optimizer, scaler, learning_rate, steps=steps,
                            batch_size=args.batch_size, seed=args.seed, start=start):
        losses.append(loss)  # on the device: to ask for its value would keep a GPU waiting
        probing = step == steps or step % eval_every == 0
        stopping = bool(interrupts)  # asked once a step: a signal may come at any moment
        if probing or step % log_every == 0 or stopping:
            row = {"step": step, "epoch": step / per_epoch,
                   "kl": torch.stack(losses).double().mean().item(),
                   "distance": distance(parameters, parameters_0),
                   "images_per_s": len(losses) * args.batch_size / (time.time() - clock)}
            if not math.isfinite(row["kl"] + row["distance"]):
                raise Problem(f"the loss is no longer finite by step {step}: lower --lr or take "
                              f"--amp off; what {args.out} held is kept")
            if probing:
                # the linear probe draws anew each time, as the paper's does
                row |= evaluate(student.encoder, probe_data, seeds=[step])
            add_to_log(row, saving=probing or stopping)
            give_advice(args, log, constant_kl)
            losses, clock = [], time.time()
        if stopping and step < steps:
            say(f"stopped after step {step:,}; the same command with --resume goes on from here")
            sys.exit(128 + interrupts[0])


def run_cli(main):
    """Run a script's main: a Problem, or an OSError such as a full disk, ends in one line on stderr
    and exit status 1.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without ε shows a question mark
    try:
        return main()
    except Problem as error:
        message = error
    except OSError as error:
        message = f"{error} (is there space on the disk, and permission?)"
    except ModuleNotFoundError as error:  # matplotlib, which is imported only where it draws
        message = f"the package {error.name} is missing: pip install -r requirements.txt"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error).lower():
            raise
        message = "out of memory: lower --batch-size, --out-dim or --image-size"
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")


if __name__ == "__main__":
    # the scripts import this file under its name: run that one copy of it, not a second called
    # __main__
    import distill
    distill.run_cli(distill.main)
