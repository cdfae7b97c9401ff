"""Random teachers at the paper's size, their features as they are, standardised and whitened, and
whitened with other ridges; and students, treated alike: results/README.md, section 13.

    PYTHONPATH=. python results/cpu/treated.py DATA OUT.json RIDGES.json SEED [ARCH or RUN ...]

As `probe.py --teacher ARCH --seeds SEED --draws 100` does, but for raw pixels and calibrated batch
norm, and it saves after each encoder and goes on with what OUT.json has.
"""
import json
import sys
from pathlib import Path

from distill import load_checkpoint, load_data, pick_device, provenance, random_network, save
from probe import TREATMENTS, extract_features, judge, whitened

dataset, out, ridges, seed, *encoders = sys.argv[1:]
out, ridges, seed = Path(out), Path(ridges), int(seed)
device = pick_device("auto")
data = load_data(dataset, 32, device)
on = {"dataset": dataset, "image_size": 32, "train_images": len(data.train_y),
      "test_images": len(data.test_y), "amp": "off", "provenance": provenance(device)}
found, by_ridge = (json.loads(file.read_text()) if file.exists() else {} for file in (out, ridges))
for which in encoders:
    is_run = Path(which).exists()
    name = f"student {which}" if is_run else f"teacher {which} seed {seed}"
    if f"{name}, whitened" in found:
        continue
    network = load_checkpoint(which)[1] if is_run else random_network(2 * seed, which, 1)
    features = extract_features(network.encoder.to(device), data)
    for treatment, treat in TREATMENTS.items():
        row = on | {"draws": 100} | judge(*treat(*features), data, range(100))
        found[name + treatment] = row
        print(name + treatment, *(f"{row[key]:.2f}" for key in (
            "linear_paper_mean", "linear_paper_std", "linear_paper_max", "linear_converged",
            "knn", "cosine", "directions")), flush=True)
    save(out, found)
    for ridge in () if is_run or seed else (0.001, 0.01, 1, 10):
        by_ridge[f"{name}, whitened with a ridge of {ridge:g}"] = on | {"draws": 10} | judge(
            *whitened(*features, ridge), data, range(10))
    save(ridges, by_ridge)
