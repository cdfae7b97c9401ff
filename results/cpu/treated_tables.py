"""What treated.py found, as the tables of results/README.md, "Whitened teachers, at the paper's
size" and "Both sides whitened", and as a picture.

    python -m results.cpu.treated_tables figures/whitened.png
"""
import csv
import json
import sys
from itertools import count, takewhile
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib import pyplot

RESULTS = Path(__file__).parent.parent
FOUND = json.loads((RESULTS / "cpu/treated-teachers.json").read_text())
BY_RIDGE = json.loads((RESULTS / "cpu/treated-ridges.json").read_text())
PAPER = {row["row"]: float(row["value"])
         for row in csv.DictReader((RESULTS / "paper.csv").read_text().splitlines())
         if row["artefact"] == "Table 5"}
ARCHS = ("vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50", "resnet20",
         "resnet56")
PROBES = {"linear (paper)": ("linear_paper_mean", ""),
          "linear (converged)": ("linear_converged", ""), "k-NN": ("knn", ""),
          "linear (paper), whitened": ("linear_paper_mean", ", whitened")}
STUDENTS = {  # (network, distilled in small or at the paper's size): run; all of seed 0
    ("vgg11", "small"): "runs/early-vgg11", ("resnet18", "small"): "runs/early-peak",
    ("vgg11", "full"): "runs/ten-vgg11-lr3e-4/best.pt",
    ("resnet18", "full"): "runs/ten-resnet18/best.pt",
    ("resnet56", "full"): "runs/resnet56-ten-epochs/best.pt"}
TREATMENTS = "", ", standardised", ", whitened"


def values(arch, key, treatment=""):
    """The number `key` of that random teacher for seeds 0, 1, ..., as many as there are."""
    names = (f"teacher {arch} seed {seed}{treatment}" for seed in count())
    return [FOUND[name][key] for name in takewhile(FOUND.__contains__, names)]


def shares(arch):
    """How far from the paper's teacher to its student the whitened one's luckiest draw is, by seed.
    """
    teacher, student = PAPER[f"{arch}, teacher"], PAPER[f"{arch}, student"]
    return [(luckiest - teacher) / (student - teacher)
            for luckiest in values(arch, "linear_paper_max", ", whitened")]


def pairs(arch, run, treatment):
    """(teacher's, student's) number by the three probes and of directions, treated alike."""
    return [[FOUND[f"{of}{treatment}"][key] for of in (f"teacher {arch} seed 0", f"student {run}")]
            for key in ("linear_paper_mean", "linear_converged", "knn", "directions")]


def correlation(spread, probe):
    """Spearman's rank correlation over the architectures, of means over seeds (without ties)."""
    ranks = [np.argsort(np.argsort([mean(values(arch, *what)) for arch in ARCHS]))
             for what in ([spread], probe)]
    return np.corrcoef(*ranks)[0, 1]


def table(head, rows):
    """Markdown; the first cell of each of the rows is an architecture, or text."""
    lines = [head, ["---"] * len(head), *rows]
    lines = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    return lines.replace("| vgg", "| VGG").replace("| resnet", "| ResNet")


def listed(numbers, form="{:.2f}"):
    return ", ".join(form.format(number) for number in numbers)


def tables():
    yield table(
        ["", "paper: teacher → student", "as is", "standardised", "whitened", "share"],
        [[arch, "{:.2f} → {:.2f}".format(*(PAPER[f"{arch}, {role}"] for role in (
             "teacher", "student"))),
          *(listed(values(arch, "linear_paper_mean", treatment))
            for treatment in TREATMENTS),
          listed(shares(arch), "{:.0%}")] for arch in ARCHS])
    yield table(
        ["", "converged: as is", "whitened", "k-NN: as is", "standardised", "c", "R"],
        [[arch, listed(values(arch, "linear_converged")),
          listed(values(arch, "linear_converged", ", whitened")), listed(values(arch, "knn")),
          listed(values(arch, "knn", ", standardised")), listed(values(arch, "cosine"), "{:.3f}"),
          listed(values(arch, "directions"))] for arch in ARCHS])
    yield table(
        ["rank correlation of", *PROBES],
        [["R", *(f"{correlation('directions', probe):.2f}" for probe in PROBES.values())],
         ["−c", *(f"{-correlation('cosine', probe):.2f}" for probe in PROBES.values())]])
    ridges = ("0.001", "0.01", "0.1", "1", "10")
    by_ridge = [[arch, *(BY_RIDGE.get(f"teacher {arch} seed 0, whitened with a ridge of {ridge}",
                                      FOUND[f"teacher {arch} seed 0, whitened"])
                         for ridge in ridges)] for arch in ARCHS]
    yield table(
        ["seed 0: linear (paper); k-NN", *ridges],
        [[arch, *(f"{row['linear_paper_mean']:.2f}; {row['knn']:.2f}" for row in rows)]
         for arch, *rows in by_ridge])
    for size in ("small", "full"):
        yield table(
            ["teacher → student", *[*PROBES][:3], "R"],
            [[f"{arch}{treatment or ', as it is'}",
              *(f"{teacher:.2f} → {student:.2f} ({student - teacher:+.2f})".replace("-", "−")
                for teacher, student in pairs(arch, run, treatment)[:3]),
              "{:.1f} → {:.1f}".format(*pairs(arch, run, treatment)[3])]
             for (arch, of), run in STUDENTS.items() if of == size for treatment in TREATMENTS])


def draw(path):
    """The paper's teachers and students joined by bars, ours as points, one a seed: maxima, all."""
    pyplot.style.use("seaborn-v0_8-colorblind")
    figure, axis = pyplot.subplots(figsize=(9, 4), layout="constrained")
    for row, arch in enumerate(ARCHS):
        axis.plot([PAPER[f"{arch}, {role}"] for role in ("teacher", "student")], [row, row],
                  color="0.85", linewidth=9, solid_capstyle="butt",
                  label="the paper, teacher to student" * (row == 0))
    for label, treatment, style in (
            ("our teacher's features as they are", "", "k*"),
            ("the same standardised", ", standardised", "C2o"),
            ("the same whitened", ", whitened", "C0D")):
        points = [(number, row) for row, arch in enumerate(ARCHS)
                  for number in values(arch, "linear_paper_max", treatment)]
        axis.plot(*zip(*points), style, label=label)
    points = [(FOUND[f"student {run}, whitened"]["linear_paper_max"], ARCHS.index(arch))
              for (arch, size), run in STUDENTS.items() if size == "full"]
    axis.plot(*zip(*points), "C1s", label="our student's after 7.5 epochs, whitened")
    names = [arch.replace("vgg", "VGG").replace("resnet", "ResNet") for arch in ARCHS]
    axis.set(yticks=range(len(ARCHS)), yticklabels=names,
             xlabel="linear (paper), %, the luckiest draw")
    axis.invert_yaxis()
    axis.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    print(*tables(), sep="\n")
    for path in sys.argv[1:]:
        draw(path)
