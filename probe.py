#!/usr/bin/env python3
"""How good are the features? Linear and k-NN probes of raw pixels, teacher and student.

    python probe.py runs/cifar10-resnet18-eps0-seed0                    one run, on the data it was distilled on
    python probe.py runs/*-resnet18-eps0-seed*                          several seeds: mean ± standard deviation
    python probe.py runs/imagenet-folder-run --dataset cifar10          transfer (Tables 2 and 4)
    python probe.py --teacher vgg11 --dataset cifar10 --seeds 3         random teachers alone, no run needed

Three probes, because they disagree, and the disagreement teaches something (README): the paper's ten-epoch linear probe,
the same linear probe standardised and trained to convergence, and k nearest neighbours.
"""
import argparse, json, statistics, sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distill import (ARCHS, DATASETS, Problem, channel_stats, load_checkpoint, load_data, normalise, random_network, run_cli)

PROBES = {"linear_paper": "linear (paper)", "linear_converged": "linear (converged)", "knn": "k-NN"}


@torch.inference_mode()
def extract_features(encoder, images, stats, batch_size=500):
    """uint8 images (n, 3, s, s) -> float32 embeddings (n, r), by `encoder` in eval mode and full precision."""
    was_training = encoder.training
    encoder.eval()
    features = torch.cat([encoder(normalise(batch, stats)).flatten(1) for batch in images.split(batch_size)])
    encoder.train(was_training)
    return features.clone()  # a normal tensor, on which autograd may build


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


def linear_probe_converged(train, test, n_classes, l2=1e-3, tolerance=1e-5, max_iter=500):
    """Test accuracy in % of multinomial logistic regression on standardised features, trained to convergence.

    Minimises mean cross-entropy + l2/2·‖W‖² by full-batch L-BFGS until no gradient entry exceeds `tolerance`. It runs in
    the eigenbasis of the features' covariance, each axis scaled by its curvature bound (Böhning 1992: half the
    eigenvalue): the same minimum in a fraction of the iterations. Raises Problem if it does not converge.
    """
    (x, y), (x_test, y_test) = train, test
    mean, std = x.mean(0), x.std(0).clamp(min=1e-8)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    eigenvalues, axes = torch.linalg.eigh(x.T @ x / len(x))
    scale = (0.5 * eigenvalues.clamp(min=0) + l2).rsqrt()
    x, x_test = x @ (axes * scale), x_test @ (axes * scale)
    weight = torch.zeros(x.shape[1], n_classes, device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, tolerance_grad=tolerance, tolerance_change=0,
                                  history_size=20, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        logits = (x @ weight + bias).double()  # the line search compares losses closer together than float32 can tell
        loss = F.cross_entropy(logits, y) + l2 / 2 * (scale[:, None] * weight).double().square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    objective()
    worst = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
    if not worst < 10 * tolerance:
        raise Problem(f"the converged linear probe did not converge (gradient {worst:.1e}): are the features finite?")
    return accuracy((x_test @ weight + bias).argmax(1), y_test)


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
