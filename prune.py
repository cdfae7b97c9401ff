#!/usr/bin/env python3
"""Are there lottery tickets? Iterative magnitude pruning with rewinding, from a distilled student (Fig. 8).

    python prune.py runs/cifar10-resnet18-eps0-seed0                                   the student, rewound to its own weights
    python prune.py runs/cifar10-resnet18-eps0-seed0 --init random --rewind-epoch 2    its teacher's random weights
    python prune.py runs/cifar10-resnet18-eps0-seed0 --control random                  as many weights per layer, but any
    python prune.py plot runs/cifar10-resnet18-eps0-seed*                              all curves of these runs, mean ± std

One round: train with labels, prune the 20 % of the remaining weights that are smallest, put the survivors back where they
were at the rewinding point, train again. A *ticket* is a mask under which that training does well (Frankle & Carbin 2019).
From random weights, larger networks have to be rewound to a point some epochs into the training (Frankle et al. 2020); the
paper finds that a distilled student is such a point already.
"""
import argparse, copy, csv, json, math, os, sys, time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distill import (ARCHS, FORMATS, MAY_CHANGE, Problem, amp_tools, at_least, augment, channel_stats, classifier, classify,
                     fingerprint, learning_rate, load_checkpoint, load_data, make_parser, open_run, pick_amp, pick_device,
                     provenance, run_cli, stratified_subset, test_accuracy, train, write_atomically, write_csv, write_json)


# ---- Masks -----------------------------------------------------------------------------------------------------------
# A mask is a plain dict {parameter name: bool tensor of its shape}, applied after every step. torch.nn.utils.prune would
# do, but it replaces each weight by a product weight_orig · weight_mask: the optimiser then moves weight_orig, where a
# pruned weight lives on out of sight, and the state dict no longer fits the encoder. Here the network stays as it is.
# The masks of a whole curve are nested, so one count per weight holds them all: how many prunings it has survived. After
# r prunings the mask is `survived >= r`.

def prunable(network, everything=False):
    """{name: parameter} of what may be pruned: weights of convolutions and linear layers, or `everything`.

    The released code prunes every parameter, also biases and norms.
    """
    is_weight = lambda name: name.endswith(".weight") and isinstance(network.get_submodule(name[:-7]), (nn.Conv2d, nn.Linear))
    return {name: p for name, p in network.named_parameters() if everything or is_weight(name)}


@torch.no_grad()
def magnitude_mask(weights, masks, keep):
    """The `keep` largest |weights| of all layers together, of those that `masks` has left, as new masks."""
    magnitude = torch.cat([w.abs().masked_fill(~masks[name], -1).reshape(-1) for name, w in weights.items()])
    alive = torch.zeros_like(magnitude, dtype=torch.bool)
    alive[magnitude.argsort(descending=True, stable=True)[:keep]] = True  # by rank, not by threshold: ties cannot add one
    parts = alive.split([w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts)}


@torch.no_grad()
def apply_masks(weights, masks):
    """Set what is pruned to 0, in place."""
    for name, mask in masks.items():
        weights[name].masked_fill_(~mask, 0)


def control_of(ticket, seed):
    """A ticket's checkpoint -> that of its control before the first sparse training: other weights, as many in every layer.

    The control's masks are the ticket's with each layer's entries in random order. It shares the ticket's dense training
    and rewinding point.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = lambda t: t.reshape(-1)[torch.randperm(t.numel(), generator=generator)].view(t.shape)
    return {**ticket, "survived": {name: shuffled(count) for name, count in ticket["survived"].items()}, "prunings": 1,
            "now": ticket["point"], "log": ticket["log"][:1], "accuracies": [], "seconds": 0.0}


# ---- The curves and their picture (from config.json and log.csv alone) -----------------------------------------------

LOG_COLUMNS = ("round", "weights_left", "best_accuracy", "final_accuracy", "seconds")  # %, %, % (best: over the epochs' ends)
FREE = (MAY_CHANGE - {"epochs"}) | {"run", "rounds", "start", "n_images", "distilled"}  # on --resume; or checked apart
NO_SETTING = (MAY_CHANGE - {"epochs", "steps"}) | {"run", "rounds", "start", "seed", "made"}  # in which repeats may differ
SHOWN = {"init", "rewind_epoch", "control", "epochs", "dataset", "n_images", "distilled arch"}  # in label or title


def read_curves(paths):
    """{label: (settings, list of curves)}, a curve being {weights left in %: best accuracy in %}; repeats share a label.

    `paths` are run directories of prune.py, or of distill.py with such directories inside. Raises Problem.
    """
    folders, groups = {}, {}
    for path in paths:
        found = [path] if (path / "log.csv").exists() and (path / "config.json").exists() else [
            config.parent for config in sorted(path.glob("*/config.json"))]
        if not found:
            raise Problem(f"no pruning curve in {path}: let prune.py finish a round, or name the directory of a curve")
        folders.update({folder.resolve(): folder for folder in found})  # none of them twice
    for folder in folders.values():
        try:
            config = json.loads((folder / "config.json").read_text())
            config |= {f"distilled {key}": value for key, value in config.pop("distilled").items()}
            with open(folder / "log.csv", newline="") as file:
                curve = {float(row["weights_left"]): float(row["best_accuracy"]) for row in csv.DictReader(file)}
            if 100.0 not in curve or not SHOWN <= config.keys():
                raise ValueError("not as prune.py writes it")
        except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
            raise Problem(f"{folder} holds no readable curve ({error!r}): leave it out, or prune again") from None
        settings = {key: value for key, value in config.items() if key.removeprefix("distilled ") not in NO_SETTING}
        groups.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(curve)
    everything = [settings for settings, _ in groups.values()]
    differing = [key for key in sorted(set().union(*everything)) if key not in ("init", "rewind_epoch", "control")
                 and any(settings.get(key) != everything[0].get(key) for settings in everything)]
    named, legend = {}, lambda group: (group[0]["init"] == "random", group[0]["rewind_epoch"], group[0]["control"] is not None)
    for settings, curves in sorted(groups.values(), key=legend):
        label = "random init" if settings["init"] == "random" else "student"
        label += f", rewound to epoch {settings['rewind_epoch']}" + ", random masks" * (settings["control"] is not None)
        named[label + "".join(f", {key} {settings.get(key)}" for key in differing)] = settings, curves
    return named


def plot(argv):
    """Print and draw Fig. 8: test accuracy of the best epoch over weights left, mean ± standard deviation over repeats."""
    parser = argparse.ArgumentParser(prog="prune.py plot", description=plot.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of prune.py, or of distill.py with such inside")
    parser.add_argument("--figure", type=Path, default=Path("figures/tickets.png"), help="default: figures/tickets.png")
    args = parser.parse_args(argv)
    if args.figure.suffix not in (".png", ".pdf", ".svg"):
        parser.error("--figure wants a name that ends in .png, .pdf or .svg")
    groups, summary = read_curves(args.runs), {}
    print("best epoch's test accuracy in %")
    for number, (label, (_, curves)) in enumerate(groups.items(), 1):
        left = [left for left in curves[0] if all(left in curve for curve in curves)]  # the rounds that all repeats have
        scores = np.array([[curve[x] for x in left] for curve in curves])
        std = scores.std(0, ddof=1) if len(curves) > 1 else np.full(len(left), np.nan)
        summary[f"{label} (n={len(curves)})"] = dict(zip(left, zip(scores.mean(0), std)))
        print(f"  [{number}] {label} (n={len(curves)})")
    print("weights left (%)" + "".join(f"{f'[{number}]':>16}" for number in range(1, len(groups) + 1)))
    for x in sorted(set().union(*summary.values()), reverse=True):
        cells = ["{:.2f} ± {:.2f}".format(*curve[x]).removesuffix(" ± nan") if x in curve else "" for curve in summary.values()]
        print(f"{x:16.2f}" + "".join(f"{cell:>16}" for cell in cells))

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4.6), layout="constrained")
    colours = {}
    for (label, curve), (settings, _) in zip(summary.items(), groups.values()):
        left, (mean, std) = np.array(list(curve)), np.array(list(curve.values())).T
        control = settings["control"] is not None
        number = colours.setdefault(json.dumps({**settings, "control": None}), len(colours))  # a control has its ticket's colour
        axis.plot(left, mean, color=f"C{number}", marker="osD^vP*X"[number % 8], linestyle="--" if control else "-",
                  markerfacecolor="white" if control else None, markersize=5, label=label)
        axis.fill_between(left, mean - std, mean + std, color=f"C{number}", alpha=0.15, linewidth=0)
    ticks = list(max(summary.values(), key=len))
    ticks = ticks[::math.ceil(len(ticks) / 9)]
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.invert_xaxis()
    titles = [f"{s['distilled arch']}, {s['n_images']:,} images of {Path(s['dataset']).name}, {s['epochs']} epochs a round"
              for s, _ in groups.values()]
    axis.set(xlabel="weights left (%)", ylabel="test accuracy, best epoch (%)", title=titles[0] if len(set(titles)) == 1 else "")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2 if max(map(len, summary)) < 50 else 1, fontsize="small", frameon=False)
    write_atomically(args.figure, lambda file: figure.savefig(file, format=args.figure.suffix[1:], dpi=150))
    print(f"the picture: {args.figure}")


# ---- Main: train, prune, rewind --------------------------------------------------------------------------------------

def parse_args(argv=None):
    (parser, add), positive = make_parser(__doc__), at_least(1, int)
    parser.add_argument("run", type=Path, help="run directory of distill.py, whose student or teacher is pruned")
    add("--init", "start at the distilled student or at its random teacher", "student", choices=("student", "random"))
    add("--rewind-epoch", "rewind to the end of this epoch of the first training; 0 is the very start", 0, type=at_least(0, int),
        metavar="ℓ")
    add("--control", "random: as many weights per layer as the ticket of the same options has, but drawn at random; run that "
        "one first", choices=("random",))
    add("--prune-all", "prune biases and norms too, as the released code does", False, action="store_true")
    add("--rounds", "number of prunings, each with a training; 24 leave 0.5 %%", 24, type=at_least(0, int))
    add("--rate", "share of the remaining weights that a round prunes; larger is quicker and rougher", 0.2, type=float)
    add("--epochs", "epochs of each training; the learning rate falls tenfold at 1/2 and 3/4 of them", 160, type=positive)
    add("--lr", "SGD's first learning rate, momentum 0.9, weight decay 1e-4 (default: 0.1, for resnet20 0.05)",
        type=at_least(0, float))
    add("--batch-size", "images a step", 256, type=positive)
    add("--dataset", "labelled data to train on (default: the one the run was probed on)")
    add("--n-samples", "train on a stratified subset of so many images (default: all)", type=positive)
    add("--seed", "of the linear classifier, the order of the data and the crops (default: the run's)", type=at_least(0, int))
    add("--device", "auto: cuda where there is one", "auto", choices=("auto", "cpu", "cuda"))
    add("--amp", "16-bit encoder, as in distill.py", "auto", choices=("auto", "bf16", "fp16", "off"))
    add("--out", "directory of the curve (default: <run>/prune-<init>-rewind<ℓ>); a control's is beside it, with -control",
        type=Path)
    add("--resume", "go on with the curve, if there is one, to the same numbers (on a CPU to the last bit)", False,
        action="store_true")
    add("--data-dir", "where downloads and caches go", "data")
    add("--mirror", "URL of a directory with the archives to download; or set DATA_MIRROR", os.environ.get("DATA_MIRROR"))
    args = parser.parse_args(argv)
    if args.rewind_epoch >= args.epochs:
        parser.error(f"--rewind-epoch {args.rewind_epoch} is beyond the run: it must be less than --epochs {args.epochs}")
    if not 0 < args.rate < 1:
        parser.error("--rate must lie between 0 and 1")
    if args.rounds > 1000:
        parser.error("--rounds must be at most 1000")
    if args.seed is not None and args.seed >= 2**62:
        parser.error("--seed must be below 2**62")
    folder = args.run if args.run.is_dir() else args.run.parent
    args.out = args.out or folder / (f"prune-{args.init}-rewind{args.rewind_epoch}" + "-all" * args.prune_all)
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["plot"]:
        return plot(argv[1:])
    args = parse_args(argv)
    device = pick_device(args.device)
    teacher, student, distilled = load_checkpoint(args.run, device)
    args.dataset = args.dataset or distilled["probe_dataset"] or distilled["dataset"]
    args.seed = distilled["seed"] if args.seed is None else args.seed
    args.lr = (0.05 if distilled["arch"] == "resnet20" else 0.1) if args.lr is None else args.lr
    start = student if args.init == "student" else teacher

    # Does this curve go on from a checkpoint? From its own; a control that begins, from its ticket's
    ticket, out = args.out, Path(f"{args.out}-control") if args.control else args.out
    settings = {key: value for key, value in distilled.items() if key not in MAY_CHANGE - {"steps", "epochs"}}
    config = {**vars(args), "run": str(args.run), "out": str(out), "start": fingerprint(start)[:12], "distilled": settings}
    checkpoint, origin = open_run(out, config, "prune.py", FREE - {"rounds"} if args.control else FREE), out
    if not checkpoint and (out / "log.csv").exists():
        raise Problem(f"{out} holds a log.csv without its last.pt and would be overwritten: name another directory with --out")
    if args.control and not checkpoint:
        if not (ticket / "last.pt").exists():
            raise Problem(f"no ticket in {ticket} whose numbers the control could keep: run the same without --control first")
        checkpoint, origin = open_run(ticket, {**config, "resume": True}, "prune.py", FREE | {"control"}), ticket
        checkpoint = control_of(checkpoint, args.seed)
        had = max(count.max().item() for count in checkpoint["survived"].values())
        if had < max(args.rounds, 1):
            raise Problem(f"the ticket in {ticket} has had {had} prunings, not {args.rounds}: finish it with --resume first")
    if checkpoint and checkpoint["config"]["start"] != config["start"]:
        raise Problem(f"{origin} began from other weights than {args.run} holds now: delete it or name another one with --out")
    amp = checkpoint["config"]["amp"] if checkpoint else args.amp
    args.amp = config["amp"] = pick_amp(amp, device, distilled["arch"], distilled["norm"])

    data = load_data(args.dataset, distilled["image_size"], args.data_dir, args.mirror)
    if len(data.test_y) == 0:
        raise Problem(f"{args.dataset} has no labels to train on: name a labelled data set with --dataset")
    subset = stratified_subset(data.train_y, args.n_samples) if args.n_samples else slice(None)
    images, labels = data.train_x[subset].to(device), data.train_y[subset].to(device)
    test_x, test_y = data.test_x.to(device), data.test_y.to(device)
    stats, n = channel_stats(images), len(images)
    if checkpoint and checkpoint["config"]["n_images"] != n:
        raise Problem(f"{origin} was trained on {checkpoint['config']['n_images']:,} images, but {args.dataset} holds {n:,} now: "
                      f"name another directory with --out")
    config["n_images"] = n
    per_epoch = math.ceil(n / args.batch_size)
    steps = args.epochs * per_epoch

    network = classifier(start, ARCHS[distilled["arch"]][1], len(data.classes), args.seed).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    autocast, scaler = amp_tools(args.amp, device)
    parts = {"network": network, "optimizer": optimizer, "scaler": scaler}
    weights = prunable(network, args.prune_all)
    total = sum(w.numel() for w in weights.values())
    remaining = lambda prunings: round(total * (1 - args.rate) ** prunings)
    if remaining(args.rounds) < 1:
        raise Problem(f"--rounds {args.rounds} at --rate {args.rate} would prune the last weight: take fewer")

    def snapshot():
        """A copy of everything that a step changes."""
        return copy.deepcopy({"step": step, **{name: part.state_dict() for name, part in parts.items()}})

    def restore(point):
        """Put everything back as the snapshot `point` has it; returns its step, from which schedule, order and crops follow."""
        for name, part in parts.items():
            part.load_state_dict(copy.deepcopy(point[name]))  # an optimiser keeps the tensors it is given, and changes them
        return point["step"]

    survived = {name: torch.zeros(w.shape, dtype=torch.int16, device=device) for name, w in weights.items()}
    prunings, step, point, log, accuracies, seconds = 0, 0, None, [], [], 0.0
    if checkpoint:
        step = restore(checkpoint["now"])
        survived = {name: t.to(device) for name, t in checkpoint["survived"].items()}
        prunings, point, log = (checkpoint[key] for key in ("prunings", "point", "log"))
        accuracies, seconds = checkpoint["accuracies"], checkpoint["seconds"]

    def save():
        state = {"format": FORMATS["prune.py"], "config": config, "now": snapshot(), "point": point, "survived": survived,
                 "prunings": prunings, "log": log, "accuracies": accuracies, "seconds": seconds}
        write_atomically(out / "last.pt", lambda file: torch.save(state, file))

    def prepare():
        """What holds before every step: the schedule's learning rate, pruned weights at 0; and the rewinding point is kept."""
        nonlocal point
        optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, steps)
        apply_masks(weights, masks)
        if point is None and step == args.rewind_epoch * per_epoch:
            point = snapshot()

    def show(row):
        eta = timedelta(seconds=round((args.rounds - row["round"]) * row["seconds"]))
        print(f"{row['round']:5d}" + "".join(f"{row[column]:18.2f}" for column in LOG_COLUMNS[1:]) + f"{eta!s:>18}", flush=True)

    def batch_loss(index):
        """Indices (B,) of images -> cross-entropy of the classifier on their crops in the coming step."""
        return F.cross_entropy(classify(network, augment(images[index], args.seed, step), stats, autocast), labels[index])

    role = "student" if args.init == "student" else "random teacher"
    print(f"{distilled['arch']} from the {role} of {args.run} on {args.dataset}: {n:,} images, "
          f"{steps:,} steps of {args.batch_size} a round, {total:,} weights to prune, seed {args.seed}, {device.type}, "
          f"amp {args.amp} -> {out}")
    titles = ("weights left (%)", "best epoch (%)", "last epoch (%)", "seconds", "ETA")
    print("round" + "".join(f"{title:>18}" for title in titles), flush=True)
    for row in log:
        show(row)
    saved = time.time()
    while True:
        masks = {name: count >= prunings for name, count in survived.items()}
        if len(log) == prunings:  # this round's training is not at its end yet
            prepare()
            losses, clock = [], time.time()
            for step, loss in train(batch_loss, n, optimizer, scaler, steps=steps, batch_size=args.batch_size, seed=args.seed,
                                    start=step):
                prepare()
                losses.append(loss)
                if step % per_epoch:
                    continue
                if not (torch.stack(losses).isfinite().all() and all(w.isfinite().all() for w in weights.values())):
                    raise Problem(f"the loss is not finite any more in epoch {step // per_epoch} of round {prunings}: lower --lr "
                                  f"or take --amp off; what {out} held is kept")
                accuracies.append(test_accuracy(network, test_x, test_y, stats, autocast))
                seconds += time.time() - clock
                if len(accuracies) == 1 and not log and (hours := seconds * args.epochs * (args.rounds + 1) / 3600) > 0.5:
                    print(f"the first epoch took {seconds:.0f} s: all rounds will take about {hours:.1f} hours", flush=True)
                if time.time() - saved > 60 and step < steps:
                    save()
                    saved = time.time()
                losses, clock = [], time.time()
            left = 100 * sum(mask.sum().item() for mask in masks.values()) / total
            log.append(dict(zip(LOG_COLUMNS, (prunings, left, max(accuracies), accuracies[-1], seconds))))
            save()
            saved = time.time()
            show(log[-1])
        write_json(out / "config.json", {**config, "made": provenance(device)})
        write_csv(out / "log.csv", LOG_COLUMNS, log)
        if prunings >= args.rounds:
            return print(f"{out}: all {args.rounds} rounds are done")
        prunings += 1
        if not args.control:  # whose masks are drawn already
            for name, mask in magnitude_mask(weights, masks, remaining(prunings)).items():
                survived[name] += mask
        step, accuracies, seconds = restore(point), [], 0.0


if __name__ == "__main__":
    run_cli(main)
