#!/usr/bin/env python3
"""What does the loss look like around a random teacher? Planes, lines between solutions, pictures.

    a=runs/cifar10-vgg11-eps1e-10-seed0 b=runs/cifar10-vgg11-epsinf-seed0
    python landscape.py plane $a $b                  the teacher and both students (Fig. 5)
    python landscape.py plane $b                     the teacher, a student's start and its end
    python landscape.py connect runs/cifar10-resnet18-eps0-seed0/best.pt    one basin? (Fig. 9)
    python landscape.py plot $b/plane-non-local.npz                         draws the second plane

`plane` lays a plane through three points of weight space, say the teacher θ_T and two students
θ*_S, and measures at every point of a grid on it how far the network there is from the teacher (KL)
and how good its features are (linear probes). `connect` fine-tunes copies of one network with
labels, each with the data in another order, and follows the straight line between every two of
them: if the test error stays low all the way, they ended in one basin.
"""
import itertools
import json
import math
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import update_bn

from distill import (
    EMBEDDING_WIDTH, MAY_CHANGE, NETWORK_SETTINGS, POSITIVE, Problem, add_common_options, autocast,
    between, channel_stats, check_same, checksum, embed, init_student, kl_by_log_softmax,
    load_checkpoint, load_data, new_parser, normalise, pick_amp, pick_device, progress, provenance,
    random_network, run_directory, run_folder, save, say, stratified_subset, to_config)
from probe import linear_probe, linear_probe_converged
from prune import (
    add_fine_tuning_options, classification_accuracy, fill_in, fine_tune, new_classifier)


# ---- Geometry: planes and lines in weight space --------------------------------------------------

def flatten(parameters):
    """A list of tensors, with N numbers in all, as one float64 vector (N,)."""
    return torch.cat([p.detach().reshape(-1) for p in parameters]).double()


@torch.no_grad()
def set_parameters(parameters, theta):
    """Set `parameters`, a list of tensors, to the vector `theta` (N,): the inverse of `flatten`."""
    for p, values in zip(parameters, theta.split([p.numel() for p in parameters])):
        p.copy_(values.view_as(p))


def plane_basis(theta, axes):
    """Origin (N,) and basis (2, N) of the plane through three points `theta` (3, N), float64.

    `barycentric`: the origin is θ_0 and the basis are the steps to θ_1 and θ_2. `orthonormal`:
    lengths and angles are those of weight space, the x axis points from θ_0 to θ_1, and the origin
    is the plane's point of least norm. Raises Problem where the points span no plane.
    """
    step_1, step_2 = theta[1:] - theta[0]
    e1 = step_1 / step_1.norm()
    height = step_2 - step_2 @ e1 * e1  # Gram-Schmidt
    if (min(step_1.norm(), step_2.norm()) < 1e-6 * theta[0].norm()
            or height.norm() < 1e-3 * step_2.norm()):
        raise Problem("the three points lie on one line, or two of them coincide (a student near "
                      "its teacher starts where the teacher is): no plane goes through them; take "
                      "another view or another run")
    if axes == "barycentric":
        return theta[0], torch.stack([step_1, step_2])
    e2 = height / height.norm()
    return theta[0] - theta[0] @ e1 * e1 - theta[0] @ e2 * e2, torch.stack([e1, e2])


def error_along_line(a, b, ts, test_error):
    """test_error(state) at the points (1−t)·a + t·b for t in `ts`, as an array; a and b are state
    dicts.

    In float64, because lerp takes no int64, such as batch norm's number of batches.
    """
    return np.array([test_error({name: torch.lerp(p.double(), b[name].double(), t).to(p.dtype)
                                 for name, p in a.items()}) for t in ts])


def barrier(errors):
    """Highest error on a line minus the mean of its ends, in the unit of `errors` (..., points)."""
    return errors.max(-1) - errors[..., [0, -1]].mean(-1)


def summary(errors):
    """Test errors in % (pairs, points) of several lines, in words."""
    found = barrier(errors)
    return f"barrier {found.mean():.1f} points ({found.min():.1f} to {found.max():.1f})"


# ---- Data and files ------------------------------------------------------------------------------

def labelled_subset(x, y, n):
    """n images and labels, each class in its share, or all if n is None; always the same ones.

    In a shuffled order: data sets come sorted by class, and batch norm's statistics of a batch of
    one class would give it away. Raises Problem without labels.
    """
    if len(y.unique()) < 2:
        raise Problem("these images have no labels: name a labelled data set with --dataset")
    x, y = stratified_subset(x, y, n)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def load_shuffled(args, distilled, n, device):
    """n training images of args.dataset, their labels, args.n_test test images, their labels, the
    number of classes, and what a config says of all that.
    """
    data = load_data(args.dataset, distilled["image_size"], device)
    images, labels = labelled_subset(data.train_x, data.train_y, n)
    test_x, test_y = labelled_subset(data.test_x, data.test_y, min(args.n_test, len(data.test_y)))
    data_config = {"n_images": len(images), "n_test_images": len(test_x), "distilled": distilled,
                   "data_checksum": checksum(data), "provenance": provenance(device)}
    return images, labels, test_x, test_y, len(data.classes), data_config


def save_npz(path, config, arrays):
    text = json.dumps(config, allow_nan=False)
    save(path, lambda temporary: np.savez(temporary, config=text, **arrays))


def read_npz(path):
    """(config dict, {name: array}) of a file that plane or connect wrote. Raises Problem."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
            return json.loads(str(arrays.pop("config"))), arrays
    except Exception as error:  # numpy and zipfile have many
        raise Problem(f"{path} is no whole file of landscape.py ({type(error).__name__}): name "
                      "another, or compute it with plane or connect") from None


# ---- plane ---------------------------------------------------------------------------------------

QUANTITIES = {"kl": "KL to the teacher (nats)", "linear_paper": "linear probe, paper (%)",
              "linear_converged": "linear probe, converged (%)"}


def locality(config):
    """A run's α = ε/(1+ε) of the paper, in two decimals; 1e-10 is its "α ≈ 0"."""
    return f"{round(1 - 1 / (1 + float(config['init_eps'])), 2):g}"


def anchors_of(args):
    """(names and Networks of the three anchors, first the teacher, config of run A, which holds
    that of run B). Raises Problem if the runs do not fit.
    """
    teacher, student, config = load_checkpoint(args.a)
    settings = {name: config[name] for name in NETWORK_SETTINGS}
    if args.b:
        teacher_b, student_b, config_b = load_checkpoint(args.b)
        check_same(args.b, config_b, settings)
        if not all(map(torch.equal, teacher.parameters(), teacher_b.parameters())):
            raise Problem(f"{args.a} and {args.b} have different teachers: a shared view wants "
                          "runs with the same --seed")
        names = "θ_T", f"θ*_S({locality(config)})", f"θ*_S({locality(config_b)})"
        return names, (teacher, student, student_b), {**config, "distilled_b": config_b}
    start = init_student(teacher, random_network(2 * config["seed"] + 1, **settings),
                         float(config["init_eps"]))
    names = "θ_T", f"θ_S({locality(config)})", f"θ*_S({locality(config)})"
    return names, (teacher, start, student), config


def plane_args(argv):
    parser = new_parser(plane.__doc__, "landscape.py plane")
    add = parser.add_argument
    add("a", metavar="A", type=Path, help="run directory of distill.py")
    add("b", metavar="B", type=Path, nargs="?", help="another one with the same teacher: the "
        "shared view; without it, the non-local one")
    add("--axes", default="orthonormal", choices=("orthonormal", "barycentric"), help="orthonormal "
        "keeps lengths and angles; barycentric counts in steps from the teacher to the others")
    add("--grid", default=25, type=between(3, 2**31), help="so many points a side")
    for axis in ("--x", "--y"):
        add(axis, type=between(-1e9, 1e9, float), nargs=2, metavar=("LOW", "HIGH"), help="its "
            "lowest and highest value, for a crop or a longer reach; None: well beyond the anchors")
    add("--encoder-only", action="store_true", help="the plane of the encoders' weights; KL "
        "between softmaxed embeddings (Fig. 13-16)")
    add("--n-samples", default=5000, type=POSITIVE, help="at most so many training images, for the "
        "KL and to train the probes on")
    add("--n-test", default=2000, type=POSITIVE, help="at most so many test images, to score the "
        "probes on")
    add("--dataset", help="labelled images; None: those that run A was distilled on")
    add("--out", type=Path, help="the .npz file; None: <A>/plane-<view>.npz, with B's name and "
        "-encoder where they apply")
    add_common_options(add)
    args = parser.parse_args(argv)
    args.view = "shared" if args.b else "non-local"
    other = f"-{run_folder(args.b).name}" if args.b else ""
    name = f"plane-{args.view}{other}" + "-encoder" * args.encoder_only
    args.out = args.out or run_folder(args.a) / f"{name}.npz"
    if args.out.suffix != ".npz":  # its picture will end in .png
        parser.error("--out wants a name that ends in .npz")
    return args


def lay_grid(theta, args):
    """A grid on the plane through the anchors `theta` (3, N), over the ranges args.x and args.y, or
    well beyond the anchors. Returns {"x", "y", "points" (3 + grid², 2), first the anchors}, and a
    function: weights(i) is the vector (N,) at point i.
    """
    origin, basis = plane_basis(theta, args.axes)
    corners = torch.linalg.solve(basis @ basis.T, basis @ (theta - origin).T).T.cpu().numpy()
    low, high = corners.min(0), corners.max(0)
    middle, reach = (low + high) / 2, 0.85 * (high - low).max()
    x, y = (np.linspace(*(limits or (centre - reach, centre + reach)), args.grid)
            for limits, centre in zip((args.x, args.y), middle))
    points = np.concatenate([corners, np.stack(np.meshgrid(x, y), axis=2).reshape(-1, 2)])

    def weights(i):  # the anchors to the last bit
        return theta[i] if i < 3 else origin + torch.from_numpy(points[i]).to(theta) @ basis

    return {"x": x, "y": y, "points": points}, weights


@torch.no_grad()
def kl_to_teacher(teacher, teacher_embeddings, network, embeddings, encoder_only):
    """KL(teacher ‖ network) in nats, mean over the images, from lists of their embeddings (B, r):
    of the logits' softmax or, with `encoder_only`, of the embeddings'. In float64, in which the
    usual form of the KL is exact enough.
    """
    total = 0
    for outputs in zip(teacher_embeddings, embeddings):
        if not encoder_only:
            outputs = (net.last_layer(net.projector(part))
                       for net, part in zip((teacher, network), outputs))
        teacher_logits, logits = (part.double() for part in outputs)
        total += kl_by_log_softmax(teacher_logits, logits).item() * len(logits)
    return total / sum(map(len, embeddings))


def plane(argv):
    """Measure a plane through the teacher and two other points of weight space, to a .npz file
    (Fig. 5, 13-16).

    With two runs, A and B, these are their students (the paper's shared view); with one, its
    student and where that student started (non-local view).

    A point of the plane has weights, but no batch-norm statistics of its own, and an anchor's would
    be wrong anywhere else. So at every point batch norm uses those of each batch, as in the
    student's training. With batch norm, therefore, the KL is not 0 even at θ_T: it is measured from
    the teacher in eval mode.
    """
    args = plane_args(argv)
    device = pick_device(args.device)
    names, networks, distilled = anchors_of(args)
    args.dataset = args.dataset or distilled["dataset"]
    args.amp = pick_amp(args.amp, device, distilled["arch"], distilled["norm"])

    # Data: images the student saw, or of --dataset, normalised as in distilling on all of them
    n_seen = distilled["n_samples"] if args.dataset == distilled["dataset"] else None
    images, labels, test_x, test_y, n_classes, data_config = load_shuffled(args, distilled, n_seen,
                                                                     device)
    stats = channel_stats(images)
    images, labels = labelled_subset(images, labels, min(args.n_samples, len(labels)))
    batches, test_batches = (  # of one size: none is a single image
        [normalise(x, stats)
         for x in part.tensor_split(math.ceil(len(part) / distilled["batch_size"]))]
        for part in (images, test_x))

    # The plane, and a network whose weights go from point to point
    teacher = networks[0]
    network = deepcopy(teacher).train()
    *anchors, parameters = (
        list((net.encoder if args.encoder_only else net).to(device).parameters())
        for net in (*networks, network))
    arrays, weights = lay_grid(torch.stack([flatten(anchor) for anchor in anchors]), args)
    arrays |= {"anchors": np.array(names), **dict.fromkeys(("length", *QUANTITIES), np.empty(0))}
    config = to_config(args) | data_config | {"n_images": len(images)}
    if args.out.exists():
        if not args.resume:
            raise Problem(f"{args.out} exists: add --resume to go on with it, or name another file "
                          "with --out")
        begun_with, arrays = read_npz(args.out)
        check_same(args.out, begun_with, config, MAY_CHANGE | {"a", "b"})
        config["provenance"] = provenance(device, {"config": begun_with})
    say(f"{distilled['arch']}{progress(distilled)} on {args.dataset}: {args.grid} x {args.grid} "
        f"points, KL and probes on {len(images):,} images, scored on {len(test_x):,}, "
        f"m={distilled['out_dim']:,}, {device.type}, amp {args.amp} -> {args.out}")

    save_npz(args.out, config, arrays)  # from here on, nobody else begins it
    # One point at a time: vmap over four took 2.5 times as long (CPU, batches of 128)
    teacher_embeddings = [embed(teacher.encoder, batch) for batch in batches]
    total = len(arrays["points"])
    for i in range(len(arrays["kl"]), total):
        here = weights(i)
        set_parameters(parameters, here)
        features, test_features = ([embed(network.encoder, batch, args.amp) for batch in part]
                                   for part in (batches, test_batches))
        kl = kl_to_teacher(teacher, teacher_embeddings, network, features, args.encoder_only)
        if not math.isfinite(kl):
            raise Problem(f"the network is not finite at {arrays['points'][i].round(3)}: keep --x "
                          "and --y closer to the anchors")
        parts = torch.cat(features), labels, torch.cat(test_features), test_y, n_classes
        measured = {"length": here.norm().item(), "kl": kl,
                    "linear_paper": linear_probe(*parts).item(),
                    "linear_converged": linear_probe_converged(*parts)}
        arrays |= {name: np.append(arrays[name], value) for name, value in measured.items()}
        if i % args.grid == 2:  # at the three anchors, and then at each row of the grid
            save_npz(args.out, config, arrays)
            say(f"{i + 1:7d} of {total} points")
    for i, name in enumerate(arrays["anchors"]):
        say(f"{name:10}" + ", ".join(f"{label} {arrays[quantity][i]:.5g}"
                                     for quantity, label in QUANTITIES.items()))
    say(f"{args.out}: all {total} points are done; to see them: python landscape.py plot "
        f"{args.out}")


# ---- connect -------------------------------------------------------------------------------------

STARTS = "distilled student", "random teacher"


def connect_args(argv):
    parser = new_parser(connect.__doc__, "landscape.py connect")
    add = parser.add_argument
    add("run", type=Path, help="run directory of distill.py, for its last student, or its best.pt")
    add("--copies", default=5, type=between(2, 2**31), help="fine-tuned copies of each start")
    add("--points", default=50, type=between(3, 2**31), help="points on each line, its two ends "
        "among them")
    add("--n-test", default=10_000, type=POSITIVE, help="at most so many test images")
    add("--out", type=Path, help="directory of the copies and connect.npz; None: <run>/connect")
    add_fine_tuning_options(add)
    args = parser.parse_args(argv)
    args.out = args.out or run_folder(args.run) / "connect"
    return args


def connect(argv):
    """Fine-tune copies of the student and of its random teacher, and measure the error between them
    (Fig. 9).

    Copies of one start differ in the order of the data alone; they have the same classifier and are
    trained as prune.py's full network is. Then comes the test error along the straight line between
    every two of them, and its barrier: the highest error minus the mean of the ends. At every point
    batch norm's statistics are computed anew from training images, at the ends, too: a mean of two
    networks' statistics would fit neither, and show a barrier of its own.
    """
    args = connect_args(argv)
    loaded = load_checkpoint(args.run)
    with run_directory(args.out, args.resume, "landscape.py") as checkpoint:
        fine_tune_and_connect(args, *loaded, checkpoint)


def fine_tune_and_connect(args, teacher, student, distilled, checkpoint):
    device = pick_device(args.device)
    fill_in(args, device, distilled)
    images, labels, test_x, test_y, n_classes, data_config = load_shuffled(args, distilled,
                                                                     args.n_samples, device)
    stats, config = channel_stats(images), to_config(args) | data_config
    copies = []  # state dicts, the student's first
    if checkpoint:
        check_same(args.out, checkpoint["config"], config, MAY_CHANGE - {"epochs"})
        config["provenance"] = provenance(device, checkpoint)
        copies = checkpoint["copies"]
    npz = args.out / "connect.npz"
    if npz.exists():
        return say(f"{npz} is complete; to see it: python landscape.py plot {npz}")
    say(f"{distilled['arch']} of {args.run}{progress(distilled)} on {args.dataset}: "
        f"{args.copies} copies each of student and teacher, {len(images):,} images, "
        f"{args.epochs} epochs in batches of {args.batch_size}; lines over {len(test_x):,} test "
        f"images, {device.type}, amp {args.amp} -> {args.out}")

    def classifier_from(network):
        return new_classifier(deepcopy(network.encoder).to(device),
                              EMBEDDING_WIDTH[distilled["arch"]], n_classes, args.seed, args.lr)

    starts = [(title, network, i) for title, network in zip(STARTS, (student, teacher))
              for i in range(args.copies)]
    for title, network, i in starts[len(copies):]:
        network, optimizer = classifier_from(network)
        for _, loss, _ in fine_tune(network, optimizer, images, labels, args, args.seed + i):
            pass
        if not loss.isfinite():
            raise Problem("the loss of a copy is not finite: lower --lr or set --amp off; what "
                          f"{args.out} held is kept")
        copies.append({name: t.cpu() for name, t in network.state_dict().items()})
        save(args.out / "last.pt", {"format": "landscape.py 4", "config": config,
                                    "copies": copies})
        say(f"{title}, copy {i}: test error "
            f"{100 - classification_accuracy(network, test_x, test_y, stats, args.amp):.2f} %")

    between_copies, _ = classifier_from(student)  # its weights go along the lines
    # For batch norm's statistics at a point: 2,000 images give 32,000 values a channel even in the
    # 4×4 maps of ResNet18's end. Batches of one size, so that all images count alike
    bn_batches = [normalise(x, stats) for x in images[:2000].tensor_split(4)]

    def test_error(state):
        """Test error in % with batch norm's statistics of this very state."""
        between_copies.load_state_dict(state)
        with autocast(device, args.amp):
            update_bn(bn_batches, between_copies.encoder)
        return 100 - classification_accuracy(between_copies, test_x, test_y, stats, args.amp)

    ts, pairs = np.linspace(0, 1, args.points), list(itertools.combinations(range(args.copies), 2))
    errors = np.array([[error_along_line(copies[first + a], copies[first + b], ts, test_error)
                        for a, b in pairs] for first in (0, args.copies)])
    save_npz(npz, config, {"t": ts, "error": errors})
    for title, lines in zip(STARTS, errors):
        say(f"{title}: {summary(lines)}")
    say(f"{npz} is complete; to see it: python landscape.py plot {npz}")


# ---- Pictures, drawn from the files alone --------------------------------------------------------

def plot(argv):
    """Draw what plane or connect computed: a panel for each quantity, or each start of lines."""
    parser = new_parser(plot.__doc__, "landscape.py plot")
    add = parser.add_argument
    add("file", type=Path, help=".npz file of plane or of connect")
    add("--figure", type=Path, help="the picture: .png, .pdf or .svg; None: beside the file")
    args = parser.parse_args(argv)
    config, arrays = read_npz(args.file)
    figure = draw_plane(config, arrays) if "kl" in arrays else draw_lines(arrays)
    figure.suptitle(describe(config))
    picture = args.figure or args.file.with_suffix(".png")
    save(picture, lambda temporary: figure.savefig(temporary, dpi=150))
    say(f"the picture: {picture}")


def describe(config):
    """Network, number of images and what was done, in words."""
    distilled, done = config["distilled"], f"{config.get('epochs')} epochs of fine-tuning"
    if "view" in config:
        points = {"shared": "two students", "non-local": "its student's start and end"}
        encoders = " (encoders)" * config["encoder_only"]
        done = (f"a plane through the teacher and {points[config['view']]}{encoders}, "
                f"α = ε/(1+ε) in brackets; white: ‖θ‖")
    return (f"{distilled['arch']} ({distilled['l2_bottleneck']}, m = {distilled['out_dim']:,}), "
            f"{config['n_images']:,} images of {Path(config['dataset']).name}; {done}")


def draw_plane(config, arrays):
    """A panel for every quantity; white contours of ‖θ‖ and the three anchors (Fig. 5)."""
    from matplotlib import colors, pyplot
    done, total = len(arrays["kl"]), len(arrays["points"])
    if done < total:
        raise Problem(f"only {done} of {total} points are measured: finish it with --resume first")
    figure, axes = pyplot.subplots(1, 3, figsize=(12.5, 4), layout="constrained")
    x, y = arrays["x"], arrays["y"]
    for axis, (quantity, label) in zip(axes, QUANTITIES.items()):
        values, length = (arrays[name][3:].reshape(len(y), len(x)) for name in (quantity, "length"))
        bright = {"cmap": "viridis"}  # is good, in all panels
        if quantity == "kl":
            extremes = np.quantile(values.clip(1e-9), (0.005, 0.995))  # a log has no 0
            bright = {"cmap": "viridis_r", "norm": colors.LogNorm(*extremes, clip=True)}
        mesh = axis.pcolormesh(x, y, values, **bright)
        figure.colorbar(mesh, ax=axis, label=label)
        axis.clabel(axis.contour(x, y, length, 6, colors="white", linewidths=0.8))
        axis.autoscale(False)  # anchors beyond a crop do not widen it
        # the grid may miss the anchors: here are their own colours
        axis.scatter(*arrays["points"][:3].T, 80, arrays[quantity][:3], edgecolors="white",
                     zorder=3, norm=mesh.norm, cmap=mesh.cmap)
        for point, name in zip(arrays["points"], arrays["anchors"]):
            symbol = name.replace("*_S", "_S^*").replace("θ", r"\theta")
            axis.annotate(f"${symbol}$", point, (7, 5), textcoords="offset points", fontsize=12,
                          clip_on=True, bbox={"color": "white", "alpha": 0.6, "pad": 1})
        axis.set(xlabel=f"steps to {arrays['anchors'][1]}", ylabel=f"to {arrays['anchors'][2]}")
        if config["axes"] == "orthonormal":
            axis.set(aspect="equal", xlabel="distance in weight space", ylabel="distance")
    return figure


def draw_lines(arrays):
    """Test error between fine-tuned copies of a start (Fig. 9)."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 2, figsize=(7.5, 4), sharey=True, layout="constrained")
    for axis, title, errors in zip(axes, STARTS, arrays["error"]):
        t, mean = arrays["t"], errors.mean(0)
        axis.plot(t, errors.T, color="grey")
        axis.plot(t, mean, linewidth=2.5)
        top = t[mean.argmax()]
        axis.annotate("barrier", (top, mean.max()), (top, (mean[0] + mean[-1]) / 2), ha="center",
                      arrowprops={"arrowstyle": "<-"})
        axis.set(title=f"copies of the {title}\n{summary(errors)}", ylabel="test error (%)",
                 xlabel=f"from copy (0) to copy (1)\n{len(errors)} pairs; thick: their mean")
    return figure


# ---- Main ----------------------------------------------------------------------------------------

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    commands = {"plane": plane, "connect": connect, "plot": plot}
    parser = new_parser(__doc__)
    parser.add_argument("command", choices=commands, help="each has a --help of its own")
    commands[parser.parse_args(argv[:1]).command](argv[1:])


if __name__ == "__main__":
    main()
