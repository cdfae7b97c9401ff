"""Pictures of runs: probes, KL and more over steps, or over what differs between the runs.

    python -m results.figures                             all that runs/ has, to figures/report/
    python -m results.figures results --only quick.png    one of them, from the logs kept here

What is read, and by which names: report.py.
"""
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib import pyplot

from distill import Problem, new_parser, save
from results.report import curve, deviation, paper_rows, read_results, values

PERCENT = {"linear_paper": "linear (paper), %", "linear_converged": "linear (converged), %",
           "knn": "k-NN, %"}
STUDENT = {"linear_paper": "linear (paper), %", "loss": "KL (nats, log)",
           "distance": "distance from the start"}
WHY = PERCENT | {"cosine": "cosine of two images' embeddings", "directions": "directions in use",
                 "loss": "KL (nats, log)"}
PLATEAU = {"loss": "KL (nats, log)", "linear_converged": "linear (converged), %"}
FIGURES = (  # file; how its runs are named, without their x if it is in the name; what is on x, y
    ("quick.png", "quick/[^/]*$", "distillation step", WHY),
    ("fig1.png", "fig3-resnet18-eps0$|fig3-vgg11-eps1e-10$", "distillation epoch", STUDENT),
    ("learning-curves.png", "cifar10-[^/]*$", "distillation epoch", PERCENT),
    ("fig3.png", "fig3-resnet18-eps|fig3-vgg11-eps", "locality α", PERCENT),
    ("fig4.png", "fig4-noise|fig4-n", "training images (log)", PERCENT),
    ("fig10.png", "fig10-m", "logits m (log)", PERCENT),
    ("fig11.png", "fig11-[^/]*$", "distillation epoch", PERCENT),
    ("fig12.png", "fig12-[^/]*$", "distillation epoch", PERCENT),
    ("fig17.png", "raw-[^/]*$", "distillation epoch", STUDENT),
    ("fig18.png", "cifar10-resnet18$|cifar10-vgg11$|fig18-[^/]*$", "distillation epoch", STUDENT),
    ("mini-fig3.png", "mini/fig3-eps", "locality α", PERCENT),
    ("mini-plateau.png", "mini/plateau-lf-l-(6000-steps|lr1e-3|warmup200|lr3e-4|epsinf)$",
     "distillation epoch", PLATEAU),
)
WORDS = {  # for names that do not speak for themselves
    "quick/eps0": "student, ε = 0", "quick/epsinf": "student, ε = ∞",
    "quick/noise": "student distilled on noise", "mini/plateau-lf-l-6000-steps": "as released",
    "mini/plateau-lf-l-lr1e-3": "as released",
    "mini/plateau-lf-l-warmup200": "warm-up of 200 steps", "mini/plateau-lf-l-lr3e-4": "--lr 3e-4",
    "mini/plateau-lf-l-epsinf": "ε = ∞", "mini/fig3-eps": "ResNet20, 10,000 images",
    "cifar10-resnet20": "ResNet20", "cifar10-resnet18": "ResNet18", "cifar10-vgg11": "VGG11"}


def series(groups, column, x):
    """What to draw of `groups` {position: [run]}: {label: {position on x: [a number of each]}}."""
    if x.startswith("distillation"):
        return {"": curve(*groups.values(), column, x.split()[1])}
    return {f", {when}": {position: values(group, when, column)
                          for position, group in groups.items()} for when in ("best", "teacher")}


def draw_figure(results, paper, folder, file, names, x, panels):
    """Draw one of FIGURES, a panel each of `panels` {column: title}, unless it has no runs; of the
    rows of `paper` dashed lines, where they are of such a run.
    """
    lines, training = defaultdict(dict), x.startswith("distillation")
    for name, group in results.items():
        match = re.match(f"({names})([^/]*)$", name)  # a run, not what came of it
        if match and group:
            number = 0 if training else float(match[match.lastindex] or 0)  # in place of α its ε
            lines[match[1]][1 - 1 / (1 + number) if "α" in x else number] = [*group.values()]
    if not lines or not training and max(map(len, lines.values())) < 2:
        return  # over a single number of logits, say, there is nothing to see
    pyplot.style.use("seaborn-v0_8-colorblind")
    shape, legend = (max(len(panels) // 3, 1), min(len(panels), 3)), {}
    picture, grid = pyplot.subplots(*shape, figsize=(3.6 * shape[1], 0.7 + 2.7 * shape[0]),
                                    sharex=True, layout="constrained")
    for axis, (column, title) in zip(grid.flat, panels.items()):
        for name, groups in lines.items():
            first = [*groups.values()][0][0]
            label = WORDS.get(name, name) + " (unfinished)" * bool(first["remaining"])
            for when, points in series(groups, column, x).items():
                if "log" in x:
                    points.pop(0, None)  # a logarithm has no place for it
                if not points:
                    continue
                positions, numbers = zip(*sorted(points.items()))
                bars = [*map(deviation, numbers)] if len(numbers[0]) > 1 else None
                line = axis.errorbar(positions, [*map(mean, numbers)], bars,
                                     marker="." * (len(positions) < 50))
                legend[label + when], color = line, line[0].get_color()
                if "log" in title:
                    level = first.get("constant_student_kl", np.nan)
                    axis.axhline(level, color=color, linestyle="dotted")
                    legend["the same answer for every image"], = axis.plot([], [], "k:")
                elif training and 0 in points and column in first["teacher"]:
                    legend["its teacher"], = axis.plot(0, first["teacher"][column], "k*", ms=9)
            for row in paper:
                if training and (row["ours"], row["probe"]) == (name, column):
                    legend["the paper's best"] = axis.axhline(float(row["value"]), color=color,
                                                              linestyle="dashed", linewidth=1)
        axis.set(title=title, xlabel=x, xscale="log" if "log" in x else "linear",
                 yscale="log" if "log" in title else "linear")
    picture.legend(legend.values(), legend, loc="outside lower center", ncols=shape[1] + 1)
    save(folder / file, lambda temporary: picture.savefig(temporary, dpi=150))


def draw_depth(summary, folder):
    """Do images point one way along depth? From `probe.py --json` of quick's networks."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, scale in zip(axes, ("cosine", "directions"), ("linear", "log")):
        for name, found in json.loads(summary.read_text()).items():
            if found.get("along_depth"):  # raw pixels have no layers
                axis.plot([layer[key] for layer in (*found["along_depth"], found)], marker=".",
                          label=WORDS.get(name.removeprefix("student runs/"), name))
        axis.set(title=WHY[key], xlabel="ReLU (the last: the embedding)", yscale=scale)
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(folder / "depth.png", lambda temporary: figure.savefig(temporary, dpi=150))


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("root", default="runs", nargs="?", type=Path, help="with paper/, mini/ or quick/ in it")
    add("--figures", default="figures/report", type=Path, help="directory of the pictures")
    add("--only", choices=[file for file, *_ in FIGURES], help="draw this one alone")
    args = parser.parse_args(argv)
    results, _ = read_results(args.root)
    if not results:
        raise Problem(f"{args.root} holds no paper/, mini/ or quick/ with a run: name another")
    for figure in FIGURES:
        if args.only in (None, figure[0]):
            draw_figure(results, paper_rows(), args.figures, *figure)
    summary = args.root / "quick/summary.json"
    if not args.only and summary.exists():
        draw_depth(summary, args.figures)


if __name__ == "__main__":
    main()
