#!/usr/bin/env python3
"""How good are the features? Linear and k-NN probes of raw pixels, teacher and student.

    python probe.py runs/cifar10-resnet18-eps0-seed0              one run, on the data of that run
    python probe.py runs/*-resnet18-eps0-seed*                    several seeds: mean ± std
    python probe.py runs/imagenet-folder-run --dataset cifar10    transfer (Tables 2 and 4)
    python probe.py --teacher vgg11 resnet18 --dataset cifar10    random teachers, no run needed

Three probes, because they disagree, and the disagreement teaches something (README): the paper's
ten-epoch linear probe, the same linear probe standardised and trained to convergence, and k nearest
neighbours.
"""
import csv
import itertools
import re
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distill import (
    ARCHS, DATASETS, MAY_CHANGE, PROBES, SEED, Problem, add_common_options, channel_stats, embed,
    fingerprint, load_checkpoint, load_data, make_parser, new_figure, normalise, pick_device,
    picture, progress, provenance, random_network, read_json, run_cli, save_figure, say,
    write_json)


# ---- The probes ----------------------------------------------------------------------------------
# Linear probes take features with a leading dimension P, say for P networks: each gets a head of
# its own, and the heads train side by side. A step of one is so small that a processor spends it
# waiting; P steps take hardly longer than one.

def accuracy(logits, labels):
    """Share of logits (..., n, classes) whose largest is that of the labels (n,), in % (...)."""
    return 100 * (logits.argmax(-1) == labels).double().mean(-1)


def linear_probe_paper(x, y, test_x, test_y, n_classes, seed=0, epochs=10):
    """The paper's linear probe (App. E): test accuracy in % after each epoch of AdamW at torch's
    defaults, (epochs, P).

    `x` and `test_x` are features (P, n, r) float32, not standardised, `y` and `test_y` labels (n,).
    One shuffle, then the same batches of 256 in every epoch. All P heads start alike.
    """
    torch.manual_seed(seed)
    head = nn.Linear(x.shape[2], n_classes)  # torch's default initialisation
    weight, bias = (p.detach().T.repeat(len(x), 1, 1).to(x.device).requires_grad_()
                    for p in (head.weight, head.bias[:, None]))
    optimizer = torch.optim.AdamW([weight, bias], fused=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(x.device)
    batches = list(zip(x[:, order].split(256, dim=1), y[order].split(256)))
    accuracies = []
    for epoch in range(epochs):
        for features, labels in batches:
            optimizer.zero_grad()
            logits = torch.baddbmm(bias, features, weight).flatten(0, 1)
            # each head's mean, summed
            loss = F.cross_entropy(logits, labels.repeat(len(x)), reduction="sum") / len(labels)
            loss.backward()
            optimizer.step()
        accuracies.append(accuracy(torch.baddbmm(bias, test_x, weight), test_y))
    return torch.stack(accuracies)


@torch.no_grad()
def linear_probe_converged(x, y, test_x, test_y, n_classes, l2=1e-3, tolerance=1e-5, max_iter=5000):
    """Test accuracy (P,) in % of logistic regression on standardised features, run until no
    gradient exceeds `tolerance`.

    It minimises mean cross-entropy + l2/2·‖weight‖², shapes as above. Every step minimises a
    quadratic upper bound of that loss (Böhning 1992), with Nesterov's momentum, restarted where it
    points uphill: a few dozen steps, however the features are scaled and correlated. Raises Problem
    if it does not converge.
    """
    # what never varies stays 0
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp(min=1e-8)
    # 1: for the bias
    x, test_x = (F.pad((features - mean) / std, (0, 1), value=1.0) for features in (x, test_x))
    decay = torch.full((x.shape[2], 1), l2, device=x.device)
    decay[-1] = 0  # the bias is free
    bound = (x.mT @ x).double() / (2 * len(y))
    diagonal = bound.diagonal(dim1=1, dim2=2)
    # a little more, for what float32 rounded off
    diagonal += decay[:, 0] + 1e-6 * diagonal.sum(1, keepdim=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(bound)).float()
    target = F.one_hot(y, n_classes)
    weight = ahead = torch.zeros(len(x), x.shape[2], n_classes, device=x.device)
    age = torch.zeros(len(x), 1, 1, device=x.device)  # of the momentum, in steps
    for _ in range(max_iter):
        error = (x @ ahead).softmax(2) - target
        gradient = (error.mT @ x).mT / len(y) + decay * ahead  # x.mT @ error takes 5 times as long
        if gradient.abs().max() < tolerance:
            return accuracy(test_x @ ahead, test_y)
        last, weight = weight, ahead - (gradient.mT @ inverse).mT
        uphill = ((weight - last) * gradient).sum((1, 2), keepdim=True) > 0
        age = torch.where(uphill, 0, age + 1)
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


def evaluate(encoder, data, amp="off"):
    """All probes of `encoder` on `data`, in %: {"linear_paper", "linear_paper_last",
    "linear_converged", "knn"}.

    linear_paper is the best of its ten epochs. Images are normalised by the mean and standard
    deviation of `data`'s own training part.
    """
    stats, n_classes = channel_stats(data.train_x), len(data.classes)
    x, test_x = (extract_features(encoder, images, stats, amp)
                 for images in (data.train_x, data.test_x))
    heads = x[None], data.train_y, test_x[None], data.test_y, n_classes
    by_epoch = linear_probe_paper(*heads)
    return {"linear_paper": by_epoch.max().item(), "linear_paper_last": by_epoch[-1].item(),
            "linear_converged": linear_probe_converged(*heads).item(),
            "knn": knn_probe(x, data.train_y, test_x, data.test_y, n_classes)}


# ---- The table and the picture -------------------------------------------------------------------

COLUMNS = {"linear_paper": "linear (paper, best)", "linear_paper_last": "(paper, last epoch)",
           "linear_converged": "linear (converged)", "knn": "k-NN (k=20)"}


def mean_std(values):
    """12.34 ± 0.56 as text, without the deviation for a single value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def print_table(rows):
    """Print {(label, ...): [(probes in %, probes of its teacher or None), ...]}, a row each, as
    mean ± std over seeds.
    """
    say(f"\n{'accuracy in %':32}" + "".join(f"{title:>23}" for title in COLUMNS.values()))
    for (label, *_), results in rows.items():
        line = f"{label} ({len(results)} seeds)" if len(results) > 1 else label
        line = f"{line:32}"
        for probe in COLUMNS:
            gains = [probes[probe] - teacher[probe] for probes, teacher in results if teacher]
            gain = f" ({statistics.mean(gains):+.2f})" if gains else ""
            line += f"{mean_std([probes[probe] for probes, _ in results]) + gain:>23}"
        say(line)
    say("in brackets: the gain over the student's own teacher")


def draw(path, runs, levels):
    """Accuracy of every probe over training steps, from each run's log.csv, and `levels` {label:
    probes}.
    """
    figure, axes = new_figure(1, len(PROBES), figsize=(11, 3.8), sharex=True)
    for axis, (probe, title) in zip(axes, PROBES.items()):
        for run, marker in zip(runs, "os^Dvx" * len(runs)):
            with open((run if run.is_dir() else run.parent) / "log.csv", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row[probe]]
            axis.plot([int(row["step"]) for row in rows], [float(row[probe]) for row in rows],
                      marker=marker, label=f"student {run.name}")
        for (label, probes), style in zip(levels.items(), ("dotted", "solid")):
            axis.axhline(probes[probe], color="black", linestyle=style, linewidth=1, label=label)
        axis.set(title=title, xlabel="distillation step", ylabel="test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save_figure(figure, path)


# ---- Main ----------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser, add = make_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path,
                        help="run directories of distill.py, or checkpoint files")
    add("--teacher", f"probe random teachers of these kinds, without a run: {', '.join(ARCHS)}", [],
        nargs="+", choices=ARCHS, metavar="ARCH")
    add("--seeds", "of the random teachers, with --teacher; those of distill.py's runs with the "
        "same --seed", [0], nargs="+", type=SEED, metavar="SEED")
    add("--dataset", f"data to probe on: {', '.join(DATASETS)}, or a folder of images (default: "
        "what the runs used)")
    add("--json", "also write every accuracy to this file, as soon as it is known", type=Path)
    add("--figure", "also draw accuracy over steps to this file (.png, .pdf, .svg)", type=picture)
    add_common_options(add, amp="off")
    args = parser.parse_args(argv)
    if not args.runs and not (args.teacher and args.dataset):
        parser.error("name one or more run directories, or --teacher ARCH --dataset DATA")
    if args.figure and not args.runs:
        parser.error("--figure draws runs: name one or more run directories")
    return args


def encoders_of(args, runs, image_size):
    """Yield (row of the table, name, encoder, name of its teacher or None) of all to be probed."""
    yield ("raw pixels",), "raw pixels", nn.Flatten(), None
    for arch, seed in itertools.product(args.teacher, args.seeds):
        encoder = random_network(2 * seed, arch, 1, image_size).encoder
        yield (f"teacher {arch}",), f"teacher {arch} seed {seed}", encoder, None
    teachers = {}
    for path, (teacher, student, config) in runs.items():
        key = fingerprint(teacher)
        if key not in teachers:  # one that several runs share is probed once
            teachers[key] = f"teacher of {path}"
            yield (f"teacher {config['arch']}",), teachers[key], teacher, None
        name = re.sub("-?seed[0-9]+$", "", path.name)
        alike = {**config, **dict.fromkeys((*MAY_CHANGE, "seed"))}  # what its seeds have in common
        row = f"student {name}{progress(config)}", str(alike)
        yield row, f"student {path}", student, teachers[key]


def main(argv=None):
    args = parse_args(argv)
    results = read_json(args.json) if args.json and args.json.exists() else {}
    if results and not args.resume:
        raise Problem(f"{args.json} exists: add --resume to go on with it, or name another file "
                      "with --json")
    if args.json:
        write_json(args.json, results)  # if it cannot be written, say so now
    device = pick_device(args.device)
    runs = {path: load_checkpoint(path, device) for path in args.runs}
    used = {(args.dataset or config["probe_dataset"] or config["dataset"], config["image_size"])
            for *_, config in runs.values()} or {(args.dataset, 32)}
    if len(used) > 1:
        raise Problem(f"these runs use different data, {sorted(used)}: name one with --dataset, or "
                      "probe them apart")
    (dataset, image_size), = used
    data = load_data(dataset, image_size, args.data_dir, args.mirror, device=device)
    if len(data.test_y) == 0:
        raise Problem(f"{dataset} has no labels to probe: name a labelled data set with --dataset")
    about = {"dataset": dataset, "train_images": len(data.train_y),
             "test_images": len(data.test_y), "amp": args.amp}
    say(f"{dataset}: {len(data.train_y):,} training and {len(data.test_y):,} test images, "
        f"{len(data.classes)} classes, {device.type}")
    rows = {}
    for row, name, encoder, teacher in encoders_of(args, runs, image_size):
        weights, known = fingerprint(encoder)[:12], results.get(name, about)
        if not about.items() <= known.items():
            raise Problem(f"{args.json} was measured on other data than {dataset}, or with another "
                          "--amp: name another file")
        if known.get("weights") != weights:  # not probed yet, or it has been trained since
            results[name] = {**evaluate(encoder.to(device), data, args.amp), **about,
                             "weights": weights, **provenance(device)}
        if args.json:
            write_json(args.json, results)
        say(f"  {name}: " + ", ".join(f"{title} {results[name][probe]:.2f}"
                                      for probe, title in PROBES.items()))
        rows.setdefault(row, []).append((results[name], results.get(teacher)))
    print_table(rows)
    if args.figure:
        levels = {"raw pixels": "raw pixels", "random teacher": f"teacher of {args.runs[0]}"}
        draw(args.figure, runs, {label: results[name] for label, name in levels.items()})


if __name__ == "__main__":
    run_cli(main)
