#!/usr/bin/env python3
"""How good are the features? Probes and controls of raw pixels, random teachers and students.

    python probe.py runs/cifar10-resnet18-eps0-seed0              a run, on the data of that run
    python probe.py runs/quick/*/                                 several, side by side
    python probe.py runs/tiny-run/best.pt --dataset cifar10       transfer (Tables 2 and 4)
    python probe.py --teacher vgg11 resnet18 --dataset cifar10    random teachers, no run needed

Three probes, because they disagree, and the disagreement teaches something (README): the paper's
ten-epoch linear probe, the same linear probe standardised and trained to convergence, and k nearest
neighbours. Each judges the features as they are, standardised and whitened: how much of a student's
gain is more than a linear map could give its teacher?
"""
import math
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import stack_module_state
from torch.optim.swa_utils import update_bn

from distill import (
    DOWNLOADS, EMBEDDING_WIDTH, MADE, SEED, Problem, between, channel_stats, embed, load_checkpoint,
    load_data, new_parser, normalise, pick_device, progress, provenance, random_network, save, say)

PROBES = {"linear_paper": "linear (paper)", "linear_converged": "linear (converged)", "knn": "k-NN"}


# ---- The probes ----------------------------------------------------------------------------------

def accuracy(logits, labels):
    """% of the n rows of logits (..., n, classes) whose argmax is their label (n,), as (...)."""
    return 100 * (logits.argmax(-1) == labels).double().mean(-1)


def linear_probe(x, y, test_x, test_y, n_classes, seeds=(0,)):
    """The paper's linear probe (App. E): test accuracy in % after ten epochs of AdamW at torch's
    defaults, (D,).

    `x` and `test_x` are features (n, r) float32, used as they are, `y` and `test_y` labels (n,).
    Each of the D `seeds` draws a head's initial weights and one shuffle of the images, which is cut
    into batches of 256, the same in every epoch. The D heads train side by side, because one alone
    is too small a task to keep a processor busy.
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
    return tuple((part - x.mean(0)) / std for part in (x, test_x))


@torch.no_grad()
def linear_probe_converged(x, y, test_x, test_y, n_classes, l2=1e-3, tolerance=1e-5, max_iter=5000):
    """Test accuracy in % of logistic regression on standardised features, run until no gradient
    exceeds `tolerance`.

    It minimises mean cross-entropy + l2/2·‖weight‖², shapes as above. Each step goes to the minimum
    of a quadratic upper bound of that loss at `ahead` (Böhning 1992), the point to which Nesterov's
    momentum leads; where it leads uphill, it starts afresh. However correlated the features, a few
    dozen steps do. Raises Problem if it does not converge.
    """
    # 1: for the bias
    x, test_x = (F.pad(part, (0, 1), value=1.0) for part in standardised(x, test_x))
    decay = torch.full((x.shape[1], 1), l2, device=x.device)
    decay[-1] = 0  # the bias is free
    bound = (x.T @ x).double() / (2 * len(y))
    diagonal = bound.diagonal()
    # l2, and a little more for what float32 rounded off; `diagonal` is a view of `bound`
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


# ---- What they probe -----------------------------------------------------------------------------

@torch.no_grad()
def extract_features(encoder, data):
    """float32 embeddings (n, r) of the training and the test images of `data`, by `encoder` in eval
    mode; images are normalised by the training part's statistics. Raises Problem if not finite.
    """
    stats, was_training = channel_stats(data.train_x), encoder.training
    # a CPU is faster with less at once (ResNet20: 1.5 times), to the same bits
    batch_size = 500 if data.train_x.is_cuda else 100
    encoder.eval()
    features = [torch.cat([embed(encoder, normalise(batch, stats))
                           for batch in images.split(batch_size)])
                for images in (data.train_x, data.test_x)]
    encoder.train(was_training)
    if not all(part.isfinite().all() for part in features):
        raise Problem("the encoder's features are not finite: its training diverged; distil again "
                      "with a lower --lr")
    return features


def spread(x):
    """{"cosine", "directions"}: do the features (n, r) point one way? In float64.

    `cosine`, the mean over pairs of images, is 1 if they all do. `directions`, at most r and n − 1,
    is the participation ratio (Σλ)²/Σλ² of the covariance's eigenvalues λ: how many of them carry
    the variance, 0 if there is none. Neither says whether the features tell the classes apart.
    """
    x = x.double()
    unit, n = F.normalize(x), len(x)  # a vector of zeros stays one
    total = unit.sum(0).square().sum() - unit.square().sum()  # of all n·(n − 1) cosines
    x = x - x.mean(0)
    gram = x @ x.T  # has the eigenvalues of the covariance, but for a factor
    return {"cosine": (total / (n * (n - 1))).item(),
            "directions": (gram.trace() ** 2 / gram.square().sum().clamp(min=1e-99)).item()}


@torch.no_grad()
def spread_along_depth(encoder, data):
    """A list of the `spread` of at most 100 test images after each ReLU, or transformer layer, from
    first to last; all that it hands on is one vector. Leaves `encoder` in eval mode.
    """
    found, images = [], data.test_x[::math.ceil(len(data.test_x) / 100)]
    hooks = [module.register_forward_hook(lambda *call: found.append(spread(call[2].flatten(1))))
             for module in encoder.modules()
             if isinstance(module, (nn.ReLU, nn.TransformerEncoderLayer))]
    embed(encoder.eval(), normalise(images, channel_stats(data.train_x)))
    for hook in hooks:
        hook.remove()
    return found


def judge(x, test_x, data, seeds=(0,)):
    """All probes of features in %, and the `spread` of at most 2,000 test images' features.

    The paper's probe is drawn once for each of `seeds`. One gives "linear_paper"; several give
    "linear_paper_mean", "linear_paper_std" and "linear_paper_max", the luckiest.
    """
    parts = x, data.train_y, test_x, data.test_y, len(data.classes)
    # 25 at once: more leave a processor's cache
    draws = torch.cat([linear_probe(*parts, seeds[i:i + 25]) for i in range(0, len(seeds), 25)])
    paper = {"linear_paper": draws.item()} if len(seeds) == 1 else {
        f"linear_paper_{name}": getattr(draws, name)().item() for name in ("mean", "std", "max")}
    return {**paper, "linear_converged": linear_probe_converged(*parts), "knn": knn_probe(*parts),
            **spread(test_x[::math.ceil(len(test_x) / 2000)])}


def evaluate(encoder, data, seeds=(0,)):
    """What `judge` says of the features of `encoder` as they are."""
    return judge(*extract_features(encoder, data), data, seeds)


# ---- Controls ------------------------------------------------------------------------------------

@torch.no_grad()
def calibrated(encoder, data):
    """A copy of `encoder` whose batch norms use the mean and variance of 5,000 training images.

    The student is probed with statistics of its training, its random teacher with mean 0 and
    variance 1: is that all the difference?
    """
    images, stats = data.train_x, channel_stats(data.train_x)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:5000]
    batches = images[order].tensor_split(math.ceil(len(order) / 500))
    encoder = deepcopy(encoder).to(images.device)
    update_bn((normalise(x, stats) for x in batches), encoder)  # of one size: all count alike
    return encoder


def whitened(x, test_x, ridge=0.1):
    """Both (n, r) turned to the principal axes of `x`, the training part, and divided along each by
    √(λ + ridge·mean λ), λ being the variance of `x` along it; axes of mere rounding are 0.

    A control, as `standardised` is: a linear map that is learnt without labels, and trains no
    network. The ridge keeps axes of hardly any variance from counting as much as the first. Up to
    0.1 the paper's probe hardly depends on it; the converged one, which standardises again, never
    does; k-NN, which cannot weigh axes, does (results/README.md tries others).
    """
    mean = x.double().mean(0)
    variance, axes = torch.linalg.eigh(x.T.double().cov())
    scaled = axes / (variance + ridge * variance.mean()).sqrt()
    scaled[:, variance <= 1e-9 * variance.max()] = 0
    return tuple(((part - mean) @ scaled).float() for part in (x, test_x))


TREATMENTS = {"": lambda *parts: parts, ", standardised": standardised, ", whitened": whitened}


def encoders_of(args, runs, data):
    """Yield (name, encoder, name of the teacher it is compared with) of all to be probed."""
    def with_calibrated(name, encoder):
        """A teacher, and the same with calibrated batch norm, if it has any."""
        yield name, encoder, None
        if "BatchNorm" in str(encoder):
            yield f"{name}, calibrated", calibrated(encoder, data), name

    yield "raw pixels", nn.Flatten(), None
    for arch in args.teacher:
        for seed in args.seeds:
            encoder = random_network(2 * seed, arch, 1, data.train_x.shape[-1]).encoder
            yield from with_calibrated(f"teacher {arch} seed {seed}", encoder)
    probed = set()  # runs may share a teacher
    for path, (teacher, student, config) in runs.items():
        name = f"teacher {config['arch']} seed {config['seed']}"
        if config["teacher"] or config["norm"] != "batch":
            name = f"teacher of {path}"
        if name not in probed:
            yield from with_calibrated(name, teacher.encoder)
        probed.add(name)
        unfinished = progress(config) * (path.name != "best.pt")
        yield f"student {path}{unfinished}", student.encoder, name


# ---- Main ----------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run directories of distill.py, or checkpoint files")
    add("--teacher", nargs="+", default=[], choices=EMBEDDING_WIDTH, metavar="ARCH", help="probe "
        f"random teachers of these kinds, without a run: {', '.join(EMBEDDING_WIDTH)}")
    add("--seeds", nargs="+", default=[0], type=SEED, metavar="SEED", help="of the random "
        "teachers: those of distill.py's runs with the same --seed")
    add("--dataset", help=f"data to probe on: {', '.join(DOWNLOADS + MADE)} or a .npz file; None: "
        "what the runs used")
    add("--draws", default=10, type=between(2, 1000), help="of the paper's linear probe, each with "
        "initial weights and an order of the images of its own")
    add("--json", type=Path, help="also write every number to this file")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda if there")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.teacher) or args.teacher and not args.dataset:
        parser.error("name one or more run directories, or --teacher ARCH --dataset DATA")
    if args.json and (args.json.suffix != ".json" or args.json.exists()):
        parser.error("--json wants a name that ends in .json, of a file that is not there yet")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    runs = {path: load_checkpoint(path) for path in args.runs}

    # The data that they have in common
    wanted = {(args.dataset or config["probe_dataset"] or config["dataset"], config["image_size"])
              for *_, config in runs.values()} or {(args.dataset, 32)}
    if len(wanted) > 1:
        raise Problem(f"these runs use data of different kinds or sizes, {wanted}: probe them "
                      "apart, or name one kind with --dataset")
    dataset, image_size = wanted.pop()
    data = load_data(dataset, image_size, device)
    if len(data.test_y) == 0:
        raise Problem(f"{dataset} has no labels to probe: name a labelled data set with --dataset")
    measured_on = {"dataset": dataset, "train_images": len(data.train_y),
                   "test_images": len(data.test_y), "amp": "off", "draws": args.draws,
                   "provenance": provenance(device)}

    say(f"{dataset}: {len(data.train_y):,} training and {len(data.test_y):,} test images, "
        f"{len(data.classes)} classes, {device.type}.\n"
        "Test accuracy in %; in brackets the gain over the teacher treated alike. paper: its\n"
        f"linear probe, mean of {args.draws} draws; luckiest: their best (the paper: of 100).\n")
    columns = {"linear_paper_mean": "paper", "linear_paper_max": "luckiest",
               "linear_converged": "converged", "knn": "k-NN"}
    line = "{:44}{:>15}{:>15}{:>15}{:>15}{:>8}{:>12}"
    say(line.format("", *columns.values(), "cosine", "directions"))
    found = {}
    for name, encoder, teacher in encoders_of(args, runs, data):
        features = extract_features(encoder.to(device), data)
        for treatment, treat in TREATMENTS.items():
            row = judge(*treat(*features), data, range(args.draws))
            gains = [f" ({row[key] - found[teacher + treatment][key]:+.2f})" if teacher else ""
                     for key in columns]
            say(line.format(treatment.replace(",", " ") or name,
                            *(f"{row[key]:.2f}{gain}" for key, gain in zip(columns, gains)),
                            f"{row['cosine']:.3f}", f"{row['directions']:.2f}"))
            found[name + treatment] = row | measured_on
        found[name]["along_depth"] = spread_along_depth(encoder, data)
    if args.json:
        save(args.json, found)


if __name__ == "__main__":
    main()
