#!/usr/bin/env python3
"""Are there lottery tickets? Iterative magnitude pruning with rewinding, from a distilled student
(Fig. 8).

    run=runs/cifar10-resnet18-eps0-seed0
    python prune.py $run                                     the student, rewound to its own weights
    python prune.py $run --init random --rewind-epoch 2      its teacher's random weights
    python prune.py $run --control random                    as many weights per layer, but any
    python prune.py plot runs/cifar10-resnet18-eps0-seed*    all curves of these runs, mean ± std

One round: train with labels, prune the 20 % of the remaining weights that are smallest, put the
survivors back where they were at the rewinding point, train again. A *ticket* is a mask under which
that training does well (Frankle & Carbin 2019). From random weights, larger networks have to be
rewound to a point some epochs into the training (Frankle et al. 2020); the paper finds that a
distilled student is such a point already.
"""
import copy
import csv
import math
import re
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from distill import (
    ARCHS, MAY_CHANGE, Problem, add_common_options, add_fine_tuning_options, channel_stats,
    check_same, check_undisturbed, checkpoint_to_resume, classification_accuracy, classifier,
    fill_defaults, fine_tune, fingerprint, load_checkpoint, load_data, make_parser, new_figure,
    number, pick_amp, pick_device, picture, progress, provenance, read_json, run_cli,
    run_folder, save_checkpoint, save_figure, say, stratified_subset, to_config, write_csv,
    write_json)


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
    """The `keep` largest |weights| of all layers together, of those that `mask` has left, as a new
    mask.
    """
    magnitude = torch.cat([w.abs().masked_fill(~mask[name], -1).flatten()
                           for name, w in weights.items()])
    survives = torch.zeros_like(magnitude, dtype=torch.bool)
    # by rank, not by threshold: ties add none
    survives[magnitude.argsort(descending=True, stable=True)[:keep]] = True
    layers = survives.split([w.numel() for w in weights.values()])
    return {name: layer.view(w.shape) for (name, w), layer in zip(weights.items(), layers)}


def random_mask(mask, by_magnitude, seed):
    """As many survivors in each layer as the mask `by_magnitude` has, but any of those that `mask`
    has left: the control. (Those are of the control's own weights, not the ticket's.)
    """
    generator, result = torch.Generator().manual_seed(seed), {}
    for name, m in by_magnitude.items():
        scores = {name: torch.rand(m.shape, generator=generator).to(m.device)}
        result |= magnitude_mask(scores, {name: mask[name]}, m.sum())
    return result


@torch.no_grad()
def apply_mask(weights, mask):
    """Set what is pruned to 0, in place."""
    for name, m in mask.items():
        weights[name].masked_fill_(~m, 0)


# ---- Main: train, prune, rewind ------------------------------------------------------------------

# accuracies in % of the test images; the best over all epochs' ends, as the paper has it
LOG_COLUMNS = ("round", "weights_left", "best_accuracy", "final_accuracy", "seconds")
FREE = (MAY_CHANGE - {"epochs"}) | {"run", "rounds", "made"}  # what may change on --resume


def parse_args(argv=None):
    parser, add = make_parser(__doc__)
    parser.add_argument("run", type=Path,
                        help="run directory of distill.py, whose student or teacher is pruned")
    add("--init", "start at the distilled student or at its random teacher", "student",
        choices=("student", "random"))
    add("--rewind-epoch", "rewind to the end of this epoch of the first training; 0 is the very "
        "start", 0, type=number(int, 0), metavar="ℓ")
    add("--control", "random: prune as many weights of each layer as their magnitudes would have "
        "it, but any", choices=("random",))
    add("--prune-all", "prune biases and norms too, as the released code does", False,
        action="store_true")
    add("--rounds", "number of prunings, each with a training; 24 leave 0.5 %%", 24,
        type=number(int, 0, 1000))
    add("--rate", "share of the remaining weights that a round prunes; larger is quicker and "
        "rougher", 0.2, type=number(float, 1e-9, 0.999))
    add_fine_tuning_options(add)
    add("--out", "directory of the curve (default: <run>/prune-<init>-rewind<ℓ>, with -control)",
        type=Path)
    add_common_options(add)
    args = parser.parse_args(argv)
    if args.rewind_epoch >= args.epochs:
        parser.error(f"--rewind-epoch {args.rewind_epoch} is beyond the run: it must be less than "
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
    device = pick_device(args.device)
    teacher, student, distilled = load_checkpoint(args.run, device)
    encoder = student if args.init == "student" else teacher
    fill_defaults(args, distilled)
    checkpoint = checkpoint_to_resume(args, "prune.py", FREE)
    args.amp = pick_amp(args.amp, device, distilled["arch"], distilled["norm"])

    data = load_data(args.dataset, distilled["image_size"], args.data_dir, args.mirror,
                     device=device)
    if len(data.test_y) == 0:
        raise Problem(f"{args.dataset} has no labels to train on: name a labelled data set with "
                      "--dataset")
    images, labels = stratified_subset(data.train_x, data.train_y, args.n_samples)
    config = {**to_config(args), "n_images": len(labels),
              "starting_weights": fingerprint(encoder), "distilled": distilled,
              "made": [provenance(device)]}
    if checkpoint:
        begun_with = checkpoint["config"]
        check_same(args.out, begun_with, config, FREE | {"distilled"})
        config["made"] = begun_with.get("made", []) + config["made"]
    stats, per_epoch = channel_stats(images), math.ceil(len(labels) / args.batch_size)

    network, optimizer, scaler = classifier(encoder, ARCHS[distilled["arch"]][1],
                                            len(data.classes), args, device)
    trained = {"network": network, "optimizer": optimizer, "scaler": scaler}  # what a step changes
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
        write_csv(args.out / "log.csv", LOG_COLUMNS, log)  # a kill may have come before it

    def snapshot(step):
        """A copy of everything that a step changes."""
        return copy.deepcopy({"step": step,
                              **{name: part.state_dict() for name, part in trained.items()}})

    def show(row):
        eta = timedelta(seconds=(args.rounds - row["round"]) * round(row["seconds"]))
        say(f"{row['round']:5d}{row['weights_left']:18.2f}{row['best_accuracy']:18.2f}"
            f"{row['final_accuracy']:18.2f}{row['seconds']:18.2f}{eta!s:>18}")

    say(f"{distilled['arch']} from the {args.init} weights of {args.run}{progress(distilled)} on "
        f"{args.dataset}: {len(labels):,} images, {args.epochs * per_epoch:,} steps of "
        f"{args.batch_size} a round, {total:,} weights to prune, seed {args.seed}, "
        f"{device.type}, amp {args.amp} -> {args.out}")
    say(f"round{'weights left (%)':>18}{'best epoch (%)':>18}{'last epoch (%)':>18}"
        f"{'seconds':>18}{'ETA':>18}")
    for row in log:
        show(row)
    for round_number in range(len(log), args.rounds + 1):
        left = round(total * (1 - args.rate) ** round_number)
        if round_number == 0:
            start, rewinding_point = 0, snapshot(0)
        else:  # prune, and rewind: weights, optimiser, schedule, order of the data and crops
            smaller = magnitude_mask(weights, mask, left)
            mask = random_mask(mask, smaller, args.seed + round_number) if args.control else smaller
            for name, part in trained.items():
                # an optimiser keeps, and changes, what it is given
                part.load_state_dict(copy.deepcopy(rewinding_point[name]))
            start = rewinding_point["step"]
            apply_mask(weights, mask)
        accuracies, clock = [], time.time()
        for step, _ in fine_tune(network, optimizer, scaler, images, labels, args, args.seed,
                                 start):
            apply_mask(weights, mask)
            if step % per_epoch == 0:
                accuracies.append(classification_accuracy(network, data.test_x, data.test_y, stats,
                                                          args.amp))
            if round_number == 0 and step == args.rewind_epoch * per_epoch:
                rewinding_point = snapshot(step)
        if not all(w.isfinite().all() for w in weights.values()):
            raise Problem(f"weights are not finite after round {round_number}: lower --lr or take "
                          f"--amp off; what {args.out} held is kept")
        seconds = time.time() - clock
        check_undisturbed(args.out / "log.csv", LOG_COLUMNS, log)
        row = round_number, 100 * left / total, max(accuracies), accuracies[-1], seconds
        log.append(dict(zip(LOG_COLUMNS, row)))
        save_checkpoint(args.out / "last.pt", "prune.py", config=config,
                        network=network.state_dict(), mask=mask,
                        rewinding_point=rewinding_point, log=log)
        write_json(args.out / "config.json", config)
        write_csv(args.out / "log.csv", LOG_COLUMNS, log)
        show(log[-1])
    say(f"{args.out}: all {args.rounds} rounds are done")


# ---- The curves and their picture, from config.json and log.csv alone ----------------------------

# in which repeats of a curve may differ
REPEATS = (FREE - {"steps"}) | {"seed", "starting_weights", "distilled"}


def read_curve(folder):
    """(label, settings that repeats share as a text, title, {weights left in %: best accuracy in
    %}).
    """
    try:
        config = read_json(folder / "config.json")
        distilled = config["distilled"]
        settings = str([{key: part[key] for key in sorted(part) if key not in REPEATS}
                        for part in (config, distilled)])
        with open(folder / "log.csv", newline="") as file:
            curve = {float(row["weights_left"]): float(row["best_accuracy"])
                     for row in csv.DictReader(file)}
        start = "student" if config["init"] == "student" else "random init"
        control = ", random masks" if config["control"] else ""
        return (f"{start}, rewound to epoch {config['rewind_epoch']}{control}",
                re.sub("seed[0-9]+", "", settings),  # also in the path of another run
                f"{distilled['arch']}, {config['n_images']:,} images of "
                f"{Path(config['dataset']).name}, {config['epochs']} epochs a round", curve)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise Problem(f"{folder} holds no readable curve ({error!r}): leave it out, or prune "
                      "again") from None


def read_curves(paths):
    """{label: list of (title, curve)} of directories of prune.py, or with such inside.

    Curves that differ in their seed alone share a label.
    """
    folders, groups, labels = {}, {}, {}
    for path in paths:
        inside = [path] if (path / "config.json").exists() else [
            config.parent for config in path.glob("*/config.json")]
        if not inside:
            raise Problem(f"no pruning curve in {path}: let prune.py finish a round, or name the "
                          "directory of a curve")
        folders |= {folder.resolve(): folder for folder in inside}  # none of them twice
    for folder in sorted(folders.values()):
        label, settings, *curve = read_curve(folder)
        if (label, settings) not in labels:
            other = label in groups  # a name that an experiment with other settings has
            labels[label, settings] = f"{label} ({folder})" if other else label
        groups.setdefault(labels[label, settings], []).append(curve)
    return dict(sorted(groups.items(), key=lambda group: (group[0][0] == "r", group[0])))


def plot(argv):
    """Print and draw Fig. 8: test accuracy of the best epoch over weights left, mean ± std."""
    parser, add = make_parser(plot.__doc__, "prune.py plot")
    parser.add_argument("runs", nargs="+", type=Path,
                        help="directories of prune.py, or of distill.py with such inside")
    add("--figure", ".png, .pdf or .svg", Path("figures/tickets.png"), type=picture)
    args = parser.parse_args(argv)
    groups, means, titles = read_curves(args.runs), {}, set()
    say("best epoch's test accuracy in %")
    for column, (label, group) in enumerate(groups.items(), 1):
        say(f"  [{column}] {label} (n={len(group)})")
        group_titles, curves = zip(*group)
        left = sorted(set.intersection(*map(set, curves)))  # the rounds that all repeats have
        accuracies = np.array([[curve[x] for x in left] for curve in curves])
        std = accuracies.std(0, ddof=min(1, len(curves) - 1))
        means[f"{label} (n={len(group)})"] = dict(zip(left, zip(accuracies.mean(0), std)))
        titles.update(group_titles)
    say("weights left (%)"
        + "".join(f"{f'[{column}]':>16}" for column in range(1, len(means) + 1)))
    for x in sorted(set().union(*means.values()), reverse=True):
        cells = [f"{curve[x][0]:.2f} ± {curve[x][1]:.2f}".removesuffix(" ± 0.00") if x in curve
                 else "" for curve in means.values()]
        say(f"{x:16.2f}" + "".join(f"{cell:>16}" for cell in cells))

    figure, axis = new_figure(figsize=(7, 4.6))
    for (label, curve), marker in zip(means.items(), "osD^vP*X" * len(means)):
        left, (mean, std) = list(curve), zip(*curve.values())
        axis.errorbar(left, mean, std, marker=marker, label=label,
                      linestyle="--" if "random masks" in label else "-")
    ticks = sorted(max(means.values(), key=len))[::-2]  # every second level, with 100 %
    axis.set(xscale="log", xlabel="weights left (%)", ylabel="test accuracy, best epoch (%)",
             title="\n".join(sorted(titles)))
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.invert_xaxis()
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    save_figure(figure, args.figure)


if __name__ == "__main__":
    run_cli(main)
