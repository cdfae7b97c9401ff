#!/usr/bin/env python3
"""What does the loss look like around a random teacher? Planes through it, lines between solutions,
and their pictures.

    a=runs/cifar10-vgg11-eps1e-10-seed0 b=runs/cifar10-vgg11-epsinf-seed0
    python landscape.py plane $a $b                  the teacher and both students (Fig. 5)
    python landscape.py plane $b --view non-local    the teacher, a student's start and its end
    python landscape.py connect runs/cifar10-resnet18-eps0-seed0    one basin? (Fig. 9)
    python landscape.py plot $b/*.npz --figure planes.png           draws what these computed

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
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import update_bn

from distill import (
    ARCHS, MAY_CHANGE, POSITIVE, SHAPE, Data, KLDivergence, Problem, add_common_options,
    add_fine_tuning_options, autocast, channel_stats, check_same, checkpoint_to_resume,
    classification_accuracy, classifier, complete, embed, fine_tune, fingerprint, init_student,
    kl_by_log_softmax, load_checkpoint, load_data, load_networks, make_parser, new_figure,
    normalise, number, pick_amp, pick_device, picture, plain, provenance, random_network, run_cli,
    save_checkpoint, save_figure, stratified_subset, write_atomically)
from probe import linear_probe_converged, linear_probe_paper, mean_std

FREE = MAY_CHANGE - {"epochs"} | {"a", "b", "run"}  # what may change on --resume


# ---- Geometry: points of a plane, or of a line, as mixtures of networks --------------------------
# A point is written by its coefficients c: θ = θ_0 + Σ c_i·(θ_i − θ_0). That is all one needs:
# lengths and angles follow from the inner products of θ_0 and the differences, and no basis vector
# as long as the network is ever made.

@torch.no_grad()
def place(parameters, anchors, coefficients):
    """Move `parameters`, a list of tensors, to θ_0 + Σ c_i·(θ_i − θ_0); `anchors` are as long lists
    θ_0, θ_1, ...

    In float64 and with θ_0's own coefficient, 1 − Σ c_i: so rounding to float32 gives every anchor
    back to the last bit.
    """
    coefficients = [1 - sum(coefficients), *coefficients]
    for p, *corners in zip(parameters, *anchors):
        p.copy_(sum(c * corner.double() for c, corner in zip(coefficients, corners)))


def inner_products(anchors):
    """(3, 3) float64 inner products of θ_0, θ_1 − θ_0 and θ_2 − θ_0."""
    theta = torch.stack([torch.cat([p.detach().reshape(-1) for p in anchor])
                         for anchor in anchors]).double()
    theta[1:] -= theta[0]
    return (theta @ theta.T).cpu().numpy()


def plane_basis(products, axes):
    """Coordinates of the three anchors on the plane, (3, 2) float64; the map from coefficients to
    them is affine.

    `barycentric`: (0, 0), (1, 0), (0, 1). `orthonormal`: lengths and angles are those of weight
    space, the x axis points from θ_0 to θ_1, and the origin is the plane's point of least norm.
    Raises Problem where the points span no plane.
    """
    norm_0, d1, d2 = np.sqrt(products.diagonal())
    cosine = products[1, 2] / (d1 * d2) if d1 * d2 > 0 else 1.0
    if min(d1, d2) < 1e-6 * norm_0 or 1 - cosine**2 < 1e-6:
        raise Problem("the three points lie on one line, or two of them coincide (a student near "
                      "its teacher starts where "
                      "the teacher is): no plane goes through them; take another view or another "
                      "run")
    if axes == "barycentric":
        return np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # Gram-Schmidt on the differences; θ_0's own coordinates are its components along the plane
    along, height = products[1, 2] / d1, d2 * math.sqrt(1 - cosine**2)
    x0 = products[0, 1] / d1
    y0 = (products[0, 2] - along * x0) / height
    return np.array([[x0, y0], [x0 + d1, y0], [x0 + along, y0 + height]])


def to_coefficients(points, anchors):
    """Coefficients (n, 2) of the points (n, 2) on the plane whose anchors have the coordinates
    `anchors` (3, 2).
    """
    return (points - anchors[0]) @ np.linalg.inv(anchors[1:] - anchors[0])


def norms(coefficients, products):
    """‖θ‖₂ (n,) of the points with these coefficients (n, 2)."""
    v = np.column_stack([np.ones(len(coefficients)), coefficients])
    return np.sqrt(np.einsum("ni,ij,nj->n", v, products, v).clip(0))


def default_limits(anchors, axes):
    """(x low, high), (y low, high) of a square that reaches well beyond the three anchors."""
    if axes == "barycentric":
        return (-0.5, 1.5), (-0.5, 1.5)
    low, high = anchors.min(0), anchors.max(0)
    reach = 0.85 * (high - low).max()
    return tuple((middle - reach, middle + reach) for middle in (low + high) / 2)


def error_along_line(a, b, ts, error):
    """error(state) at the points (1−t)·a + t·b for t in `ts`, as an array; a and b are state dicts.

    In float64, as `place`: the ends are exact, and a line between equal networks is one point.
    """
    def mix(p, q, t):
        return ((1 - t) * p.double() + t * q.double()).to(p.dtype) if p.is_floating_point() else p

    return np.array([error({name: mix(p, b[name], t) for name, p in a.items()}) for t in ts])


def barrier(errors):
    """Highest error on a line minus the mean of its two ends, in the unit of `errors` (...,
    points).
    """
    return errors.max(-1) - (errors[..., 0] + errors[..., -1]) / 2


# ---- Data and files ------------------------------------------------------------------------------

def labelled_subset(x, y, n):
    """A stratified subset of n images and labels, or all if n is None, always the same ones in the
    same order.

    The order is shuffled: data sets come sorted by class, and a batch norm that sees one class at a
    time would give it away. Raises Problem without labels.
    """
    if len(y.unique()) < 2:
        raise Problem("these images have no labels: name a labelled data set with --dataset")
    x, y, *_ = stratified_subset(Data(x, y, None, None, None), n)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def save_npz(path, config, arrays):
    write_atomically(path, lambda file: np.savez(file, config=json.dumps(config), **arrays))


def read_npz(path):
    """(config dict, {name: array}) of a file that plane or connect wrote. Raises Problem."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
            return json.loads(str(arrays.pop("config"))), arrays
    except FileNotFoundError:
        raise Problem(f"no file {path}: make one with landscape.py plane or connect") from None
    except Exception as error:  # numpy and zipfile have many
        raise Problem(f"{path} is truncated or not a file of landscape.py "
                      f"({type(error).__name__}): compute it again") from None


# ---- plane ---------------------------------------------------------------------------------------

QUANTITIES = {"kl": "KL to the teacher (nats)", "linear_paper": "linear probe, paper (%)",
              "linear_converged": "linear probe, converged (%)"}


def locality(eps):
    """The paper's α = ε/(1+ε), in two digits; 1e-10 is its "α ≈ 0"."""
    return f"{round(eps / (1 + eps), 2):g}" if eps < math.inf else "1"


def anchors_of(args):
    """(teacher, {name: Network} of the three anchors, config of run A). Raises Problem if the runs
    do not fit.
    """
    teacher, student, config = load_networks(args.a)
    alpha, shape = locality(config["init_eps"]), {key: config[key] for key in SHAPE}
    if args.view == "shared":
        teacher_b, student_b, config_b = load_networks(args.b)
        check_same(f"{args.a} to {args.b}", shape, {key: config_b[key] for key in SHAPE})
        if fingerprint(teacher) != fingerprint(teacher_b):
            raise Problem(f"{args.a} and {args.b} have different teachers: a shared view wants "
                          "runs with the same --seed "
                          f"(here {config['seed']} and {config_b['seed']})")
        alpha_b = locality(config_b["init_eps"])
        return teacher, {"θ_T": teacher, f"θ*_S({alpha})": student,
                         f"θ*_S({alpha_b})": student_b}, config
    redrawn = random_network(2 * config["seed"], **shape)
    if not config["teacher"] and fingerprint(teacher) != fingerprint(redrawn):
        raise Problem(f"this version of torch does not draw the teacher of {args.a} again from its "
                      "seed, so the student's "
                      f"start is lost too: take --view shared, or distil again")
    start = init_student(teacher, random_network(2 * config["seed"] + 1, **shape),
                         config["init_eps"])
    return teacher, {"θ_T": teacher, f"θ_S({alpha})": start, f"θ*_S({alpha})": student}, config


def plane_args(argv):
    parser, add = make_parser(plane.__doc__, "landscape.py plane")
    parser.add_argument("a", metavar="A", type=Path, help="run directory of distill.py")
    parser.add_argument("b", metavar="B", type=Path, nargs="?", help="another one with the same "
                                                                     "teacher, for the shared view")
    add("--view", "which three points (default: shared where there is a run B)",
        choices=("shared", "non-local"))
    add("--axes", "orthonormal keeps lengths and angles; barycentric counts in steps from the "
                  "teacher to the others",
        "orthonormal", choices=("orthonormal", "barycentric"))
    add("--grid", "so many points a side", 25, type=number(int, 3))
    for axis in ("--x", "--y"):
        add(axis, "its lowest and highest value, for a crop or a longer reach (default: well "
                  "beyond the three points)",
            type=float, nargs=2, metavar=("LOW", "HIGH"))
    add("--encoder-only", "the plane of the encoders' weights; KL between softmaxed embeddings "
                          "(Fig. 13-16)", False,
        action="store_true")
    add("--bn", "batch norm's statistics: each batch's own, or averaged anew at every point",
        "batch",
        choices=("batch", "reset"))
    add("--n-samples", "at most so many training images, for the KL and to train the probes "
                       "on", 5000, type=POSITIVE)
    add("--n-test", "at most so many test images, to score the probes on", 2000, type=POSITIVE)
    add("--dataset", "labelled images (default: those that run A was distilled on)")
    add("--chunk", "points whose probes train together; fewer take less memory", 8, type=POSITIVE)
    add("--out", "the .npz file (default: <A>/plane-<view>.npz, with B's name and -encoder where "
                 "they apply)", type=Path)
    add_common_options(add)
    args = parser.parse_args(argv)
    args.view = args.view or ("shared" if args.b else "non-local")
    if (args.view == "shared") != (args.b is not None):
        parser.error("--view shared wants two runs, A and B; --view non-local one")
    for limits in (args.x, args.y):
        if limits and not -math.inf < limits[0] < limits[1] < math.inf:
            parser.error("--x and --y want a lower and a higher number")
    other = f"-{folder(args.b).name}" if args.b else ""
    args.out = args.out or folder(
        args.a) / f"plane-{args.view}{other}{'-encoder' * args.encoder_only}.npz"
    if args.out.suffix != ".npz":
        parser.error("--out wants a name that ends in .npz")
    return args


def folder(run):
    """The directory of a run that is named by it, or by a checkpoint in it."""
    return run.parent if run.is_file() else run


def plane(argv):
    """Measure a plane through the teacher and two other points of weight space, to a .npz file
    (Fig. 5, 13-16).

    The points of `shared` are the teacher and the students of runs A and B, those of `non-local`
    the teacher, the student of run A and where that student started.

    Batch norm (`--bn`): a point of the plane has weights but no statistics of its own. The running
    ones of an anchor belong to that anchor's activations; at any other point they would normalise
    by the wrong mean and variance, and the picture would show that error. So `batch` takes those of
    each batch, as the student's training does, and `reset` averages them anew at every point and
    then measures in eval mode, as the probes of probe.py do.
    """
    args = plane_args(argv)
    device = pick_device(args.device)
    teacher, networks, distilled = anchors_of(args)
    args.dataset = args.dataset or distilled["dataset"]
    args.amp = pick_amp(args.amp, device, distilled["arch"], distilled["norm"])

    # Data: some of the images the student saw, normalised as they were for it
    data = load_data(args.dataset, distilled["image_size"], args.data_dir, args.mirror,
                     device=device)
    seen = distilled["n_samples"] if args.dataset == distilled["dataset"] else None
    images, labels = labelled_subset(data.train_x, data.train_y, seen)
    stats = channel_stats(images)
    images, labels = labelled_subset(images, labels, min(args.n_samples, len(labels)))
    test_x, test_y = labelled_subset(data.test_x, data.test_y, min(args.n_test, len(data.test_y)))
    batches, test_batches = (  # even ones: none of a single image
        [normalise(x, stats)
         for x in part.tensor_split(math.ceil(len(part) / distilled["batch_size"]))]
        for part in (images, test_x))

    # The plane
    teacher.to(device).eval()
    network = random_network(0, **{key: distilled[key]
                                   for key in SHAPE}).requires_grad_(False).to(device)
    *anchors, parameters = ([p.detach().to(device)
                             for p in (net.encoder if args.encoder_only else net).parameters()]
                            for net in (*networks.values(), network))
    products = inner_products(anchors)
    corners = plane_basis(products, args.axes)
    x, y = (np.linspace(*(limits or default), args.grid)
            for limits, default in zip((args.x, args.y), default_limits(corners, args.axes)))
    # the anchors come first
    points = np.concatenate([corners, np.stack(np.meshgrid(x, y), axis=2).reshape(-1, 2)])
    coefficients = to_coefficients(points, corners)
    config = plain(args) | {
        "n_images": len(images), "n_test_images": len(test_x), "distilled": distilled,
        "made": provenance(device),
        "anchors": [fingerprint(net)[:12] for net in networks.values()]}
    arrays = {"x": x, "y": y, "points": points, "anchors": np.array(list(networks)),
              "norm": norms(coefficients, products),
              "done": np.array(0),
              **{quantity: np.full(len(points), np.nan) for quantity in QUANTITIES}}
    if args.out.exists():
        if not args.resume:
            raise Problem(f"{args.out} exists: add --resume to go on with it, or name another file "
                          "with --out")
        begun_with, arrays = read_npz(args.out)
        check_same(args.out, begun_with, config, FREE | {"made"})
    print(f"{distilled['arch']} on {args.dataset}: {args.grid} x {args.grid} points, KL and probes "
          f"on {len(images):,} images, "
          f"scored on {len(test_x):,}, m={distilled['out_dim']:,}, {device.type}, amp {args.amp} "
          f"-> {args.out}", flush=True)

    with torch.no_grad():
        # the same at every point
        teacher_embeddings = [embed(teacher.encoder, batch) for batch in batches]

    def logits(net, embedding):
        """What the KL compares; the softmax of the embedding itself for encoders alone."""
        return embedding if args.encoder_only else net.last_layer(net.projector(embedding))

    @torch.no_grad()
    def measure(point):
        """KL, features of the training images and of the test images at one point: one forward pass
        gives all three.

        One point at a time: vmap over four points took 2.5 times as long (CPU; ResNet20 and VGG11,
        batches of 128).
        """
        place(parameters, anchors, point)
        network.train()
        if args.bn == "reset":
            with autocast(device, args.amp):
                update_bn(batches, network.encoder)
            network.eval()
        features, test_features = (
            [embed(network.encoder, batch, args.amp) for batch in part]
            for part in (batches, test_batches))
        kl = 0.0
        for embedding, teacher_embedding in zip(features, teacher_embeddings):
            both = logits(teacher, teacher_embedding), logits(network, embedding)
            loss = KLDivergence.apply(*both)
            if not loss.isfinite():  # e^d overflowed: at a KL so far from 0 the usual form is right
                loss = kl_by_log_softmax(*both)
            kl += loss.item() * len(embedding) / len(images)
        return kl, torch.cat(features), torch.cat(test_features)

    clock, first = time.time(), int(arrays["done"])
    for start in range(first, len(points), args.chunk):
        chunk = slice(start, start + args.chunk)
        kl, *features = zip(*map(measure, coefficients[chunk]))
        features, test_features = map(torch.stack, features)
        if not all(torch.isfinite(values).all()
                   for values in (torch.tensor(kl), features, test_features)):
            raise Problem(f"the network is not finite near {points[start].round(3)}: keep --x and "
                          "--y closer to the anchors")
        probe_data = features, labels, test_features, test_y, len(data.classes)
        arrays["kl"][chunk] = kl
        arrays["linear_paper"][chunk] = linear_probe_paper(*probe_data).max(0).values.cpu()
        arrays["linear_converged"][chunk] = linear_probe_converged(*probe_data).cpu()
        done = start + len(kl)
        arrays["done"] = np.array(done)
        save_npz(args.out, config, arrays)
        seconds = (time.time() - clock) / (done - first)
        print(f"{done:7d} of {len(points)} points, {seconds:.2f} s each, "
              f"ETA {timedelta(seconds=round(seconds * (len(points) - done)))}", flush=True)
    print(f"{'anchor':10}{'x':>10}{'y':>10}{'norm':>10}{'KL (nats)':>12}{'linear (paper)':>17}"
          f"{'(converged)':>13}")
    columns = (arrays[key] for key in ("anchors", "points", "norm", *QUANTITIES))
    for name, (x, y), norm, kl, paper, converged in zip(*columns):
        print(f"{name:10}{x:10.3f}{y:10.3f}{norm:10.3f}{kl:12.3e}{paper:17.2f}{converged:13.2f}")
    print(f"{args.out}: all {len(points)} points are done; to see them: python landscape.py plot "
          f"{args.out}")


# ---- connect -------------------------------------------------------------------------------------

INITS = "distilled student", "random init"
# for batch norm's statistics at a point: ResNet's last, smallest maps still give 30,000 values a
# channel
BN_IMAGES = 2000


def connect_args(argv):
    parser, add = make_parser(connect.__doc__, "landscape.py connect")
    parser.add_argument("run", type=Path, help="run directory of distill.py")
    add("--copies", "fine-tuned copies of each start", 5, type=number(int, 2))
    add("--points", "points on each line, its two ends among them", 50, type=number(int, 3))
    add_fine_tuning_options(add)
    add("--n-test", "at most so many test images, for the lines", 10_000, type=POSITIVE)
    add("--out", "directory of the copies and connect.npz (default: <run>/connect)", type=Path)
    add_common_options(add)
    args = parser.parse_args(argv)
    args.out = args.out or folder(args.run) / "connect"
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
    starts = student, teacher  # in the order of INITS
    complete(args, distilled)
    checkpoint = checkpoint_to_resume(args, "landscape.py", FREE)
    args.amp = pick_amp(args.amp, device, distilled["arch"], distilled["norm"])
    data = load_data(args.dataset, distilled["image_size"], args.data_dir, args.mirror,
                     device=device)
    images, labels = labelled_subset(data.train_x, data.train_y, args.n_samples)
    test_x, test_y = labelled_subset(data.test_x, data.test_y, min(args.n_test, len(data.test_y)))
    stats, n_pairs = channel_stats(images), math.comb(args.copies, 2)
    config = plain(args) | {
        "n_images": len(images), "n_test_images": len(test_x), "distilled": distilled,
        "made": provenance(device),
        "starting_weights": [fingerprint(encoder)[:12] for encoder in starts]}
    copies, lines = [], []  # state dicts and lists of test errors, the student's first
    if checkpoint:
        check_same(args.out, checkpoint["config"], config, FREE | {"made", "distilled"})
        copies, lines = checkpoint["copies"], checkpoint["lines"]
    print(f"{distilled['arch']} of {args.run} on {args.dataset}: {args.copies} copies each of "
          "student and random init, "
          f"{len(images):,} images, {args.epochs} epochs in batches of {args.batch_size}; lines "
          f"over {len(test_x):,} test "
          f"images, {device.type}, amp {args.amp} -> {args.out}", flush=True)

    def save():
        save_checkpoint(args.out / "last.pt", "landscape.py", config=config, copies=copies,
                        lines=lines)

    for i in range(len(copies), 2 * args.copies):
        start, copy = divmod(i, args.copies)
        network = classifier(deepcopy(starts[start]), ARCHS[distilled["arch"]][1],
                             len(data.classes), args.seed)
        network.train().to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9,
                                    weight_decay=1e-4)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        for _, loss in fine_tune(network, optimizer, scaler, images, labels, args,
                                 order_seed=args.seed + copy):
            pass
        if not loss.isfinite():
            raise Problem(f"the loss of copy {i} is not finite: lower --lr or take --amp off; what "
                          f"{args.out} held is kept")
        copies.append({name: t.cpu() for name, t in network.state_dict().items()})
        save()
        accuracy = classification_accuracy(network, test_x, test_y, stats, args.amp)
        print(f"{INITS[start]}, copy {copy}: test error {100 - accuracy:.2f} %", flush=True)

    between = classifier(student, ARCHS[distilled["arch"]][1], len(data.classes),
                         args.seed).to(device)
    # any images: their order is random
    bn_batches = [normalise(x, stats) for x in images[:BN_IMAGES].split(500)]

    def error(state):
        """Test error in % with batch norm's statistics of this very state."""
        between.load_state_dict(state)
        with autocast(device, args.amp):
            update_bn(bn_batches, between.encoder)
        return 100 - classification_accuracy(between, test_x, test_y, stats, args.amp)

    ts, pairs = np.linspace(0, 1, args.points), list(itertools.combinations(range(args.copies), 2))
    for i in range(len(lines), 2 * n_pairs):
        start, pair = divmod(i, n_pairs)
        a, b = (copies[start * args.copies + copy] for copy in pairs[pair])
        lines.append(error_along_line(a, b, ts, error).tolist())
        save()
    errors = np.array(lines).reshape(2, n_pairs, args.points)
    save_npz(args.out / "connect.npz", config,
             {"t": ts, "pairs": np.array(pairs), "error": errors, "barrier": barrier(errors)})
    print(f"{'line':30}{'ends':>16}{'highest':>10}{'barrier':>10}   (test error in %)")
    for title, lines in zip(INITS, errors):
        for (a, b), line in zip(pairs, lines):
            ends = f"{line[0]:.2f}, {line[-1]:.2f}"
            print(f"{f'{title}, {a} to {b}':30}{ends:>16}{line.max():10.2f}{barrier(line):10.2f}")
        print(f"barrier, {title}: {mean_std(barrier(lines))} points over {n_pairs} pairs")
    print(f"{args.out}/connect.npz is complete; to see it: python landscape.py plot "
          f"{args.out}/connect.npz")


# ---- Pictures, drawn from the files alone --------------------------------------------------------

def plot(argv):
    """Draw what plane or connect computed: planes side by side, one row a quantity; or lines, one
    panel a start.
    """
    parser, add = make_parser(plot.__doc__, "landscape.py plot")
    parser.add_argument("files", nargs="+", type=Path, help=".npz files of plane, or of connect "
                                                            "(their pairs are pooled)")
    add("--figure", "the picture: .png, .pdf or .svg (default: beside the first file, .png)",
        type=picture)
    add("--kl-range", "ends of the colours for the KL; the paper's are 1e-7 1e-3, with raw rows "
                      "(default: from the data)",
        type=number(float, 1e-300), nargs=2, metavar=("LOW", "HIGH"))
    add("--accuracy-range", "ends of the colours for accuracy in %%; the paper's are 10 50 "
                            "(default: from the data)",
        type=number(float, 0), nargs=2, metavar=("LOW", "HIGH"))
    args = parser.parse_args(argv)
    for low, high in filter(None, (args.kl_range, args.accuracy_range)):
        if low >= high:
            parser.error("--kl-range and --accuracy-range want a lower and a higher number")
    files = {path: read_npz(path) for path in args.files}
    are_planes = ["kl" in arrays for _, arrays in files.values()]
    if any(are_planes) != all(are_planes):
        raise Problem("planes and lines do not go into one picture: plot them apart")
    figure = draw_planes(files, args) if all(are_planes) else draw_lines(files)
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
    """A column for every file, a row for every quantity; white contours of ‖θ‖ and the three
    anchors (Fig. 5).
    """
    from matplotlib.colors import LogNorm, Normalize
    for path, (_, arrays) in files.items():
        if arrays["done"] < len(arrays["points"]):
            raise Problem(f"{path} holds {arrays['done']} of {len(arrays['points'])} points: "
                          "finish it with --resume first")
    shape, size = (3, len(files)), (0.9 + 3.6 * len(files), 9.6)
    if len(files) == 1:  # one plane lies better on its side
        shape, size = (1, 3), (12.5, 4)
    figure, axes = new_figure(*shape, figsize=size)
    for row, (quantity, label) in zip(axes.reshape(3, -1), QUANTITIES.items()):
        everything = np.concatenate([arrays[quantity] for _, arrays in files.values()])
        if quantity == "kl":
            scale = LogNorm(*(args.kl_range or np.quantile(everything[everything > 0],
                                                           (0.005, 0.995))), clip=True)
        else:
            scale = Normalize(*(args.accuracy_range or (everything.min(), everything.max())),
                              clip=True)
        for axis, (config, arrays) in zip(row, files.values()):
            x, y = arrays["x"], arrays["y"]
            values, norm = (arrays[key][3:].reshape(len(y), len(x)) for key in (quantity, "norm"))
            colours = axis.pcolormesh(x, y, values, norm=scale, rasterized=True)
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
        figure.colorbar(colours, ax=row, label=label)
    titles = "\n".join(describe(config) for config, _ in files.values())
    figure.suptitle(f"{titles}; white lines: ‖θ‖", fontsize=10)
    return figure


def draw_lines(files):
    """Test error between fine-tuned copies: every pair a thin line, their mean a thick one (Fig.
    9).
    """
    (first, (config, arrays)), *others = files.items()
    for path, (other, _) in others:
        alike = ("points", "epochs", "lr", "batch_size", "dataset", "n_images", "n_test_images")
        check_same(f"{first} to {path}", config, {key: other[key] for key in alike}, ())
    figure, axes = new_figure(1, 2, figsize=(7, 3.6), sharey=True)
    for start, (axis, title) in enumerate(zip(axes, INITS)):
        errors = np.concatenate([lines["error"][start] for _, lines in files.values()])
        axis.plot(arrays["t"], errors.T, color="grey", linewidth=0.8)
        axis.plot(arrays["t"], errors.mean(0), linewidth=2.5)
        summary = f"barrier {mean_std(barrier(errors))} points, {len(errors)} pairs"
        axis.set(title=f"{title}\n{summary}", xlabel="position on the line",
                 ylabel="test error (%)")
        print(f"{title}: ends {errors[:, [0, -1]].mean():.2f} %, {summary}")
    figure.suptitle(describe(config), fontsize=10)
    return figure


# ---- Main ----------------------------------------------------------------------------------------

def main(argv=None):
    argv, commands = sys.argv[1:] if argv is None else argv, {"plane": plane, "connect": connect,
                                                              "plot": plot}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    parser, _ = make_parser(__doc__)
    parser.add_argument("command", choices=commands, help="each has a --help of its own")
    parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
