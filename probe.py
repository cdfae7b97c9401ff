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
    ARCHS, DATASETS, MAY_CHANGE, PROBES, SEED, Problem, add_common_options, channel_stats, embed,
    fingerprint, init_student, load_checkpoint, load_data, make_parser, new_figure, normalise,
    number, pick_device, picture, progress, provenance, random_network, read_checkpoint,
    read_json, run_cli, run_folder, save_figure, say, write_json)


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


@torch.no_grad()
def linear_probe_converged(x, y, test_x, test_y, n_classes, l2=1e-3, tolerance=1e-5, max_iter=5000):
    """Test accuracy in % of logistic regression on standardised features, run until no gradient
    exceeds `tolerance`.

    It minimises mean cross-entropy + l2/2·‖weight‖², shapes as above. Every step minimises a
    quadratic upper bound of that loss (Böhning 1992) from `ahead`, where Nesterov's momentum leads
    (it starts afresh where it points uphill): a few dozen steps, however the features are scaled
    and correlated. Raises Problem if it does not converge.
    """
    # what never varies stays 0
    mean, std = x.mean(0), x.std(0).clamp(min=1e-8)
    # 1: for the bias
    x, test_x = (F.pad((features - mean) / std, (0, 1), value=1.0) for features in (x, test_x))
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
        error = (x @ ahead).softmax(1) - target
        gradient = (error.T @ x).T / len(y) + decay * ahead  # x.T @ error takes 5 times as long
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
    chosen, encoder = images[order], deepcopy(encoder)
    batches = chosen.tensor_split(math.ceil(len(chosen) / 500))  # of one size: all count alike
    update_bn((normalise(x, stats) for x in batches), encoder)
    return encoder


def evaluate(encoder, data, seeds=(0,), amp="off"):
    """All probes of `encoder` on `data`, in %: {"linear_paper", "linear_converged", "knn"}.

    linear_paper is the mean over a draw for each of `seeds`; with more than one, "linear_paper_std"
    says how they scatter and "linear_paper_max" what the luckiest reads. Images are normalised by
    the mean and standard deviation of `data`'s own training part.
    """
    stats, n_classes = channel_stats(data.train_x), len(data.classes)
    x, test_x = (extract_features(encoder, images, stats, amp)
                 for images in (data.train_x, data.test_x))
    parts = x, data.train_y, test_x, data.test_y, n_classes
    # 25 at once: more leave a processor's cache
    draws = torch.cat([linear_probe(*parts, seeds[i:i + 25]) for i in range(0, len(seeds), 25)])
    scatter = {}
    if len(seeds) > 1:
        scatter = {"linear_paper_std": draws.std().item(), "linear_paper_max": draws.max().item()}
    return {"linear_paper": draws.mean().item(), **scatter,
            "linear_converged": linear_probe_converged(*parts), "knn": knn_probe(*parts)}


# ---- The table and the picture -------------------------------------------------------------------

COLUMNS = {"linear_paper": "linear (paper)", "linear_paper_max": "(its luckiest draw)",
           "linear_converged": "linear (converged)", "knn": "k-NN (k=20)"}


def mean_std(values):
    """12.34 ± 0.56 as text, without the deviation for a single value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def print_table(rows, draws):
    """Print {(label, alike): {fingerprint: (probes in %, {"teacher" or "start": its probes})}}, a
    row each and one for each comparison, as mean ± std over seeds.
    """
    def line(label, cells):
        say(f"{label:34}" + "".join(f"{cell:>22}" for cell in cells))

    say()
    line("accuracy in %", COLUMNS.values())
    for (label, _), row in rows.items():
        results = list(row.values())
        seeds = f" ({len(results)} seeds)" if len(results) > 1 else ""
        line(label + seeds, [mean_std([probes[key] for probes, _ in results]) for key in COLUMNS])
        for reference in results[0][1]:
            gains = [statistics.mean(probes[key] - references[reference][key]
                                     for probes, references in results)
                     for key in COLUMNS]
            line(f"  gain over its {reference}", [f"{gain:+.2f}" for gain in gains])
    say(f"linear (paper) is the mean of {draws} draws of its initial weights and order of images; "
        "the paper's tables\nshow the luckiest of 100 to 150: hold that column beside them. "
        "±: between seeds")


def draw(path, runs, levels):
    """Accuracy of every probe over training steps, from each checkpoint's log, and `levels` {label:
    probes}.
    """
    logs = [read_checkpoint(run)["log"] for run in runs]
    figure, axes = new_figure(1, len(PROBES), figsize=(11, 3.8), sharex=True)
    for axis, (probe, title) in zip(axes, PROBES.items()):
        for run, log, marker in zip(runs, logs, "os^Dvx" * len(runs)):
            rows = [row for row in log if probe in row]
            axis.plot([row["step"] for row in rows], [row[probe] for row in rows], marker=marker,
                      label=f"student {run_folder(run).name}")
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
    add("--teacher", f"probe random teachers of these kinds, without a run: {', '.join(ARCHS)}",
        nargs="+", choices=ARCHS, metavar="ARCH")
    add("--seeds", "of the random teachers, with --teacher; those of distill.py's runs with the "
        "same --seed", [0], nargs="+", type=SEED, metavar="SEED")
    add("--dataset", f"data to probe on: {', '.join(DATASETS)}, or a folder of images (default: "
        "what the runs used)")
    add("--draws", "of the paper's linear probe, each with initial weights and an order of the "
        "images of its own", 10, type=number(int, 2, 1000))
    add("--json", "also write every accuracy to this file, as soon as it is known", type=Path)
    add("--figure", "also draw accuracy over steps to this file (.png, .pdf, .svg)", type=picture)
    add_common_options(add, amp="off")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.teacher) or args.teacher and not args.dataset:
        parser.error("name one or more run directories, or --teacher ARCH --dataset DATA")
    if args.figure and not args.runs:
        parser.error("--figure draws runs: name one or more run directories")
    return args


def encoders_of(args, runs, image_size, data):
    """Yield (label, alike, name, encoder, {what it is compared with: name}) of all to be probed.

    What agrees in label and in `alike`, a text, differs in its seed alone, and shares a row.
    """
    def controls(label, alike, name, encoder):
        """A random teacher, and the same with calibrated batch norm, if it has any."""
        yield label, alike, name, encoder, {}
        if any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()):
            copy = calibrated(encoder.to(data.train_x.device), data.train_x,
                              channel_stats(data.train_x))
            yield f"{label}, calibrated", alike, f"{name}, calibrated", copy, {"teacher": name}

    yield "raw pixels", "", "raw pixels", nn.Flatten(), {}
    for arch, seed in itertools.product(args.teacher or (), args.seeds):
        encoder = random_network(2 * seed, arch, 1, image_size).encoder
        yield from controls(f"teacher {arch}", "", f"teacher {arch} seed {seed}", encoder)
    for path, (teacher, student, config) in runs.items():
        run = re.sub("-?seed[0-9]+$", "", run_folder(path).absolute().name)
        which = ", best probe" if path.name == "best.pt" else progress(config)
        label = f"teacher of {run}" if config["teacher"] else f"teacher {config['arch']}"
        references = {"teacher": f"teacher of {path}"}
        yield from controls(label, config["norm"], references["teacher"], teacher)
        alike = str({**config, **dict.fromkeys((*MAY_CHANGE, "seed", "step", "total_steps"))})
        alike = re.sub("seed[0-9]+", "", alike)  # also in the path of another run, --teacher
        if config["init_eps"] > 0:
            shape = (config["arch"], 1, config["image_size"], config["norm"])
            start = random_network(2 * config["seed"] + 1, *shape).encoder.to(data.train_x.device)
            init_student(teacher, start, config["init_eps"])
            yield f"start of {run}", alike, f"start of {path}", start, references
            references = references | {"start": f"start of {path}"}
        yield f"student {run}{which}", alike, f"student {path}", student, references


def main(argv=None):
    args = parse_args(argv)

    # What an earlier call has left
    results = read_json(args.json) if args.json and args.json.exists() else {}
    if results and not args.resume:
        raise Problem(f"{args.json} exists: add --resume to go on with it, or name another file "
                      "with --json")
    if args.json:
        write_json(args.json, results)  # if it cannot be written, say so now

    # Runs, and the data that they have in common
    device = pick_device(args.device)
    runs = {path: load_checkpoint(path, device) for path in args.runs}
    configs = [config for *_, config in runs.values()]
    logged = {config["probe_dataset"] or config["dataset"] for config in configs}
    datasets = {args.dataset} if args.dataset else logged
    sizes = {config["image_size"] for config in configs} or {32}
    if len(datasets) > 1 or len(sizes) > 1:
        raise Problem(f"these runs use data of different kinds or sizes, {datasets} and {sizes}: "
                      "probe them apart, or name one kind with --dataset")
    (dataset,), (image_size,) = datasets, sizes
    if args.figure and logged != {dataset}:
        raise Problem(f"--figure draws what the runs' logs hold, and that is not of {dataset}")
    data = load_data(dataset, image_size, args.data_dir, args.mirror, device=device)
    if len(data.test_y) == 0:
        raise Problem(f"{dataset} has no labels to probe: name a labelled data set with --dataset")
    about = {"dataset": dataset, "image_size": image_size, "train_images": len(data.train_y),
             "test_images": len(data.test_y), "amp": args.amp, "draws": args.draws}
    say(f"{dataset}: {len(data.train_y):,} training and {len(data.test_y):,} test images, "
        f"{len(data.classes)} classes, {device.type}")

    # Probe what is not yet known, by the weights
    if not all(isinstance(known, dict) and about.items() <= known.items()
               for known in results.values()):
        raise Problem(f"{args.json} was measured on other data than {dataset}, with other --amp or "
                      "--draws, or by an older probe.py: name another file")
    measured, rows = {known["weights"]: known for known in results.values()}, {}
    for *row, name, encoder, references in encoders_of(args, runs, image_size, data):
        weights = fingerprint(encoder)
        if weights not in measured:  # not yet; a teacher that runs share is probed once
            probes = evaluate(encoder.to(device), data, range(args.draws), args.amp)
            measured[weights] = {**probes, **about, "weights": weights, **provenance(device)}
        results[name] = measured[weights]
        if args.json:
            write_json(args.json, results)
        say(f"  {name}: " + ", ".join(f"{title} {results[name][probe]:.2f}"
                                      for probe, title in PROBES.items()))
        rows.setdefault(tuple(row), {})[weights] = (
            results[name], {label: results[other] for label, other in references.items()})
    print_table(rows, args.draws)
    if args.figure:
        draw(args.figure, runs, {"raw pixels": results["raw pixels"],
                                 "random teacher": results[f"teacher of {args.runs[0]}"]})


if __name__ == "__main__":
    run_cli(main)
