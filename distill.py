#!/usr/bin/env python3
"""Distil a student from a frozen, randomly initialised teacher: no labels, no augmentation.

    python distill.py --arch resnet18 --init-eps 0.0          the paper's run: CIFAR10, 100 epochs (wants a GPU)
    python distill.py --arch resnet20 --dataset leaves --out-dim 1024 --batch-size 128 --steps 400       (a laptop)
    python distill.py --arch vgg11 --init-eps inf --dataset path/to/images       (holds train/<class>/ and test/<class>/)

Method: "Random Teachers are Good Teachers", Sarnthein et al., ICML 2023, arXiv 2302.12091. This file, in the order the
data flows: models, data, student initialisation, loss, the training loop, checkpoints, main.
"""
import argparse, csv, hashlib, math, os, pickle, signal, sys, time, warnings
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
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


ARCHS = {  # name: (encoder for an image size, embedding width r)
    "vgg11": (lambda size: vgg("A"), 512), "vgg13": (lambda size: vgg("B"), 512),
    "vgg16": (lambda size: vgg("D"), 512), "vgg19": (lambda size: vgg("E"), 512),
    "resnet18": (lambda size: imagenet_resnet("resnet18", size), 512),
    "resnet34": (lambda size: imagenet_resnet("resnet34", size), 512),
    "resnet50": (lambda size: imagenet_resnet("resnet50", size), 2048),
    "resnet20": (lambda size: cifar_resnet(3), 64), "resnet56": (lambda size: cifar_resnet(9), 64),
}


class Network(nn.Module):
    """Encoder, projector MLP and L2 bottleneck (App. E.1): images (B, 3, s, s) -> m logits, each a cosine in [-1, 1].

    `raw_rows` leaves the m rows of the last layer unnormalised, as the paper's released code does: logits shrink by the
    rows' norm, about 0.02·√256 = 0.32, and the KL by about its square.
    """
    def __init__(self, arch, out_dim, image_size=32, raw_rows=False):
        super().__init__()
        build, r = ARCHS[arch]
        self.encoder = build(image_size)
        self.mlp = nn.Sequential(nn.Linear(r, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256))
        self.last = nn.Linear(256, out_dim, bias=False)
        self.raw_rows = raw_rows

    def bottleneck(self, images, autocast):
        """(B, 3, s, s) normalised images -> (B, 256) float32 unit vectors.

        Only the encoder runs under autocast. What the student learns from are logit differences of about 1e-3, and a
        16-bit logit has steps as large as that: from the embedding on, everything stays in float32.
        """
        with autocast:
            embedding = self.encoder(images)
        return F.normalize(self.mlp(embedding.float()), dim=1)

    def rows(self):
        """The last layer's (m, 256) weight, rows of unit length (unless `raw_rows`)."""
        return self.last.weight if self.raw_rows else F.normalize(self.last.weight, dim=1)


def random_network(seed, arch, out_dim, image_size=32, raw_rows=False):
    """A freshly initialised Network, on the CPU; the same `seed` gives the same weights."""
    network, generator = Network(arch, out_dim, image_size, raw_rows), torch.Generator().manual_seed(seed)
    for module in network.modules():
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


DATASETS = ("cifar10", "cifar100", "leaves", "noise")


def load_data(name, image_size=32, data_dir="data", mirror=None):
    """Load a data set by name, or any folder with train/<class>/* and test/<class>/* (or val/) images, as `Data`.

    Raises Problem for an unknown name, a folder without train/, a failed download, an unreadable image.
    """
    if name == "leaves":
        data = dead_leaves()
    elif name == "noise":  # the paper's control (Fig. 4): σ=1 after normalisation; 8 bits hold ±4σ in steps of σ/32
        pixels = np.random.default_rng(0).standard_normal((50_000, 3, image_size, image_size), np.float32)
        x, y = torch.from_numpy((pixels * 32 + 128).round().clip(0, 255).astype(np.uint8)), torch.zeros(len(pixels)).long()
        data = Data(x, y, x[:0], y[:0], ["noise"])
    elif name in ("cifar10", "cifar100"):
        data = cifar(name, data_dir, mirror)
    elif Path(name).is_dir():
        data = image_folder(Path(name), image_size, data_dir)
    else:
        raise Problem(f"no data set or folder called '{name}'; there are {', '.join(DATASETS)}, or any folder of images")
    if data.train_x.shape[-1] != image_size:
        resize = torchvision.transforms.Resize((image_size, image_size), antialias=True)
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


def cifar(name, data_dir, mirror):
    """CIFAR10/100 by torchvision's downloader, which checks the MD5 sum wherever the file comes from."""
    Set = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    if mirror:
        Set.url = f"{mirror.rstrip('/')}/{Set.filename}"
    if not (Path(data_dir) / Set.base_folder).exists():
        print(f"downloading {Set.url} (170 MB) to {data_dir}/; the original host can be slow: 55 kB/s, an hour, was seen in "
              f"2026. A mirror: --mirror URL; no download: --dataset leaves", flush=True)
    try:
        parts = [Set(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise Problem(f"cannot download {Set.url} ({str(error).splitlines()[0]}): use --dataset leaves, a folder of images, "
                      f"or --mirror URL of a directory that holds {Set.filename}")
    arrays = [a for part in parts for a in (torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))]
    return Data(*arrays, parts[0].classes)


def image_folder(folder, image_size, data_dir):
    """Decode a folder that torchvision's ImageFolder reads, once; later calls read the cache in data_dir/cache/."""
    test = "test" if (folder / "test").is_dir() else "val"
    for part in ("train", test):
        if not (folder / part).is_dir():
            raise Problem(f"{folder} needs train/<class>/ and test/<class>/ (or val/<class>/) folders of images: no {part}/")
    crop = torchvision.transforms.Compose([torchvision.transforms.Resize(image_size), torchvision.transforms.CenterCrop(image_size)])
    try:
        sets = [torchvision.datasets.ImageFolder(folder / part, crop) for part in ("train", test)]
    except FileNotFoundError as error:
        raise Problem(f"{folder}: {str(error).splitlines()[0]}")
    if sets[0].classes != sets[1].classes:
        raise Problem(f"{folder}: train/ and {test}/ must hold the same classes")
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for part in sets for path, _ in part.samples]
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


def dead_leaves(n_train=10_000, n_test=2_000, size=32, n_leaves=50, seed=0):
    """Dead-leaves images: opaque leaves of power-law size fall on each other until they cover the picture.

    The standard generative model of natural-image statistics (Lee, Mumford & Huang 2001; Baradad et al. 2021). Ten
    classes differ in the leaves' shape, elongation, law of sizes and palette. Only +, -, ×, ÷, √ and uniform draws are
    used, which IEEE 754 fixes to the last bit: sines or powers would give other bytes on another processor.
    """
    shapes = {  # is the point (u, v) inside a leaf of radius 1 about the origin?
        "ellipse": lambda u, v: u * u + v * v < 1,
        "box": lambda u, v: np.maximum(abs(u), abs(v)) < 0.886,
        "star": lambda u, v: np.sqrt(abs(u)) + np.sqrt(abs(v)) < 1.3,
        "ring": lambda u, v: abs(u * u + v * v - 0.85) < 0.5,
        "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.35) & (np.maximum(abs(u), abs(v)) < 1.2),
    }
    kinds = [  # shape, √(length/width), sizes fall as r^-2 or r^-3, the palette's weight of light against dark
        ("ellipse", 1.0, 3, 1.0), ("ellipse", 2.0, 2, 0.5), ("box", 1.0, 2, 0.5), ("box", 2.0, 3, 1.0), ("star", 1.0, 3, 0.5),
        ("star", 1.6, 2, 1.0), ("ring", 1.0, 2, 1.0), ("ring", 1.6, 3, 0.5), ("cross", 1.0, 2, 0.5), ("cross", 1.6, 3, 1.0)]
    rng = np.random.default_rng(seed)
    n = (n_train + n_test) // len(kinds)
    y, x = (np.mgrid[:size, :size] + 0.5).astype(np.float32)[:, None]
    images = np.empty((len(kinds), n, 3, size, size), np.uint8)
    for c, (shape, stretch, law, light) in enumerate(kinds):
        draws = rng.random((9, n, n_leaves, 1, 1), np.float32)
        cx, cy = (draws[:2] * 1.25 - 0.125) * size
        t = 2 * draws[2] - 1
        cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)  # a direction within ±90°, without a sine
        small, large = 1.5 / size * 32, 14 / size * 32
        if law == 2:
            radius = 1 / (1 / large + draws[3] * (1 / small - 1 / large))
        else:
            radius = 1 / np.sqrt(1 / large**2 + draws[3] * (1 / small**2 - 1 / large**2))
        grey, hue = 2 * draws[4] - 1, 2 * draws[5:8, :, :, 0, 0] - 1
        colour = 127.5 + 127.5 * np.clip(light * grey[:, :, 0, 0] + (1.2 - light) * hue, -1, 1)
        colour = colour.astype(np.uint8)
        for start in range(0, n, 100):  # small blocks stay in the processor's cache
            s = slice(start, start + 100)
            top = np.zeros((len(cx[s]), size, size), np.uint8)  # which leaf lies on top, leaf 0 being the ground
            for leaf in range(1, n_leaves):
                dx, dy = x - cx[s, leaf], y - cy[s, leaf]
                u = (dx * cos[s, leaf] + dy * sin[s, leaf]) / (radius[s, leaf] * stretch)
                v = (dy * cos[s, leaf] - dx * sin[s, leaf]) / (radius[s, leaf] / stretch)
                np.copyto(top, leaf, where=shapes[shape](u, v))
            for channel in range(3):
                images[c, s, channel] = np.take_along_axis(colour[channel, s], top.reshape(len(top), -1), 1).reshape(top.shape)
    names = ["-".join(map(str, kind[:3])) for kind in kinds]
    k = n_train // len(kinds)
    parts = [torch.from_numpy(images[:, part].reshape(-1, 3, size, size)) for part in (slice(k), slice(k, n))]
    labels = [torch.arange(len(kinds)).repeat_interleave(len(part) // len(kinds)) for part in parts]
    return Data(parts[0], labels[0], parts[1], labels[1], names)


def channel_stats(images):
    """Mean and standard deviation of uint8 images (n, 3, s, s) by channel, each (1, 3, 1, 1) float32 in 0..255."""
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(images[:, c].reshape(-1), minlength=256) for c in range(3)]).double().cpu()
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
    scale = math.sqrt(1 + eps**2)
    for theta_t, theta in zip(teacher.parameters(), draw.parameters()):
        if eps < math.inf:
            theta.copy_((theta_t + eps * theta) / scale)
    return draw


class KLDivergence(torch.autograd.Function):
    """KL(softmax teacher ‖ softmax student) in nats (≥ 0), mean over the batch, from logits (B, m) in float32; call `.apply`.

    The KL here is about 1e-6 nats: two log-softmaxes, whose entries sit near −ln 65536 = −11, would lose most of it to
    float32 rounding. With p the teacher's softmax and d = student − teacher logits, shifted so that Σ p·d = 0, it is
    log(1 + s) for s = Σ p·(e^d − 1 − d), a sum of terms ≥ 0 in which nothing cancels. The gradient is p_student − p; that
    difference, too, has a form without cancellation, and is exactly 0 where the logits agree.
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


KL_FORMS = {"exact": KLDivergence.apply, "log-softmax": kl_by_log_softmax}


def distance(parameters, start):
    """‖θ − θ_start‖₂ over two equally long lists of tensors, as a float."""
    return torch.stack([(p.detach() - q).norm() for p, q in zip(parameters, start)]).norm().item()


# ---- The training loop -----------------------------------------------------------------------------------------------

def train(batch_loss, n, optimizer, scaler, *, steps, batch_size, seed, start=0):
    """Train, and yield (step, loss) after every optimiser step: step 1..steps, loss a detached scalar on the device.

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


def pick_device(name):
    """The torch.device for --device auto, cpu or cuda. Raises Problem for cuda where there is none."""
    torch.backends.cudnn.benchmark = True  # one shape of batch: worth finding its fastest convolution
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32; --amp is the switch for less
    if name == "cuda" and not torch.cuda.is_available():
        raise Problem("--device cuda, but torch sees no CUDA device here: use --device cpu")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def pick_amp(amp, device):
    """Resolve --amp auto: bf16 where the hardware multiplies it fast, else fp16 on CUDA, else float32 ("off")."""
    if amp != "auto":
        return amp
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


# ---- Checkpoints -----------------------------------------------------------------------------------------------------

FORMAT = "random-teachers-1"


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


def read_checkpoint(path, device="cpu"):
    """The whole checkpoint of a run directory or .pt file, as a dict of plain values and tensors.

    Raises Problem if it is missing, truncated or not one of ours. No pickled code runs, so a stranger's file is safe.
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise Problem(f"no checkpoint at {path}: make one with distill.py, or name its run directory")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of foreign files; ours get a line of their own below
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError):
        raise Problem(f"{path} is truncated or not a checkpoint: delete it and distil again") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise Problem(f"{path} is not a checkpoint of distill.py ({FORMAT}): name a run directory that distill.py made")
    return checkpoint


def network_of(config):
    """A Network of the shape that a checkpoint's config describes."""
    return Network(config["arch"], config["out_dim"], config["image_size"], config["raw_rows"])


def load_checkpoint(path, device="cpu"):
    """(teacher encoder, student encoder, config dict) of a run directory or .pt file, in eval mode and frozen.

    Encoders map normalised images (B, 3, s, s) to embeddings (B, r); s is config["image_size"]. Raises Problem.
    """
    checkpoint = read_checkpoint(path)
    encoders = []
    for role in ("teacher", "student"):
        network = network_of(checkpoint["config"])
        network.load_state_dict(checkpoint[role])
        encoders.append(network.encoder.eval().requires_grad_(False).to(device, memory_format=torch.channels_last))
    return *encoders, checkpoint["config"]


# ---- Main ------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    number = lambda kind, low, name: lambda text: kind(text) if kind(text) >= low else parser.error(f"{name} must be at least {low}")
    add = parser.add_argument
    add("--arch", choices=ARCHS, default="resnet18", help="encoder; on a CPU take resnet20")
    add("--init-eps", type=number(float, 0, "--init-eps"), default=0.0, metavar="ε",
        help="student = (teacher + ε·draw)/√(1+ε²): 0 starts at the teacher, inf independently of it; the paper's α = ε/(1+ε), "
             "so α=0.5 is ε=1 and α=0.6 is ε=1.5. Without batch norm (vgg*) 0 is a fixed point, left by rounding alone; "
             "the paper's α≈0 is 1e-10")
    add("--dataset", default="cifar10", help=f"{', '.join(DATASETS)}, or a folder with train/<class>/ and test/ or val/")
    add("--probe-dataset", help="labelled data for the probes (default: --dataset); needed with noise")
    add("--n-samples", type=number(int, 1, "--n-samples"), help="distil on a stratified subset of so many images")
    add("--image-size", type=number(int, 8, "--image-size"), default=32, help="images are resized to this many pixels square")
    add("--out-dim", type=number(int, 1, "--out-dim"), default=2**16, help="number of logits m; 1024 spares a CPU half the work (Fig. 10)")
    add("--raw-rows", action="store_true", help="do not normalise the last layer's rows, as the released code: KL about 10 times smaller")
    add("--teacher-mode", choices=("eval", "train"), default="eval", help="train: the teacher's batch norm uses each batch's statistics")
    add("--live-teacher", action="store_true", help="run the teacher at every step instead of once; the same result, slower")
    add("--kl", choices=KL_FORMS, default="exact", help="how to compute the KL; log-softmax is the usual way, off by several per cent at 1e-6 nats")
    add("--epochs", type=number(int, 1, "--epochs"), default=100, help="passes over the training images")
    add("--steps", type=number(int, 1, "--steps"), help="stop after so many steps, if that is earlier")
    add("--batch-size", type=number(int, 1, "--batch-size"), default=256)
    add("--lr", type=number(float, 0, "--lr"), default=1e-3, help="AdamW's constant learning rate; weight decay is 0")
    add("--seed", type=number(int, 0, "--seed"), default=0, help="of the teacher, the student's draw and the order of the data")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="16-bit encoder; auto: where the hardware does it fast")
    add("--log-every", type=number(int, 1, "--log-every"), help="steps between log lines (default: an epoch, at most 100)")
    add("--eval-every", type=number(int, 1, "--eval-every"), help="steps between probes and checkpoints (default: a tenth of the run)")
    add("--out", help="run directory (default: runs/<dataset>-<arch>-eps<ε>-seed<seed>)")
    add("--resume", action="store_true", help="go on from the run directory's checkpoint, if there is one")
    add("--data-dir", default="data", help="where downloads and caches go")
    add("--mirror", default=os.environ.get("DATA_MIRROR"), help="URL of a directory that holds the CIFAR archives (or set DATA_MIRROR)")
    args = parser.parse_args(argv)
    if args.dataset == "noise" and args.probe_dataset in (None, "noise"):
        parser.error("noise has no labels: name a labelled data set with --probe-dataset, for example leaves")
    if args.arch.startswith("vgg") and args.image_size < 32:
        parser.error("VGG halves the image five times: --image-size must be at least 32")
    return args


LOG_COLUMNS = ("step", "epoch", "kl", "distance", "images_per_s", "linear_paper", "linear_paper_last", "linear_converged", "knn")
MAY_CHANGE = {"epochs", "steps", "log_every", "eval_every", "out", "resume", "data_dir", "mirror", "device"}  # on --resume


def main(argv=None):
    args = parse_args(argv)
    from probe import evaluate  # here, because probe.py imports this file
    device = pick_device(args.device)
    args.amp = pick_amp(args.amp, device)
    out = Path(args.out or f"runs/{Path(args.dataset).name}-{args.arch}-eps{args.init_eps:g}-seed{args.seed}")
    config, path = vars(args).copy(), out / "last.pt"
    checkpoint = None
    if path.exists():
        if not args.resume:
            raise Problem(f"{path} exists: add --resume to go on with that run, or name another directory with --out")
        checkpoint = read_checkpoint(path)
        for key in config.keys() - MAY_CHANGE:
            if checkpoint["config"].get(key) != config[key]:
                raise Problem(f"cannot resume {out}: it was run with --{key.replace('_', '-')} {checkpoint['config'].get(key)}, not {config[key]}")
        if checkpoint["step"] == checkpoint["steps"] and all(config[key] == checkpoint["config"][key] for key in ("steps", "epochs")):
            print(f"{out}: all {checkpoint['steps']:,} steps are done")
            return

    out.mkdir(parents=True, exist_ok=True)

    # Data, teacher, student, and where the student starts
    load = lambda name: load_data(name, args.image_size, args.data_dir, args.mirror)
    data = load(args.dataset)
    probe_data = (load(args.probe_dataset) if args.probe_dataset else data).to(device)
    subset = stratified_subset(data.train_y, args.n_samples) if args.n_samples else slice(None)
    all_images = data.train_x[subset].to(device)
    stats, n = channel_stats(all_images), len(all_images)
    shape = (args.arch, args.out_dim, args.image_size, args.raw_rows)
    teacher = random_network(2 * args.seed, *shape)
    student = init_student(teacher, random_network(2 * args.seed + 1, *shape), args.init_eps)
    for network in (teacher, student):
        network.to(device, memory_format=torch.channels_last)
    teacher.requires_grad_(False).train(args.teacher_mode == "train")
    student.train()
    theta = list(student.parameters())
    theta_0 = [p.detach().clone() for p in theta]
    optimizer = torch.optim.AdamW(theta, lr=args.lr, weight_decay=0, fused=True)
    autocast, scaler = amp_tools(args.amp, device)
    per_epoch = math.ceil(n / args.batch_size)
    steps = min(args.epochs * per_epoch, args.steps or math.inf)
    log_every, eval_every = args.log_every or min(per_epoch, 100), args.eval_every or max(1, steps // 10)
    step, log = 0, []
    if checkpoint:
        teacher.load_state_dict(checkpoint["teacher"]), student.load_state_dict(checkpoint["student"])
        optimizer.load_state_dict(checkpoint["optimizer"]), scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"])
        step, log = checkpoint["step"], checkpoint["log"]
        print(f"resuming {out} after step {step:,} of {steps:,}")

    # The teacher runs once: it is frozen, the images are not augmented, and in eval mode a batch norm uses its (initial)
    # running statistics. So the bottleneck of each image never changes: n × 256 numbers instead of n encoder passes an epoch.
    float32 = amp_tools("off", device)[0]
    teacher_rows, table = teacher.rows(), None
    if args.teacher_mode == "eval" and not args.live_teacher:
        with torch.no_grad():
            table = torch.cat([teacher.bottleneck(normalise(x, stats), float32) for x in all_images.split(args.batch_size)])

    def batch_loss(index):
        """index (B,) -> the mean KL of student from teacher; the student's batch norms use the batch's statistics."""
        images = normalise(all_images[index], stats)
        with torch.no_grad():
            target = table[index] if table is not None else teacher.bottleneck(images, float32)
            teacher_logits = target @ teacher_rows.T
        return KL_FORMS[args.kl](teacher_logits, student.bottleneck(images, autocast) @ student.rows().T)

    def save():
        write_atomically(path, lambda file: torch.save({
            "format": FORMAT, "config": config, "teacher": teacher.state_dict(), "student": student.state_dict(),
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "rng": torch.get_rng_state(),
            "step": step, "steps": steps, "log": log}, file))

    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, or a cluster that wants its node back: stop after this step
        signal.signal(number, lambda number, frame: interrupted.append(number))

    # Train, and between the steps log, probe and save
    print(f"{args.arch} on {args.dataset}: {n:,} images, {steps:,} steps of {args.batch_size}, m={args.out_dim:,}, ε={args.init_eps:g}, "
          f"seed {args.seed}, {device.type}, amp {args.amp} -> {out}")
    print(f"{'step':>7} {'epoch':>7} {'KL (nats)':>10} {'from init':>9} {'images/s':>9} {'ETA':>9}   "
          f"probe: linear  converged   k-NN (%)")
    row_of = lambda probes: f"{probes['linear_paper']:15.2f} {probes['linear_converged']:10.2f} {probes['knn']:10.2f}" if probes else ""

    def log_row(kl, speed, probes):
        """One line on the screen and in log.csv: mean KL and images/s since the last line, and any probes (%)."""
        log.append({"step": step, "epoch": round(step / per_epoch, 4), "kl": kl, "distance": distance(theta, theta_0),
                    "images_per_s": speed, **probes})
        with open(out / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(log)
        eta = timedelta(seconds=round((steps - step) * args.batch_size / speed)) if speed else ""
        print(f"{step:7d} {step / per_epoch:7.1f} {kl:10.3e} {log[-1]['distance']:9.3f} {speed:9.0f} {eta!s:>9} {row_of(probes)}", flush=True)

    teacher_probes = evaluate(teacher.encoder, probe_data)
    print(f"{'teacher':>7}{'':49}{row_of(teacher_probes)}", flush=True)
    if step == 0:  # at ε=0 the student's encoder is the teacher's, and so are its probes
        log_row(0.0, 0, teacher_probes if args.init_eps == 0 else evaluate(student.encoder, probe_data))
    losses, clock, first, saved = [], time.time(), step, time.time()
    for step, loss in train(batch_loss, n, optimizer, scaler, steps=steps, batch_size=args.batch_size, seed=args.seed, start=step):
        losses.append(loss)  # left on the device: asking for its value would make the GPU wait
        if device.type == "cpu" and step == first + 5 and (hours := (steps - step) * (time.time() - clock) / 5 / 3600) > 1:
            print(f"this CPU needs about {hours:.0f} hours for these {steps:,} steps (going on); `bash run_all.sh quick` shows the "
                  f"effect in minutes", flush=True)
        evaluating = (step % eval_every == 0 or step == steps) and not interrupted
        if not (evaluating or step % log_every == 0 or interrupted):
            continue
        for i, value in enumerate(kls := torch.stack(losses).tolist()):
            if not math.isfinite(value):
                raise Problem(f"the loss became {value} at step {step - len(kls) + 1 + i}: lower --lr or take --amp off; "
                              f"{path if path.exists() else 'no checkpoint yet, so nothing'} is kept as it was")
        speed = len(kls) * args.batch_size / (time.time() - clock)
        log_row(sum(kls) / len(kls), speed, evaluate(student.encoder, probe_data) if evaluating else {})
        if evaluating or interrupted or time.time() - saved > 600:
            save()
            saved = time.time()
        if interrupted:
            print(f"stopped after step {step:,}; the same command with --resume goes on from here")
            sys.exit(128 + interrupted[0])
        losses, clock = [], time.time()
    for probe, name in (("linear_paper", "linear probe"), ("linear_converged", "converged"), ("knn", "k-NN")):
        last = next(row for row in reversed(log) if probe in row)
        print(f"{name:>13}: teacher {teacher_probes[probe]:.2f} -> student {last[probe]:.2f} ({last[probe] - teacher_probes[probe]:+.2f})")


def run_cli(main):
    """Run a script's main: a Problem, or an OSError such as a full disk, ends in one line on stderr and exit status 1."""
    try:
        main()
    except (Problem, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    import distill  # the scripts import this file under its name: run that one copy of it, not a second called __main__
    distill.run_cli(distill.main)
