#!/usr/bin/env python3
"""How good are the features? Linear and k-NN probes of raw pixels, teacher and student.

    python probe.py runs/cifar10-resnet18-eps0-seed0                    one run, on the data it was distilled on
    python probe.py runs/*-resnet18-eps0-seed*                          several seeds: mean ± standard deviation
    python probe.py runs/imagenet-folder-run --dataset cifar10          transfer (Tables 2 and 4)
    python probe.py --teacher vgg11 resnet18 --dataset cifar10          random teachers alone, no run needed

Three probes, because they disagree, and the disagreement teaches something (README): the paper's ten-epoch linear probe,
the same linear probe standardised and trained to convergence, and k nearest neighbours.
"""
import argparse, csv, os, re, statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distill import (ARCHS, DATASETS, PROBES, Problem, amp_tools, at_least, channel_stats, fingerprint, load_checkpoint, load_data,
                     normalise, pick_device, provenance, random_network, read_json, run_cli, write_json)


@torch.no_grad()
def extract_features(encoder, images, stats, amp="off"):
    """uint8 images (n, 3, s, s) -> float32 embeddings (n, r), by `encoder` in eval mode; in full precision unless told."""
    batch_size = 500 if images.is_cuda else 100  # a CPU is faster with less at once (ResNet20: 1.5 times), to the same bits
    was_training = encoder.training
    encoder.eval()
    with amp_tools(amp, images.device)[0]:
        features = torch.cat([encoder(normalise(batch, stats)).float() for batch in images.split(batch_size)])
    encoder.train(was_training)
    if not features.isfinite().all():
        raise Problem("the encoder's features are not finite: its training diverged; distil again with a lower --lr")
    return features


def accuracy(predicted, labels):
    """Share of equal entries, in %."""
    return 100 * (predicted == labels).float().mean().item()


def linear_probe_paper(train, test, n_classes, seed=0, epochs=10):
    """The paper's linear probe (App. E): (best, last) test accuracy in % over its epochs of AdamW at torch's defaults.

    `train` and `test` are (features (n, r) float32, labels (n,)). Features are not standardised; one shuffle, then the
    same batches of 256 in every epoch. The paper's tables report the best epoch.
    """
    (x, y), device = train, train[0].device
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # torch's default init draws from the global generator: give it back as it was
        torch.manual_seed(seed)
        head = nn.Linear(x.shape[1], n_classes).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), fused=True)
    order = torch.randperm(len(x), generator=generator).to(device)
    batches = list(zip(x[order].split(256), y[order].split(256)))
    accuracies = []
    for epoch in range(epochs):
        for features, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(head(features), labels).backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append(accuracy(head(test[0]).argmax(1), test[1]))
    return max(accuracies), accuracies[-1]


def logistic_regression(x, y, n_classes, l2, tolerance=1e-5, max_iter=500):
    """(weight (r, classes), bias (classes,)) that minimise mean cross-entropy + l2/2·‖weight‖²; x (n, r) float32, y (n,).

    Full-batch L-BFGS until no entry of the gradient exceeds `tolerance`. It sees the weight as L⁻ᵀ·u, where L·Lᵀ is the
    bound xᵀx/2n + l2 on the curvature (Böhning 1992): in u the problem is well conditioned however the features are
    correlated, which takes a tenth of the iterations to the same minimum. Raises Problem if it does not converge.
    """
    r = x.shape[1]
    bound = 0.5 * (x.T @ x / len(x)).double()
    bound.diagonal().add_(l2 + 1e-6 * bound.trace())  # a little more than l2, for what float32 rounded off
    root = torch.linalg.cholesky(bound)
    u = torch.zeros(r, n_classes, dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=torch.float64, device=x.device, requires_grad=True)
    weight = lambda: torch.linalg.solve_triangular(root.T, u, upper=True)
    optimizer = torch.optim.LBFGS([u, bias], max_iter=max_iter, tolerance_grad=tolerance, tolerance_change=0,
                                  history_size=20, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        w = weight()
        loss = F.cross_entropy((x @ w.float()).double() + bias, y) + l2 / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    objective()
    worst = max(u.grad.abs().max().item(), bias.grad.abs().max().item())
    if not worst < 10 * tolerance:
        raise Problem(f"the converged linear probe did not converge (largest gradient entry {worst:.1e})")
    return weight().detach().float(), bias.detach().float()


def linear_probe_converged(train, test, n_classes, l2=1e-3):
    """Test accuracy in % of logistic regression on standardised features, trained to convergence with a small fixed `l2`."""
    mean, std = train[0].mean(0), train[0].std(0).clamp(min=1e-8)  # a feature that never varies stays 0
    weight, bias = logistic_regression((train[0] - mean) / std, train[1], n_classes, l2)
    return accuracy(((test[0] - mean) / std @ weight + bias).argmax(1), test[1])


@torch.no_grad()
def knn_probe(train, test, n_classes, k=20):
    """Test accuracy in % of the k nearest neighbours: Euclidean, unstandardised, majority vote, ties to the lowest label."""
    centre = train[0].mean(0)  # distances do not change, but their float32 rounding shrinks
    x, correct = train[0] - centre, 0
    for query, labels in zip((test[0] - centre).split(500), test[1].split(500)):
        squared = x.square().sum(1) - 2 * query @ x.T  # + |query|², the same for all neighbours
        neighbours = train[1][squared.topk(min(k, len(x)), largest=False).indices]
        votes = F.one_hot(neighbours, n_classes).sum(1)
        correct += (votes.argmax(1) == labels).sum().item()  # argmax takes the first of equals
    return 100 * correct / len(test[1])


def evaluate(encoder, data, amp="off"):
    """All probes of `encoder` on `data`, in %: {"linear_paper", "linear_paper_last", "linear_converged", "knn"}.

    Images are normalised by the mean and standard deviation of `data`'s own training part; features are computed once.
    """
    stats = channel_stats(data.train_x)
    parts = (data.train_x, data.train_y), (data.test_x, data.test_y)
    train, test = ((extract_features(encoder, x, stats, amp), y) for x, y in parts)
    n_classes = len(data.classes)
    best, last = linear_probe_paper(train, test, n_classes)
    return {"linear_paper": best, "linear_paper_last": last,
            "linear_converged": linear_probe_converged(train, test, n_classes), "knn": knn_probe(train, test, n_classes)}


# ---- Tables and the picture ------------------------------------------------------------------------------------------

def common_data(configs, dataset):
    """(data set, image size) to probe runs with these configs on: `dataset`, or what all of them used. Raises Problem."""
    sizes = {config["image_size"] for config in configs}
    names = {config["probe_dataset"] or config["dataset"] for config in configs}
    if len(sizes) > 1:
        raise Problem("these runs were trained on images of different sizes: probe them apart")
    if not dataset and len(names) > 1:
        raise Problem(f"these runs use different data ({', '.join(sorted(names))}): name one with --dataset")
    return dataset or names.pop(), sizes.pop() if sizes else 32


def print_table(raw, teachers, students):
    """A row each for raw pixels, teachers and every kind of student, with mean ± standard deviation over seeds.

    `raw` is a dict of probes in %, `teachers` lists (arch, probes), `students` (path, config, its teacher's probes, probes).
    Runs that differ in their seed alone are one kind.
    """
    rows = [("raw pixels", [(raw, None)])]
    for arch in dict.fromkeys(arch for arch, _ in teachers):
        rows.append((f"teacher {arch}", [(probes, None) for a, probes in teachers if a == arch]))
    kinds = {}
    for path, config, teacher_probes, probes in students:
        kind = tuple(item for item in config.items() if item[0] not in
                     ("seed", "out", "resume", "device", "log_every", "eval_every", "data_dir", "mirror"))
        kinds.setdefault(kind, []).append((path.name, probes, teacher_probes))
    for kind in kinds.values():
        name = kind[0][0] if len(kind) == 1 else re.sub(r"[-_]?seed\d+$", "", kind[0][0])
        rows.append((f"student {name}", [scores for _, *scores in kind]))
    columns = {"linear_paper": "linear (paper, best)", "linear_paper_last": "(paper, last epoch)",
               "linear_converged": "linear (converged)", "knn": "k-NN (k=20)"}
    print(f"\n{'accuracy in %':32}" + "".join(f"{title:>23}" for title in columns.values()))
    for label, scores in rows:
        cells = []
        for probe in columns:
            cell = f"{statistics.mean(probes[probe] for probes, _ in scores):.2f}"
            if len(scores) > 1:
                cell += f" ± {statistics.stdev(probes[probe] for probes, _ in scores):.2f}"
            if scores[0][1]:
                cell += f" ({statistics.mean(probes[probe] - before[probe] for probes, before in scores):+.2f})"
            cells.append(f"{cell:>23}")
        print(f"{label + f' ({len(scores)} seeds)' * (len(scores) > 1):32}" + "".join(cells))
    if students:
        print("in brackets: the gain over the student's own teacher")


def draw(path, raw, teachers, students):
    """Accuracy of every probe over training steps (from each run's log.csv), against teachers and raw pixels."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(PROBES), figsize=(11, 3.8), sharex=True, layout="constrained")
    styles = [("#1b5e9e", "o-"), ("#c4561b", "s--"), ("#7a7a7a", "^:"), ("#3f8f4f", "D-."), ("#8a4fa3", "v-"), ("#111111", "x--")]
    for ax, (probe, title) in zip(axes, PROBES.items()):
        for i, (run, *_) in enumerate(students):
            with open((run if run.is_dir() else run.parent) / "log.csv", newline="") as file:
                points = [(int(row["step"]), float(row[probe])) for row in csv.DictReader(file) if row[probe]]
            ax.plot(*zip(*points), styles[i % 6][1], color=styles[i % 6][0], label=f"student {run.name}", markersize=4.5)
        for i, (_, probes) in enumerate(teachers):
            ax.axhline(probes[probe], color="black", linewidth=1, label="random teacher" if i == 0 else None)
        ax.axhline(raw[probe], color="black", linewidth=1, linestyle=(0, (1, 3)), label="raw pixels")
        ax.set(title=title, xlabel="distillation step")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run directories of distill.py, or checkpoint files")
    add("--teacher", nargs="+", choices=ARCHS, default=[], metavar="ARCH",
        help=f"probe random teachers of these kinds, without a run: {', '.join(ARCHS)}")
    add("--seeds", type=at_least(0, int), nargs="+", default=[0], metavar="SEED", help="of the random teachers, with --teacher; "
        "those of distill.py's runs with the same --seed (default: 0)")
    add("--dataset", help=f"data to probe on: {', '.join(DATASETS)}, or a folder of images (default: what the runs used)")
    add("--amp", choices=("bf16", "fp16", "off"), default="off", help="16-bit encoder: faster; off is what all tables use unless "
        "they say otherwise (default: off)")
    add("--json", type=Path, help="also write every accuracy to this file, as soon as it is known")
    add("--resume", action="store_true", help="do not probe again what the --json file holds already")
    add("--figure", type=Path, help="also draw accuracy over steps to this file (.png, .pdf)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one (default: auto)")
    add("--data-dir", default="data", help="where downloads and caches go (default: data)")
    add("--mirror", default=os.environ.get("DATA_MIRROR"), help="URL of a directory with the archives to download; or set DATA_MIRROR")
    args = parser.parse_args(argv)
    if not args.runs and not (args.teacher and args.dataset):
        parser.error("name one or more run directories, or --teacher ARCH --dataset DATA")
    if args.figure and not args.runs:
        parser.error("--figure draws runs: name one or more run directories")
    if args.figure and args.figure.suffix not in (".png", ".pdf", ".svg"):
        parser.error("--figure wants a name that ends in .png, .pdf or .svg")
    device = pick_device(args.device)

    runs = [(path, *load_checkpoint(path, device)) for path in args.runs]
    dataset, image_size = common_data([config for *_, config in runs], args.dataset)
    data = load_data(dataset, image_size, args.data_dir, args.mirror).to(device)
    if len(data.test_y) == 0:
        raise Problem(f"{dataset} has no labels to probe: name a labelled data set with --dataset")
    print(f"{dataset}: {len(data.train_y):,} training and {len(data.test_y):,} test images, {len(data.classes)} classes, "
          f"{device.type}")

    results = read_json(args.json) if args.json and args.json.exists() else {}
    if results and not args.resume:
        raise Problem(f"{args.json} exists: add --resume to go on with it, or name another file with --json")
    about = {"dataset": dataset, "train_images": len(data.train_y), "test_images": len(data.test_y), "amp": args.amp}

    def probe(name, encoder):
        """The probes of an encoder, taken from the --json file if it has them, and kept there."""
        before = results.get(name, about)
        if any(before[key] != value for key, value in about.items()):
            raise Problem(f"{args.json} was measured on other data than {dataset}, or with another --amp: name another file with --json")
        if name not in results:
            results[name] = {**evaluate(encoder.to(device), data, args.amp), **about, **provenance(device)}
        if args.json:
            write_json(args.json, results)
        print(f"  {name}: " + ", ".join(f"{title} {results[name][probe]:.2f}" for probe, title in PROBES.items()), flush=True)
        return results[name]

    raw = probe("raw pixels", nn.Flatten())
    teachers = [(arch, probe(f"teacher {arch} seed {seed}", random_network(2 * seed, arch, 1, image_size).encoder))
                for arch in args.teacher for seed in args.seeds]
    students, known = [], {}  # a teacher that several runs share is probed once
    for path, teacher, student, config in runs:
        key = fingerprint(teacher)
        if key not in known:
            known[key] = probe(f"teacher of {path}", teacher)
            teachers.append((config["arch"], known[key]))
        students.append((path, config, known[key], probe(f"student {path}", student)))
        write_json((path if path.is_dir() else path.parent) / f"probe-{Path(dataset).name}.json",
                   {"raw": raw, "teacher": known[key], "student": students[-1][-1]})
    print_table(raw, teachers, students)
    if args.figure:
        draw(args.figure, raw, teachers, students)


if __name__ == "__main__":
    run_cli(main)
