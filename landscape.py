#!/usr/bin/env python3
"""What does the loss look like around a random teacher? Planes through it, lines between solutions, and their pictures.

    python landscape.py plane runs/cifar10-vgg11-eps1e-10-seed0 runs/cifar10-vgg11-epsinf-seed0    shared view (Fig. 5)
    python landscape.py plane runs/cifar10-vgg11-epsinf-seed0 --view non-local             teacher, start and student
    python landscape.py connect runs/cifar10-resnet18-eps0-seed0               do fine-tuned copies share a basin? (Fig. 9)
    python landscape.py plot runs/cifar10-vgg11-epsinf-seed0/*.npz --figure planes.png          draws what these computed

`plane` lays a plane through three points of weight space, say the teacher θ_T and two students θ*_S, and measures at every
point of a grid on it how far the network there is from the teacher (KL) and how good its features are (linear probes).
`connect` fine-tunes copies of one network with labels, each with the data in another order, and follows the straight line
between every two of them: if the test error stays low all the way, they ended in one basin.
"""
import itertools, json, math, os, sys, time, zipfile
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from distill import (ARCHS, FORMATS, SHAPE, KLDivergence, Problem, amp_tools, at_least, augment, channel_stats, check_same,
                     classifier, classify, distance, fingerprint, init_student, kl_by_log_softmax, learning_rate,
                     load_checkpoint, load_data, load_networks, make_parser, normalise, open_run, pick_amp, pick_device,
                     provenance, random_network, run_cli, stratified_subset, test_accuracy, train, write_atomically)


# ---- Options and files -----------------------------------------------------------------------------------------------

FREE = {"resume", "device", "data_dir", "mirror", "out", "a", "b", "run"}  # what may change on --resume
DISTILLED = ("arch", "init_eps", "out_dim", "norm", "bottleneck", "dataset", "n_samples", "steps", "seed")  # kept of a run
SAVE_EVERY = 30  # seconds


def plain(args):
    """The options as a dict that JSON and torch.save can hold."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def folder(run):
    """The directory of a run that is named by it, or by a checkpoint in it."""
    return run if run.is_dir() else run.parent


def subset(x, y, n, device):
    """A stratified subset of n images and labels, or all if n is None; on the device, always the same ones in the same order.

    The order is shuffled: data sets come sorted by class, and a batch norm that sees one class at a time would give it away.
    """
    if len(y) == 0 or len(y.unique()) == 1:
        raise Problem("these images have no labels: name a labelled data set with --dataset")
    index = stratified_subset(y, n or len(y))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    return x[index].to(device), y[index].to(device)


def save_npz(path, config, device, arrays):
    config = json.dumps({**config, "made": provenance(device)})
    write_atomically(path, lambda file: np.savez(file, config=config, **arrays))


def read_npz(path):
    """(config dict, {name: array}) of a file that plane or connect wrote. Raises Problem."""
    if not path.exists():
        raise Problem(f"no file {path}: make one with landscape.py plane or connect")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
            return json.loads(str(arrays.pop("config"))), arrays
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise Problem(f"{path} is truncated or not a file of landscape.py ({type(error).__name__}): delete it and compute it "
                      f"again") from None


def add_common(add, out):
    """The options that plane and connect share."""
    add("--device", "auto: cuda where there is one", "auto", choices=("auto", "cpu", "cuda"))
    add("--amp", "16-bit encoder, as in distill.py", "auto", choices=("auto", "bf16", "fp16", "off"))
    add("--out", out, type=Path)
    add("--resume", "go on with what an interrupted call has left, to the same numbers", False, action="store_true")
    add("--data-dir", "where downloads and caches go", "data")
    add("--mirror", "URL of a directory with the archives to download; or set DATA_MIRROR", os.environ.get("DATA_MIRROR"))


# ---- Geometry: points of a plane, or of a line, as mixtures of networks ----------------------------------------------
# A point is written by its weights w: θ = θ_0 + Σ w_i·(θ_i − θ_0). That is all one needs: lengths and angles follow from
# the inner products of θ_0 and the differences, a few numbers, and no basis vector as long as the network is ever made.

@torch.no_grad()
def place(parameters, anchors, weights):
    """Move `parameters`, a list of tensors, to θ_0 + Σ w_i·(θ_i − θ_0); `anchors` are as long lists θ_0, θ_1, ...

    In float64 and with θ_0's own weight, 1 − Σ w_i: so rounding to float32 gives every anchor back to the last bit.
    """
    shares = [1 - sum(weights), *weights]
    for p, *corners in zip(parameters, *anchors):
        p.copy_(sum(share * corner.double() for share, corner in zip(shares, corners)))


@torch.no_grad()
def inner_products(anchors):
    """(3, 3) float64 inner products of θ_0, θ_1 − θ_0 and θ_2 − θ_0."""
    products = torch.zeros(3, 3, dtype=torch.float64)
    for tensors in zip(*anchors):
        first, *others = (t.double().reshape(-1) for t in tensors)
        rows = torch.stack([first, *(other - first for other in others)])
        products += (rows @ rows.T).cpu()
    return products.numpy()


def plane_basis(products, axes):
    """Coordinates of the three anchors on the plane, (3, 2) float64; the map from weights to coordinates is affine.

    `barycentric`: (0, 0), (1, 0), (0, 1). `orthonormal`: lengths and angles are those of weight space, the x axis points from
    θ_0 to θ_1, and the origin is the plane's point of least norm. Raises Problem where the points span no plane.
    """
    norm_0, d1, d2 = np.sqrt(products.diagonal())
    cosine = products[1, 2] / (d1 * d2) if d1 * d2 > 0 else 1.0
    if min(d1, d2) < 1e-6 * norm_0 or 1 - cosine**2 < 1e-6:
        raise Problem("the three points lie on one line, or two of them coincide (a student near its teacher starts where the "
                      "teacher is): no plane goes through them; take another view or another run")
    if axes == "barycentric":
        return np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    # Gram-Schmidt on the differences; θ_0's own coordinates are its components along the plane
    along, height = products[1, 2] / d1, d2 * math.sqrt(1 - cosine**2)
    x0 = products[0, 1] / d1
    y0 = (products[0, 2] - along * x0) / height
    return np.array([[x0, y0], [x0 + d1, y0], [x0 + along, y0 + height]])


def to_weights(points, coordinates):
    """Weights (n, 2) of the points (n, 2) on the plane whose anchors have these `coordinates` (3, 2)."""
    return (points - coordinates[0]) @ np.linalg.inv(coordinates[1:] - coordinates[0])


def norms(weights, products):
    """‖θ‖₂ (n,) of the points with these weights (n, 2)."""
    v = np.column_stack([np.ones(len(weights)), weights])
    return np.sqrt(np.einsum("ni,ij,nj->n", v, products, v).clip(0))


def default_limits(coordinates, axes):
    """((x low, high), (y low, high)): a square that reaches well beyond the three anchors."""
    if axes == "barycentric":
        return (-0.5, 1.5), (-0.5, 1.5)
    low, high = coordinates.min(0), coordinates.max(0)
    middle, reach = (low + high) / 2, 0.85 * (high - low).max()
    return tuple((m - reach, m + reach) for m in middle)


# ---- Linear probes of many points at once ----------------------------------------------------------------------------
# The two linear probes of probe.py (a test holds them equal), but with a leading dimension P for points of the plane: a
# probe's steps are so small that a processor, and a GPU still more, spends them waiting; P probes take hardly longer than one.

def share_correct(logits, labels):
    """Accuracy (P,) in % of logits (P, n, classes)."""
    return 100 * (logits.argmax(2) == labels).double().mean(1).cpu().numpy()


def linear_probes_paper(x, y, test_x, test_y, n_classes, seed=0):
    """The paper's linear probe: test accuracy (P,) in % of the best of ten epochs of AdamW; x (P, n, r), y (n,)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(x.shape[2], n_classes)
    weight = head.weight.detach().T.repeat(len(x), 1, 1).to(x.device).requires_grad_()
    bias = head.bias.detach().repeat(len(x), 1, 1).to(x.device).requires_grad_()
    optimizer = torch.optim.AdamW([weight, bias], fused=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(x.device)
    batches = list(zip(x[:, order].split(256, dim=1), y[order].split(256)))
    accuracies = []
    for epoch in range(10):
        for features, labels in batches:
            optimizer.zero_grad()
            logits = torch.baddbmm(bias, features, weight).flatten(0, 1)
            (F.cross_entropy(logits, labels.repeat(len(x)), reduction="sum") / len(labels)).backward()  # a mean for each point
            optimizer.step()
        with torch.no_grad():
            accuracies.append(share_correct(torch.baddbmm(bias, test_x, weight), test_y))
    return np.max(accuracies, axis=0)


@torch.no_grad()
def linear_probes_converged(x, y, test_x, test_y, n_classes, l2=1e-3, tolerance=1e-4, max_iter=5000):
    """Test accuracy (P,) in % of logistic regression on standardised features, run until no gradient exceeds `tolerance`.

    Every step minimises a quadratic upper bound of the loss (Böhning 1992), with Nesterov's momentum, restarted at a point
    when it points uphill. Raises Problem if it does not converge.
    """
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp(min=1e-8)
    with_bias = lambda features: F.pad((features - mean) / std, (0, 1), value=1.0)
    x, test_x, target = with_bias(x), with_bias(test_x), F.one_hot(y, n_classes).float()
    decay = torch.tensor([l2] * (x.shape[2] - 1) + [0.0], device=x.device)[:, None]
    bound = (0.5 / len(y) * x.mT @ x).double()
    shift = 1e-6 * bound.diagonal(dim1=1, dim2=2).sum(1)[:, None]  # for what float32 rounded off
    bound.diagonal(dim1=1, dim2=2).add_(decay[:, 0] + shift)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(bound)).float()
    weight = ahead = torch.zeros(len(x), x.shape[2], n_classes, device=x.device)
    age = torch.zeros(len(x), 1, 1, device=x.device)
    for _ in range(max_iter):
        gradient = x.mT @ ((x @ ahead).softmax(2) - target) / len(y) + decay * ahead
        if gradient.abs().max() < tolerance:
            return share_correct(test_x @ ahead, test_y)
        before, weight = weight, ahead - inverse @ gradient
        uphill = ((weight - before) * gradient).sum((1, 2), keepdim=True) > 0
        age = torch.where(uphill, 0, age + 1)
        ahead = weight + age / (age + 3) * (weight - before)
    raise Problem(f"the converged linear probe did not converge (largest gradient entry {gradient.abs().max():.1e})")


# ---- plane -----------------------------------------------------------------------------------------------------------

QUANTITIES = {"kl": "KL to the teacher (nats)", "linear_paper": "linear probe, paper (%)",
              "linear_converged": "linear probe, converged (%)"}


def anchors_of(args):
    """(teacher, three anchor Networks, their names, config of run A) for the view. Raises Problem if runs do not fit."""
    teacher, student, config = load_networks(args.a)
    if args.view == "shared":
        teacher_b, student_b, config_b = load_networks(args.b)
        for key in SHAPE:
            if config[key] != config_b[key]:
                raise Problem(f"no plane holds both runs: {args.a} has --{key.replace('_', '-')} {config[key]}, {args.b} "
                              f"has {config_b[key]}")
        if fingerprint(teacher) != fingerprint(teacher_b):
            raise Problem(f"{args.a} and {args.b} have different teachers: a shared view wants runs with the same --seed "
                          f"(here {config['seed']} and {config_b['seed']})")
        alpha = [locality(c["init_eps"]) for c in (config, config_b)]
        return teacher, [teacher, student, student_b], ["θ_T", f"θ*_S({alpha[0]})", f"θ*_S({alpha[1]})"], config
    shape = [config[key] for key in SHAPE]
    if not config["teacher"] and fingerprint(teacher) != fingerprint(random_network(2 * config["seed"], *shape)):
        raise Problem(f"this version of torch does not draw the teacher of {args.a} again from its seed {config['seed']}, so the "
                      f"student's start is lost too: take --view shared, or distil again")
    start = init_student(teacher, random_network(2 * config["seed"] + 1, *shape), config["init_eps"])
    alpha = locality(config["init_eps"])
    return teacher, [teacher, start, student], ["θ_T", f"θ_S({alpha})", f"θ*_S({alpha})"], config


def locality(eps):
    """The paper's α = ε/(1+ε), in two digits; 1e-10 is its "α ≈ 0"."""
    return f"{round(eps / (1 + eps), 2):g}" if eps < math.inf else "1"


def plane_args(argv):
    (parser, add), positive = make_parser(plane.__doc__, "landscape.py plane"), at_least(1, int)
    parser.add_argument("a", metavar="A", type=Path, help="run directory of distill.py")
    parser.add_argument("b", metavar="B", type=Path, nargs="?", help="another one with the same teacher, for the shared view")
    add("--view", "which three points (default: shared where there is a run B)", choices=("shared", "non-local"))
    add("--axes", "orthonormal keeps lengths and angles; barycentric counts in steps from the teacher to the others",
        "orthonormal", choices=("orthonormal", "barycentric"))
    add("--grid", "so many points a side", 25, type=at_least(3, int))
    for axis in "xy":
        add(f"--{axis}", f"lowest and highest {axis}, for a crop or a longer reach (default: well beyond the three points)",
            type=float, nargs=2, metavar=("LOW", "HIGH"))
    add("--encoder-only", "the plane of the encoders' weights; KL between softmaxed embeddings (Fig. 13-16)", False,
        action="store_true")
    add("--bn", "batch norm's statistics: each batch's own, or averaged anew at every point", "batch", choices=("batch", "reset"))
    add("--n-samples", "at most so many training images, for the KL and to train the probes on", 5000, type=positive)
    add("--n-test", "at most so many test images, to score the probes on", 2000, type=positive)
    add("--dataset", "labelled images (default: those that run A was distilled on)")
    add("--chunk", "points whose probes train together; fewer take less memory", 8, type=positive)
    add_common(add, "the .npz file (default: <A>/plane-<view>.npz, with B's name and -encoder where they apply)")
    args = parser.parse_args(argv)
    args.view = args.view or ("shared" if args.b else "non-local")
    if (args.view == "shared") != (args.b is not None):
        parser.error("--view shared wants two runs, A and B; --view non-local one")
    for axis, limits in (("x", args.x), ("y", args.y)):
        if limits and not -math.inf < limits[0] < limits[1] < math.inf:
            parser.error(f"--{axis} wants a lower and a higher number")
    name = f"plane-{args.view}" + (f"-{folder(args.b).name}" if args.b else "") + "-encoder" * args.encoder_only
    args.out = args.out or folder(args.a) / f"{name}.npz"
    if args.out.suffix != ".npz":
        parser.error("--out wants a name that ends in .npz")
    return args


def plane(argv):
    """Measure a plane through the teacher and two other points of weight space, to a .npz file (Fig. 5, 13-16).

    The points of `shared` are the teacher and the students of runs A and B, those of `non-local` the teacher, the student of
    run A and where that student started.

    Batch norm (`--bn`): a point of the plane has weights but no statistics of its own. The running ones of an anchor belong to
    that anchor's activations; at any other point they would normalise by the wrong mean and variance, and the picture would
    show that error. So `batch` takes those of each batch, as the student's training does, and `reset` averages them anew at
    every point and then measures in eval mode, as the probes of probe.py do.
    """
    args = plane_args(argv)
    device = pick_device(args.device)
    teacher, networks, names, distilled = anchors_of(args)
    args.dataset = args.dataset or distilled["dataset"]
    args.amp = pick_amp(args.amp, device, distilled["arch"], distilled["norm"])

    # Data: some of the images the student saw, normalised as they were for it
    data = load_data(args.dataset, distilled["image_size"], args.data_dir, args.mirror)
    seen = distilled["n_samples"] if args.dataset == distilled["dataset"] else None
    images, labels = subset(data.train_x, data.train_y, seen, "cpu")
    stats = tuple(stat.to(device) for stat in channel_stats(images))
    images, labels = subset(images, labels, min(args.n_samples, len(labels)), device)
    test_x, test_y = subset(data.test_x, data.test_y, min(args.n_test, len(data.test_y)), device)
    split = lambda x: x.tensor_split(math.ceil(len(x) / distilled["batch_size"]))  # even batches: none of a single image

    # The plane
    teacher.to(device).eval()
    network = random_network(0, *(distilled[key] for key in SHAPE)).requires_grad_(False).to(device)
    moved = lambda n: list((n.encoder if args.encoder_only else n).parameters())
    anchors = [[p.detach().to(device) for p in moved(n)] for n in networks]
    products = inner_products(anchors)
    coordinates = plane_basis(products, args.axes)
    limits = [given or low_high for given, low_high in zip((args.x, args.y), default_limits(coordinates, args.axes))]
    x, y = (np.linspace(*low_high, args.grid) for low_high in limits)
    points = np.concatenate([coordinates, np.stack(np.meshgrid(x, y), axis=2).reshape(-1, 2)])  # the anchors come first
    weights = to_weights(points, coordinates)
    config = plain(args) | {"n_images": len(images), "n_test_images": len(test_x),
                            "anchors": fingerprint(nn.ParameterList(sum(anchors, [])))[:12],
                            "distilled": {key: distilled[key] for key in DISTILLED}}

    arrays = {"x": x, "y": y, "points": points, "anchors": np.array(names), "norm": norms(weights, products),
              "reconstruction_error": np.full(3, np.nan), "done": np.array(0),
              **{quantity: np.full(len(points), np.nan) for quantity in QUANTITIES}}
    if args.out.exists():
        if not args.resume:
            raise Problem(f"{args.out} exists: add --resume to go on with it, or name another file with --out")
        before, measured = read_npz(args.out)
        if before.get("anchors") != config["anchors"]:
            raise Problem(f"{args.out} was measured around other weights than these: delete it, or name another file with --out")
        check_same(args.out, before, config, FREE)
        arrays |= measured

    print(f"{distilled['arch']} on {args.dataset}: {args.grid} x {args.grid} points, KL and probes on {len(images):,} images, "
          f"scored on {len(test_x):,}, m={distilled['out_dim']:,}, {device.type}, amp {args.amp} -> {args.out}", flush=True)
    if arrays["done"]:
        print_anchors(arrays)

    # The teacher's side of every KL, computed once: embeddings, or the bottleneck's vectors, a 256th of m = 65,536 logits
    autocast, full_precision = amp_tools(args.amp, device)[0], amp_tools("off", device)[0]
    head = lambda net, embedding: embedding if args.encoder_only else net.project(embedding)
    logits = lambda net, vectors: vectors if args.encoder_only else net.logits(vectors)
    with torch.no_grad():
        table = [head(teacher, teacher.embed(normalise(batch, stats), full_precision)) for batch in split(images)]

    @torch.no_grad()
    def measure(weight):
        """KL, features of the training images and of the test images at one point: one forward pass gives all three.

        One point at a time: vmap over four points took 2.5 times as long (CPU; ResNet20 and VGG11, batches of 128).
        """
        place(moved(network), anchors, weight)
        network.train()
        if args.bn == "reset":
            with autocast:
                update_bn((normalise(batch, stats) for batch in split(images)), network.encoder)
            network.eval()
        kl, features = 0.0, []
        for batch, target in zip(split(images), table):
            features.append(network.embed(normalise(batch, stats), autocast))
            both = logits(teacher, target), logits(network, head(network, features[-1]))
            loss = KLDivergence.apply(*both).item()
            if not math.isfinite(loss):  # e^d overflowed: at a KL so far from 0 the usual form is right
                loss = kl_by_log_softmax(*both).item()
            kl += loss * len(batch) / len(images)
        test_features = [network.embed(normalise(batch, stats), autocast) for batch in split(test_x)]
        return kl, torch.cat(features), torch.cat(test_features)

    done = first = shown = int(arrays["done"])
    clock = saved = time.time()
    while done < len(points):
        chunk = slice(done, min(done + args.chunk, len(points)) if done else 3)  # the anchors are a chunk of their own
        kl, *features = zip(*(measure(weight) for weight in weights[chunk]))
        x, test = (torch.stack(part) for part in features)
        if not (np.isfinite(kl).all() and x.isfinite().all() and test.isfinite().all()):
            save_npz(args.out, config, device, arrays)
            raise Problem(f"the network is not finite near {points[chunk][0].round(3)}: keep --x and --y closer to the anchors")
        arrays["kl"][chunk] = kl
        arrays["linear_paper"][chunk] = linear_probes_paper(x, labels, test, test_y, len(data.classes))
        arrays["linear_converged"][chunk] = linear_probes_converged(x, labels, test, test_y, len(data.classes))
        arrays["done"], done = np.array(chunk.stop), chunk.stop
        if chunk.start == 0:
            for i, anchor in enumerate(anchors):
                place(moved(network), anchors, weights[i])
                arrays["reconstruction_error"][i] = distance(moved(network), anchor) / arrays["norm"][i]
            print_anchors(arrays)
        if time.time() - saved > SAVE_EVERY or done == len(points):
            save_npz(args.out, config, device, arrays)
            saved = time.time()
        if chunk.start == 0 or done * 10 // len(points) > shown * 10 // len(points):
            rate, shown = (time.time() - clock) / (done - first), done
            eta = timedelta(seconds=round(rate * (len(points) - done)))
            print(f"{done:7d} of {len(points)} points, {rate:.2f} s each, ETA {eta}", flush=True)
    print(f"{args.out}: all {len(points)} points are done; to see them: python landscape.py plot {args.out}")


def print_anchors(arrays):
    """A table of the anchors: coordinates, ‖θ‖, how exactly the plane gives their weights back, and what was measured."""
    print(f"{'anchor':10}{'x':>10}{'y':>10}{'norm':>10}{'rel. error':>12}{'KL (nats)':>12}"
          f"{'linear (paper)':>17}{'(converged)':>13}")
    for i, name in enumerate(arrays["anchors"]):
        (x, y), norm, error = (arrays[key][i] for key in ("points", "norm", "reconstruction_error"))
        kl, paper, converged = (arrays[key][i] for key in QUANTITIES)
        print(f"{name:10}{x:10.3f}{y:10.3f}{norm:10.3f}{error:12.1e}{kl:12.3e}{paper:17.2f}{converged:13.2f}", flush=True)


# ---- connect ---------------------------------------------------------------------------------------------------------

INITS = {"student": "distilled student", "random": "random init"}
BN_IMAGES = 2000  # for batch norm's statistics at a point: ResNet's last, smallest maps still give 30,000 values a channel


def error_along_line(a, b, ts, error):
    """error(state) at the points (1−t)·a + t·b for t in `ts`, as an array; a and b are state dicts.

    In float64, as `place`: the ends are exact, and a line between equal networks is one point.
    """
    mix = lambda p, q, t: ((1 - t) * p.double() + t * q.double()).to(p.dtype) if p.is_floating_point() else p
    return np.array([error({name: mix(p, b[name], t) for name, p in a.items()}) for t in ts])


def barrier(errors):
    """Highest error on a line minus the mean of its two ends, in the unit of `errors` (..., points)."""
    return errors.max(-1) - (errors[..., 0] + errors[..., -1]) / 2


def connect_args(argv):
    (parser, add), positive = make_parser(connect.__doc__, "landscape.py connect"), at_least(1, int)
    parser.add_argument("run", type=Path, help="run directory of distill.py")
    add("--copies", "fine-tuned copies of each start", 5, type=at_least(2, int))
    add("--points", "points on each line, its two ends among them", 50, type=at_least(3, int))
    add("--epochs", "epochs of fine-tuning; the learning rate falls tenfold at 1/2 and 3/4 of them", 160, type=positive)
    add("--lr", "SGD's first learning rate, momentum 0.9, weight decay 1e-4 (default: 0.1, for resnet20 0.05)",
        type=at_least(0, float))
    add("--batch-size", "images a step", 256, type=positive)
    add("--dataset", "labelled data to train on (default: the one the run was probed on)")
    add("--n-samples", "train on a stratified subset of so many images (default: all)", type=positive)
    add("--n-test", "at most so many test images, for the lines", 10_000, type=positive)
    add("--seed", "of the classifier and the crops; copy k sees the data in the order of seed + k (default: the run's)",
        type=at_least(0, int))
    add_common(add, "directory of the copies and connect.npz (default: <run>/connect)")
    args = parser.parse_args(argv)
    if args.seed is not None and args.seed >= 2**62:
        parser.error("--seed must be below 2**62")
    return args


def connect(argv):
    """Fine-tune copies of the student and of its random teacher, and measure the error between them (Fig. 9).

    Copies of one start differ in the order of the data alone; they have the same classifier and are trained as prune.py's full
    network is. Then comes the test error along the straight line between every two of them, and its barrier: the highest error
    minus the mean of the ends. At every point batch norm's statistics are computed anew from training images: a mean of two
    networks' statistics would fit neither, and show a barrier of its own.
    """
    args = connect_args(argv)
    device = pick_device(args.device)
    random_encoder, student_encoder, distilled = load_checkpoint(args.run)
    starts = {"student": student_encoder, "random": random_encoder}
    args.out = args.out or folder(args.run) / "connect"
    args.dataset = args.dataset or distilled["probe_dataset"] or distilled["dataset"]
    args.seed = distilled["seed"] if args.seed is None else args.seed
    args.lr = (0.05 if distilled["arch"] == "resnet20" else 0.1) if args.lr is None else args.lr

    data = load_data(args.dataset, distilled["image_size"], args.data_dir, args.mirror)
    images, labels = subset(data.train_x, data.train_y, args.n_samples, device)
    test_x, test_y = subset(data.test_x, data.test_y, min(args.n_test, len(data.test_y)), device)
    bn_images = images[:BN_IMAGES]  # any: their order is random
    config = plain(args) | {"n_images": len(images), "n_test_images": len(test_x),
                            "starts": [fingerprint(starts[init])[:12] for init in INITS],
                            "distilled": {key: distilled[key] for key in DISTILLED}}
    checkpoint = open_run(args.out, config, "landscape.py", FREE | {"starts", "distilled"})
    if checkpoint and checkpoint["config"]["starts"] != config["starts"]:
        raise Problem(f"{args.out} began from other weights than {args.run} holds now: delete it or name another one with --out")
    args.amp = config["amp"] = pick_amp(config["amp"], device, distilled["arch"], distilled["norm"])
    stats, per_epoch = channel_stats(images), math.ceil(len(images) / args.batch_size)
    steps, autocast = args.epochs * per_epoch, amp_tools(args.amp, device)[0]
    pairs = list(itertools.combinations(range(args.copies), 2))
    copies, now, lines = (checkpoint[key] for key in ("copies", "now", "lines")) if checkpoint else ([], None, [])

    def save(now=None):
        """`copies` are state dicts and `lines` lists of errors, the student's first; `now` is a copy in training."""
        state = {"format": FORMATS["landscape.py"], "config": config, "copies": copies, "now": now, "lines": lines}
        write_atomically(args.out / "last.pt", lambda file: torch.save(state, file))

    def network_from(init):
        return classifier(deepcopy(starts[init]), ARCHS[distilled["arch"]][1], len(data.classes), args.seed).to(device)

    def fine_tune(init, copy, now):
        """Train copy number `copy` of a start to its end, from the state `now` if there is one; returns its state dict."""
        network = network_from(init)
        optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
        scaler = amp_tools(args.amp, device)[1]
        parts, step, losses = {"network": network, "optimizer": optimizer, "scaler": scaler}, 0, []
        if now:
            step = now["step"]
            for name, part in parts.items():
                part.load_state_dict(now[name])

        def batch_loss(index):
            return F.cross_entropy(classify(network, augment(images[index], args.seed, step), stats, autocast), labels[index])

        optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, steps)
        saved = time.time()
        for step, loss in train(batch_loss, len(images), optimizer, scaler, steps=steps, batch_size=args.batch_size,
                                seed=args.seed + copy, start=step):
            optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, steps)
            losses.append(loss)
            if step % per_epoch:
                continue
            if not torch.stack(losses).isfinite().all():
                raise Problem(f"the loss is not finite any more in epoch {step // per_epoch} of copy {copy} ({INITS[init]}): "
                              f"lower --lr or take --amp off; what {args.out} held is kept")
            losses = []
            if time.time() - saved > SAVE_EVERY and step < steps:
                save({"step": step, **{name: part.state_dict() for name, part in parts.items()}})
                saved = time.time()
        print(f"{INITS[init]}, copy {copy}: test error {100 - test_accuracy(network, test_x, test_y, stats, autocast):.2f} %",
              flush=True)
        return {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}

    print(f"{distilled['arch']} of {args.run} on {args.dataset}: {args.copies} copies each of student and random init, "
          f"{len(images):,} images, {steps:,} steps of {args.batch_size}; lines over {len(test_x):,} test images, {device.type}, "
          f"amp {args.amp} -> {args.out}", flush=True)
    for init, copy in list(itertools.product(INITS, range(args.copies)))[len(copies):]:
        clock = time.time()
        state = fine_tune(init, copy, now)
        copies, now = [*copies, state], None
        save()
        print(f"  {time.time() - clock:.0f} s; {2 * args.copies - len(copies)} copies to go", flush=True)

    network = network_from("student")

    def error(state):
        """Test error in % with batch norm's statistics of this very state."""
        network.load_state_dict(state)
        with autocast:
            update_bn((normalise(batch, stats) for batch in bn_images.split(500)), network["encoder"])
        return 100 - test_accuracy(network, test_x, test_y, stats, autocast)

    ts = np.linspace(0, 1, args.points)
    print(f"{'line':30}{'ends':>16}{'highest':>10}{'barrier':>10}   (test error in %)")
    for i, (init, (a, b)) in enumerate(itertools.product(INITS, pairs)):
        if i == len(lines):
            first = 0 if init == "student" else args.copies
            lines.append(error_along_line(copies[first + a], copies[first + b], ts, error).tolist())
            save()
        line = np.array(lines[i])
        ends = f"{line[0]:.2f}, {line[-1]:.2f}"
        print(f"{f'{INITS[init]}, {a} to {b}':30}{ends:>16}{line.max():10.2f}{barrier(line):10.2f}", flush=True)
    errors = np.array(lines).reshape(len(INITS), len(pairs), args.points)
    save_npz(args.out / "connect.npz", config, device, {"t": ts, "inits": np.array(list(INITS)), "pairs": np.array(pairs),
                                                "error": errors, "barrier": barrier(errors)})
    for title, values in zip(INITS.values(), barrier(errors)):
        print(f"barrier, {title}: {mean_std(values)} points over {len(values)} pairs")
    print(f"{args.out / 'connect.npz'} is complete; to see it: python landscape.py plot {args.out / 'connect.npz'}")


def mean_std(values):
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else "")


# ---- Pictures, drawn from the files alone ----------------------------------------------------------------------------

def plot(argv):
    """Draw what plane or connect computed: planes side by side, one row a quantity; or lines, one panel a start."""
    parser, add = make_parser(plot.__doc__, "landscape.py plot")
    parser.add_argument("files", nargs="+", type=Path, help=".npz files of plane, or of connect (their pairs are pooled)")
    add("--figure", "the picture: .png, .pdf or .svg (default: beside the first file, .png)", type=Path)
    for name, what, paper in (("--kl-range", "the KL", "1e-7 1e-3, with raw rows"),
                              ("--accuracy-range", "accuracy in %%", "10 50")):
        add(name, f"ends of the colours for {what}; the paper's are {paper} (default: from the data)", type=float, nargs=2,
            metavar=("LOW", "HIGH"))
    args = parser.parse_args(argv)
    args.figure = args.figure or args.files[0].with_suffix(".png")
    if args.figure.suffix not in (".png", ".pdf", ".svg"):
        parser.error("--figure wants a name that ends in .png, .pdf or .svg")
    for name, limits in (("--kl-range", args.kl_range), ("--accuracy-range", args.accuracy_range)):
        if limits and not 0 < limits[0] < limits[1] < math.inf:
            parser.error(f"{name} wants a lower and a higher number, both above 0")
    files = [(path, *read_npz(path)) for path in args.files]
    kinds = {"kl" in arrays for *_, arrays in files}
    if len(kinds) > 1:
        raise Problem("planes and lines do not go into one picture: plot them apart")
    for path, _, arrays in files:
        if "kl" in arrays and arrays["done"] < len(arrays["points"]):
            raise Problem(f"{path} holds {arrays['done']} of {len(arrays['points'])} points: finish it with --resume first")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = draw_planes(plt, files, args) if kinds == {True} else draw_lines(plt, files)
    write_atomically(args.figure, lambda file: figure.savefig(file, format=args.figure.suffix[1:], dpi=150))
    print(f"the picture: {args.figure}")


def draw_planes(plt, files, args):
    """A column for every file, a row for every quantity; white contours of ‖θ‖₂ and the three anchors (Fig. 5)."""
    from matplotlib.colors import ListedColormap, LogNorm, Normalize
    from matplotlib.patheffects import withStroke
    colours = ListedColormap(plt.get_cmap("viridis")(np.linspace(0, 0.9, 256)))  # its brightest would hide white contours
    outline = [withStroke(linewidth=2.5, foreground="white")]
    shape, size = (3, len(files)), (0.9 + 3.6 * len(files), 9.6)
    if len(files) == 1:  # one plane lies better on its side
        shape, size = (1, 3), (12.5, 4)
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    axes = axes.reshape(3, len(files))
    for row, (quantity, title) in zip(axes, QUANTITIES.items()):
        everything = np.concatenate([arrays[quantity] for *_, arrays in files])
        if quantity == "kl":
            low, high = args.kl_range or np.quantile(everything[everything > 0], (0.005, 0.995))
            scale = LogNorm(low, high)
        else:
            low, high = args.accuracy_range or (everything.min(), everything.max())
            scale = Normalize(low, high)
        for axis, (path, config, arrays) in zip(row, files):
            values, norm = (arrays[key][3:].reshape(len(arrays["y"]), -1) for key in (quantity, "norm"))
            picture = axis.pcolormesh(arrays["x"], arrays["y"], values.clip(low, high), norm=scale, cmap=colours,
                                      shading="nearest", rasterized=True)
            contours = axis.contour(arrays["x"], arrays["y"], norm, 6, colors="white", linewidths=0.8)
            axis.clabel(contours, fontsize=7)
            for (x, y), name, marker in zip(arrays["points"][:3], arrays["anchors"], "*os"):
                if arrays["x"][0] <= x <= arrays["x"][-1] and arrays["y"][0] <= y <= arrays["y"][-1]:
                    axis.plot(x, y, marker, color="black", markeredgecolor="white", markersize=11 if marker == "*" else 7)
                    axis.annotate(f"${str(name).replace('*_S', '_S^*').replace('θ', chr(92) + 'theta')}$", (x, y), (7, 5),
                                  textcoords="offset points", fontsize=12, path_effects=outline)
            if config["axes"] == "orthonormal":
                axis.set_aspect("equal")
            if quantity == "kl" and len(files) > 1:
                axis.set_title(describe(config).replace(", ", "\n", 1), fontsize=9)
            if quantity == "linear_converged" or len(files) == 1:
                lengths = config["axes"] == "orthonormal"
                axis.set_xlabel("distance in weight space" if lengths else f"steps to {arrays['anchors'][1]}")
        figure.colorbar(picture, ax=row, label=title, extend="both" if quantity == "kl" else "neither")
    figure.suptitle("white lines: ‖θ‖" if len(files) > 1 else f"{describe(files[0][1])}; white lines: ‖θ‖", fontsize=10)
    return figure


def describe(config):
    """A plane in a line: view, network, number of logits, images."""
    distilled = config["distilled"]
    return (f"{config['view']} view{' of encoders' * config['encoder_only']}, {distilled['arch']}, m = {distilled['out_dim']:,}"
            f"{', raw rows' * (distilled.get('bottleneck') == 'lf/l')}, {config['n_images']:,} images of {Path(config['dataset']).name}")


def draw_lines(plt, files):
    """Test error between fine-tuned copies: every pair a thin line, their mean a thick one (Fig. 9)."""
    first, config, arrays = files[0]
    for path, other, _ in files[1:]:
        for key in ("points", "epochs", "lr", "batch_size", "dataset", "n_images", "n_test_images"):
            if other[key] != config[key]:
                raise Problem(f"{first} has {key} {config[key]}, {path} has {other[key]}: their lines are not alike, plot them apart")
    figure, axes = plt.subplots(1, len(INITS), figsize=(7, 3.6), sharey=True, layout="constrained")
    for i, (axis, (init, title), colour) in enumerate(zip(axes, INITS.items(), ("#1b5e9e", "#c4561b"))):
        errors = np.concatenate([lines["error"][i] for *_, lines in files])
        axis.plot(arrays["t"], errors.T, color=colour, linewidth=0.8, alpha=0.5)
        axis.plot(arrays["t"], errors.mean(0), color=colour, linewidth=2.5)
        summary = f"barrier {mean_std(barrier(errors))} points, {len(errors)} pair{'s' * (len(errors) > 1)}"
        axis.set(title=f"{title}\n{summary}", xlabel="position on the line")
        axis.grid(alpha=0.3)
        print(f"{title}: ends {errors[:, [0, -1]].mean():.2f} %, {summary}")
    axes[0].set_ylabel("test error (%)")
    figure.suptitle(f"{config['distilled']['arch']}, {config['n_images']:,} images of {Path(config['dataset']).name}, "
                    f"{config['epochs']} epochs of fine-tuning", fontsize=10)
    return figure


# ---- Main ------------------------------------------------------------------------------------------------------------

def main(argv=None):
    argv, commands = sys.argv[1:] if argv is None else argv, {"plane": plane, "connect": connect, "plot": plot}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    parser, _ = make_parser(__doc__)
    parser.add_argument("command", choices=commands, help="each has a --help of its own")
    parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
