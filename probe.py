#!/usr/bin/env python3
"""How good are the features? Linear and k-NN probes of raw pixels, teacher and student.

    python probe.py runs/cifar10-resnet18-eps0-seed0                    one run, on the data it was distilled on
    python probe.py runs/*-resnet18-eps0-seed*                          several seeds: mean ± standard deviation
    python probe.py runs/imagenet-folder-run --dataset cifar10          transfer (Tables 2 and 4)
    python probe.py --teacher vgg11 --dataset cifar10 --seeds 3         random teachers alone, no run needed

Three probes, because they disagree, and the disagreement teaches something (README): the paper's ten-epoch linear probe,
the same linear probe standardised and trained to convergence, and k nearest neighbours.
"""
import argparse, csv, hashlib, json, os, re, statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distill import (ARCHS, DATASETS, Problem, channel_stats, load_checkpoint, load_data, normalise, pick_device,
                     random_network, run_cli, write_atomically)

PROBES = {"linear_paper": "linear (paper)", "linear_converged": "linear (converged)", "knn": "k-NN"}


@torch.no_grad()
def extract_features(encoder, images, stats, batch_size=500):
    """uint8 images (n, 3, s, s) -> float32 embeddings (n, r), by `encoder` in eval mode and full precision."""
    was_training = encoder.training
    encoder.eval()
    features = torch.cat([encoder(normalise(batch, stats)) for batch in images.split(batch_size)])
    encoder.train(was_training)
    if not features.isfinite().all():
        raise Problem("the encoder's features are not finite: its training diverged; distil again with a lower --lr")
    return features


def accuracy(predicted, labels):
    """Share of equal entries, in %."""
    return 100 * (predicted == labels).float().mean().item()


def linear_probe_paper(train, test, n_classes, seed=0):
    """The paper's linear probe (App. E): (best, last) test accuracy in % over ten epochs of AdamW at torch's defaults.

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
    for epoch in range(10):
        for features, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(head(features), labels).backward()
            optimizer.step()
        with torch.no_grad():
            accuracies.append(accuracy(head(test[0]).argmax(1), test[1]))
    return max(accuracies), accuracies[-1]


def logistic_regression(x, y, n_classes, l2, tolerance=1e-5, max_iter=500):
    """(weight (r, classes), bias (classes,)) that minimise mean cross-entropy + l2/2·‖weight‖²; x (n, r) float32, y (n,).

    Full-batch L-BFGS until no entry of the gradient exceeds `tolerance`. It runs in the eigenbasis of x, each axis scaled
    by its bound on the curvature, half the eigenvalue (Böhning 1992): the same minimum in a tenth of the iterations.
    Raises Problem if it does not converge.
    """
    eigenvalues, axes = torch.linalg.eigh(x.T @ x / len(x))
    scale = (0.5 * eigenvalues.clamp(min=0) + l2).rsqrt()
    z = x @ (axes * scale)
    weight = torch.zeros(x.shape[1], n_classes, device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, tolerance_grad=tolerance, tolerance_change=0,
                                  history_size=20, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        logits = (z @ weight + bias).double()  # the line search compares losses closer together than float32 can tell
        loss = F.cross_entropy(logits, y) + l2 / 2 * (scale[:, None] * weight).double().square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    objective()
    worst = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    if not worst < 10 * tolerance:
        raise Problem(f"the converged linear probe did not converge (largest gradient entry {worst:.1e})")
    return (axes * scale) @ weight.detach(), bias.detach()


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
        neighbours = train[1][squared.topk(k, largest=False).indices]
        votes = F.one_hot(neighbours, n_classes).sum(1)
        correct += (votes.argmax(1) == labels).sum().item()  # argmax takes the first of equals
    return 100 * correct / len(test[1])


def evaluate(encoder, data):
    """All probes of `encoder` on `data`, in %: {"linear_paper", "linear_paper_last", "linear_converged", "knn"}.

    Images are normalised by the mean and standard deviation of `data`'s own training part; features are computed once.
    """
    stats = channel_stats(data.train_x)
    train, test = ((extract_features(encoder, x, stats), y) for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)))
    n_classes = len(data.classes)
    best, last = linear_probe_paper(train, test, n_classes)
    return {"linear_paper": best, "linear_paper_last": last,
            "linear_converged": linear_probe_converged(train, test, n_classes), "knn": knn_probe(train, test, n_classes)}


# ---- Tables and the picture ------------------------------------------------------------------------------------------

def probe_runs(paths, dataset, seeds, teacher_arch, options):
    """Probe runs, or random teachers of `teacher_arch` alone. Returns (data, raw, teachers, students).

    `raw` is a dict of probes in %; `teachers` maps a teacher to one; `students` lists (path, config, teacher, probes).
    A teacher that several runs share is probed once.
    """
    device, image_size = options.device, 32
    runs = [(Path(path), *load_checkpoint(path, device)) for path in paths]
    if runs:
        configs = [config for *_, config in runs]
        if len({config["image_size"] for config in configs}) > 1:
            raise Problem("these runs were trained on images of different sizes: probe them apart")
        names = {config["probe_dataset"] or config["dataset"] for config in configs}
        if not dataset and len(names) > 1:
            raise Problem(f"these runs use different data ({', '.join(sorted(names))}): name one with --dataset")
        dataset, image_size = dataset or names.pop(), configs[0]["image_size"]
    data = load_data(dataset, image_size, options.data_dir, options.mirror)
    if len(data.test_y) == 0:
        raise Problem(f"{dataset} has no labels to probe: name a labelled data set with --dataset")
    data = data.to(device)
    print(f"{dataset}: {len(data.train_y):,} training and {len(data.test_y):,} test images, {len(data.classes)} classes, on {device}")

    def report(what, probes):
        print(f"  {what}: " + ", ".join(f"{title} {probes[probe]:.2f}" for probe, title in PROBES.items()), flush=True)
        return probes

    raw = report("raw pixels", evaluate(nn.Flatten(), data))
    teachers, students = {}, []
    for seed in range(seeds if teacher_arch else 0):
        encoder = random_network(2 * seed, teacher_arch, out_dim=1).encoder.to(device)
        teachers[teacher_arch, seed] = report(f"teacher {teacher_arch}, seed {seed}", evaluate(encoder, data))
    for path, teacher, student, config in runs:
        weights = hashlib.sha256(b"".join(t.cpu().contiguous().numpy().tobytes() for t in teacher.state_dict().values()))
        key = config["arch"], weights.hexdigest()
        if key not in teachers:
            teachers[key] = report(f"teacher of {path}", evaluate(teacher, data))
        students.append((path, config, key, report(f"student {path}", evaluate(student, data))))
        folder = path if path.is_dir() else path.parent
        result = {"dataset": dataset, "raw": raw, "teacher": teachers[key], "student": students[-1][-1]}
        write_json(folder / f"probe-{Path(dataset).name}.json", result)
    return data, raw, teachers, students


def write_json(path, result):
    write_atomically(path, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))


def print_table(raw, teachers, students):
    """One row each for raw pixels, teachers and every kind of student: mean ± standard deviation over seeds, and the gain."""
    rows = [("raw pixels", [raw], None)]
    for arch in dict.fromkeys(arch for arch, _ in teachers):
        rows.append((f"teacher {arch}", [probes for (a, _), probes in teachers.items() if a == arch], None))
    kinds = {}
    for path, config, teacher, probes in students:
        kind = tuple((k, v) for k, v in config.items() if k not in ("seed", "out", "resume", "device", "log_every"))
        kinds.setdefault(kind, []).append((path, teachers[teacher], probes))
    for runs in kinds.values():
        name = re.sub(r"-?seed\d+$", "", runs[0][0].name) if len(runs) > 1 else runs[0][0].name
        rows.append((f"student {name}", [probes for *_, probes in runs], [teacher for _, teacher, _ in runs]))
    width = max(len(label) for label, *_ in rows) + 7
    columns = {"linear_paper": "linear (paper, best)", "linear_paper_last": "(its last epoch)", "linear_converged": "linear (converged)", "knn": "k-NN (k=20)"}
    print(f"\n{'accuracy in %':{width}}" + "".join(f"{title:>22}" for title in columns.values()))
    for label, results, baselines in rows:
        cells = []
        for probe in columns:
            values = [result[probe] for result in results]
            cell = f"{statistics.mean(values):.2f}"
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values):.2f}"
            if baselines:
                cell += f" ({statistics.mean(v - b[probe] for v, b in zip(values, baselines)):+.2f})"
            cells.append(f"{cell:>22}")
        print(f"{label + (f' ({len(results)} seeds)' if len(results) > 1 else ''):{width}}" + "".join(cells))
    if students:
        print("in brackets: the gain over the student's own teacher")


def draw(path, raw, teachers, students):
    """Accuracy of every probe over training steps (each run's log.csv) against its teacher and raw pixels."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(PROBES), figsize=(11, 3.6), sharex=True, layout="constrained")
    for ax, (probe, title) in zip(axes, PROBES.items()):
        for i, (run, config, _, _) in enumerate(students):
            with open((run if run.is_dir() else run.parent) / "log.csv", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row[probe]]
            ax.plot([int(row["step"]) for row in rows], [float(row[probe]) for row in rows], "osD^v<>"[i % 7] + ("-", "--", ":")[i % 3],
                    color=("#1b5e9e", "#c4561b", "#7a7a7a", "#3f8f4f", "#8a4fa3")[i % 5], label=f"student, {run.name}", markersize=4.5)
        for key, probes in teachers.items():
            ax.axhline(probes[probe], color="black", linewidth=1, label="its random teacher" if key == next(iter(teachers)) else None)
        ax.axhline(raw[probe], color="black", linewidth=1, linestyle=(0, (1, 3)), label="raw pixels")
        ax.set(title=title, xlabel="distillation step")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", help="run directories of distill.py, or checkpoint files")
    add("--teacher", choices=ARCHS, metavar="ARCH", help=f"probe random teachers of this kind, without any run: {', '.join(ARCHS)}")
    add("--seeds", type=int, default=1, help="how many random teachers, with --teacher (default: 1)")
    add("--dataset", help=f"data to probe on: {', '.join(DATASETS[:3])}, or a folder (default: what the run used)")
    add("--json", type=Path, help="also write raw, teacher and student accuracies to this file")
    add("--figure", type=Path, help="also draw accuracy over steps to this file (.png, .pdf)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--data-dir", default="data", help="where downloads and caches go (default: data)")
    add("--mirror", default=os.environ.get("DATA_MIRROR"), help="URL of a directory that holds the CIFAR archives (or set DATA_MIRROR)")
    args = parser.parse_args(argv)
    if not args.runs and not (args.teacher and args.dataset):
        parser.error("name one or more run directories, or --teacher ARCH --dataset DATA")
    args.device = pick_device(args.device)
    data, raw, teachers, students = probe_runs(args.runs, args.dataset, args.seeds, args.teacher, args)
    print_table(raw, teachers, students)
    if args.json:
        mean = lambda results: {p: round(statistics.mean(r[p] for r in results), 4) for p in PROBES}
        write_json(args.json, {"raw": mean([raw]), "teacher": mean(teachers.values()),
                               "students": {path.name: mean([probes]) for path, _, _, probes in students}})
    if args.figure:
        draw(args.figure, raw, teachers, students)


if __name__ == "__main__":
    run_cli(main)
