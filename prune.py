#!/usr/bin/env python3
"""Are there lottery tickets? Iterative magnitude pruning with rewinding, from a distilled student
(Fig. 8).

    run=runs/cifar10-resnet18-eps0-seed0
    python prune.py $run                                     the student, rewound to its own weights
    python prune.py $run --init teacher --rewind-epoch 2     its teacher's random weights
    python prune.py $run --control random                    as many per layer, drawn by lot
    python prune.py plot runs/cifar10-resnet18-eps0-seed*    all curves of these runs

Round 0 trains with labels. Each later round prunes the smallest 20 % of the remaining weights, puts
the survivors back where they were at the rewinding point, and trains again. A *ticket* is a mask
under which that training does well (Frankle & Carbin 2019). From random weights, larger networks
have to be rewound to a point some epochs into the training (Frankle et al. 2020); the paper finds
that a distilled student is such a point already.
"""
import copy
import csv
import itertools
import json
import math
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distill import (
    EMBEDDING_WIDTH, MAY_CHANGE, POSITIVE, SEED, Problem, add_common_options, between,
    channel_stats, check_same, checksum, embed, load_checkpoint, load_data, new_parser, normalise,
    pick_amp, pick_device, progress, provenance, run_directory, run_folder, save, say,
    stratified_subset, to_config, train)


# ---- Training with labels, here and in landscape.py ----------------------------------------------

def new_classifier(encoder, width, n_classes, seed, lr):
    """(network, optimizer) for `fine_tune`: the `encoder`, to be trained, of that embedding width,
    and a linear head, whose weights the seed fixes; and SGD as the paper has it.
    """
    torch.manual_seed(seed)
    head = nn.Linear(width, n_classes).to(next(encoder.parameters()).device)
    network = nn.Sequential(OrderedDict(encoder=encoder.requires_grad_(True), head=head)).train()
    return network, torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)


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


def fine_tune(network, optimizer, images, labels, args, order_seed, first_step=0):
    """`train` a classifier for args.epochs epochs with labels, flips and crops.

    The learning rate args.lr falls tenfold at half and at three quarters of the steps (epochs 80
    and 120 of 160). It reads epochs, batch_size, lr, amp and seed of args; the crops follow
    args.seed, the order of the data `order_seed`.
    """
    stats, steps = channel_stats(images), args.epochs * math.ceil(len(images) / args.batch_size)
    counter = itertools.count(first_step)

    def batch_loss(index):
        crops = augment(images[index], args.seed, next(counter))
        return F.cross_entropy(classify(network, crops, stats, args.amp), labels[index])

    def learning_rate(step):
        return args.lr * 0.1 ** sum(step >= round(milestone * steps) for milestone in (0.5, 0.75))

    return train(batch_loss, len(images), optimizer, steps=steps, batch_size=args.batch_size,
                 seed=order_seed, learning_rate=learning_rate, first_step=first_step)


@torch.no_grad()
def classification_accuracy(network, images, labels, stats, amp):
    """Share of uint8 images (n, 3, s, s) classified right, in %; eval mode, then train mode."""
    network.eval()
    predicted = torch.cat([classify(network, x, stats, amp).argmax(1) for x in images.split(500)])
    network.train()
    return 100 * (predicted == labels).double().mean().item()


def add_fine_tuning_options(add):
    """The options of supervised training, as the paper has it for Fig. 8."""
    add("--epochs", default=160, type=POSITIVE, help="of a training; the learning rate falls "
        "tenfold at 1/2 and 3/4 of them")
    add("--lr", type=between(0, math.inf, float), help="SGD's first learning rate, momentum 0.9, "
        "weight decay 1e-4; None: 0.1, for resnet20 0.05")
    add("--batch-size", default=256, type=POSITIVE, help="images a step")
    add("--dataset", help="labelled data to train on; None: the one the run was probed on")
    add("--n-samples", type=POSITIVE, help="training images, each class in its share; None: all")
    add("--seed", type=SEED, help="of classifier, data order, crops, random masks; None: the run's")
    add_common_options(add)


def fill_in(args, device, distilled):
    """Replace None and auto in fine-tuning's options by what fits the run of config `distilled`."""
    args.dataset = args.dataset or distilled["probe_dataset"] or distilled["dataset"]
    args.seed = distilled["seed"] if args.seed is None else args.seed
    if args.lr is None:
        args.lr = 0.05 if distilled["arch"] == "resnet20" else 0.1
    args.amp = pick_amp(args.amp, device, distilled["arch"], distilled["norm"])


# ---- Masks ---------------------------------------------------------------------------------------
# A mask is a plain dict {parameter name: bool tensor of its shape}, applied after every step.
# torch.nn.utils.prune would do, but it replaces each weight by a product weight_orig · weight_mask:
# the optimiser then moves weight_orig, where a pruned weight lives on out of sight, and the state
# dict no longer fits the encoder. Here the network stays as it is.

def prunable(network, everything=False):
    """{name: parameter} of what may be pruned: weights of convolutions and of linear layers, the
    classifier's too, or all parameters, as the released code does.
    """
    return {name: p for name, p in network.named_parameters() if everything or p.dim() in (2, 4)}


@torch.no_grad()
def magnitude_mask(weights, mask, keep):
    """A new mask: the `keep` largest |weights| that `mask` has left, over all layers together."""
    magnitude = torch.cat([w.abs().masked_fill(~mask[name], -1).flatten()
                           for name, w in weights.items()])
    survives = torch.zeros_like(magnitude, dtype=torch.bool)
    # by rank, not by threshold: ties add none
    survives[magnitude.argsort(descending=True, stable=True)[:keep]] = True
    layers = survives.split([w.numel() for w in weights.values()])
    return {name: layer.view_as(w) for (name, w), layer in zip(weights.items(), layers)}


def random_mask(mask, by_magnitude, seed):
    """The control: in each layer as many survivors as the mask `by_magnitude` has, drawn by lot
    from those that `mask` has left. (Magnitudes are those of the control's own weights.)
    """
    rng, result = np.random.default_rng(seed), {}
    for name, m in by_magnitude.items():
        scores = {name: torch.from_numpy(rng.random(m.shape)).to(m.device)}
        result |= magnitude_mask(scores, {name: mask[name]}, m.sum())
    return result


@torch.no_grad()
def apply_mask(weights, mask):
    """Set what is pruned to 0, in place."""
    for name, m in mask.items():
        weights[name].masked_fill_(~m, 0)


# ---- Main: train, prune, rewind ------------------------------------------------------------------

def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run of distill.py; or plot, which has a --help of its own")
    add("--init", default="student", choices=("student", "teacher"), help="start at the distilled "
        "student or at its teacher's random weights (the paper's random init)")
    add("--rewind-epoch", default=0, type=between(0, 2**31), metavar="ℓ", help="rewind to the end "
        "of this epoch of the first training; 0 is the very start")
    add("--control", choices=("random",), help="random: prune by lot, in each layer as many "
        "weights as their magnitudes would have it")
    add("--prune-all", action="store_true", help="prune biases and norms too, as the released code "
        "does")
    add("--rounds", default=24, type=between(0, 1000), help="number of prunings, each with a "
        "training; 24 leave 0.5 %%")
    add("--rate", default=0.2, type=between(1e-9, 0.999, float), help="share of the remaining "
        "weights that a round prunes; larger is quicker and rougher")
    add("--out", type=Path, help="directory of the curve; None: <run>/prune-<init>-rewind<ℓ>, with "
        "-all and -control")
    add_fine_tuning_options(add)
    args = parser.parse_args(argv)
    if args.rewind_epoch >= args.epochs:
        parser.error(f"--rewind-epoch {args.rewind_epoch} is too late: it must be less than "
                     f"--epochs {args.epochs}")
    name = f"prune-{args.init}-rewind{args.rewind_epoch}"
    name += "-all" * args.prune_all + "-control" * bool(args.control)
    args.out = args.out or run_folder(args.run) / name
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plot"]:
        return plot(argv[1:])
    args = parse_args(argv)
    teacher, student, distilled = load_checkpoint(args.run)
    with run_directory(args.out, args.resume, "prune.py") as checkpoint:
        prune(args, (student if args.init == "student" else teacher).encoder, distilled, checkpoint)


def prune(args, encoder, distilled, checkpoint):
    """Train the encoder, prune it, rewind it, and train it again, round by round."""
    device = pick_device(args.device)
    fill_in(args, device, distilled)
    data = load_data(args.dataset, distilled["image_size"], device)
    if len(data.test_y) == 0:
        raise Problem(f"{args.dataset} has no labels to train on: name a labelled data set with "
                      "--dataset")
    images, labels = stratified_subset(data.train_x, data.train_y, args.n_samples)
    config = to_config(args) | {
        "n_images": len(labels), "data_checksum": checksum(data), "distilled": distilled,
        "provenance": provenance(device, checkpoint)}
    if checkpoint:
        check_same(args.out, checkpoint["config"], config, MAY_CHANGE - {"epochs"} | {"rounds"})

    stats, per_epoch = channel_stats(images), math.ceil(len(labels) / args.batch_size)
    network, optimizer = new_classifier(encoder.to(device), EMBEDDING_WIDTH[distilled["arch"]],
                                        len(data.classes), args.seed, args.lr)
    weights = prunable(network, args.prune_all)
    total = sum(w.numel() for w in weights.values())
    if total * (1 - args.rate) ** args.rounds < 1:
        raise Problem(f"--rounds {args.rounds} at --rate {args.rate} would prune the last weight: "
                      "take fewer")
    mask = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    rewinding_point, log = None, []
    if checkpoint:
        network.load_state_dict(checkpoint["network"])
        mask = {name: m.to(device) for name, m in checkpoint["mask"].items()}
        rewinding_point, log = checkpoint["rewinding_point"], checkpoint["log"]
        save(args.out / "log.csv", log)  # a kill may have come before it

    def snapshot(step):
        """A copy of everything that a step changes, and the number of steps made."""
        return copy.deepcopy({"network": network.state_dict(), "optimizer": optimizer.state_dict(),
                              "step": step})

    def show(row):
        say(f"{row['round']:5d}{row['weights_left']:18.2f}{row['best_accuracy']:18.2f}"
            f"{row['final_accuracy']:18.2f}{row['seconds']:18.2f}")

    say(f"{distilled['arch']} from the {args.init}'s weights of {args.run}{progress(distilled)} on "
        f"{args.dataset}: {len(labels):,} images, {args.epochs * per_epoch:,} steps of "
        f"{args.batch_size} a round, {total:,} weights to prune, seed {args.seed}, "
        f"{device.type}, amp {args.amp} -> {args.out}")
    say(f"round{'weights left (%)':>18}{'best epoch (%)':>18}{'last epoch (%)':>18}"
        f"{'seconds':>18}")
    for row in log:
        show(row)
    for round_number in range(len(log), args.rounds + 1):
        left = round(total * (1 - args.rate) ** round_number)
        if round_number == 0:
            rewinding_point = snapshot(0)
        else:  # prune, and rewind: weights, optimiser, schedule, order of the data and crops
            smaller = magnitude_mask(weights, mask, left)
            mask = (random_mask(mask, smaller, (args.seed, round_number)) if args.control
                    else smaller)
            network.load_state_dict(rewinding_point["network"])
            # a copy: an optimiser keeps, and changes, what it is given
            optimizer.load_state_dict(copy.deepcopy(rewinding_point["optimizer"]))
            apply_mask(weights, mask)
        accuracies, clock = [], time.time()
        for step, *_ in fine_tune(network, optimizer, images, labels, args, args.seed,
                                  rewinding_point["step"]):
            apply_mask(weights, mask)
            if step % per_epoch == 0:
                accuracies.append(classification_accuracy(network, data.test_x, data.test_y, stats,
                                                          args.amp))
            if round_number == 0 and step == args.rewind_epoch * per_epoch:
                rewinding_point = snapshot(step)
        if not all(w.isfinite().all() for w in weights.values()):
            raise Problem(f"weights are not finite after round {round_number}: lower --lr or set "
                          f"--amp off; what {args.out} held is kept")
        # accuracies in % of the test images; the paper has the best over all epochs' ends
        log.append({"round": round_number, "weights_left": 100 * left / total,
                    "best_accuracy": max(accuracies), "final_accuracy": accuracies[-1],
                    "seconds": time.time() - clock})
        save(args.out / "last.pt", {"format": "prune.py 4", "config": config, "log": log,
                                    "network": network.state_dict(), "mask": mask,
                                    "rewinding_point": rewinding_point})
        save(args.out / "config.json", config)
        save(args.out / "log.csv", log)
        show(log[-1])
    say(f"{args.out}: all {args.rounds} rounds are done")


# ---- The curves and their picture, from config.json and log.csv alone ----------------------------

def read_curve(folder):
    """(what was pruned in words, network and data in words, {weights left in %: best accuracy in
    %}) of a directory of prune.py. Raises Problem.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        with open(folder / "log.csv", newline="") as file:
            curve = {float(row["weights_left"]): float(row["best_accuracy"])
                     for row in csv.DictReader(file)}
        ends = f", {len(curve) - 1} of {config['rounds']} rounds" * (len(curve) <= config["rounds"])
        return (f"{config['init']}, ℓ = {config['rewind_epoch']}, {config['epochs']} epochs"
                + ", all parameters" * config["prune_all"]
                + ", random masks" * bool(config["control"]) + ends,
                f"{config['distilled']['arch']}, {config['n_images']:,} images of "
                f"{Path(config['dataset']).name}", curve)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Problem(f"{folder} holds no readable curve ({error!r}): leave it out, or prune "
                      "again") from None


def plot(argv):
    """Print and draw Fig. 8: test accuracy of the best epoch over weights left, a line a curve."""
    parser = new_parser(plot.__doc__, "prune.py plot")
    parser.add_argument("runs", nargs="+", type=Path,
                        help="directories of prune.py, or of distill.py with such inside")
    parser.add_argument("--figure", type=Path, help=".png, .pdf or .svg; None: tickets.png in the "
                        "first of them")
    args = parser.parse_args(argv)
    folders = []
    for path in args.runs:
        inside = [path] if (path / "config.json").exists() else [
            config.parent for config in sorted(path.glob("*/config.json"))]
        if not inside:
            raise Problem(f"no pruning curve in {path}: let prune.py finish a round, or name the "
                          "directory of a curve")
        folders += inside
    kinds, titles, curves = zip(*map(read_curve, folders))
    if len(set(titles)) > 1:
        kinds = [*map("; ".join, zip(kinds, titles))]

    say("best epoch's test accuracy in %")
    for i, (folder, kind) in enumerate(zip(folders, kinds), 1):
        say(f"  [{i}] {kind} ({folder})")
    say("weights left (%)" + "".join(f"{f'[{i}]':>10}" for i in range(1, len(curves) + 1)))
    levels = sorted(set().union(*curves), reverse=True)
    for left in levels:
        say(f"{left:16.2f}" + "".join(f"{curve[left]:10.2f}" if left in curve else f"{'':10}"
                                      for curve in curves))

    from matplotlib import pyplot  # here, so that the numbers come out without it
    figure, axis = pyplot.subplots(figsize=(7, 4.6), layout="constrained")
    order = sorted(set(kinds))
    for kind, curve in zip(kinds, curves):
        i = order.index(kind)  # repeats look alike
        axis.plot(*zip(*curve.items()), label=kind, marker="osD^vP*X"[i % 8], color=f"C{i}",
                  linestyle="--" if "random" in kind else "-")
        if len(curve) == 1:  # no pruning: for comparison
            axis.axhline(*curve.values(), color=f"C{i}", linestyle=":")
    ticks = levels[::math.ceil(len(levels) / 9)]  # with 100 %
    axis.set(xscale="log", xlabel="weights left (%)", ylabel="test accuracy, best epoch (%)",
             title=titles[0])
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.invert_xaxis()
    one_of_each = dict(zip(*reversed(axis.get_legend_handles_labels())))  # {label: line}
    figure.legend(one_of_each.values(), one_of_each, loc="outside lower center", ncols=2)
    picture = args.figure or args.runs[0] / "tickets.png"
    save(picture, lambda temporary: figure.savefig(temporary, dpi=150))
    say(f"the picture: {picture}")


if __name__ == "__main__":
    main()
