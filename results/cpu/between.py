"""How much of the last block's variance is between images, not between pixels: results/README.md,
section 13. After `bash run_all.sh quick`:

    PYTHONPATH=. python results/cpu/between.py
"""
import torch

from distill import channel_stats, load_checkpoint, load_data, normalise, random_network
from probe import calibrated

data = load_data("leaves")
x = normalise(data.test_x[::4], channel_stats(data.train_x))
teacher = random_network(0, "resnet20", 1).encoder
encoders = {"teacher": teacher, "calibrated": calibrated(teacher, data)} | {
    run: load_checkpoint(f"runs/quick/{run}")[1].encoder for run in ("eps0", "epsinf", "noise")}
for name, encoder in encoders.items():
    with torch.no_grad():
        maps = encoder.eval()[:-2](x).double()  # before the mean over pixels, (500, 64, 8, 8)
    share = maps.mean((2, 3)).var(0).sum() / maps.var((0, 2, 3)).sum()
    print(f"{name}: {share:.1%} of the variance is between images")
