#!/usr/bin/env python3
"""What does the loss look like around a random teacher? Planes, lines between solutions, pictures.

    a=runs/cifar10-vgg11-eps1e-10-seed0 b=runs/cifar10-vgg11-epsinf-seed0
    python landscape.py plane $a $b                  the teacher and both students (Fig. 5)
    python landscape.py plane $b                     the teacher, a student's start and its end
    python landscape.py connect runs/cifar10-resnet18-eps0-seed0/best.pt    one basin? (Fig. 9)
    python landscape.py plot $a/*.npz $b/*.npz --figure planes.png          draws the two planes

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
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import update_bn

from distill import (
    ARCHS, MAY_CHANGE, POSITIVE, SETTINGS, Problem, add_common_options,
    add_fine_tuning_options, autocast, channel_stats, check_same, checkpoint_to_resume,
    classification_accuracy, classifier, embed, fill_defaults, fine_tune, fingerprint, init_student,
    kl_by_log_softmax, load_checkpoint, load_data, load_networks, make_parser, new_figure,
    normalise, number, pick_amp, pick_device, picture, progress, provenance, random_network,
    run_cli, run_folder, save_checkpoint, save_figure, say, stratified_subset, to_config,
    write_atomically)
from probe import linear_probe, linear_probe_converged, mean_std

RANGE = {"nargs": 2, "metavar": ("LOW", "HIGH")}  # of an option that wants two numbers
FREE = (MAY_CHANGE - {"epochs"}) | {"a", "b", "run", "made"}  # what may change on --resume


# ---- Geometry: planes and lines in weight space --------------------------------------------------

def flat(parameters):
    """A list of tensors, with N numbers in all, as one float64 vector (N,)."""
    return torch.cat([p.detach().reshape(-1) for p in parameters]).double()


@torch.no_grad()
def place(parameters, theta):
    """Set `parameters`, a list of tensors, to the vector `theta` (N,): the inverse of `flat`."""
    for p, values in zip(parameters, theta.split([p.numel() for p in parameters])):
        p.copy_(values.view_as(p))


def plane_basis(theta, axes):
    """Origin (N,) and basis (2, N) of the plane through three points `theta` (3, N), float64.

    `barycentric`: the origin is θ_0 and the basis are the steps to θ_1 and θ_2. `orthonormal`:
    lengths and angles are those of weight space, the x axis points from θ_0 to θ_1, and the origin
    is the plane's point of least norm. Raises Problem where the points span no plane.
    """
    step_1, step_2 = theta[1:] - theta[0]
    e1 = step_1 / step_1.norm().clamp(min=1e-300)
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


def coordinates(theta, origin, basis):
    """Coordinates (3, 2) of the points `theta` (3, N) on the plane with that origin and basis."""
    return torch.linalg.solve(basis @ basis.T, basis @ (theta - origin).T).T.cpu().numpy()


def error_along_line(a, b, ts, error):
    """error(state) at the points (1−t)·a + t·b for t in `ts`, as an array; a and b are state dicts.

    In float64, so that the ends are exact, and a line between equal networks is one point.
    """
    return np.array([error({name: torch.lerp(p.double(), b[name].double(), t).to(p.dtype)
                            for name, p in a.items()}) for t in ts])


def barrier(errors):
    """Highest error on a line minus the mean of its ends, in the unit of `errors` (..., points)."""
    return errors.max(-1) - errors[..., [0, -1]].mean(-1)


def summary(errors):
    """Test errors in % (pairs, points) of several lines, in words."""
    return (f"test error at the ends {errors[:, [0, -1]].mean():.2f} %, barrier "
            f"{mean_std(barrier(errors))} points, {len(errors)} pairs")


# ---- Data and files ------------------------------------------------------------------------------

def labelled_subset(x, y, n):
    """n images and labels, each class in its share, or all if n is None; always the same ones.

    In a shuffled order: data sets come sorted by class, and a batch norm that sees one class at a
    time would give it away. Raises Problem without labels.
    """
    if len(y.unique()) < 2:
        raise Problem("these images have no labels: name a labelled data set with --dataset")
    x, y = stratified_subset(x, y, n)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def load_shuffled(args, distilled, n, device):
    """n training images of args.dataset, their labels, args.n_test test images, their labels, and
    the number of classes.
    """
    data = load_data(args.dataset, distilled["image_size"], args.data_dir, args.mirror, n, device)
    return (*labelled_subset(data.train_x, data.train_y, n),
            *labelled_subset(data.test_x, data.test_y, min(args.n_test, len(data.test_y))),
            len(data.classes))


def full_config(args, images, test_images, networks, distilled, device):
    """The options, and what they do not say: how much data, which networks, on which machine."""
    return to_config(args) | {
        "n_images": len(images), "n_test_images": len(test_images),
        "starting_weights": [fingerprint(network) for network in networks],
        "distilled": distilled, "made": provenance(device)}


def save_npz(path, config, arrays):
    write_atomically(path, lambda file: np.savez(file, config=json.dumps(config), **arrays))


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


def locality(eps):
    """The paper's α = ε/(1+ε), in two decimals; 1e-10 is its "α ≈ 0"."""
    return f"{round(1 - 1 / (1 + eps), 2):g}"


def anchors_of(args):
    """(names and Networks of the three anchors, first the teacher, config of run A). Raises Problem
    if the runs do not fit.
    """
    teacher, student, config = load_networks(args.a)
    alpha, settings = locality(config["init_eps"]), {key: config[key] for key in SETTINGS}
    if args.b:
        teacher_b, student_b, config_b = load_networks(args.b)
        check_same(args.b, config_b, settings)
        if fingerprint(teacher) != fingerprint(teacher_b):
            raise Problem(f"{args.a} and {args.b} have different teachers: a shared view wants "
                          "runs with the same --seed")
        names = "θ_T", f"θ*_S({alpha})", f"θ*_S({locality(config_b['init_eps'])})"
        return names, (teacher, student, student_b), config
    start = init_student(teacher, random_network(2 * config["seed"] + 1, **settings),
                         config["init_eps"])
    return ("θ_T", f"θ_S({alpha})", f"θ*_S({alpha})"), (teacher, start, student), config


def plane_args(argv):
    parser, add = make_parser(plane.__doc__, "landscape.py plane")
    parser.add_argument("a", metavar="A", type=Path, help="run directory of distill.py")
    parser.add_argument("b", metavar="B", type=Path, nargs="?",
                        help="another one with the same teacher: the shared view; without it, the "
                             "non-local one")
    add("--axes", "orthonormal keeps lengths and angles; barycentric counts in steps from the "
        "teacher to the others", "orthonormal", choices=("orthonormal", "barycentric"))
    add("--grid", "so many points a side", 25, type=number(int, 3))
    for axis in ("--x", "--y"):
        add(axis, "its lowest and highest value, for a crop or a longer reach (default: well "
            "beyond the three points)", type=number(float, -1e9, 1e9), **RANGE)
    add("--encoder-only", "the plane of the encoders' weights; KL between softmaxed embeddings "
        "(Fig. 13-16)", False, action="store_true")
    add("--n-samples", "at most so many training images, for the KL and to train the probes on",
        5000, type=POSITIVE)
    add("--n-test", "at most so many test images, to score the probes on", 2000, type=POSITIVE)
    add("--dataset", "labelled images (default: those that run A was distilled on)")
    add("--out", "the .npz file (default: <A>/plane-<view>.npz, with B's name and -encoder where "
        "they apply)", type=Path)
    add_common_options(add)
    args = parser.parse_args(argv)
    args.view = "shared" if args.b else "non-local"
    other = f"-{run_folder(args.b).name}" if args.b else ""
    encoder = "-encoder" * args.encoder_only
    args.out = args.out or run_folder(args.a) / f"plane-{args.view}{other}{encoder}.npz"
    if args.out.suffix != ".npz":  # its picture will end in .png
        parser.error("--out wants a name that ends in .npz")
    return args


def plane(argv):
    """Measure a plane through the teacher and two other points of weight space, to a .npz file
    (Fig. 5, 13-16).

    With two runs, A and B, these are their students (the paper's shared view); with one, its
    student and where that student started (non-local view).

    A point of the plane has weights, but no batch-norm statistics of its own, and those of an
    anchor would normalise by the wrong mean and variance anywhere else. So at every point each
    batch is normalised by its own statistics, as in the student's training. (So with batch norm the
    KL at θ_T is not 0: the teacher it is measured from is in eval mode.)
    """
    args = plane_args(argv)
    device = pick_device(args.device)
    names, networks, distilled = anchors_of(args)
    args.dataset = args.dataset or distilled["dataset"]
    args.amp = pick_amp(args.amp, device, distilled["arch"], distilled["norm"])

    # Data: some of the images the student saw, normalised as they were for it
    seen = distilled["n_samples"] if args.dataset == distilled["dataset"] else None
    images, labels, test_x, test_y, n_classes = load_shuffled(args, distilled, seen, device)
    stats = channel_stats(images)
    images, labels = labelled_subset(images, labels, min(args.n_samples, len(labels)))
    batches, test_batches = (  # even ones: none of a single image
        [normalise(x, stats)
         for x in part.tensor_split(math.ceil(len(part) / distilled["batch_size"]))]
        for part in (images, test_x))

    # The plane: the anchors, and then a grid that reaches well beyond them
    teacher = networks[0].to(device).eval()
    network = deepcopy(teacher).requires_grad_(False).train()  # its weights go from point to point
    *anchors, parameters = (
        list((net.encoder if args.encoder_only else net).to(device).parameters())
        for net in (*networks, network))
    theta = torch.stack([flat(anchor) for anchor in anchors])
    origin, basis = plane_basis(theta, args.axes)
    corners = coordinates(theta, origin, basis)
    low, high = corners.min(0), corners.max(0)
    middle, reach = (low + high) / 2, 0.85 * (high - low).max()
    x, y = (np.linspace(*(limits or (centre - reach, centre + reach)), args.grid)
            for limits, centre in zip((args.x, args.y), middle))
    grid = np.stack(np.meshgrid(x, y), axis=2).reshape(-1, 2)
    arrays = {"x": x, "y": y, "points": np.concatenate([corners, grid]),
              "anchors": np.array(names),
              **dict.fromkeys(("norm", *QUANTITIES), np.empty(0))}
    config = full_config(args, images, test_x, networks, distilled, device)
    if args.out.exists():
        if not args.resume:
            raise Problem(f"{args.out} exists: add --resume to go on with it, or name another file "
                          "with --out")
        begun_with, arrays = read_npz(args.out)
        check_same(args.out, begun_with, config, FREE)
        config["made"] = [*np.ravel(begun_with["made"]), config["made"]]
    else:
        save_npz(args.out, config, arrays)  # if it cannot be written, say so now
    say(f"{distilled['arch']}{progress(distilled)} on {args.dataset}: {args.grid} x {args.grid} "
        f"points, KL and probes on {len(images):,} images, scored on {len(test_x):,}, "
        f"m={distilled['out_dim']:,}, {device.type}, amp {args.amp} -> {args.out}")

    with torch.no_grad():  # the same at every point
        teacher_embeddings = [embed(teacher.encoder, batch) for batch in batches]

    def logits(net, embeddings):
        """What KL compares, in float64, in which its usual form is exact enough (KLDivergence)."""
        if not args.encoder_only:
            embeddings = net.last_layer(net.projector(embeddings))
        return embeddings.double()

    def measure(i):
        """{quantity: its value} at point i.

        One point at a time: vmap over four points took 2.5 times as long (CPU; ResNet20 and VGG11,
        batches of 128).
        """
        point = torch.from_numpy(arrays["points"][i]).to(device)
        here = theta[i] if i < 3 else origin + point @ basis  # the anchors to the last bit
        place(parameters, here)
        with torch.no_grad():
            features, test_features = ([embed(network.encoder, batch, args.amp) for batch in part]
                                       for part in (batches, test_batches))
            kl = sum(kl_by_log_softmax(logits(teacher, t), logits(network, s)).item() * len(t)
                     for t, s in zip(teacher_embeddings, features)) / len(images)
        if not math.isfinite(kl):
            raise Problem(f"the network is not finite at {arrays['points'][i].round(3)}: keep --x "
                          "and --y closer to the anchors")
        parts = torch.cat(features), labels, torch.cat(test_features), test_y, n_classes
        return {"norm": here.norm().item(), "kl": kl, "linear_paper": linear_probe(*parts).item(),
                "linear_converged": linear_probe_converged(*parts)}

    clock, total = time.time(), len(arrays["points"])
    for i in range(len(arrays["kl"]), total):
        for name, value in measure(i).items():
            arrays[name] = np.append(arrays[name], value)
        if i % args.grid == 2:  # at the three anchors, and then at each row of the grid
            save_npz(args.out, config, arrays)
            say(f"{i + 1:7d} of {total} points, {time.time() - clock:.0f} s")
    for i, name in enumerate(arrays["anchors"]):
        say(f"{name:10}" + ", ".join(f"{label} {arrays[quantity][i]:.5g}"
                                     for quantity, label in QUANTITIES.items()))
    say(f"{args.out}: all {total} points are done; to see them: python landscape.py plot "
        f"{args.out}")


# ---- connect -------------------------------------------------------------------------------------

INITS = "distilled student", "random init"


def connect_args(argv):
    parser, add = make_parser(connect.__doc__, "landscape.py connect")
    parser.add_argument("run", type=Path,
                        help="run directory of distill.py, for its last student, or its best.pt")
    add("--copies", "fine-tuned copies of each start", 5, type=number(int, 2))
    add("--points", "points on each line, its two ends among them", 50, type=number(int, 3))
    add_fine_tuning_options(add)
    add("--n-test", "at most so many test images, for the lines", 10_000, type=POSITIVE)
    add("--out", "directory of the copies and connect.npz (default: <run>/connect)", type=Path)
    add_common_options(add)
    args = parser.parse_args(argv)
    args.out = args.out or run_folder(args.run) / "connect"
    return args


def connect(argv):
    """Fine-tune copies of the student and of its random teacher, and measure the error between them
    (Fig. 9).

    Copies of one start differ in the order of the data alone; they have the same classifier and are
    trained as prune.py's full network is. Then comes the test error along the straight line between
    every two of them, and its barrier: the highest error minus the mean of the ends. At every point
    batch norm's statistics are computed anew from training images: a mean of two networks'
    statistics would fit neither, and show a barrier of its own.
    """
    args = connect_args(argv)
    device = pick_device(args.device)
    teacher, student, distilled = load_checkpoint(args.run, device)
    fill_defaults(args, distilled)
    checkpoint = checkpoint_to_resume(args, "landscape.py", FREE)
    args.amp = pick_amp(args.amp, device, distilled["arch"], distilled["norm"])
    images, labels, test_x, test_y, n_classes = load_shuffled(args, distilled, args.n_samples,
                                                              device)
    stats = channel_stats(images)
    starts = dict(zip(INITS, (student, teacher)))
    config = full_config(args, images, test_x, starts.values(), distilled, device)
    copies = []  # state dicts, the student's first
    if checkpoint:
        begun_with, copies = checkpoint["config"], checkpoint["copies"]
        check_same(args.out, begun_with, config, FREE | {"distilled"})
        config["made"] = [*np.ravel(begun_with["made"]), config["made"]]
    npz = args.out / "connect.npz"
    if npz.exists():
        return say(f"{npz} is complete; to see it: python landscape.py plot {npz}")
    say(f"{distilled['arch']} of {args.run}{progress(distilled)} on {args.dataset}: "
        f"{args.copies} copies each of student and random init, {len(images):,} images, "
        f"{args.epochs} epochs in batches of {args.batch_size}; lines over {len(test_x):,} test "
        f"images, {device.type}, amp {args.amp} -> {args.out}")

    def new_classifier(encoder):
        return classifier(deepcopy(encoder), ARCHS[distilled["arch"]][1], n_classes, args, device)

    for init, copy in list(itertools.product(INITS, range(args.copies)))[len(copies):]:
        network, *trained_by = new_classifier(starts[init])
        for _, loss in fine_tune(network, *trained_by, images, labels, args, args.seed + copy):
            pass
        if not loss.isfinite():
            raise Problem("the loss of a copy is not finite: lower --lr or take --amp off; what "
                          f"{args.out} held is kept")
        copies.append({name: t.cpu() for name, t in network.state_dict().items()})
        save_checkpoint(args.out / "last.pt", "landscape.py", config=config, copies=copies)
        say(f"{init}, copy {copy}: test error "
            f"{100 - classification_accuracy(network, test_x, test_y, stats, args.amp):.2f} %")

    between, *_ = new_classifier(student)  # its weights go along the lines
    # For batch norm's statistics at a point: 2,000 images give 32,000 values a channel even in the
    # 4×4 maps of ResNet18's end. Batches of one size, so that all images count alike
    bn_batches = [normalise(x, stats) for x in images[:2000].tensor_split(4)]

    def error(state):
        """Test error in % with batch norm's statistics of this very state."""
        between.load_state_dict(state)
        with autocast(device, args.amp):
            update_bn(bn_batches, between.encoder)
        return 100 - classification_accuracy(between, test_x, test_y, stats, args.amp)

    ts, pairs = np.linspace(0, 1, args.points), list(itertools.combinations(range(args.copies), 2))
    errors = np.array([[error_along_line(copies[i + a], copies[i + b], ts, error)
                        for a, b in pairs] for i in (0, args.copies)])
    save_npz(npz, config, {"t": ts, "error": errors})
    for init, lines in zip(INITS, errors):
        say(f"{init}: {summary(lines)}")
    say(f"{npz} is complete; to see it: python landscape.py plot {npz}")


# ---- Pictures, drawn from the files alone --------------------------------------------------------

def plot(argv):
    """Draw what plane or connect computed: planes, a row each with a column a quantity; or lines,
    one panel a start.
    """
    parser, add = make_parser(plot.__doc__, "landscape.py plot")
    parser.add_argument("files", nargs="+", type=Path,
                        help=".npz files of plane, or of connect (their pairs are pooled)")
    add("--figure", "the picture: .png, .pdf or .svg (default: beside the first file, .png)",
        type=picture)
    add("--kl-range", "ends of the colours for the KL; the paper's are 1e-7 1e-3, with raw rows "
        "(default: from the data)", type=number(float, 1e-300), **RANGE)
    add("--accuracy-range", "ends of the colours for accuracy in %%; the paper's are 10 50 "
        "(default: from the data)", type=number(float, 0), **RANGE)
    args = parser.parse_args(argv)
    files = {path: read_npz(path) for path in args.files}
    are_planes = {"kl" in arrays for _, arrays in files.values()}
    if len(are_planes) > 1:
        raise Problem("planes and lines do not go into one picture: plot them apart")
    figure = draw_planes(files, args) if True in are_planes else draw_lines(files)
    save_figure(figure, args.figure or args.files[0].with_suffix(".png"))


def describe(config):
    """Network, number of images and what was done, in words."""
    distilled, done = config["distilled"], f"{config.get('epochs')} epochs of fine-tuning"
    if "view" in config:
        encoders = " of encoders" * config["encoder_only"]
        done = f"{config['view']} view{encoders}, m = {distilled['out_dim']:,}"
    rows = ", raw rows" * (distilled.get("bottleneck") == "lf/l")
    images = f"{config['n_images']:,} images of {Path(config['dataset']).name}"
    return f"{distilled['arch']}{rows}, {images}; {done}"


def draw_planes(files, args):
    """A row for every file, a column for every quantity; white contours of ‖θ‖ and the three
    anchors (Fig. 5).
    """
    from matplotlib.colors import LogNorm, Normalize
    for path, (_, arrays) in files.items():
        done, total = len(arrays["kl"]), len(arrays["points"])
        if done < total:
            raise Problem(f"{path} holds {done} of {total} points: finish it with --resume first")
    figure, axes = new_figure(len(files), 3, figsize=(12.5, 4 * len(files)), squeeze=False)
    for column, (quantity, label) in zip(axes.T, QUANTITIES.items()):
        everything = np.concatenate([arrays[quantity] for _, arrays in files.values()])
        limits, scale = args.accuracy_range or (everything.min(), everything.max()), Normalize
        if quantity == "kl":
            extremes = np.quantile(everything[everything > 0], (0.005, 0.995))
            limits, scale = args.kl_range or extremes, LogNorm
        for axis, (config, arrays) in zip(column, files.values()):
            x, y = arrays["x"], arrays["y"]
            values, norm = (arrays[key][3:].reshape(len(y), len(x)) for key in (quantity, "norm"))
            colours = axis.pcolormesh(x, y, values, norm=scale(*sorted(limits), clip=True),
                                      rasterized=True)
            axis.clabel(axis.contour(x, y, norm, 6, colors="white", linewidths=0.8), fontsize=7)
            axis.autoscale(False)  # anchors beyond a crop do not widen it
            for point, name, marker in zip(arrays["points"], arrays["anchors"], "*os"):
                symbol = str(name).replace("*_S", "_S^*").replace("θ", r"\theta")
                axis.plot(*point, marker, color="black", markeredgecolor="white", markersize=9)
                axis.annotate(f"${symbol}$", point, (7, 5), textcoords="offset points",
                              fontsize=12, clip_on=True,
                              bbox={"color": "white", "alpha": 0.6, "pad": 1})
            axis.set_xlabel(f"steps to {arrays['anchors'][1]}")
            if config["axes"] == "orthonormal":
                axis.set(aspect="equal", xlabel="distance in weight space")
        figure.colorbar(colours, ax=column, label=label)
    titles = "\n".join(describe(config) for config, _ in files.values())
    figure.suptitle(f"{titles}; white lines: ‖θ‖", fontsize=10)
    return figure


def draw_lines(files):
    """Test error between fine-tuned copies: every pair a thin line, their mean a thick one (Fig.
    9).
    """
    kinds = {(describe(config), config["lr"], config["points"], config["distilled"]["init_eps"])
             for config, _ in files.values()}
    if len(kinds) > 1:
        raise Problem(f"these lines are of different experiments: plot them apart, {sorted(kinds)}")
    config, arrays = files[min(files)]
    figure, axes = new_figure(1, 2, figsize=(7, 3.6), sharey=True)
    for start, (axis, title) in enumerate(zip(axes, INITS)):
        errors = np.concatenate([lines["error"][start] for _, lines in files.values()])
        axis.plot(arrays["t"], errors.T, color="grey", linewidth=0.8)
        axis.plot(arrays["t"], errors.mean(0), linewidth=2.5)
        say(f"{title}: {summary(errors)}")
        axis.set(title=f"{title}\nbarrier {mean_std(barrier(errors))}, {len(errors)} pairs",
                 xlabel="position on the line", ylabel="test error (%)")
    figure.suptitle(describe(config), fontsize=10)
    return figure


# ---- Main ----------------------------------------------------------------------------------------

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    commands = {"plane": plane, "connect": connect, "plot": plot}
    parser, _ = make_parser(__doc__)
    parser.add_argument("command", choices=commands, help="each has a --help of its own")
    commands[parser.parse_args(argv[:1]).command](argv[1:])


if __name__ == "__main__":
    run_cli(main)
