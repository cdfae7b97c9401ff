#!/usr/bin/env python3
"""Distil a student from a frozen, randomly initialised teacher: no labels, no augmentation.

    python distill.py --arch resnet18 --init-eps 0.0    the paper's run on CIFAR10 (wants a GPU)
    python datasets/leaves.py                           images for a laptop, without a download
    python distill.py --arch resnet20 --dataset leaves --out-dim 1024 --batch-size 128 --steps 400

"Random Teachers are Good Teachers" (Sarnthein et al., ICML 2023, arXiv 2302.12091): linear probes
of the student's embeddings beat those of the teacher's. The idea ends with `distill`, which puts
it together; below it is plumbing. Bare §, Table, Fig. and App. are the paper's. In shapes n counts
images, B those of a batch, s pixels a side, r numbers of an embedding, m logits (65,536).
"""
import argparse, fcntl, json, math, os, re, shlex, subprocess, sys, time, warnings, zlib
from collections import namedtuple
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3
from torchvision.models.vgg import cfgs as VGG_PLANS, make_layers
from torchvision.transforms.functional import resize


# ---- Normalisation of the images -----------------------------------------------------------------

def channel_stats(images):
    """Mean and std of uint8 images (n, 3, s, s) by channel: (1, 3, 1, 1) float32 in 0..255."""
    # from each channel's histogram: exact, and fast
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


# ---- Encoders: images (B, 3, s, s) -> embeddings (B, r) (Table 5, App. E) ------------------------

def cifar_resnet(n_blocks, norm_layer):
    """He et al. 2016, §4.2, but with convolutions as shortcuts: three stages of 16-32-64 channels,
    `n_blocks` basic blocks each.
    """
    width, layers = 16, [conv3x3(3, 16), norm_layer(16), nn.ReLU(inplace=True)]
    for channels in (16, 32, 64):
        for block in range(n_blocks):
            stride, shortcut = 1, None
            if channels > width:
                stride, shortcut = 2, nn.Sequential(conv1x1(width, channels, 2),
                                                    norm_layer(channels))
            layers.append(BasicBlock(width, channels, stride, shortcut, norm_layer=norm_layer))
            width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) that applies one pre-norm layer twelve times.

    One layer for all twelve, and patches of 16 pixels, match the paper's parameter counts; its text
    says 8 pixels (vit-*-p8). Emits the class token. In the paper's released code the heads of a
    token attend to each other; here, as usual, tokens attend to tokens.
    """
    def __init__(self, width, patch, image_size):
        super().__init__()
        torch.backends.mha.set_fastpath_enabled(False)  # in eval mode, on GPUs, its GELU differs
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch) ** 2, width))
        self.layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True,
            norm_first=True)
        attention, bound = self.layer.self_attn, width**-0.5
        for p in (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.bias):
            # as torch initialises a Linear; its attention does otherwise
            nn.init.uniform_(p, -bound, bound)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        for _ in range(12):
            tokens = self.layer(tokens)
        return self.norm(tokens[:, 0])


EMBEDDING_WIDTH = {  # r of every encoder, by its name
    "vgg11": 512, "vgg13": 512, "vgg16": 512, "vgg19": 512,
    "resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet20": 64, "resnet56": 64,
    "vit-tiny": 192, "vit-small": 384, "vit-medium": 512, "vit-base": 768,
    "vit-tiny-p8": 192, "vit-small-p8": 384, "vit-medium-p8": 512, "vit-base-p8": 768}
NORM_LAYERS = {  # what may normalise a ResNet's activations, over c channels (Fig. 11)
    "batch": nn.BatchNorm2d,
    "instance": lambda c: nn.GroupNorm(c, c),
    "group": lambda c: nn.GroupNorm(c // 8, c),
    "layer": lambda c: nn.GroupNorm(1, c),
    "none": nn.Identity}  # which takes any argument


def build_encoder(arch, image_size, norm):
    """The encoder of that name. Only ResNets have a `norm`; VGGs have none, ViTs have their own."""
    if arch.startswith("vgg"):  # torchvision's `features`, without batch norm
        plan = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}[arch]
        return nn.Sequential(make_layers(VGG_PLANS[plan]), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if arch.startswith("vit"):
        return ViT(EMBEDDING_WIDTH[arch], 8 if arch.endswith("-p8") else 16, image_size)
    if arch in ("resnet20", "resnet56"):
        return cifar_resnet({"resnet20": 3, "resnet56": 9}[arch], NORM_LAYERS[norm])
    encoder = torchvision.models.get_model(arch, norm_layer=NORM_LAYERS[norm])
    encoder.fc = nn.Identity()
    if image_size <= 64:  # a 3×3 stem with stride 1 and no max-pool
        encoder.conv1, encoder.maxpool = conv3x3(3, 64), nn.Identity()
    return encoder


def autocast(device, amp):
    """The context in which matrix products and convolutions run in 16 bits if `amp` is "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def embed(encoder, images, amp="off"):
    """(B, 3, s, s) normalised images -> (B, r) float32 embeddings.

    Only the encoder may run in 16 bits; projector and logits stay in float32. In a random network
    logits are about 1/16 (see Network): bfloat16 would round them to steps of 5e-4, coarse beside
    the few 1e-3 by which student and teacher come to differ.
    """
    with autocast(images.device, amp):
        return encoder(images).float()


# ---- Network = last layer ∘ projector ∘ encoder (App. E.1) ---------------------------------------
# The paper's "L2 bottleneck": the projector ends in an affine map (l), whose output is divided by
# its L2 norm (f); the last layer divides the rows of a matrix by theirs (w) and multiplies by it
# (l). So logits are cosines. We write projector/last layer, "lf/wl"; Fig. 12 leaves out letters,
# whose order means nothing.

class L2Linear(nn.Module):
    """Half of the bottleneck, by its letters: (B, width) -> (B, out_dim), without l (B, width)."""
    def __init__(self, code, width, out_dim, bias):
        super().__init__()
        self.code = code
        self.linear = nn.Linear(width, out_dim, bias) if "l" in code else None

    def forward(self, x):
        if "l" in self.code:
            weight = self.linear.weight
            if "w" in self.code:
                weight = F.normalize(weight, dim=1)
            x = F.linear(x, weight, self.linear.bias)
        return F.normalize(x, dim=1) if "f" in self.code else x


class Network(nn.Module):
    """Encoder, projector to vectors (B, 256; f/wl: 2048), last layer to m = `out_dim` logits.

    With lf/wl a logit is the cosine of two vectors of 256 numbers, the image's and one of m rows:
    at most 1, and about ±1/√256 = 1/16 in a random network. So the softmax is nearly flat and all
    losses are small: two random networks have a KL of 4e-3 nats, half the variance 2/256 of their
    logits' difference. The paper's text says lf/wl, its released code computes lf/l: rows start
    0.02·√256 = 0.32 long, so logits are 0.32 times as large, and the KL 0.1 times.
    """
    def __init__(self, arch, out_dim, image_size=32, norm="batch", l2_bottleneck="lf/wl"):
        super().__init__()
        to_vector, to_logits = l2_bottleneck.split("/")
        self.encoder = build_encoder(arch, image_size, norm)
        self.projector = nn.Sequential(
            nn.Linear(EMBEDDING_WIDTH[arch], 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(),
            L2Linear(to_vector, 2048, 256, bias=True))
        width = 256 if "l" in to_vector else 2048
        self.last_layer = L2Linear(to_logits, width, out_dim, bias=False)

    def forward(self, images, amp="off"):
        """(B, 3, s, s) normalised images -> (B, m) float32 logits."""
        return self.last_layer(self.projector(embed(self.encoder, images, amp)))


def random_network(seed, *args, **settings):
    """A freshly initialised Network(*args, **settings), on the CPU; a `seed` fixes its weights."""
    torch.manual_seed(seed)  # ViTs keep their own initialisation, from torch's global generator
    network, generator = Network(*args, **settings), torch.Generator().manual_seed(seed)
    for name, module in network.named_modules():
        if isinstance(network.encoder, ViT) and name.startswith("encoder"):
            continue
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu",
                                    generator=generator)
        elif isinstance(module, nn.Linear):
            # the paper's trunc_normal_ cuts at 100 std, so not at all; its draws change with torch
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    # norms: weight 1, mean 0, variance 1 from torch
    return network.to(memory_format=torch.channels_last)


# ---- Student initialisation (§2) -----------------------------------------------------------------

@torch.no_grad()
def init_student(teacher, independent, eps):
    """Turn the network `independent`, of weights θ̃, into the student's start
    θ_S = (θ_T + ε·θ̃)/√(1 + ε²), where θ_T is the teacher's, and return it.

    ε = 0 copies the teacher, ε = inf keeps θ̃; the paper's locality α is ε/(1+ε). The root keeps
    the variance of the weights. It is for every parameter, as in the released code: norm weights, 1
    in both networks, become (1+ε)/√(1+ε²). Buffers (batch-norm statistics) stay fresh.
    What is there to learn at ε = 0? The same weights are not the same function: in eval mode the
    random teacher's batch norms (mean 0, variance 1) do nothing, while the student's normalise by
    each batch. Without batch norm the two agree, and in float32 ε = 0 is a fixed point. The paper's
    "α ≈ 0", ε = 1e-10, changes the last bits of the smallest weights; Adam magnifies that.
    """
    scale = math.hypot(1, eps)
    for theta_t, theta in zip(teacher.parameters(), independent.parameters()):
        if eps < math.inf:
            theta.copy_(theta_t / scale + theta * (eps / scale))
    return independent


# ---- Loss (§3) -----------------------------------------------------------------------------------

class KLDivergence(torch.autograd.Function):
    """KL(softmax teacher ‖ softmax student) in nats, mean over the batch; call `.apply`.

    Takes float32 logits (B, m) of the teacher, then of the student. Only the student's get a
    gradient.

    Why not the cross-entropy? Its gradient is the same, but its value adds the teacher's entropy,
    about ln 65536 = 11.09, where float32 has steps of 1e-6: as large as the KL is at the end. Two
    log-softmaxes near −11 round likewise, which moves a student that should stay put. So let p be
    the teacher's softmax and d = student − teacher logits, shifted so that Σ p·d = 0 (no softmax
    sees a shift); then all is computed from numbers of the size of d, and is 0 where d is:

        k         = Σ p·(e^d − 1 − d) = Σ p·e^d − 1, a sum of terms ≥ 0
        p_student = p·e^d / Σ p·e^d = p·e^d / (1 + k)
        KL        = Σ p·log(p / p_student) = log(1 + k)
        gradient  = p_student − p = p·(e^d − 1 − k) / (1 + k), over B for the batch's mean
    """
    @staticmethod
    def forward(ctx, teacher_logits, student_logits):
        p = teacher_logits.softmax(1)
        d = student_logits - teacher_logits
        d -= (p * d).sum(1, keepdim=True)
        growth = d.expm1()  # e^d − 1
        k = (p * (growth - d)).sum(1, keepdim=True)
        # in the memory of `growth`: a batch's logits take 67 MB
        gradient = growth.sub_(k).mul_(p).div_((1 + k) * len(p))
        ctx.save_for_backward(gradient)
        return k.log1p().mean()

    @staticmethod
    def backward(ctx, upstream):
        return None, ctx.saved_tensors[0] * upstream


def kl_by_log_softmax(teacher_logits, student_logits):
    """The same KL as one usually writes it. Its rounding noise is enough to leave ε = 0."""
    return F.kl_div(student_logits.log_softmax(1), teacher_logits.log_softmax(1),
                    reduction="batchmean", log_target=True)


LOSSES = {"kl": KLDivergence.apply, "kl-log-softmax": kl_by_log_softmax, "mse": F.mse_loss}


# ---- The training loop ---------------------------------------------------------------------------

def train(batch_loss, n, optimizer, *, steps, batch_size=256, seed=0, learning_rate=None,
          first_step=0):
    """Train, and after each step yield (steps made, loss as a scalar on the device, size of the
    batch), so that the caller can log, probe, prune and save in between.

    `batch_loss(index)` is the loss on the images numbered `index`, (B,) int64: in it distillation
    and supervised training (prune.py) differ. `learning_rate(steps made)` sets each step's rate;
    without it the optimiser keeps its own. An epoch's order of the data depends on its number and
    the seed alone, so one may stop anywhere and go on from there, as `first_step`.
    """
    device = optimizer.param_groups[0]["params"][0].device
    per_epoch = math.ceil(n / batch_size)
    for step in range(first_step, steps):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == first_step:
            order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n)).to(device)
        index = order[i * batch_size:(i + 1) * batch_size]  # the last, smaller batch is kept
        if learning_rate:
            optimizer.param_groups[0]["lr"] = learning_rate(step)
        loss = batch_loss(index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step + 1, loss.detach(), len(index)


# ---- The experiment ------------------------------------------------------------------------------

@torch.no_grad()
def teacher_vectors(teacher, images, stats, batch_size=256):
    """uint8 images (n, 3, s, s) -> what the teacher's projector makes of them: vectors (n, 256).

    The teacher runs once: it is frozen and in eval mode, where its output for an image does not
    depend on the rest of the batch, and the images are not augmented. Its vectors are kept, from
    which the last layer makes logits; all n·m logits would take 13 GB. They are float32 even where
    the student's encoder runs in 16 bits, which does ResNet20 no harm (results/README.md).
    """
    return torch.cat([teacher.projector(embed(teacher.encoder, normalise(x, stats)))
                      for x in images.split(batch_size)])


def distill(teacher, student, images, optimizer, *, divergence=KLDivergence.apply, amp="off",
            batch_size=256, **loop):
    """Return `train`'s iterator, each step of which fits `student` to `teacher` on one batch.

    The paper's experiment, in small, with uint8 images (n, 3, s, s) on the networks' device:

        teacher = random_network(0, "resnet20", out_dim=1024)
        student = init_student(teacher, random_network(1, "resnet20", out_dim=1024), eps=0.0)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0)
        for step, loss, _ in distill(teacher, student, images, optimizer, steps=400):
            print(step, loss.item())

    AdamW without weight decay is Adam. `divergence` maps teacher and student logits (B, m) to a
    scalar, `amp` is "bf16" or "off", and `loop` are further arguments of `train`. Who probes the
    student between steps must leave it in training mode, as probe.evaluate does.
    """
    # eval mode: with batch norm this sets teacher and student apart at ε = 0 (see init_student)
    teacher.requires_grad_(False).eval()
    student.train()
    stats = channel_stats(images)
    vectors = teacher_vectors(teacher, images, stats, batch_size)

    def batch_loss(index):
        x = normalise(images[index], stats)
        teacher_logits = teacher.last_layer(vectors[index])
        student_logits = student(x, amp)
        return divergence(teacher_logits, student_logits)

    return train(batch_loss, len(images), optimizer, batch_size=batch_size, **loop)


# ==== Here the idea ends. Below: checkpoints, data, options, and `main`, which logs and probes ====

class Problem(SystemExit):
    """Something the user can put right: a line that says how, with which the script ends."""


NETWORK_SETTINGS = ("arch", "out_dim", "image_size", "norm", "l2_bottleneck")


def load_checkpoint(path):
    """(teacher, student, config) of a run directory or .pt file: Networks on the CPU, in eval mode
    and frozen, so that embed(student.encoder, normalised images) are features; and the settings:
    options, n_images, total_steps and `step`, the number of steps made. Raises Problem.
    """
    checkpoint = read_checkpoint(Path(path))
    config = {**checkpoint["config"], "step": checkpoint["step"]}
    networks = [Network(*(config[name] for name in NETWORK_SETTINGS)) for _ in range(2)]
    for network, role in zip(networks, ("teacher", "student")):
        network.to(memory_format=torch.channels_last).load_state_dict(checkpoint[role])
    return *(network.eval().requires_grad_(False) for network in networks), config


def checksum(content):
    """A number for nested dicts, lists and tensors: two agree if their contents do."""
    if torch.is_tensor(content):
        return zlib.crc32(content.cpu().reshape(-1).numpy())
    if isinstance(content, dict):
        content = [*content.items()]
    if isinstance(content, (list, tuple)):
        content = [*map(checksum, content)]
    return zlib.crc32(str(content).encode())


def read_checkpoint(path, script="distill.py"):
    """What a run directory or .pt file of `script` holds, as a dict with tensors on the CPU. Raises
    Problem if that is missing, damaged or not one of ours; a stranger's file runs no code.
    """
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        raise Problem(f"no checkpoint at {path}: make one with {script}, or name its run directory")
    warnings.filterwarnings("ignore", module="torch._weights_only_unpickler")  # on foreign files
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        damaged = checkpoint.pop("checksum") != checksum(checkpoint)
    except Exception:  # torch has many, one for each way in which a file can be broken
        damaged = True
    if damaged or checkpoint["format"] != f"{script} 4":
        raise Problem(f"{path} is truncated, damaged or no checkpoint of this {script}: name "
                      f"another, or make it again with {script}")
    return checkpoint


def save(path, content):
    """Write a dict to a .pt or .json file, or a list of dicts to a .csv file, so that readers see
    the old file or the new one. For other files, `content(path)` writes. Raises Problem.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            torch.save({**content, "checksum": checksum(content)}, temporary)
        elif path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        elif path.suffix == ".csv":
            columns = dict.fromkeys(name for row in content for name in row)
            lines = [columns, *([row.get(name, "") for name in columns] for row in content)]
            temporary.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        else:
            content(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # Runtime-: torch's full disk
        raise Problem(f"cannot write {path}: {str(error).splitlines()[0]}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def run_directory(folder, resume, script="distill.py"):
    """Make `folder` and keep other processes out of it until this one leaves or is killed; yield
    the checkpoint to go on from, or {} where a run begins. Raises Problem rather than mix runs.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise Problem(f"cannot write to {folder}, or another process does ({error}): name another "
                      "directory with --out") from None
    try:
        begun = any((folder / name).exists() for name in ("last.pt", "log.csv", "connect.npz"))
        if begun and not resume:
            raise Problem(f"{folder} holds a run: add --resume to go on, or name another --out")
        yield read_checkpoint(folder, script) if begun else {}
    finally:
        os.close(handle)


def to_config(args):
    """The options as a dict that JSON can hold: paths, and ε = inf, become text."""
    return {name: str(value) if isinstance(value, Path) or value == math.inf else value
            for name, value in vars(args).items()}


# what may differ when a run goes on, because it does not change what the run computes
MAY_CHANGE = {"epochs", "steps", "total_steps", "log_every", "eval_every", "resume", "device",
              "out", "run", "provenance"}


def check_same(path, theirs, ours, ignored=MAY_CHANGE):
    """Raise a Problem that names the first of `ours` that differs in `theirs`, those of `path`."""
    for name in sorted(ours.keys() - ignored):
        if isinstance(ours[name], dict):
            check_same(path, theirs.get(name) or {}, ours[name], ignored)
        elif theirs.get(name) != ours[name]:
            raise Problem(f"{path} does not fit: it has {name.replace('_', '-')} "
                          f"{theirs.get(name)}, not {ours[name]}: name another")


def progress(config):
    """' (step 21 of 400)' for a run with this config of load_checkpoint; '' if it is finished."""
    unfinished = config["step"] < config["total_steps"]
    return unfinished * f" (step {config['step']:,} of {config['total_steps']:,})"


def run_folder(path):
    """The run directory that is named by itself, or by a checkpoint in it."""
    return path.parent if path.suffix == ".pt" else path


# ---- Data: uint8 images, all of them resident on the device --------------------------------------

# images (n, 3, s, s) uint8, labels (n,) int64 in 0..classes-1; without labels there is no test part
Data = namedtuple("Data", "train_x train_y test_x test_y classes")
DOWNLOADS = ("cifar10", "cifar100", "stl10")  # by torchvision
MADE = ("leaves", "tinyimagenet", "cifar5m")  # by the scripts in datasets/, as data/<name>*.npz


def load_data(name, image_size=32, device="cpu", n=None):
    """The Data of that name: one of DOWNLOADS, noise (at least n images), a .npz file, or
    data/<name>.npz. Raises Problem.
    """
    file = Path(name if name.endswith(".npz") else f"data/{name}.npz")
    if name in DOWNLOADS:
        arrays, classes = torchvision_data(name)
    elif name == "noise":
        arrays, classes = gaussian_noise(max(n or 0, 50_000), image_size), ["noise"]
    elif file.exists():
        arrays, classes = npz_data(file)
    else:
        script = name.split("-")[0]
        raise Problem(f"there is no {file}: datasets/{script if script in MADE else 'folder'}.py "
                      f"makes it (there are {', '.join(DOWNLOADS + MADE)} and noise, too)")
    x, y, test_x, test_y = map(torch.from_numpy, arrays)
    x, test_x = (resize(images.permute(0, 3, 1, 2), image_size) for images in (x, test_x))
    return Data(*(part.to(device) for part in (x, y.long(), test_x, test_y.long())), classes)


def stratified_subset(x, y, n):
    """n of the images x and labels y, from each class its share, as in the paper's balanced subsets
    (Fig. 4), or all of them if n is None. Raises Problem if there are fewer.
    """
    if n in (None, len(y)):
        return x, y
    if n > len(y):
        raise Problem(f"--n-samples {n:,} is more than the {len(y):,} training images there are")
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    member = F.one_hot(y.cpu()[shuffled]).bool()
    # the k-th of a class's K images ranks at (k − 1/2)/K: the n lowest take each class evenly
    rank = ((member.cumsum(0) - 0.5) / member.sum(0))[member]
    chosen = shuffled[rank.argsort(stable=True)[:n]].sort().values
    return x[chosen], y[chosen]


def torchvision_data(name):
    """CIFAR or STL10's labelled images, by torchvision's downloader, which checks the MD5 sum of
    what it gets, also from DATA_MIRROR, the URL of a directory with the same archives.
    """
    source = getattr(torchvision.datasets, name.upper())
    host = os.environ.get("DATA_MIRROR") or source.url.rpartition("/")[0]
    source.url = f"{host.rstrip('/')}/{source.filename}"
    try:
        train, test = (source("data", split, download=True)
                       for split in (("train", "test") if name == "stl10" else (True, False)))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise Problem(f"cannot download {source.url} ({reason}): set DATA_MIRROR to the URL of a "
                      "directory with it, or take --dataset leaves")
    return [np.stack(values) for part in (train, test) for values in zip(*part)], train.classes


def gaussian_noise(n, image_size):
    """The paper's control (Fig. 4): σ = 1 after normalisation; 8 bits hold ±4σ in 32nds of σ."""
    pixels = np.random.default_rng(0).standard_normal((n, 3, image_size, image_size), np.float32)
    x = (pixels * 32 + 128).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return x, np.zeros(n, np.int64), x[:0], np.zeros(0, np.int64)


def npz_data(path):
    """The arrays and classes of a file as the scripts in datasets/ write it: train_x and test_x
    (n, s, s, 3) uint8, train_y and test_y (n,), classes.
    """
    try:
        with np.load(path) as file:
            *arrays, classes = (array.astype(array.dtype.type, copy=False)  # native bytes
                                for array in map(file.__getitem__, Data._fields))
        for x, y in (arrays[:2], arrays[2:]):
            n, size = x.shape[:2]
            # bincount wants whole numbers from 0 on
            if (x.dtype != np.uint8 or x.shape != (n, size, size, 3) or y.shape != (n,)
                    or not 0 < len(np.bincount(y)) <= len(classes)):
                raise ValueError(f"images {x.dtype} {x.shape}, labels {y.dtype} {y.shape}")
    except Exception as error:
        raise Problem(f"{path} is no data set ({error}): make it again") from None
    return arrays, classes.tolist()


# ---- Machine and options -------------------------------------------------------------------------

say = partial(print, flush=True)  # at once, also into a file
CPUINFO = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""  # Linux


def pick_device(name):
    """The torch.device for --device auto, cpu or cuda. Problem if there is no CUDA for it."""
    torch.backends.cudnn.benchmark = True  # batches of one shape: find the fastest convolution
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # 10 bits
    if name == "cuda" and not torch.cuda.is_available():
        raise Problem("--device cuda, but torch sees no CUDA device here: use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_amp(amp, device, arch, norm="batch"):
    """What "auto" is: bf16 where it is fast; without batch norm, where VGG11 failed in it, off."""
    fast = re.search("amx_bf16|avx512_bf16", CPUINFO)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    auto = "bf16" if fast and norm == "batch" and arch.startswith("resnet") else "off"
    return auto if amp == "auto" else amp


def provenance(device, checkpoint=None):
    """On what and by which code a result is made; "X, then Y" where it goes on from X."""
    hardware = f"{os.cpu_count()} cores of {re.search('model name.*: (.*)|$', CPUINFO)[1] or '?'}"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    # of this repository, not of one in which this code merely lies
    git = (f"cd {shlex.quote(str(Path(__file__).parent))} && git ls-files --error-unmatch "
           "distill.py >/dev/null 2>&1 && git describe --always --dirty --exclude='*'")
    made = {"hardware": hardware, "torch": str(torch.__version__),
            "commit": subprocess.getoutput(git) or "?"}
    before = checkpoint["config"]["provenance"] if checkpoint else made
    return {name: old if old.split(", then ")[-1] == made[name] else f"{old}, then {made[name]}"
            for name, old in before.items()}


def new_parser(doc, prog=None):
    """An argument parser that shows the beginning of a docstring and the default of each option."""
    with suppress(AttributeError):  # of a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal without ε shows a question mark
    return argparse.ArgumentParser(prog, description=doc.partition("\n\n")[0],
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def between(low, high, kind=int):
    """An argparse type: a number of `kind`, int or float, from `low` to `high`; never nan."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be at least {low} and at most {high}")
        return kind(text)
    return number


POSITIVE, SEED = between(1, 2**31), between(0, 2**62)


def add_common_options(add):
    """Of all scripts that train or measure for long; `add` is a parser's add_argument."""
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda if there")
    add("--amp", default="auto", choices=("auto", "bf16", "off"), help="auto: where bf16 is fast "
        "and the encoder has batch norm")
    add("--resume", action="store_true", help="go on with what an interrupted call left")


def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--arch", default="resnet18", choices=EMBEDDING_WIDTH, help="encoder; on a CPU resnet20")
    add("--norm", default="batch", choices=NORM_LAYERS, help="what normalises a ResNet (Fig. 11)")
    add("--l2-bottleneck", default="lf/wl", choices=("lf/wl", "lf/l", "l/wl", "l/l", "f/wl", "lf/"),
        help="l: a linear map, f: output of length 1, w: rows of length 1; lf/l: the released code")
    add("--loss", default="kl", choices=LOSSES, help="kl-log-softmax: off by some %% at 1e-6 nats")
    for name, default, kind, text in (
            ("--init-eps", 0.0, between(0, math.inf, float), "0: start at the teacher, inf: apart "
             "from it; the paper's α is ε/(1+ε). 1e-10 without batch norm: 0 is a fixed point"),
            ("--dataset", "cifar10", str, f"{', '.join(DOWNLOADS)}; {', '.join(MADE)}, from the "
             "scripts in datasets/; noise; a .npz file, say of your images by datasets/folder.py"),
            ("--probe-dataset", None, str, "labelled data for the probes; None: --dataset"),
            ("--n-samples", None, POSITIVE, "images to distil on, each class in its share"),
            ("--image-size", 32, between(16, 2**31), "pixels a side, to which images are scaled"),
            ("--out-dim", 2**16, POSITIVE, "number of logits m; 1024 spares a CPU much (Fig. 10)"),
            ("--teacher", None, str, "run whose student is the teacher: a second round (Fig. 18)"),
            ("--epochs", 100, POSITIVE, "passes over the training images"),
            ("--steps", None, POSITIVE, "train for so many steps, whatever --epochs says"),
            ("--batch-size", 256, POSITIVE, "images a step"),
            ("--lr", 1e-3, between(0, math.inf, float), "of AdamW; VGG11 may want 3e-4 (README)"),
            ("--seed", 0, SEED, "of teacher, student's start and order of the data"),
            ("--log-every", None, POSITIVE, "steps between log lines; None: an epoch, at most 100"),
            ("--eval-every", None, POSITIVE, "steps between probes; None: a 25th, at least 100"),
            ("--out", None, Path, "run directory; None: runs/<dataset>-<arch>-eps<ε>-seed<seed>")):
        add(name, default=default, type=kind, help=text)
    add_common_options(add)
    args = parser.parse_args(argv)
    if (args.probe_dataset or args.dataset) == "noise":
        parser.error("noise has no labels: name labelled data with --probe-dataset, say leaves")
    if args.arch.startswith("v") and args.image_size % 32:
        parser.error("VGGs and ViTs want an --image-size that is a multiple of 32")
    if args.norm != "batch" and not args.arch.startswith("resnet"):
        parser.error("--norm is for ResNets: VGG has no norm, and a ViT has its own")
    if args.l2_bottleneck == "lf/":
        args.out_dim = 256  # the vectors are the logits
    dataset = Path(args.dataset).name.removesuffix(".npz")
    args.out = args.out or Path(f"runs/{dataset}-{args.arch}-eps{args.init_eps:g}-seed{args.seed}")
    return args


# ---- Main ----------------------------------------------------------------------------------------

def constant_student_kl(teacher, images, n=1000):
    """The KL in nats, over some n of the images, of the best student that gives them all the same
    answer: the teacher's mean softmax. Without batch norm students may get stuck there.
    """
    sample = images[::math.ceil(len(images) / n)]
    p = teacher.last_layer(teacher_vectors(teacher, sample, channel_stats(images))).softmax(1)
    return (p * (p / p.mean(0)).log()).sum(1).mean().item()


def save_run(out, config, log, state):
    """Write last.pt, and best.pt, where Fig. 9 starts, if the last linear probe is the best yet."""
    content = {name: part.state_dict() for name, part in state.items()}
    content |= {"format": "distill.py 4", "config": config, "step": log[-1]["step"], "log": log}
    probed = [row for row in log[1:] if "linear_paper" in row]
    if log[-1] is max(probed, key=lambda row: row["linear_paper"], default=None):
        save(out / "best.pt", {**content, "optimizer": None})
    save(out / "last.pt", content)


def show(row):
    """Print a row of the log: loss in nats, distance from the start, images/s, probes in %."""
    say(", ".join(f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
                  for name, value in row.items()))


def networks_at_start(args, checkpoint):
    """(teacher, student) before the first step, also where a run goes on: distances are from there.

    Of seed s their seeds are 2s and 2s + 1, so that no two seeds share a network.
    """
    settings = {name: getattr(args, name) for name in NETWORK_SETTINGS}
    teacher = random_network(2 * args.seed, **settings)
    if checkpoint:
        teacher.load_state_dict(checkpoint["teacher"])
    elif args.teacher:
        _, teacher, first_round = load_checkpoint(args.teacher)
        check_same(args.teacher, first_round, settings)
    independent = random_network(2 * args.seed + 1, **settings)
    return teacher, init_student(teacher, independent, args.init_eps)


def main(argv=None):
    args = parse_args(argv)
    with run_directory(args.out, args.resume) as checkpoint:
        run(args, checkpoint)


def run(args, checkpoint):
    from probe import evaluate  # here, because probe.py imports this file
    device = pick_device(args.device)
    args.amp = pick_amp(args.amp, device, args.arch, args.norm)

    # Data: the student sees `images` alone; labels are for the probes, and the share of classes
    data = probe_data = load_data(args.dataset, args.image_size, device, args.n_samples)
    if args.probe_dataset:
        probe_data = load_data(args.probe_dataset, args.image_size, device)
    images, _ = stratified_subset(data.train_x, data.train_y, args.n_samples)
    per_epoch = math.ceil(len(images) / args.batch_size)
    steps = args.steps or args.epochs * per_epoch
    log_every = args.log_every or min(per_epoch, 100)
    eval_every = args.eval_every or max(steps // 25, 100)
    config = to_config(args) | {
        "n_images": len(images), "total_steps": steps, "provenance": provenance(device, checkpoint),
        "data_checksum": checksum([data, probe_data])}
    if checkpoint:
        check_same(args.out, checkpoint["config"], config)
        save(args.out / "log.csv", checkpoint["log"])  # a kill may have come before it
        if checkpoint["step"] >= steps:
            return say(f"{args.out}: all {steps:,} steps are done; for more: --steps or --epochs")

    # Networks, and what trains the student
    teacher, student = (network.to(device) for network in networks_at_start(args, checkpoint))
    parameters_0 = [p.detach().clone() for p in student.parameters()]
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, weight_decay=0, fused=True)
    state = {"teacher": teacher, "student": student, "optimizer": optimizer}
    if checkpoint:
        student.load_state_dict(checkpoint["student"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    say(f"{args.arch} on {args.dataset}: {len(images):,} images, {steps:,} steps of "
        f"{args.batch_size}, m={args.out_dim:,}, ε={args.init_eps:g}, seed {args.seed}, "
        f"{device.type}, amp {args.amp} -> {args.out}")
    training = distill(teacher, student, images, optimizer, divergence=LOSSES[args.loss],
                       amp=args.amp, batch_size=args.batch_size, seed=args.seed, steps=steps,
                       first_step=checkpoint.get("step", 0))
    config["constant_student_kl"] = constant_student_kl(teacher, images)
    say(f"a constant student's KL: {config['constant_student_kl']:.2e} nats")

    if checkpoint:
        config, log = checkpoint["config"] | config, checkpoint["log"]
    else:
        config["teacher_probes"] = evaluate(teacher.encoder, probe_data)
        log = [{"step": 0, "epoch": 0.0, "loss": math.nan, "distance": 0.0, "images_per_s": 0}]
        show({"teacher": args.teacher or "random", **config["teacher_probes"]})
        log[0] |= evaluate(student.encoder, probe_data)
        save_run(args.out, config, log, state)
        save(args.out / "log.csv", log)
    save(args.out / "run.json", config)
    show(log[-1])

    losses, n_seen, clock = [], 0, time.time()
    for step, loss, n in training:
        losses.append(loss * n)  # on the device: to ask for its value would keep a GPU waiting
        n_seen += n
        probing = step == steps or step % eval_every == 0
        if not (probing or step % log_every == 0):
            continue
        moved = [(p.detach() - q).norm() for p, q in zip(student.parameters(), parameters_0)]
        row = {"step": step, "epoch": step / per_epoch,
               "loss": torch.stack(losses).double().sum().item() / n_seen,
               "distance": torch.stack(moved).norm().item(),
               "images_per_s": n_seen / (time.time() - clock)}
        if not math.isfinite(row["loss"] + row["distance"]):
            raise Problem(f"the loss is no longer finite by step {step}: lower --lr or set --amp "
                          f"off; what {args.out} held is kept")
        log.append(row)
        if probing:
            row |= evaluate(student.encoder, probe_data, seeds=[step])  # each time another draw
            save_run(args.out, config, log, state)
        save(args.out / "log.csv", log)
        show(row)
        losses, n_seen, clock = [], 0, time.time()


if __name__ == "__main__":
    main()
