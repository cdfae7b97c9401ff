"""Draw do images point one way along depth? From what `probe.py --json` wrote of encoders.

    python results/depth.py results/quick/summary.json figures/depth.png
"""
import json
import sys
from pathlib import Path

from matplotlib import pyplot

source, picture = map(Path, sys.argv[1:])
pyplot.style.use("tableau-colorblind10")
figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
words = {"teacher": "random teacher", "eps0": "student, ε = 0", "epsinf": "student, ε = ∞",
         "noise": "student distilled on noise"}
for name, found in json.loads(source.read_text()).items():
    if found.get("along_depth"):
        label = next((word for part, word in words.items() if part in name), name)
        label += ", calibrated" * ("calibrated" in name)
        for axis, key in zip(axes, ("cosine", "directions")):
            values = [layer[key] for layer in found["along_depth"]] + [found[key]]
            axis.plot(values, marker=".", label=label)
for axis in axes:
    axis.xaxis.get_major_locator().set_params(integer=True)
axes[0].set(xlabel="layer (the last: the embedding)", ylabel="mean cosine of two images")
axes[1].set(xlabel="layer (the last: the embedding)", ylabel="directions in use (log)", yscale="log")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
figure.savefig(picture, dpi=150)
