#!/usr/bin/env python3
"""How good are the features? Linear and k-NN probes of raw pixels, teacher and student.

    python probe.py runs/cifar10-resnet18-eps0-seed0              one run, on the data of that run
    python probe.py runs/*-resnet18-eps0-seed*                    several seeds: mean ± std
    python probe.py runs/tiny-run/best.pt --dataset cifar10       transfer (Tables 2 and 4)
    python probe.py --teacher vgg11 resnet18 --dataset cifar10    random teachers, no run needed

Three probes, because they disagree, and the disagreement teaches something (README): the paper's
ten-epoch linear probe, the same linear probe standardised and trained to convergence, and k nearest
neighbours.
"""
import itertools
import math
import re
import statistics
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import stack_module_state
from torch.optim.swa_utils import update_bn

from distill import (
    DOWNLOADS, EMBEDDING_WIDTH, MADE, MAY_CHANGE, SEED, Problem, between, channel_stats, check_same,
    embed, init_student, load_checkpoint, load_data, new_parser, normalise, pick_device, progress,
    provenance, random_network, read_checkpoint, run_folder, save, say)

PROBES = {"linear_paper": "linear (paper)", "linear_converged": "linear (converged)", "knn": "k-NN"}


# ---- The probes ----------------------------------------------------------------------------------

def accuracy(logits, labels):
    """% of the n rows of logits (..., n, classes) whose argmax is their label (n,), as (...)."""
    return 100 * (logits.argmax(-1) == labels).double().mean(-1)


def linear_probe(x, y, test_x, test_y, n_classes, seeds=(0,)):
    """The paper's linear probe (App. E): test accuracy in % after ten epochs of AdamW at torch's
    defaults, (D,).

    `x` and `test_x` are features (n, r) float32, not standardised, `y` and `test_y` labels (n,).
    Each of the D `seeds` is a draw of the head's initial weights and of one shuffle, so of the
    batches of 256, which are the same in every epoch. The D heads train side by side: a step of one
    is so small that a processor spends it waiting.
    """
    heads, orders = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        heads.append(nn.Linear(x.shape[1], n_classes).to(x.device))  # torch's initialisation
        orders.append(torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)))
    weight, bias = stack_module_state(heads)[0].values()  # (D, classes, r) and (D, classes)
    optimizer = torch.optim.AdamW([weight, bias], fused=True)
    for index in torch.stack(orders).to(x.device).split(256, dim=1) * 10:  # (D, 256), ten epochs
        optimizer.zero_grad()
        logits = torch.baddbmm(bias[..., None], weight, x[index].mT)  # (D, classes, 256)
        # each head's mean, summed
        loss = F.cross_entropy(logits, y[index], reduction="sum") / index.shape[1]
        loss.backward()
        optimizer.step()
    return accuracy(test_x @ weight.detach().mT + bias.detach()[:, None], test_y)


def standardised(x, test_x):
    """Both (n, r) with mean 0 and variance 1 in each feature of `x`, the training part. A feature
    that does not vary there, but for rounding, is 0 in both: no test image may count by it.
    """
    std = x.std(0)
    std[std <= 1e-6 * x.abs().amax(0)] = math.inf
    return ((part - x.mean(0)) / std for part in (x, test_x))


@torch.no_grad()
def linear_probe_converged(x, y, test_x, test_y, n_classes, l2=1e-3, tolerance=1e-5, max_iter=5000):
    """Test accuracy in % of logistic regression on standardised features, run until no gradient
    exceeds `tolerance`.

    It minimises mean cross-entropy + l2/2·‖weight‖², shapes as above. Every step minimises a
    quadratic upper bound of that loss (Böhning 1992) from `ahead`, where Nesterov's momentum leads
    (it starts afresh where it points uphill): a few dozen steps, however the features are scaled
    and correlated. Raises Problem if it does not converge.
    """
    # 1: for the bias
    x, test_x = (F.pad(part, (0, 1), value=1.0) for part in standardised(x, test_x))
    decay = torch.full((x.shape[1], 1), l2, device=x.device)
    decay[-1] = 0  # the bias is free
    bound = (x.T @ x).double() / (2 * len(y))
    diagonal = bound.diagonal()
    # a view of `bound`: l2, and a little more for what float32 rounded off
    diagonal += decay[:, 0] + 1e-6 * diagonal.sum()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(bound)).float()
    target = F.one_hot(y, n_classes)
    weight = ahead = torch.zeros(x.shape[1], n_classes, device=x.device)
    age = 0  # of the momentum, in steps
    for _ in range(max_iter):
        residual = (x @ ahead).softmax(1) - target
        gradient = (residual.T @ x).T / len(y) + decay * ahead  # x.T @ residual: 5 times as long
        if gradient.abs().max() < tolerance:
            return accuracy(test_x @ ahead, test_y).item()
        last, weight = weight, ahead - (gradient.T @ inverse).T
        age = 0 if ((weight - last) * gradient).sum() > 0 else age + 1
        ahead = weight + age / (age + 3) * (weight - last)
    raise Problem(f"the converged linear probe did not converge (largest gradient entry "
                  f"{gradient.abs().max():.1e})")


@torch.no_grad()
def knn_probe(x, y, test_x, test_y, n_classes, k=20):
    """Test accuracy in % of the majority of the k nearest neighbours: features (n, r) as they are,
    Euclidean, ties to the lowest label.
    """
    centre = x.mean(0)  # distances do not change, but their float32 rounding shrinks
    x, votes = x - centre, []
    for query in (test_x - centre).split(500):
        squared = x.square().sum(1) - 2 * query @ x.T  # + |query|², the same for all neighbours
        nearest = y[squared.topk(min(k, len(x)), largest=False).indices]
        votes.append(F.one_hot(nearest, n_classes).sum(1))
    return accuracy(torch.cat(votes), test_y).item()  # argmax takes the first of equals


@torch.no_grad()
def extract_features(encoder, images, stats, amp="off"):
    """uint8 images (n, 3, s, s) -> float32 embeddings (n, r), by `encoder` in eval mode. Raises
    Problem if not finite.
    """
    # a CPU is faster with less at once (ResNet20: 1.5 times), to the same bits
    batch_size = 500 if images.is_cuda else 100
    was_training = encoder.training
    encoder.eval()
    features = torch.cat([embed(encoder, normalise(batch, stats), amp)
                          for batch in images.split(batch_size)])
    encoder.train(was_training)
    if not features.isfinite().all():
        raise Problem("the encoder's features are not finite: its training diverged; distil again "
                      "with a lower --lr")
    return features


@torch.no_grad()
def calibrated(encoder, images, stats, n=5000):
    """A copy of `encoder` whose batch norms use the mean and variance of n training images.

    A control. The student is probed with statistics of its training, its random teacher with mean 0
    and variance 1: is that all the difference?
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]
    encoder, batches = deepcopy(encoder), images[order].tensor_split(math.ceil(len(order) / 500))
    update_bn((normalise(x, stats) for x in batches), encoder)  # of one size: all count alike
    return encoder


def evaluate(encoder, data, seeds=(0,), amp="off"):
    """All probes of `encoder` on `data`, in %: {"linear_paper", "linear_converged", "knn"}.

    The paper's probe draws its initial weights and order of images from each of `seeds`. Several
    draws give, in place of "linear_paper", its "_mean", "_std" and "_max", the luckiest. Images are
    normalised by the mean and standard deviation of `data`'s own training part.
    """
    stats, n_classes = channel_stats(data.train_x), len(data.classes)
    x, test_x = (extract_features(encoder, images, stats, amp)
                 for images in (data.train_x, data.test_x))
    parts = x, data.train_y, test_x, data.test_y, n_classes
    # 25 at once: more leave a processor's cache
    draws = torch.cat([linear_probe(*parts, seeds[i:i + 25]) for i in range(0, len(seeds), 25)])
    paper = {"linear_paper": draws[0].item()} if len(seeds) == 1 else {
        "linear_paper_mean": draws.mean().item(), "linear_paper_std": draws.std().item(),
        "linear_paper_max": draws.max().item()}
    return {**paper, "linear_converged": linear_probe_converged(*parts), "knn": knn_probe(*parts)}


# ---- The table and the picture -------------------------------------------------------------------

COLUMNS = {"linear_paper_mean": "linear (paper)", "linear_paper_max": "(its luckiest draw)",
           "linear_converged": "linear (converged)", "knn": "k-NN (k=20)"}


def mean_std(values):
    """12.34 ± 0.56 as text, without the deviation for a single value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def check_repeats(configs):
    """Raise Problem unless the runs {path: config} repeat one experiment, so that one may average
    them: all settings agree but the seed, also that in a path, and no seed comes twice.
    """
    def settings(config):
        return {name: settings(value) if isinstance(value, dict) else
                re.sub(r"seed\d+", "", str(value)) for name, value in config.items()}

    ignored = MAY_CHANGE - {"total_steps"} | {"seed", "step", "teacher_probes",
                                              "constant_student_kl"}
    seeds, first = {}, next(iter(configs), None)
    for path, config in configs.items():
        check_same(path, settings(config), settings(configs[first]), ignored)
        if seeds.setdefault(config["seed"], path) != path:
            raise Problem(f"{seeds[config['seed']]} and {path} have the same seed: leave one out")


def print_table(rows, probes, draws):
    """Print {label: {name: {"teacher" or "start": the name of what it is compared with}}}, a row
    each and one for each comparison, as mean ± std over seeds; `probes` has those of every name.
    """
    def line(label, cells):
        say(f"{label:34}" + "".join(f"{cell:>22}" for cell in cells))

    say()
    line("accuracy in %", COLUMNS.values())
    for label, row in rows.items():
        seeds = f" ({len(row)} seeds)" if len(row) > 1 else ""
        line(label + seeds, [mean_std([probes[name][key] for name in row]) for key in COLUMNS])
        for reference in next(iter(row.values())):
            gains = [statistics.mean(probes[name][key] - probes[others[reference]][key]
                                     for name, others in row.items()) for key in COLUMNS]
            line(f"  gain over its {reference}", [f"{gain:+.2f}" for gain in gains])
    say(f"linear (paper) is the mean of {draws} draws of its initial weights and order of images; "
        "the paper's tables\nshow the luckiest of 100 to 150: hold that column beside them. "
        "±: between seeds")


def plot_probes(path, runs, baselines):
    """Accuracy of every probe over training steps, from each checkpoint's log, and `baselines`
    {label: probes} as horizontal lines.
    """
    from matplotlib import pyplot  # here, so that all numbers come out without it
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.8), sharex=True, layout="constrained")
    for axis, (probe, title) in zip(axes, PROBES.items()):
        for run, marker in zip(runs, "os^Dvx" * len(runs)):
            rows = [row for row in read_checkpoint(run)["log"] if probe in row]
            axis.plot([row["step"] for row in rows], [row[probe] for row in rows], marker=marker,
                      label=f"student {run.absolute().name}")
        for (label, probes), style in zip(baselines.items(), ("dotted", "solid")):
            level = probes.get(probe, probes["linear_paper_mean"])
            axis.axhline(level, color="black", linestyle=style, linewidth=1, label=label)
        axis.set(title=title, xlabel="distillation step", ylabel="test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save(path, lambda temporary: figure.savefig(temporary, dpi=150))
    say(f"the picture: {path}")


# ---- Main ----------------------------------------------------------------------------------------

def label_of(path, config):
    """The name of a run without its seed, and which of its students the checkpoint `path` holds."""
    which = ", best probe" if path.name == "best.pt" else progress(config)
    return re.sub("-?seed[0-9]+$", "", run_folder(path).absolute().name) + which


def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run directories of distill.py, or checkpoint files")
    add("--teacher", nargs="+", choices=EMBEDDING_WIDTH, metavar="ARCH", help="probe random "
        f"teachers of these kinds, without a run: {', '.join(EMBEDDING_WIDTH)}")
    add("--seeds", nargs="+", default=[0], type=SEED, metavar="SEED", help="of the random "
        "teachers: those of distill.py's runs with the same --seed")
    add("--dataset", help=f"data to probe on: {', '.join(DOWNLOADS + MADE)}, a .npz file or a "
        "folder of images; None: what the runs used")
    add("--draws", default=10, type=between(2, 1000), help="of the paper's linear probe, each with "
        "initial weights and an order of the images of its own")
    add("--json", type=Path, help="also write every accuracy to this file")
    add("--figure", type=Path, help="also draw accuracy over steps: .png, .pdf or .svg")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda if there")
    add("--amp", default="off", choices=("bf16", "off"), help="16-bit encoder")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.teacher) or args.teacher and not args.dataset:
        parser.error("name one or more run directories, or --teacher ARCH --dataset DATA")
    if args.figure and (args.dataset or not args.runs):
        parser.error("--figure draws the logs of runs: name some, and no other --dataset")
    if args.json and (args.json.suffix != ".json" or args.json.exists()):
        parser.error("--json wants a name that ends in .json, of a file that is not there yet")
    return args


def encoders_of(args, runs, image_size, data):
    """Yield (label, name, encoder, {"teacher" or "start": the name of what it is compared with}) of
    all to be probed. What has one label differs in its seed alone, and shares a row.
    """
    def controls(label, name, encoder):
        """A random teacher, and the same with calibrated batch norm, if it has any."""
        yield label, name, encoder, {}
        if any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()):
            twin = calibrated(encoder.to(data.train_x.device), data.train_x,
                              channel_stats(data.train_x))
            yield f"{label}, calibrated", f"{name}, calibrated", twin, {"teacher": name}

    yield "raw pixels", "raw pixels", nn.Flatten(), {}
    for arch, seed in itertools.product(args.teacher or (), args.seeds):
        encoder = random_network(2 * seed, arch, 1, image_size).encoder
        yield from controls(f"teacher {arch}", f"teacher {arch} seed {seed}", encoder)
    teachers = {}  # runs may share one: it is probed once
    for path, (teacher, student, config) in runs.items():
        label = label_of(path, config)
        norm = f" {config['norm']} norm" * (config["norm"] != "batch")
        kind = f"teacher of {label}" if config["teacher"] else f"teacher {config['arch']}{norm}"
        name = teachers.setdefault((kind, config["seed"]), f"teacher of {path}")
        if name == f"teacher of {path}":
            yield from controls(kind, name, teacher.encoder)
        compared_with = {"teacher": name}
        if float(config["init_eps"]) > 0:
            start = random_network(2 * config["seed"] + 1, config["arch"], config["out_dim"],
                                   config["image_size"], config["norm"], config["l2_bottleneck"])
            init_student(teacher, start, float(config["init_eps"]))
            yield f"start of {label}", f"start of {path}", start.encoder, compared_with
            compared_with = compared_with | {"start": f"start of {path}"}
        yield f"student {label}", f"student {path}", student.encoder, compared_with


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    runs = {path: load_checkpoint(path) for path in args.runs}
    configs = {path: config for path, (*_, config) in runs.items()}
    groups = {}
    for path, config in configs.items():
        groups.setdefault(label_of(path, config), {})[path] = config
    for group in groups.values():
        check_repeats(group)

    # The data that they have in common
    wanted = {(args.dataset or config["probe_dataset"] or config["dataset"], config["image_size"])
              for config in configs.values()} or {(args.dataset, 32)}
    if len(wanted) > 1:
        raise Problem(f"these runs use data of different kinds or sizes, {wanted}: probe them "
                      "apart, or name one kind with --dataset")
    dataset, image_size = wanted.pop()
    data = load_data(dataset, image_size, device=device)
    if len(data.test_y) == 0:
        raise Problem(f"{dataset} has no labels to probe: name a labelled data set with --dataset")
    measured_on = {"dataset": dataset, "image_size": image_size, "train_images": len(data.train_y),
                   "test_images": len(data.test_y), "amp": args.amp, "draws": args.draws,
                   "provenance": provenance(device)}
    say(f"{dataset}: {len(data.train_y):,} training and {len(data.test_y):,} test images, "
        f"{len(data.classes)} classes, {device.type}")

    probes, rows = {}, {}
    for label, name, encoder, compared_with in encoders_of(args, runs, image_size, data):
        probes[name] = evaluate(encoder.to(device), data, range(args.draws), args.amp) | measured_on
        rows.setdefault(label, {})[name] = compared_with
        say(f"  {name}: " + ", ".join(f"{title} {probes[name][column]:.2f}"
                                      for column, title in COLUMNS.items()))
    print_table(rows, probes, args.draws)
    if args.json:
        save(args.json, probes)
    if args.figure:
        plot_probes(args.figure, runs, {"raw pixels": probes["raw pixels"],
                                        "random teacher": probes[f"teacher of {args.runs[0]}"]})


if __name__ == "__main__":
    main()
