"""REPORT.md and its figures: every table and figure of the paper beside what is under runs/ (bash run_all.sh report).

    python -m results.report                              from runs/paper and runs/mini
    python -m results.report results/cpu                  from the logs that are kept there

Directories have the names that `bash run_all.sh list` gives them, such as paper/fig10-m256-seed0. Read are run.json and log.csv of
distill.py, the .json files of probe.py, config.json and log.csv of prune.py, and landscape.py's .npz; never a checkpoint.
"""
import csv, json, os, re, statistics, zipfile
from pathlib import Path

import numpy as np

from distill import PROBES, Problem, make_parser, read_json, run_cli, write_atomically

# ---- What the paper says: accuracies in %, each (linear probe, k-NN) --------------------------------------------------

RAW = {"cifar10": (39.02, 33.61), "cifar100": (14.07, 14.87), "stl10": (31.51, 28.94), "tinyimagenet": (3.28, 3.44)}
TEACHERS = {  # Tables 1 and 3
    "cifar10": {"resnet18": (35.50, 37.65), "vgg11": (36.55, 44.92)},
    "cifar100": {"resnet18": (11.58, 13.77), "vgg11": (12.05, 18.10)},
    "stl10": {"resnet18": (24.24, 31.71), "vgg11": (24.67, 36.92)},
    "tinyimagenet": {"resnet18": (4.85, 4.59), "vgg11": (5.25, 5.98)}}
STUDENTS = {
    "cifar10": {"resnet18": (46.02, 44.67), "vgg11": (51.98, 51.32)},
    "cifar100": {"resnet18": (21.50, 20.22), "vgg11": (26.62, 23.53)},
    "stl10": {"resnet18": (40.58, 37.41), "vgg11": (46.20, 43.58)},
    "tinyimagenet": {"resnet18": (10.40, 7.11), "vgg11": (12.88, 9.23)}}
TRANSFER = {  # Tables 2 and 4
    "cifar10": {"resnet18": (46.06, 44.45), "vgg11": (52.45, 51.48)},
    "cifar100": {"resnet18": (22.60, 19.48), "vgg11": (27.49, 23.95)},
    "stl10": {"resnet18": (41.42, 38.86), "vgg11": (45.86, 42.26)}}
TABLE_5 = {  # linear probe only: teacher, student
    "vgg11": (36.55, 51.98), "vgg13": (34.73, 49.26), "vgg16": (33.08, 46.35), "vgg19": (30.84, 43.90),
    "resnet20": (28.68, 36.62), "resnet56": (14.05, 27.92), "resnet18": (35.50, 46.02), "resnet34": (28.18, 41.04),
    "resnet50": (19.69, 27.53), "vit-tiny": (32.93, 35.76), "vit-small": (38.57, 41.68), "vit-medium": (41.09, 43.13),
    "vit-base": (41.71, 44.38)}
FIG_4 = {  # linear probe only: the values of the released notebook; noise: the middle of 16.3 to 16.7
    "n500": 41.76, "n1000": 45.94, "n2000": 46.18, "n5000": 47.66, "n10000": 48.43, "n15000": 49.51, "n50000": 51.36,
    "n100000": 52.75, "n200000": 53.51, "n750000": 52.56, "n1000000": 52.65, "n5000000": 53.67,
    **{f"noise{n}": 16.5 for n in (500, 5000, 50000, 150000)}}

NEAR = {"resnet18": "0", "vgg11": "1e-10"}  # the ε that stands for the paper's α ≈ 0
ALPHA = {"0": 0, "1e-10": 0, "0.1": 0.09, "0.5": 0.33, "1.5": 0.6, "4": 0.8, "inf": 1}  # ε: α = ε/(1+ε)
VITS = [arch for arch in TABLE_5 if arch.startswith("vit")]

INTRODUCTION = """\
# Report

Made by `bash run_all.sh report` from what lies under `{root}`; nothing here was typed by hand. The jobs are those of
`bash run_all.sh list`. Test accuracy in %, mean ± standard deviation over n seeds.

- **ours** is the best, as in the paper's tables: of a student, over all probes of its run, but for the one before its first
  step; of a teacher, of raw pixels and of a student on other data, over the ten epochs of one linear probe. **last** is the
  student at the end of its run, or the probe's last epoch.
- **converged** is a linear probe that the paper does not have: standardised features, trained to its optimum (of a student:
  at the end of its run). It does not depend on how features are scaled.
- **verdict**: *agrees* if ours is within 2 points of the paper or within two of our standard deviations, else *higher* or
  *lower*. For a figure without numbers: *shows* or *does not show*, by the rule beside it. *missing* where no finished run is.
- **made** numbers the notes at the end: data, size of the run, hardware, versions.

{summary}
"""


# ---- What we have ----------------------------------------------------------------------------------------------------

def read_log(folder):
    """The rows of a log.csv as dicts of floats; empty cells are left out. None yet where a run has only begun."""
    if not (folder / "log.csv").exists():
        return []
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def read_results(root):
    """(runs, tables, unfinished): finished runs by name without seed, .json files of probe.py by name, what is not done."""
    runs, tables, unfinished = {}, {file.stem: read_json(file) for file in sorted(root.glob("*.json"))}, []
    for file in sorted(root.glob("*/run.json")):
        run, rows = read_json(file), read_log(file.parent)
        if rows and rows[-1]["step"] == run["total_steps"]:
            runs.setdefault(re.sub(r"-seed\d+$", "", file.parent.name), []).append({**run, "rows": rows})
        else:
            unfinished.append(f"{file.parent.name} (step {rows[-1]['step'] if rows else 0:,.0f} of {run['total_steps']:,})")
    for name, same in (("fig4-n50000", "cifar10-vgg11"), ("fig12-lf-l", "raw-resnet18-eps0")):  # the same settings, run once
        if same in runs:
            runs[name] = runs[same]
    return runs, tables, unfinished


def read_curves(root, start, epoch):
    """The finished pruning curves of Table 1's ResNet18: their settings, with {weights left in %: best accuracy in %}."""
    curves = []
    for file in sorted(root.glob(f"cifar10-resnet18-seed*/prune-{start}-rewind{epoch}/config.json")):
        config, rows = read_json(file), read_log(file.parent)
        if len(rows) == config["rounds"] + 1:
            curves.append({**config, "curve": {row["weights_left"]: row["best_accuracy"] for row in rows}})
    return curves


def read_npz(file):
    """The settings and arrays of a file of landscape.py, in one dict. Raises Problem."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return json.loads(str(arrays["config"])) | {name: arrays[name] for name in arrays.files if name != "config"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise Problem(f"{file} is truncated or not a file of landscape.py ({type(error).__name__}): delete it and make it again")


def best(run, probe="linear_paper"):
    """Of the student: what stands before the first step is its start."""
    return max(row[probe] for row in run["rows"] if probe in row and row["step"] > 0)


def last(run, column="linear_paper"):
    return run["rows"][-1][column]


def teacher(run, probe="linear_paper"):
    return run["teacher_probes"][probe]


def average(group, score=best):
    return statistics.mean(score(run) for run in group)


def spread(lists):
    """([means], [standard deviations]) of lists of numbers; 0 for a single number."""
    return [statistics.mean(v) for v in lists], [statistics.stdev(v) if len(v) > 1 else 0 for v in lists]


def mean_std(values):
    """12.34 ± 0.56 as text, without the deviation for a single value; nothing for none."""
    if not values:
        return ""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def origin(result):
    """On what data, how large, on which hardware and by which version a run, a curve or an entry of a .json was made."""
    made = result.get("made", result)
    versions = [f"{m['hardware']}, torch {m['torch']}, commit {m['commit']}" for m in (made if isinstance(made, list) else [made])]
    made = ", then ".join(dict.fromkeys(versions))
    if "total_steps" not in result and "made" in result:
        return f"{result['dataset']}, {result['n_images']:,} images, amp {result['amp']}; {made}"
    if "total_steps" not in result:
        images = f"{result['train_images']:,} + {result['test_images']:,} images"
        return f"{result['dataset']}, {images}, amp {result['amp']}; {made}"
    probed = f", probed on {result['probe_dataset']}" if result["probe_dataset"] else ""
    return (f"{result['dataset']}, {result['n_images']:,} images{probed}, {result['total_steps']:,} steps of "
            f"{result['batch_size']}, m = {result['out_dim']:,}, amp {result['amp']}; {made}")


# ---- Tables ----------------------------------------------------------------------------------------------------------

class Page:
    """Markdown, the verdicts given so far, and numbered notes on how each number was made."""
    def __init__(self):
        self.lines, self.origins, self.verdicts = [], {}, []

    def notes(self, results):
        numbers = sorted({self.origins.setdefault(origin(result), len(self.origins) + 1) for result in results})
        return ", ".join(f"[{number}]" for number in numbers)

    def table(self, header, rows):
        rows = (header, ["---"] * len(header), *rows)
        self.lines += ["", *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]

    def numbers(self, rows):
        """A table of (label, the paper's number, our runs or .json entries, which probe)."""
        cells = []
        for label, paper, results, probe in rows:
            runs = [result for result in results if "rows" in result]
            ours = [best(result, probe) if runs else result[probe] for result in results]
            at_end = [last(run, probe) for run in runs] or [result["linear_paper_last"] for result in results if probe != "knn"]
            converged = [last(run, "linear_converged") for run in runs] or [result["linear_converged"] for result in results]
            difference = statistics.mean(ours) - paper if ours else 0
            agrees = abs(difference) <= max(2, 2 * statistics.stdev(ours) if len(ours) > 1 else 0)
            self.verdicts.append("missing" if not ours else "agrees" if agrees else "higher" if difference > 0 else "lower")
            cells.append((label, f"{paper:.2f}", mean_std(ours) + f" ({len(ours)})" * bool(ours), mean_std(at_end),
                          f"{difference:+.2f}" if ours else "", self.verdicts[-1], mean_std(converged) if probe != "knn" else "",
                          self.notes(results)))
        self.table(("", "paper", "ours (n)", "last", "difference", "verdict", "converged", "made"), cells)

    def claims(self, rows):
        """A table of (figure, what the paper shows and our rule, what it needs, judge(*needs) -> (text, whether it shows))."""
        cells = []
        for label, rule, needs, judge in rows:
            shared = set.intersection(*({result["seed"] for result in group} for group in needs))  # what has the same teachers
            needs = [[result for result in group if result["seed"] in shared] for group in needs]
            text, shows = judge(*needs) if shared else ("", None)
            self.verdicts.append({True: "shows", False: "does not show", None: "missing"}[shows])
            cells.append((label, rule, text and f"{text} (n = {len(shared)})", self.verdicts[-1], self.notes(sum(needs, []))))
        self.table(("", "the paper shows, by this rule", "ours", "verdict", "made"), cells)


# ---- Claims of figures that have no numbers --------------------------------------------------------------------------

def claims(runs, root):
    """Rows for Page.claims."""
    find, rows = lambda *names: [runs.get(name, []) for name in names], []
    listed = lambda groups, score=best: ", ".join(mean_std([score(run) for run in group]) for group in groups)

    def gains(group):
        return (f"teacher {listed([group], teacher)}, student {listed([group])}, at the end {listed([group], last)}",
                average(group, last) > average(group, teacher))

    def flat_then_lower(*groups):
        students, below = [average(group) for group in groups], average(groups[0], teacher)
        return (f"α = 0, 0.09, 0.33, 0.6, 0.8, 1: {listed(groups)}; teacher {below:.2f}",
                max(students[:4]) - min(students[:4]) <= 2 and below < students[-1] < min(students[:4]))
    for arch, near in NEAR.items():
        rows.append((f"Fig. 1, {arch}", "at its end the student's linear probe is above its teacher's", find(f"fig3-{arch}-eps{near}"), gains))
        rows.append((f"Fig. 3, {arch}", "within 2 points for α ≤ 0.6; lower at α = 1, and still above the teacher",
                     find(*(f"fig3-{arch}-eps{eps}" for eps in (near, "0.1", "0.5", "1.5", "4", "inf"))), flat_then_lower))

    def valley(plane):
        (origin, student), points, kl = plane["points"][:2], plane["points"][3:], plane["kl"][3:]
        x, y = (points - origin) @ (student - origin), (points - origin) @ ((student - origin)[::-1] * (1, -1))
        unit = ((student - origin) ** 2).sum()
        near, far = (np.median(kl[(0 < side * x) & (side * x < unit / 2) & (abs(y) < unit / 2)]) for side in (1, -1))
        return f"median KL {near:.1e} on the student's side, {far:.1e} on the other", bool(far > 2 * near)
    planes = [{**plane, "seed": plane["distilled"]["seed"]} for plane in map(read_npz, root.glob("fig5-shared.npz"))
              if plane["done"] == len(plane["points"])]
    rows.append(("Fig. 5, vgg11", "an asymmetric valley: up to half the way from θ_T to θ*_S(0), the KL is less than half of that "
                 "as far on the other side", [planes], lambda planes: valley(planes[0])))

    def tickets(*groups):
        levels = set.intersection(*(set(result["curve"]) for group in groups for result in group))
        student, *random = ({left: average(group, lambda result: result["curve"][left]) for left in levels} for group in groups)
        sparse = [left for left in levels if left < 60]
        ahead = [student[left] - random[0][left] for left in sparse]
        apart = max(min(abs(student[left] - curve[left]) for curve in random[1:]) for left in sparse)
        return (f"student minus random init ℓ = 0: {min(ahead):+.2f} to {max(ahead):+.2f} points; at most {apart:.2f} from the "
                f"nearer of ℓ = 1 and 2", min(ahead) > 0 and apart <= 0.5)
    rows.append(("Fig. 8, resnet18", "below 60 % of the weights the student rewound to ℓ = 0 is above random init rewound to 0, "
                 "and within half a point of random init rewound to 1 or 2",
                 [read_curves(root, *which) for which in (("student", 0), ("random", 0), ("random", 1), ("random", 2))], tickets))

    def barriers(lines):
        student, random = (np.mean(np.concatenate([line["barrier"][i] for line in lines])) for i in (0, 1))
        return f"barrier {student:.2f} points between students, {random:.2f} between random inits", bool(student < random / 2)
    lines = [read_npz(file) for file in sorted(root.glob("cifar10-resnet18-seed*/connect/connect.npz"))]
    rows.append(("Fig. 9, resnet18", "the barrier between fine-tuned students is less than half of that between random inits",
                 [lines], barriers))

    def wide_enough(*groups):
        students = [average(group) for group in groups]
        return f"m = 16, 256, 1,024, 4,096, 16,384, 65,536: {listed(groups)}", students[0] < students[-1] - 2 < min(students[1:])
    rows.append(("Fig. 10, resnet18", "from m = 256 on within 2 points of m = 65,536 or better; not at m = 16",
                 find(*(f"fig10-m{m}" for m in (16, 256, 1024, 4096, 16384)), "cifar10-resnet18"), wide_enough))

    def batch_norm_first(*groups):
        first = lambda run: next(row["linear_paper"] for row in run["rows"][1:] if "linear_paper" in row)
        early, late = ([average(group, score) for group in groups] for score in (first, best))
        return (f"batch, instance, group, layer, none: at the first probe {listed(groups, first)}; best {listed(groups)}",
                max(early) == early[0] and min(late) > late[0] - 2)
    rows.append(("Fig. 11, resnet18", "batch norm is ahead at the first probe, a tenth of the run; the others, and none, come "
                 "within 2 points", find("cifar10-resnet18", *(f"fig11-{norm}" for norm in ("instance", "group", "layer", "none"))), batch_norm_first))

    def feature_norm_matters(both, no_weight_norm, no_feature_norm):
        w, f = (average(group) - average(both) for group in (no_weight_norm, no_feature_norm))
        return f"without weight norm {w:+.2f} points, without feature norm {f:+.2f}", f < w
    rows.append(("Fig. 12, resnet18", "no feature norm (l/wl) costs more than no weight norm (lf/l)",
                 find("cifar10-resnet18", "fig12-lf-l", "fig12-l-wl"), feature_norm_matters))

    def rise_and_fall(group):
        (_, *epochs), (_, *kl), _ = mean_over(group, "kl")  # the first row is before any step
        far = average(group, lambda run: last(run, "distance"))
        when = epochs[kl.index(max(kl))] / epochs[-1]
        return (f"highest KL {max(kl):.1e} at {when:.0%} of the run, {kl[-1]:.1e} at its end; distance {far:.1f}",
                when <= 0.1 and kl[-1] < max(kl) / 2 and 10 <= far <= 40)
    for name in ("raw-resnet18-eps0", "raw-vgg11-eps1e-10"):
        rows.append((f"Fig. 17, {name}", "the KL is highest in the first tenth and halves by the end; the distance from init ends "
                     "between 10 and 40", find(name), rise_and_fall))

    def nothing_more(first, second):
        change = average(second, last) - average(first, last)
        kl = [average(group, lambda run: last(run, "kl")) for group in (first, second)]
        return f"probe {change:+.2f} points; KL at the end {kl[0]:.1e}, then {kl[1]:.1e}", abs(change) <= 2 and kl[1] < kl[0] / 10
    for arch in NEAR:
        rows.append((f"Fig. 18, {arch}", "a second round leaves the probe within 2 points, and its KL ends below a tenth of the "
                     "first's", find(f"cifar10-{arch}", f"fig18-{arch}"), nothing_more))

    def same(usual, other):
        return f"{listed([usual])} → {listed([other])}", abs(average(other) - average(usual)) <= 2
    for name, arch, rule in (("raw-vgg11-eps1e-10", "vgg11", "the released code's rows, not normalised"),
                             ("raw-resnet18-eps0", "resnet18", "the same"),
                             ("loss-mse", "resnet18", "MSE of the logits in place of the KL"),
                             ("optimizer-sgd", "resnet18", "SGD in place of AdamW")):
        rows.append((name, f"(a switch, no figure) {rule}: within 2 points", find(f"cifar10-{arch}", name), same))
    return sorted(rows, key=lambda row: int(re.findall(r"Fig. (\d+)|$", row[0])[0] or 99))


# ---- Figures ---------------------------------------------------------------------------------------------------------

def mean_over(group, column):
    """(epochs, means, standard deviations) of a column of log.csv over the runs of a group."""
    table = [{row["epoch"]: row[column] for row in run["rows"] if column in row} for run in group]
    epochs = sorted(set.intersection(*map(set, table)))
    return epochs, *spread([[curve[epoch] for curve in table] for epoch in epochs])


def figures(runs):
    """What `runs` allow to draw: {figure: [panel (title, x label, y label, {option of the axes: value}, lines, levels)]}.

    `lines` are {name: (x, means, standard deviations)}, `levels` {name: y}.
    """
    plots, accuracy = {}, "linear probe (%)"
    there = lambda **names: {label: runs[name] for label, name in names.items() if name in runs}
    over = lambda groups, column="linear_paper": {label: mean_over(group, column) for label, group in groups.items()}
    bests = lambda groups, probe="linear_paper": (
        list(groups), *spread([[best(run, probe) for run in group] for group in groups.values()]))
    by_alpha = lambda prefix: {alpha: runs[prefix + eps] for eps, alpha in ALPHA.items() if prefix + eps in runs}

    for arch in NEAR:
        if 0 in (groups := by_alpha(f"fig3-{arch}-eps")):
            level = {"teacher": average(groups[0], teacher)}
            plots.setdefault("fig1", []).append((arch, "epoch", accuracy, {}, over({"student": groups[0]}), level))
            plots.setdefault("fig3", []).append((arch, "locality α", accuracy, {}, {"student": bests(groups)}, level))
    lines = {}
    for kind, label in (("n", "CIFAR10, beyond 50,000 with CIFAR-5M"), ("noise", "Gaussian noise")):
        if groups := {int(name[len(kind):]): runs[f"fig4-{name}"] for name in FIG_4
                      if name[len(kind):].isdigit() and name.startswith(kind) and f"fig4-{name}" in runs}:
            lines[label] = bests(groups)
    if lines:
        plots["fig4"] = [("vgg11", "training images", accuracy, {"xscale": "log"}, lines, {})]
    widths = {4**k: runs[name] for k in range(9) if (name := f"fig10-m{4**k}" if k < 8 else "cifar10-resnet18") in runs}
    if len(widths) > 1:
        plots["fig10"] = [("resnet18", "logits m", accuracy, {"xscale": "log"}, {"student": bests(widths)}, {})]
    norms = there(batch="cifar10-resnet18", instance="fig11-instance", group="fig11-group", layer="fig11-layer", none="fig11-none")
    parts = there(**{"lf/wl": "cifar10-resnet18"},
                  **{parts: f"fig12-{parts.replace('/', '-')}" for parts in ("lf/l", "l/wl", "l/l", "f/wl", "lf/")})
    for figure, groups in (("fig11", norms), ("fig12", parts)):
        if len(groups) > 1:
            plots[figure] = [("resnet18", "epoch", accuracy, {}, over(groups), {})]
    if groups := there(**{name[4:]: name for name in ("raw-resnet18-eps0", "raw-vgg11-eps1e-10", "raw-vgg11-epsinf")}):
        plots["fig17"] = [("", "epoch", "KL (nats)", {"yscale": "log"}, over(groups, "kl"), {}),
                          ("", "epoch", "distance from init ‖θ−θ₀‖", {}, over(groups, "distance"), {})]
    if there(**{arch: f"fig18-{arch}" for arch in NEAR}):
        groups = there(**{f"{arch}, round {i}": f"{name}-{arch}" for arch in NEAR for i, name in ((1, "cifar10"), (2, "fig18"))})
        plots["fig18"] = [("", "epoch", accuracy, {}, over(groups), {}),
                          ("", "epoch", "KL (nats)", {"yscale": "log"}, over(groups, "kl"), {})]
    if 0 in (groups := by_alpha("fig3-eps")):  # in miniature
        plots["mini-fig3"] = [(title, "locality α", "test accuracy (%)", {}, {"student": bests(groups, probe)},
                               {"teacher": average(groups[0], lambda run: teacher(run, probe))}) for probe, title in PROBES.items()]
    return plots


def draw(plots, folder):
    """Write a .png for each figure."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for name, panels in plots.items():
        figure, axes = plt.subplots(1, len(panels), figsize=(0.6 + 4.2 * len(panels), 3.6), layout="constrained", squeeze=False)
        for axis, (title, xlabel, ylabel, options, lines, levels) in zip(axes[0], panels):
            for i, (label, (x, mean, std)) in enumerate(lines.items()):
                axis.errorbar(x, mean, std, label=label, marker="os^Dv*"[i % 6], linestyle=("-", "--", "-.", ":")[i % 4],
                              markersize=4, capsize=2)
            for label, level in levels.items():
                axis.axhline(level, color="black", linewidth=1, label=label)
            axis.set(title=title, xlabel=xlabel, ylabel=ylabel, **options)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize="small")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)


# ---- Main ------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser, add = make_parser(__doc__)
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"),
                        help="directory with paper/ and mini/ in it (default: runs)")
    add("--out", "the page", Path("results/REPORT.md"), type=Path)
    add("--figures", "directory of the pictures", Path("figures/report"), type=Path)
    args = parser.parse_args(argv)
    page, root = Page(), args.root / "paper"
    if not root.is_dir() and not (args.root / "mini").is_dir():
        raise Problem(f"{args.root} holds neither paper/ nor mini/: do some jobs of `bash run_all.sh list` first, or name another "
                      f"directory")
    write = page.lines.append
    runs, tables, unfinished = read_results(root)
    entries = lambda file, start: [entry for name, entry in tables.get(file, {}).items() if name.startswith(start)]
    teachers = lambda dataset, arch: entries(f"teachers-{dataset}", f"teacher {arch} seed")

    for i, (probe, title) in enumerate({"linear_paper": "linear probe", "knn": "k-NN"}.items()):
        write(f"## Table {1 + 2 * i}: {title}")
        rows = []
        for dataset in RAW:
            rows.append((f"{dataset}, raw pixels", RAW[dataset][i], entries(f"teachers-{dataset}", "raw pixels"), probe))
            for arch in NEAR:
                rows.append((f"{dataset}, {arch}, teacher", TEACHERS[dataset][arch][i], teachers(dataset, arch), probe))
                rows.append((f"{dataset}, {arch}, student", STUDENTS[dataset][arch][i], runs.get(f"{dataset}-{arch}", []), probe))
        page.numbers(rows)
        write(f"## Table {2 + 2 * i}: {title}, students of Tiny ImageNet on other data, at the end of their runs")
        page.numbers([(f"{dataset}, {arch}, student", paper[i], entries(f"transfer-{dataset}-{arch}", "student"), probe)
                      for dataset in TRANSFER for arch, paper in TRANSFER[dataset].items()])

    write("## Table 5: architectures on CIFAR10, linear probe")
    page.numbers([row for arch, paper in TABLE_5.items() for row in (
        (f"{arch}, teacher", paper[0], teachers("cifar10", arch), "linear_paper"),
        (f"{arch}, student", paper[1], runs.get(f"cifar10-{arch}", []), "linear_paper"))])
    accuracies = lambda arch: [entry["linear_paper"] for entry in teachers("cifar10", arch)]
    apart = [abs(statistics.mean(accuracies(arch)) - TABLE_5[arch][0]) for arch in TABLE_5 if arch not in VITS and accuracies(arch)]
    if apart:
        write(f"Teachers but for the ViTs: mean absolute deviation from the paper {statistics.mean(apart):.2f} points over "
              f"{len(apart)} of {len(TABLE_5) - len(VITS)} architectures, the largest {max(apart):.2f}.\n")
    if any(map(accuracies, VITS)):
        write("The paper's ViT rows come from another network: its released code attends over heads, not tokens, and its text says "
              "8-pixel patches where its parameter counts need 16. Our random ViTs with either, linear probe:")
        cell = lambda name: f"{mean_std(accuracies(name))} ({len(accuracies(name))})"
        page.table(("", "paper", "16-pixel patches (n)", "8-pixel patches (n)"),
                   [(arch, f"{TABLE_5[arch][0]:.2f}", cell(arch), cell(f"{arch}-p8")) for arch in VITS])

    write("## Fig. 4: VGG11 distilled on n images (noise: Gaussian noise), probed on CIFAR10")
    page.numbers([(size, paper, runs.get(f"fig4-{size}", []), "linear_paper") for size, paper in FIG_4.items()])
    write("## Figures without numbers, and switches\n\nFig. 13 to 16 (encoders alone) have no rule: see the pictures.")
    page.claims(claims(runs, root))

    small, _, small_unfinished = read_results(args.root / "mini")
    if small:
        write("## In miniature, on a CPU (`bash run_all.sh list mini`)\n\nFewer images and steps than the paper: read these for "
              "their direction, not beside its numbers. Students at the end of their runs; in brackets the gain over their own teachers.")
        gain = lambda group, probe: average(group, lambda run: last(run, probe) - teacher(run, probe))
        cell = lambda group, probe: f"{mean_std([last(run, probe) for run in group])} ({gain(group, probe):+.2f})"
        page.table(("(n)", *PROBES.values(), "made"), [
            (f"{name} ({len(group)})", *(cell(group, probe) for probe in PROBES), page.notes(group))
            for name, group in small.items()])

    draw(figures(runs) | figures({name: group for name, group in small.items() if name.startswith("fig3-")}), args.figures)
    number = lambda name: (name.startswith("mini"), int(re.search(r"\d+", name)[0]))
    pictures = sorted((path.stem for path in args.figures.glob("*fig*.png")), key=number)  # also prune.py's and landscape.py's
    if pictures:
        write("## Pictures\n")
        page.lines += [f"**{name}**\n\n![{name}]({os.path.relpath(args.figures / name, args.out.parent)}.png)\n" for name in pictures]
    write("## How the numbers were made\n")
    page.lines += [f"- [{number}] {text}" for text, number in page.origins.items()]
    if unfinished + small_unfinished:
        write("\nNot finished, and so left out: " + ", ".join(unfinished + small_unfinished) + ".")
    summary = ", ".join(f"{page.verdicts.count(verdict)} {verdict}" for verdict in sorted(set(page.verdicts)))
    introduction = INTRODUCTION.format(root=args.root, summary=f"Of {len(page.verdicts)} rows: {summary}.")
    write_atomically(args.out, lambda file: file.write("\n".join([introduction, *page.lines, ""]).encode()))
    print(f"{args.out}: {summary}; pictures: {', '.join(pictures) or 'none'}")


if __name__ == "__main__":
    run_cli(main)
