#!/usr/bin/env python3
"""Understanding the Behaviour of Contrastive Loss (Wang & Liu, CVPR 2021), reproduced in one file.

    python ctl.py --tau 0.3         # one run on CIFAR-10: train, evaluate, put the result beside the paper's
    python ctl.py --preset quick    # the same in two minutes, on images made by code
    python ctl.py --help            # every setting: its meaning, its value in each preset, its source
    bash reproduce.sh               # Table 1 on CIFAR and SVHN; then tables, verdicts and figures

The contrastive loss pulls an image towards its own view and pushes it from all other images. It pushes the nearest
of them hardest; the temperature tau says by how much. At small tau only the nearest negatives count: features spread
evenly over the sphere (uniformity), and images that are alike are torn apart. At large tau all negatives count alike:
images that are alike may stay together (tolerance), and the sphere is filled less evenly. No tau gives both. That is
the uniformity-tolerance dilemma.

Read from top to bottom. Rooms 1 to 3 are the paper's subject, 4 and 5 what it is measured on, 6 and 7 a run:

    1 Loss      Eqs. 1-9: the losses, their gradients in closed form
    2 Metrics   Eqs. 10 and 11, Fig. 8, kNN and the linear probe
    3 Memory    the bank of all N embeddings that an image is compared with
    4 Network   ResNet-18 for images of 32x32
    5 Data      CIFAR, SVHN, a folder of images, or shapes made by code; the augmentation
    6 Training  the settings, the step, the loop, the evaluation, the checkpoint
    7 Record    what a run leaves, the paper's Table 1 beside it; the command line

Data goes one way: images -> views -> embeddings -> similarities with the bank -> loss; then the embeddings update the
bank. Embeddings -> metrics -> record.
Shapes are written (B, N): B images of a batch (the anchors) against all N training images.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import json
import math
import numbers
import os
import platform
import re
import socket
import sys
import tempfile
import time
import urllib.error
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import filelock
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import transforms
from tqdm import tqdm


class Stop(Exception):
    """A run can't go on: one line that says why, and the exit status."""
    status = 1  # the run failed


class BadInput(Stop, ValueError):
    status = 2  # wrong arguments or data, or a file of another config


class Busy(Stop):
    status = 3  # another process is at work on this run


class NotFinite(ValueError):
    """A similarity, an embedding or a weight is NaN or infinite."""


def require(right: bool | Tensor, words: str, error: type[Exception] = ValueError) -> None:
    if not right:
        raise error(words)


def say(line: str) -> None:
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on, and the work goes on
        sys.stdout = open(os.devnull, "w")


# ── 1  LOSS ───────────────────────────────────────────────────────────────────────────── paper, section 3, Eqs. 1-9 ──
#
# Everything here is a function of s_ij = f(x_i)·g(x_j), the similarity of anchor i with training image j.
# With d_ij = s_ij - s_ii, how far j is ahead of anchor i's own image, the paper's losses are three ways to
# take the "typical" d of a row, from the hardest negative alone to all of them alike:
#
#     triplet       max_j d_ij                          tau -> 0         (Eq. 6 times tau)
#     contrastive   tau · log sum_j exp(d_ij / tau)     any tau          (Eq. 1 times tau)
#     simple        mean_j d_ij                         tau -> infinity  (Eq. 7 times tau, less its constant)
#
# The sums run over all columns: the positive is one of them, with d_ii = 0. The hard losses (Eq. 9; penalty, Eq. 8)
# keep the positive and the k largest of the others.


def contrastive_loss(similarity: Tensor, positive: Tensor, tau: float | Tensor, k: int | None = None) -> Tensor:
    """The contrastive loss of each anchor, Eq. 1; with k the hard contrastive loss, Eq. 9.

    similarity: (B, N) floating point, s_ij in [-1, 1] (other finite values too, as far as |s|/tau fits the
    dtype); float16 and bfloat16 are computed in float32.
    positive: (B,) int64, the column of each anchor's own image. tau: the temperature, a number > 0 or a scalar tensor;
    the loss is differentiable in it: dL/dtau = (s_ii - sum_k P_ik s_ik) / tau², over the columns kept.
    k: keep only the k nearest negatives (all where there are fewer). Returns (B,), in [0, log N + 2/tau] for |s| <= 1.
    Raises ValueError where an argument is wrong. Values are checked only on the CPU.

    >>> s = torch.tensor([[0.9, 0.5, -0.2]])
    >>> round(contrastive_loss(s, torch.tensor([0]), tau=0.1).item(), 6)  # log(1 + e^-4 + e^-11)
    0.018166
    """
    similarity, s_ii = check_similarity(similarity, positive, tau, k)
    if k is not None:
        similarity = torch.cat([s_ii, nearest_negatives(similarity, positive, k)[0]], dim=1)  # (B, 1 + k)
    # Eq. 1: L = -log[ exp(s_ii/tau) / sum_k exp(s_ik/tau) ] = log sum_k exp((s_ik - s_ii)/tau)
    # In place, as (B, N) may be large.
    return torch.logsumexp((similarity - s_ii).div_(tau), dim=1)


def simple_loss(similarity: Tensor, positive: Tensor, k: int | None = None) -> Tensor:
    """The simple loss of each anchor: Eq. 3, weighted as in Eq. 7; with k the hard simple loss.

    Arguments and errors as in `contrastive_loss`. Returns (B,), in (-2, 2) for |s| <= 1; it can be negative.

    >>> simple_loss(torch.tensor([[1.0, 0.5, -0.9]]), torch.tensor([0])).item()  # -2/3 · 1 + 1/3 · (0.5 - 0.9)
    -0.800000011920929
    """
    similarity, s_ii = check_similarity(similarity, positive, k=k)
    if k is not None:
        similarity = torch.cat([s_ii, nearest_negatives(similarity, positive, k)[0]], dim=1)  # (B, 1 + k)
    # Eq. 7 · tau - constant: -(n-1)/n · s_ii + 1/n · sum_{kept negatives} s_ij, with n = 1 + (negatives kept)
    return (similarity - s_ii).mean(dim=1)


def triplet_loss(similarity: Tensor, positive: Tensor) -> Tensor:
    """The limit of tau · (contrastive loss) as tau -> 0: a triplet loss without margin, Eq. 6 times tau.

    Arguments and errors as in `contrastive_loss`. Returns (B,), in [0, 2] for |s| <= 1: 0 where the positive is
    nearest. Where several negatives are nearest they share the gradient.
    """
    similarity, s_ii = check_similarity(similarity, positive)
    # Eq. 6 · tau: max(s_max - s_ii, 0); the positive's own column gives the 0
    return (similarity - s_ii).amax(dim=1)


def loss_gradient(similarity: Tensor, positive: Tensor, tau: float | Tensor, k: int | None = None) -> Tensor:
    """The gradient of `contrastive_loss` with respect to the similarities, in closed form: Eq. 4.

    Arguments and errors as in `contrastive_loss`. Returns (B, N): in [0, 1/tau] at the negatives, in [-1/tau, 0] at
    the positive, 0 at negatives that k drops. Each row sums to 0. For readers and tests; training uses autograd.
    """
    similarity, _ = check_similarity(similarity, positive, tau, k)
    own, dropped = own_and_dropped(similarity, positive, k)
    # Eq. 2: P_ij = exp(s_ij/tau) / sum_k exp(s_ik/tau), here at the negatives
    P = torch.softmax(similarity.masked_fill(dropped, -torch.inf) / tau, dim=1).masked_fill(own, 0.0)
    # Eq. 4: dL/ds_ij = P_ij / tau and dL/ds_ii = -(1/tau) sum_{k != i} P_ik, which is exact where P_ii - 1 would cancel
    return torch.where(own, -P.sum(dim=1, keepdim=True), P) / tau


def relative_penalty(similarity: Tensor, positive: Tensor, tau: float | Tensor, k: int | None = None) -> Tensor:
    """How the push on an anchor is shared among its negatives, Eq. 5 (Eq. 8 with k): a Boltzmann distribution.

    Arguments and errors as in `contrastive_loss`. Returns (B, N), in [0, 1], each row summing to 1 (to 0 where there
    is no negative, N = 1); 0 at the positive, which the penalty does not depend on, and at negatives that k drops.
    """
    similarity, _ = check_similarity(similarity, positive, tau, k)
    own, dropped = own_and_dropped(similarity, positive, k)
    # Eq. 5: r_i(s_ij) = exp(s_ij/tau) / sum_{k != i} exp(s_ik/tau)
    return torch.softmax(similarity.masked_fill(own | dropped, -torch.inf) / tau, dim=1).masked_fill(own, 0.0)


def nearest_negatives(similarity: Tensor, positive: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest negatives of each anchor, those with s_ij >= s_alpha of Eq. 8: similarities and columns,
    both (B, min(k, N - 1)), in no order; ties at place k as `topk` breaks them."""
    others = similarity.scatter(1, positive[:, None], -torch.inf)  # the positive is never among them
    return others.topk(min(k, similarity.shape[1] - 1), dim=1, sorted=False)


def own_and_dropped(similarity: Tensor, positive: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """(B, N) each: which column is the anchor's own image, and which are the negatives that k drops."""
    own = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, positive[:, None], True)
    if k is None:
        return own, torch.zeros_like(own)
    return own, ~own.scatter(1, nearest_negatives(similarity, positive, k)[1], True)


def check_similarity(similarity, positive, tau=1.0, k=None) -> tuple[Tensor, Tensor]:
    """Raise ValueError where an argument of the losses is wrong; return similarity, and s_ii as a column (B, 1)."""
    require(torch.is_tensor(similarity) and similarity.is_floating_point() and similarity.ndim == 2,
            "similarity must be (B, N) floating point")
    B, N = similarity.shape
    require(torch.is_tensor(positive) and positive.dtype == torch.int64 and positive.shape == (B,) and N > 0,
            f"positive must be an int64 tensor of shape ({B},), columns of {N}")
    require(tau.ndim == 0 if torch.is_tensor(tau) else isinstance(tau, numbers.Real),
            "tau must be a number, or a tensor of no dimensions")
    require(k is None or isinstance(k, numbers.Integral) and k >= 1, "k must be a whole number, at least 1")
    if similarity.dtype in (torch.half, torch.bfloat16):
        similarity = similarity.float()
    # Reading values would make a GPU wait, and break a graph that is being compiled.
    if similarity.device.type == "cpu" and not torch.compiler.is_compiling():
        value = float(tau.detach() if torch.is_tensor(tau) else tau)
        require(torch.finfo(similarity.dtype).tiny <= value < math.inf,
                f"tau must be finite and above 0 (also in {similarity.dtype}), not {value}")
        require(B == 0 or 0 <= positive.min() <= positive.max() < N, f"positive must lie in 0..{N - 1}")
        require(similarity.isfinite().all(), "similarity holds NaN or infinity", NotFinite)
    return similarity, similarity.gather(1, positive[:, None])


# ── 2  METRICS ─────────────────────────────────────────────────────── paper, sections 4 and 5.1, Eqs. 10-11, Fig. 8 ──
#
# z: (n, dim) unit vectors, what the loss sees. h: (n, features), what the linear probe sees. Labels: int64, from 0.
# Nothing is subsampled: functions over all pairs work on ROWS rows at a time. Each function raises ValueError where an
# argument does not fit, and gives the same number in any context of a caller (autocast, inference mode).

ROWS = 256  # rows of a block


@torch.no_grad()
def uniformity(z: Tensor, t: float = 2.0) -> float:
    """How evenly embeddings fill the sphere: -L_uniformity of Eq. 10, over the pairs i < j.

    z: (n, dim) unit vectors. Returns a value in [0, 4t]: 0 if all are equal, larger = more uniform (3.94 for many
    vectors spread evenly over the sphere in 128 dimensions, at t = 2); nan for fewer than two vectors, inf where every
    term underflows (a huge t).
    """
    check_vectors(z=z)
    n, total = len(z), 0.0
    if n < 2:
        return math.nan
    for i in range(0, n, ROWS):
        s = products(z[i:i + ROWS], z[i:])  # (b, n - i)
        # |z_i - z_j|² = 2 - 2 s_ij for unit vectors, so exp(-t |z_i - z_j|²) = exp(2t (s_ij - 1))
        terms = s.sub_(1).mul_(2 * t).exp_()
        # The first b columns are these rows themselves: there each pair stands twice, and each vector beside itself.
        total += terms[:, len(s):].sum(dtype=torch.float64).item()
        total += terms[:, :len(s)].triu(1).sum(dtype=torch.float64).item()
    # Eq. 10: L_uniformity = log E exp(-t |f(x) - f(y)|²)
    return -math.log(total / (n * (n - 1) / 2)) if total else math.inf


@torch.no_grad()
def tolerance(z: Tensor, labels: Tensor) -> float:
    """Mean similarity of two samples of the same class: Eq. 11 as the paper's text and table mean it, over pairs i < j.

    z: (n, dim) unit vectors; labels: (n,). Returns a value in [-1, 1]; nan where no class has two samples. (Eq. 11 as
    printed averages over *all* pairs, 0 where classes differ: with 100 classes that could not exceed 0.01, and Table 1
    has 0.39.)
    """
    check_vectors(z=z)
    check_labels(labels=(labels, z))
    _, label, count = labels.unique(return_inverse=True, return_counts=True)
    z = z.double()
    S = z.new_zeros(len(count), z.shape[1]).index_add(0, label, z)  # S_c: the sum of class c's vectors
    # The pairs of class c, in either order and without self-pairs, add up to |S_c|² - sum_i |z_i|².
    pairs = (count * (count - 1)).sum().item()
    return ((S.square().sum() - z.square().sum()) / pairs).item() if pairs else math.nan


@torch.no_grad()
def alignment(z1: Tensor, z2: Tensor) -> float:
    """Mean squared distance of the two views of each image (Wang & Isola, ICML 2020, with exponent 2).

    z1, z2: (n, dim) unit vectors, row i of both from image i. Returns a value in [0, 4], 0 if the views coincide.
    """
    check_vectors(z1=z1, z2=z2)
    require(z1.shape == z2.shape, "z1 and z2 must have one shape")
    return (z1.double() - z2.double()).square().sum(dim=1).mean().item()


@torch.no_grad()
def similarity_profile(z: Tensor, z2: Tensor, positive: Tensor, top: int = 10) -> Tensor:
    """Mean similarity of the positive, then of the nearest, second nearest, … negative: a panel of Fig. 8.

    z: (n, dim) unit vectors, the anchors. z2: (m, dim) unit vectors to compare with (other views, or a bank's rows),
    row `positive[i]` being anchor i's own. Returns (1 + top,) float64 on the CPU, in [-1, 1]; nan where there are
    fewer negatives than that.
    """
    check_vectors(z=z, z2=z2)
    require(torch.is_tensor(positive) and positive.shape == z.shape[:1], f"positive must be of shape ({len(z)},)")
    kept = min(top, len(z2) - 1)
    total = torch.zeros(1 + kept, dtype=torch.float64)
    for rows, own in zip(z.split(ROWS), positive.split(ROWS)):
        s, s_ii = check_similarity(products(rows, z2), own)  # (b, m), (b, 1)
        negatives = nearest_negatives(s, own, kept)[0].sort(dim=1, descending=True).values  # (b, kept)
        total += torch.cat([s_ii, negatives], dim=1).sum(dim=0, dtype=torch.float64).cpu()
    return F.pad(total / len(z), (0, top - kept), value=math.nan)


@torch.no_grad()
def knn_accuracy(train_z: Tensor, train_y: Tensor, test_z: Tensor, test_y: Tensor,
                 k: int = 200, temperature: float = 0.07) -> float:
    """Percent of test images whose k nearest training images vote for their class, with weights exp(s/temperature).

    train_z, test_z: (n, dim), (m, dim) unit vectors; train_y, test_y: (n,), (m,). All n vote where n < k. The protocol
    is the authors' (Wu et al., CVPR 2018).
    """
    check_vectors(train_z=train_z, test_z=test_z)
    check_labels(train_y=(train_y, train_z), test_y=(test_y, test_z))
    require(isinstance(k, numbers.Integral) and k >= 1 and temperature > 0, "k must be at least 1, temperature above 0")
    classes, right = 1 + max(train_y.max().item(), test_y.max().item()), 0
    for z, y in zip(test_z.split(ROWS), test_y.split(ROWS)):
        s, neighbour = products(z, train_z).topk(min(k, len(train_z)), dim=1)  # (b, k), the nearest first
        # All of a row's weights are divided by the largest: none overflows, and the nearest never vanishes.
        weight = torch.exp((s - s[:, :1]) / temperature)
        votes = z.new_zeros(len(z), classes).scatter_add(1, train_y[neighbour], weight)  # (b, classes)
        right += (votes.argmax(dim=1) == y).sum().item()
    return 100 * right / len(test_y)


@torch.inference_mode(False)
@torch.no_grad()
def linear_probe(train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, epochs: int = 100, lr: float = 30.0,
                 momentum: float = 0.9, milestones: tuple[int, ...] = (40, 60, 80), gamma: float = 0.2,
                 batch_size: int = 256, seed: int = 0) -> float:
    """Percent of test images that a linear classifier on frozen features gets right, after its last epoch.

    train_h: (n, d) features, or (V, n, d) for V views of each image, of which each epoch picks one at random (an
    image and its mirror image: then this is training with random flips). test_h: (m, d). SGD without weight decay,
    lr · gamma at the milestones (paper, section 5.1; batch, momentum and flips from the authors' code, which reports
    its best epoch on the test set: this reports the last). Raises NotFinite where it diverges.
    """
    V, rows = 1, train_h
    if torch.is_tensor(train_h) and train_h.ndim == 3:
        V, rows = len(train_h), train_h.flatten(0, 1)  # (V·n, d)
    check_vectors(unit=False, train_h=rows, test_h=test_h)
    n, d = len(rows) // V, rows.shape[1]
    check_labels(train_y=(train_y, rows[:n]), test_y=(test_y, test_h))
    rows, classes = rows.detach(), 1 + int(max(train_y.max(), test_y.max()))
    # The problem is convex: 0 is as good a start as any, and needs no draw.
    weight, bias = rows.new_zeros(classes, d, requires_grad=True), rows.new_zeros(classes, requires_grad=True)
    optimiser = torch.optim.SGD([weight, bias], lr=lr, momentum=momentum)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones), gamma)
    draws = torch.Generator().manual_seed(seed)
    with torch.enable_grad(), autocast(rows.device):
        for _ in range(epochs):
            order = torch.randperm(n, generator=draws)
            view = torch.randint(V, (n,), generator=draws)
            images = torch.stack([order, view * n + order]).to(rows.device)  # and the rows of `rows` that show them
            for image, row in images.split(batch_size, dim=1):
                optimiser.zero_grad()
                F.cross_entropy(F.linear(rows[row], weight, bias), train_y[image]).backward()
                optimiser.step()
            schedule.step()
    require(weight.isfinite().all() and bias.isfinite().all(), "the linear probe's weights", NotFinite)
    with autocast(rows.device):
        return 100 * (F.linear(test_h, weight, bias).argmax(dim=1) == test_y).double().mean().item()


def products(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of two sets of vectors, in their own precision: (n, dim), (m, dim) -> (n, m)."""
    with autocast(a.device):
        return a @ b.T


def autocast(device: torch.device, bfloat16: bool = False):
    """A context in which matrix products and convolutions run in bfloat16, or else in their tensors' own dtype."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def check_vectors(unit: bool = True, **sets: Tensor) -> None:
    """Raise ValueError unless all sets hold vectors (n, dim), of one dim and precision, finite and, if so, unit."""
    for name, z in sets.items():
        require(torch.is_tensor(z) and z.ndim == 2 and z.dtype in (torch.float32, torch.float64),
                f"{name} must be (n, dim) float32 or float64")
        require(z.isfinite().all(), f"{name} must be finite, but holds NaN or infinity", NotFinite)
        require(not unit or ((torch.linalg.vector_norm(z, dim=1) - 1).abs() < 1e-3).all(),
                f"{name} must hold unit vectors: divide each row by its length first")
    require(len({(z.shape[1], z.dtype) for z in sets.values()}) < 2,
            f"{' and '.join(sets)} must have one dim and one precision")


def check_labels(**pairs: tuple[Tensor, Tensor]) -> None:
    """Raise ValueError unless labels hold a class from 0 for each of the rows, one at least. name=(labels, rows)."""
    for name, (labels, rows) in pairs.items():
        require(torch.is_tensor(labels) and labels.dtype == torch.int64 and labels.shape == rows.shape[:1],
                f"{name} must be an int64 tensor of shape ({len(rows)},)")
        require(len(labels) > 0 and labels.min() >= 0, f"{name} must hold classes from 0, one at least")


# ── 3  MEMORY BANK ────────────────────────────────────────────────────────────────────────────── paper, section 5.1 ──


class MemoryBank:
    """g(x_j) of every training image j: a moving average of its embeddings, a unit row each, (N, dim).

    size: N. momentum: the share of the old row that stays, in [0, 1] (0.5 in the authors' code). init: "random", rows
    drawn evenly from the sphere with `generator`, or the embeddings (N, dim) to begin with. Raises ValueError.
    """

    def __init__(self, size: int, dim: int = 128, momentum: float = 0.5, init: str | Tensor = "random",
                 generator: torch.Generator | None = None, device: torch.device | str = "cpu"):
        require(isinstance(momentum, numbers.Real) and 0 <= momentum <= 1, "momentum must lie in [0, 1]")
        if isinstance(init, str) and init == "random":
            init = torch.randn(size, dim, generator=generator, dtype=torch.float32)
        require(torch.is_tensor(init) and init.shape == (size, dim),
                f'init must be "random" or a tensor of shape ({size}, {dim})')
        with torch.inference_mode(False):  # a bank made inside a caller's inference mode must learn outside it
            self.rows = F.normalize(init.detach().float(), dim=1).to(device)
        require(((self.rows.norm(dim=1) - 1).abs() < 1e-3).all(), "init must hold finite rows, none of them all zeros")
        self.momentum = momentum

    def similarity(self, z: Tensor) -> Tensor:
        """s_ij = f(x_i)·g(x_j). z: (B, dim). Returns (B, N), float32 whatever the network's precision."""
        require(z.ndim == 2 and z.shape[1] == self.rows.shape[1], f"z must be (B, {self.rows.shape[1]})")
        return products(z.float(), self.rows)

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor) -> None:
        """Move the rows `index` (B,) towards the embeddings z (B, dim) of the same images, and back to the sphere."""
        old = self.rows[index]
        require(z.shape == old.shape, f"z must be {tuple(old.shape)}, an embedding for each index")
        mixed = self.momentum * old + (1 - self.momentum) * z.float()
        opposite = (mixed == 0).all(dim=1, keepdim=True)  # nothing to normalise: such a row stays
        self.rows[index] = F.normalize(torch.where(opposite, old, mixed), dim=1)


# ── 4  NETWORK ────────────────────────────────────────────────────────────────────────────────── paper, section 5.1 ──


class Block(nn.Module):
    """A residual block: two 3x3 convolutions and a shortcut (He et al., CVPR 2016).

    (B, channels, s, s) -> (B, out, s/stride, s/stride)
    """

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            # Every second pixel, then a convolution of stride 1: but for rounding a 1x1 convolution of stride 2, whose
            # weight gradient corrupts memory on CPUs where channels are few (uxlfoundation/oneDNN#6035).
            self.shortcut = nn.Sequential(nn.AvgPool2d(1, stride), nn.Conv2d(channels, out, 1, bias=False),
                                          nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """f(x): ResNet-18 with a 3x3 first convolution of stride 1 and no max-pooling, for images of 32x32.

    x: (B, 3, size, size), normalised. width: channels of the first stage (64 in the paper); dim: of the embedding;
    bfloat16: run in bfloat16. Convolutions start He-normal (fan-out), the head Xavier-uniform (authors' code).
    """

    def __init__(self, width: int = 64, dim: int = 128, bfloat16: bool = False):
        super().__init__()
        stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2)]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(*(nn.Sequential(Block(i, o, s), Block(o, o, 1)) for i, o, s in stages))
        self.head = nn.Linear(8 * width, dim)
        self.in_bfloat16 = bfloat16
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """h, (B, 8·width) float32: the pooled features that the linear probe sees."""
        with autocast(x.device, self.in_bfloat16):
            return self.stages(self.stem(x)).mean(dim=(2, 3)).float()

    def project(self, h: Tensor) -> Tensor:
        """(B, dim) float32: the embedding before it is normalised."""
        with autocast(h.device, self.in_bfloat16):
            return self.head(h).float()

    def forward(self, x: Tensor) -> Tensor:
        """z, (B, dim) float32: the embedding, of unit length."""
        return F.normalize(self.project(self.features(x)), dim=1)


# ── 5  DATA ───────────────────────────────────────────────────────────────────────────────────── paper, section 5.1 ──


class Data(NamedTuple):
    """A whole dataset: images uint8 (n, 3, size, size), labels int64 (n,) from 0."""
    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device | str) -> Data:
        return Data(self.name, *(tensor.to(device) for tensor in self[1:]))

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for tensor in self[1:]:
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().view(-1).numpy())
        return digest.hexdigest()


DOWNLOADS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100,
             "svhn": torchvision.datasets.SVHN}


def load_dataset(dataset: str, root: str | Path = "data", size: int = 32) -> Data:
    """The dataset of that name, downloaded into `root` unless it is there; or, for any other name, a folder of images.

    Raises BadInput for data that is missing, broken or out of reach; Stop for a download that broke off.
    """
    if dataset in DOWNLOADS:
        require(size == 32, f"{dataset} has images of 32x32: give --size 32", BadInput)
        return load_download(dataset, Path(root).expanduser())
    require(dataset != "shapes" or size <= 64, "shapes are made up to 64x64: give a smaller --size", BadInput)
    return load_shapes(size) if dataset == "shapes" else load_folder(dataset, size)


def load_download(name: str, root: Path) -> Data:
    """CIFAR-10, CIFAR-100 or SVHN through torchvision, which checks the MD5 sums. Files already in `root` are used."""
    def read(download: bool) -> Data:
        tensors = []
        for part in ("train", "test"):
            which = {"split": part} if name == "svhn" else {"train": part == "train"}
            data = DOWNLOADS[name](root, download=download, **which)
            images = torch.as_tensor(data.data)  # CIFAR: (n, 32, 32, 3); SVHN: (n, 3, 32, 32)
            tensors.append((images if name == "svhn" else images.permute(0, 3, 1, 2)).contiguous())
            tensors.append(torch.as_tensor(data.labels if name == "svhn" else data.targets))
        return Data(name, *tensors)

    with contextlib.suppress(RuntimeError):  # already downloaded, perhaps into a folder that can only be read
        return read(download=False)
    make_folder(root)
    say(f"downloading {name} into {root}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with filelock.FileLock(root / ".download.lock"):  # several runs may start at once
            return read(download=True)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise (BadInput if isinstance(error, urllib.error.URLError) else Stop)(
            f"cannot download {name} ({error}): run the command again, or put its files into {root} (--data), or name "
            "a folder of images (--dataset), or images made by code (--dataset shapes)")
    finally:
        socket.setdefaulttimeout(timeout)


def load_folder(folder: str | Path, size: int = 32) -> Data:
    """A folder with train/<class>/* and test/<class>/*: images of any size, upright (EXIF), the shorter side resized to
    `size` (antialiased), the middle square cut out. Classes are numbered as sorted by name, as `train` has them. What
    is hidden is left out, and so are links to folders inside a class. Raises BadInput."""
    square = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    folder, tensors, left_out = Path(folder).expanduser(), [], []
    train, test = files_by_class(folder / "train"), files_by_class(folder / "test")
    require(len(train) > 1, f"{folder / 'train'} has one class alone: at least two are needed", BadInput)
    for part, classes in (("train", train), ("test", test)):
        images, labels = [], []
        for name, files in classes.items():
            kept = [path for path in files if path.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS]
            require(kept, f"{folder / part / name} holds no image", BadInput)
            require(name in train, f"{folder / part / name}: {folder / 'train'} has no class of that name", BadInput)
            left_out += sorted(set(files) - set(kept))
            images += [square(read_image(path)) for path in kept]
            labels += [list(train).index(name)] * len(kept)
        tensors += [torch.stack(images), torch.tensor(labels)]
    if left_out:
        say(f"{len(left_out)} files are left out, as their endings are no image's: {left_out[0]} …")
    name = re.sub(r"[^\w .-]", "_", folder.resolve().name)[:80] or "images"  # it stands in tables and file names
    # A folder that is named like a dataset must not stand where the dataset's own records stand.
    return Data(name + "-folder" * (name in (*DOWNLOADS, "shapes")), *tensors)


def files_by_class(folder: Path) -> dict[str, list[Path]]:
    """What the folder of each class holds, at any depth."""
    classes = {}
    for path in sorted(path for path in folder.glob("[!.]*") if path.is_dir()):
        # Such a link would give images the wrong class.
        require(not folder.resolve().is_relative_to(path.resolve()), f"{path} links to a folder above it", BadInput)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        classes[path.name] = [file for file in files if "/." not in f"/{file.relative_to(path).as_posix()}"]
    require(classes, f"no class in {folder}: a dataset is {', '.join(DOWNLOADS)}, shapes, or a folder with "
            "train/<class>/* and test/<class>/*", BadInput)
    return classes


def read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            require(image.mode[0] not in "IF", "it has more than 8 bits a channel")
            return ImageOps.exif_transpose(image).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds on a broken file
        raise BadInput(f"cannot read the image {path} ({str(error) or type(error).__name__}): mend or remove it")


def balanced_order(labels: Tensor, seed: int = 0) -> Tensor:
    """A random order of the images. Every prefix is balanced over the classes, to within one image, until a class runs
    out."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    one_hot = F.one_hot(labels[shuffled])  # (n, classes)
    rank = one_hot.cumsum(0)[torch.arange(len(labels)), labels[shuffled]]  # 1 for the first of a class, 2, …
    return shuffled[rank.argsort(stable=True)]


# The augmentation has two parts: what is drawn (on the CPU, so that all devices draw alike), and what is done with it
# (to a whole batch at once, where the images are).

GREY = (0.2989, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass
class Augmentation:
    """What is done to each of B images; a[rows] is what is done to those rows."""
    crop: Tensor  # (B, 4) int64: top, left, height, width, in pixels
    flip: Tensor  # (B,) bool
    order: Tensor  # (B, 4) int64: which colour operation comes first, second, …
    factor: Tensor  # (B, 4) float32: of brightness, contrast, saturation (1 = as it is), hue (0 = as it is)
    grey: Tensor  # (B,) bool

    def __getitem__(self, rows) -> Augmentation:
        return Augmentation(*(value[rows] for value in vars(self).values()))

    def to(self, device: torch.device | str) -> Augmentation:
        # Without waiting; but on MPS such a copy may read memory that was freed meanwhile (pytorch#139550).
        at_once = torch.device(device).type == "cuda"
        return Augmentation(*(value.to(device, non_blocking=at_once) for value in vars(self).values()))


def draw_augmentation(count: int, generator: torch.Generator, size: int = 32, flip: bool = True) -> Augmentation:
    """Draw what to do to `count` images of size x size, by the paper's settings and torchvision's distribution.

    RandomResizedCrop(size, scale=(0.2, 1)), ColorJitter(0.4, 0.4, 0.4, 0.4), horizontal flip, RandomGrayscale(0.2).
    A crop that does not fit is drawn again, up to ten times in all, then the whole image is taken, as torchvision does.
    """
    def rand(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, dtype=torch.float32)

    area = size * size * (0.2 + 0.8 * rand(10))  # (count, 10): all ten tries at once
    ratio = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * rand(10))
    width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (width > 0) & (width <= size) & (height > 0) & (height <= size)
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    width = torch.where(found, width.gather(1, first)[:, 0], size)
    height = torch.where(found, height.gather(1, first)[:, 0], size)
    top, left = (rand() * (size - height + 1)).long(), (rand() * (size - width + 1)).long()
    factor = torch.cat([0.6 + 0.8 * rand(3), -0.4 + 0.8 * rand(1)], dim=1)
    # The order of the draws is part of the protocol: a flip is drawn also where it is not wanted.
    return Augmentation(crop=torch.stack([top, left, height, width], dim=1), flip=(rand() < 0.5) & flip,
                        order=rand(4).argsort(dim=1), factor=factor, grey=rand() < 0.2)


def augment(images: Tensor, drawn: Augmentation) -> Tensor:
    """Do to each image what was drawn for it, on one device.

    images: uint8 (B, 3, s, s). Returns float32 (B, 3, s, s) in [0, 1]. Equal to torchvision's transforms on float
    images; its PIL pipeline rounds to 256 levels after every step. Raises ValueError for images that are not uint8.
    """
    check_images(images)
    if images.device.type == "cpu" and len(images) > 64:  # on a CPU, parts that stay in its cache are faster
        parts = range(0, len(images), 64)
        return torch.cat([augment(images[i:i + 64], drawn[i:i + 64]) for i in parts])
    size = images.shape[-1]
    top, left, height, width = drawn.crop.float().unbind(dim=1)
    rows, columns = resize_weights(top, height, size), resize_weights(left, width, size)
    columns = torch.where(drawn.flip[:, None, None], columns.flip(1), columns)
    with autocast(images.device):
        x = rows[:, None] @ (images.float() / 255)  # (B, 3, size, size)
        # One product an image: its channels share `columns`.
        x = (x.flatten(1, 2) @ columns.transpose(1, 2)).unflatten(1, (3, size))
    # The hue step is expensive and runs once. Blends that the drawn order has before it come first, the others after.
    hue_place = (drawn.order == HUE).int().argmax(dim=1)
    for place in range(3):
        x = blend(x, drawn, place, place < hue_place)
    x = shift_hue(x, drawn.factor[:, HUE])
    for place in range(1, 4):
        x = blend(x, drawn, place, place > hue_place)
    return torch.where(drawn.grey[:, None, None, None], grey_of(x), x)


def check_images(images: Tensor) -> None:
    require(torch.is_tensor(images) and images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3,
            "images must be uint8 (B, 3, s, s), 0 to 255")


def resize_weights(start: Tensor, length: Tensor, size: int) -> Tensor:
    """(B, size, size): row i holds the weights of the pixels that make pixel i of the enlarged crop (bilinear)."""
    pixel = torch.arange(size, device=start.device, dtype=torch.float32)
    at = (pixel + 0.5) * (length / size)[:, None] - 0.5  # in the crop; its own pixel centres are 0 … length - 1
    at = start[:, None] + torch.minimum(at.clamp(min=0), length[:, None] - 1)
    return (1 - (at[:, :, None] - pixel).abs()).clamp(min=0)


def grey_of(x: Tensor) -> Tensor:
    r, g, b = x.unbind(dim=1)
    return (GREY[0] * r + GREY[1] * g + GREY[2] * b)[:, None]  # (B, 1, s, s)


def blend(x: Tensor, drawn: Augmentation, place: int, active: Tensor) -> Tensor:
    """Blend towards black (brightness), the mean grey (contrast) or each pixel's grey (saturation), where active."""
    operation = drawn.order[:, place]
    factor = drawn.factor.gather(1, operation[:, None])[:, 0]
    operation, factor = operation[:, None, None, None], torch.where(active, factor, 1.0)[:, None, None, None]
    grey = grey_of(x)
    towards = torch.where(operation == SATURATION, grey, grey.mean(dim=(2, 3), keepdim=True))
    towards = torch.where(operation == BRIGHTNESS, 0.0, towards)
    return (factor * x).add_((1 - factor) * towards).clamp_(0, 1)  # in place: new memory costs more than the sums


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (B,), a share of the whole circle, keeping value and chroma (HSV)."""
    r, g, b = x.unbind(dim=1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    c = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == g, (b - r).div_(c).add_(2), (r - g).div_(c).add_(4))
    hue = torch.where(value == r, (g - b).div_(c), hue)
    hue += 6 * shift[:, None, None]  # in sixths of the circle
    # HSV to RGB: channel n is V - C · max(0, min(k, 4 - k, 1)) with k = (n + hue) mod 6, and n = 5, 3, 1 for red,
    # green, blue: each falls from V to V - C and rises again, a third of the circle after the one before.
    corner = torch.tensor([5.0, 3.0, 1.0], device=x.device, dtype=torch.float32)[:, None, None]
    k = corner + hue[:, None]  # (B, 3, s, s)
    k -= (k / 6).floor_().mul_(6)  # k modulo 6, at a third of what % costs
    share = torch.minimum(k, 4 - k).clamp_(0, 1)
    return share.mul_(chroma[:, None]).neg_().add_(value[:, None])


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, by the authors' code for every dataset


def normalise(x: Tensor) -> Tensor:
    """Views as the network wants them: the authors' mean and standard deviation, channels last."""
    mean, std = (torch.tensor(values, device=x.device, dtype=x.dtype)[:, None, None] for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


# The images of `quick`, for who has no dataset. Skip them on a first reading.

SHAPES = {  # about how far the point (u, v), r from the centre, lies inside the shape's edge; below 0 outside
    "disk": lambda u, v, r: 0.85 - r,
    "ring": lambda u, v, r: 0.17 - (r - 0.8).abs(),
    "crescent": lambda u, v, r: torch.minimum(1 - r, torch.hypot(u - 0.5, v) - 0.8),
    "square": lambda u, v, r: 0.75 - torch.maximum(u.abs(), v.abs()),
    "frame": lambda u, v, r: 0.15 - (torch.maximum(u.abs(), v.abs()) - 0.7).abs(),
    "triangle": lambda u, v, r: 0.5 - torch.stack(
        [u * math.cos(a) + v * math.sin(a) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]).amax(0),
    "star": lambda u, v, r: 0.4 + 0.7 * (
        (torch.atan2(v, u) % (2 * math.pi / 5) - math.pi / 5).abs() / (math.pi / 5)) - r,  # the fold is 1 at a tip
    "cross": lambda u, v, r: torch.maximum(
        torch.minimum(1 - u.abs(), 0.27 - v.abs()), torch.minimum(1 - v.abs(), 0.27 - u.abs())),
    "bar": lambda u, v, r: torch.minimum(1 - u.abs(), 0.3 - v.abs()),
    "dots": lambda u, v, r: 0.38 - torch.hypot(u.abs() - 0.62, v),
}


def load_shapes(size: int = 32, train: int = 4000, test: int = 2000) -> Data:
    """Ten classes of shape, made by code, always the same, up to a pixel that another kind of CPU rounds differently.

    An image is tiled with one shape, light and dark pieces in turn, so that a crop of it still shows which, and
    neither colour nor mean brightness tells. All else is nuisance: position, size, rotation, the colours, a texture
    behind, from coarse to fine, and noise.
    """
    n, draws = train + test, torch.Generator().manual_seed(0)
    rand, randn = (functools.partial(draw, dtype=torch.float32) for draw in (torch.rand, torch.randn))

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * rand(n, channels, 1, 1, generator=draws)

    def loguniform(low: float, high: float) -> Tensor:
        return uniform(math.log(low), math.log(high)).exp()

    labels = torch.arange(n) % len(SHAPES)
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size * 2 - 1  # pixel centres, in [-1, 1]
    y, x = axis[:, None], axis[None, :]
    # The pattern's frame: moved, turned and scaled so that a shape fills about the unit disk, and a piece is 2.4 wide.
    angle, radius = uniform(0, 2 * math.pi), loguniform(0.25, 0.65)
    dx, dy = (x - uniform(-1, 1)) / radius, (y - uniform(-1, 1)) / radius
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()  # (n, 1, size, size)
    light = 1 - 2 * (((u / 2.4).floor() + (v / 2.4).floor()) % 2)  # 1 and -1, as on a chessboard
    u, v = u % 2.4 - 1.2, v % 2.4 - 1.2
    inside = torch.empty(n, 1, size, size, dtype=torch.float32)
    for label, depth in enumerate(SHAPES.values()):
        rows = labels == label
        inside[rows] = depth(u[rows], v[rows], torch.hypot(u[rows], v[rows]))
    mask = (0.5 + inside * radius * size / 2).clamp(0, 1)  # edges one pixel wide
    saturation = uniform(0, 0.6)
    behind = uniform(0.4, 0.6) + saturation * uniform(-0.5, 0.5, 3)  # (n, 3, 1, 1)
    front = behind + uniform(0.35, 0.45) * light + saturation * uniform(-0.5, 0.5, 3)
    for cells in (2, 4, 8, 16):
        texture = rand(n, 3, cells + 1, cells + 1, generator=draws) * 2 - 1
        texture = torch.lerp(texture.mean(dim=1, keepdim=True), texture, uniform(0, 1))  # from grey to coloured
        texture = F.interpolate(texture, size=(size, size), mode="bilinear", align_corners=True)
        behind = behind + loguniform(0.02, 0.25) * texture
    images = torch.lerp(behind, front, mask)
    images = images + 0.02 * randn(images.shape, generator=draws)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Data("shapes", images[:train], labels[:train], images[train:], labels[train:])


# ── 6  TRAINING ───────────────────────────────────────────────────────────────────────────────── paper, section 5.1 ──

PROTOCOL_VERSION = 1  # goes up when the same settings would give other results, but for rounding


LOSSES = {  # each loss, and the settings that it takes; a new one needs a row here, a new setting a field of Config
    "contrastive": (contrastive_loss, ("tau",)),
    "hard": (contrastive_loss, ("tau", "k")),
    "simple": (simple_loss, ()),
    "hard-simple": (simple_loss, ("k",)),
    "triplet": (triplet_loss, ()),
}


def setting(default, words: str, source: str = "", low=None, high=None, choices=None, kind=None, study: bool = True):
    """A field of Config. low, high: its range, both ends included. kind: its type. study: the result depends on it, and
    the record holds it."""
    kind = kind or type(default)
    high = {int: 2 ** 31 - 1, float: 1e30}.get(kind) if high is None else high
    return dataclasses.field(default=default, metadata=dict(
        words=words, source=source, low=low, high=high, choices=choices, kind=kind, study=study))


@dataclass
class Config:
    """The settings of one run; the defaults are the paper's protocol (`make_config` fills in a preset). Raises BadInput
    for a setting that is wrong, and for one that its loss would ignore."""
    loss: str = setting("contrastive", "which loss", "paper, Eqs. 1, 3, 6, 9", choices=tuple(LOSSES))
    tau: float | None = setting(None, "temperature (contrastive, hard); None: 0.3", "paper, 5", 1e-30, kind=float)
    dataset: str = setting("cifar10", "cifar10, cifar100, svhn, shapes (made by code), or a folder with\n"
                           "train/<class>/* and test/<class>/*", "paper, 5.1")
    preset: str = setting("paper", "fills what is left open; not given: paper on a CUDA GPU, else mini", "our choice",
                          choices=("paper", "narrow", "mini", "quick", "smoke"))
    seed: int = setting(0, "every random draw follows from it", "paper: one run each", 0)
    epochs: int = setting(200, "passes over the training images", "paper, 5.1", 1)
    batch_size: int = setting(128, "images of a step; the last step of an epoch may have fewer", "paper, 5.1", 2)
    size: int = setting(32, "height and width of the images, a multiple of 8", "paper, 5.1", 16, 1024)
    width: int = setting(64, "channels of the first stage of ResNet-18", "paper, 5.1", 1, 4096)
    dim: int = setting(128, "dimensions of the embedding", "paper, 5.1", 1)
    lr: float = setting(0.03, "learning rate", "paper, 5.1; mini: by accuracy_heldout", 1e-30)
    momentum: float = setting(0.9, "of SGD", "paper, 5.1", 0, 1)
    weight_decay: float = setting(5e-4, "of SGD, on all parameters", "paper, 5.1", 0)
    schedule: str = setting("step", "of the learning rate: times gamma at the milestones, or cosine to 0", "paper, 5.1",
                            choices=("step", "cosine"))
    milestones: tuple = setting((160, 190), "epochs at which it falls (step schedule), whatever --epochs is",
                                "paper, 5.1", 1, kind=int)
    gamma: float = setting(0.1, "factor at each milestone (step schedule)", "paper, 5.1", 0)
    warmup: float = setting(0.0, "epochs over which the learning rate rises from 0", "our choice", 0)
    bank_momentum: float = setting(0.5, "share of a bank row that an update keeps", "authors' code", 0, 1)
    bank_init: str = setting("random", "start of the bank; embeddings: of one view of each image (see centre_head)",
                             "random: authors' code; embeddings: our choice", choices=("random", "embeddings"))
    k: int | None = setting(None, "nearest negatives of the hard losses; None: 4095", "paper, 5.2", 1, kind=int)
    subset: int | None = setting(None, "train on at most that many images, of each class as many",
                                 "our choice", 10, kind=int)
    test_subset: int | None = setting(None, "test on at most that many images, likewise", "our choice", 10, kind=int)
    flip: bool = setting(True, "horizontal flips in pretraining (evaluation has them always)", "paper, not its code")
    match_step: bool = setting(False, "multiply the loss by tau, so that the step does not grow as 1/tau", "our choice")
    precision: str = setting("auto", "of the network (similarities and loss: float32). auto: bfloat16 on a GPU that\n"
                             "has it, else float32 (where a GPU's convolutions may take TF32)", "our choice",
                             choices=("auto", "float32", "bfloat16"))
    probe_lr: float = setting(30.0, "learning rate of the linear probe; 0.3 suits the few features of small widths",
                              "paper, 5.1; mini: on training images that it does not use", 1e-30)
    eval_every: int = setting(10, "epochs between two looks at kNN, uniformity, tolerance; 0: none", "our choice", 0)
    device: str = setting("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps, …", study=False)
    threads: int | None = setting(None, "of the CPU; None: as PyTorch chooses", "", 1, 1024, kind=int, study=False)
    data: str = setting("data", "folder where downloads are or go", study=False)
    results: str = setting("results", "folder for the record", study=False)
    runs: str = setting("runs", "folder for the checkpoint", study=False)
    force: bool = setting(False, "begin again: delete the run's checkpoint and record first", study=False)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                setattr(self, field.name, tuple(check_setting(field.name, one, **field.metadata) for one in value))
            elif value is not None or field.default is not None:
                setattr(self, field.name, check_setting(field.name, value, **field.metadata))
        require(list(self.milestones) == sorted(set(self.milestones)), "milestones must rise", BadInput)
        require(self.size % 8 == 0, f"size must be a multiple of 8, not {self.size}", BadInput)
        for name, usual in (("tau", 0.3), ("k", 4095)):
            value, takes = getattr(self, name), name in LOSSES[self.loss][1]
            # What the loss would ignore is refused.
            require(takes or value is None, f"the {self.loss} loss has no {name}: leave it out", BadInput)
            setattr(self, name, usual if takes and value is None else value)
        require(self.tau or not self.match_step, f"the {self.loss} loss has no tau: leave out match_step", BadInput)
        for name in ("results", "runs"):
            setattr(self, name, os.path.expanduser(getattr(self, name)))

    def study(self) -> dict:
        """The settings that the result depends on: what the record holds."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["study"]}


def check_setting(name: str, value, kind, low, high, choices, **_):
    """The value, whole numbers turned to float where that is its kind. Raises BadInput where it is wrong."""
    value = float(value) if kind is float and type(value) is int else value
    require(type(value) is kind and value != "", f"{name} must be a {kind.__name__}, not {value!r}", BadInput)
    require(not choices or value in choices, f"{name} must be one of {choices}, not {value!r}", BadInput)
    require(low is None or low <= value <= high, f"{name} must lie in {low} … {high}, not {value!r}", BadInput)
    return value


SMALL = dict(width=16, lr=0.1, schedule="cosine", warmup=3.0, bank_init="embeddings", probe_lr=0.3)
MINI = dict(SMALL, epochs=60, batch_size=64, k=409, subset=5000)
PRESETS = {
    "paper": {},  # section 5.1; for a GPU
    "narrow": dict(SMALL, epochs=40),  # all images, a narrow network: two to three hours on a core
    "mini": MINI,  # a tenth of the images: a quarter of an hour on a core
    # A demonstration on shapes, two minutes a run; and seconds, for tests.
    "quick": dict(MINI, dataset="shapes", size=24, width=8, subset=500, test_subset=1000, batch_size=16, epochs=160,
                  lr=0.01, k=200, eval_every=0),
    "smoke": dict(MINI, dataset="shapes", epochs=3, batch_size=16, width=4, dim=16, lr=0.03, warmup=1.0, k=8,
                  subset=100, test_subset=100, eval_every=2),
}


def make_config(preset: str = "paper", **given) -> Config:
    """The preset's settings, but for those given; its k is dropped for a loss without k. Raises BadInput."""
    require(preset in PRESETS, f"preset must be one of {', '.join(PRESETS)}, not {preset!r}", BadInput)
    filled = {**PRESETS[preset], **given}
    if "k" not in given and "k" not in LOSSES.get(filled.get("loss"), LOSSES["contrastive"])[1]:
        filled.pop("k", None)
    if filled.get("schedule") == "cosine" and given.keys() & {"milestones", "gamma"}:
        raise BadInput("the cosine schedule has no milestones and no gamma: leave them out, or give schedule step")
    return Config(**filled, preset=preset)


def learning_rate(config: Config, at: float) -> float:
    """The learning rate at a time, in epochs: 3.5 is half-way through the fourth."""
    rise = min(1.0, at / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        return config.lr * rise * (1 + math.cos(math.pi * at / config.epochs)) / 2
    return config.lr * rise * config.gamma ** sum(at >= milestone for milestone in config.milestones)


def generator(*key) -> torch.Generator:
    """Random numbers that depend on the key alone (seed, purpose, epoch, step): a run resumes exactly at any step."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


@dataclass
class Run:
    """The state of a run, as a checkpoint holds it."""
    model: ResNet18
    optimiser: torch.optim.SGD
    bank: MemoryBank
    losses: Tensor  # (steps of an epoch,) of the running epoch, on the device: a look at them would make a GPU wait
    untrained: dict  # the metrics before training
    step: int = 0  # steps done, of all epochs
    history: list[dict] = dataclasses.field(default_factory=list)  # an entry an epoch
    seconds: float = 0.0  # spent so far
    evaluation: float = 0.0  # seconds that an evaluation took

    def finite(self) -> bool:
        values = (*self.model.state_dict().values(), self.bank.rows, self.losses)
        return all(value.isfinite().all() for value in values)


def train(config: Config) -> dict:
    """Train, evaluate, write the record and return it (paper, section 5.1). A finished record of the same config is
    returned as it is; an unfinished run goes on from its checkpoint. Sets PyTorch's threads and CUDA device for the
    whole process. Raises Stop or one of its kinds (BadInput, Busy)."""
    device = pick_device(config.device)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    data = take_subset(load_dataset(config.dataset, config.data, config.size), config)
    config = dataclasses.replace(config, dataset=data.name)  # a folder's own name: no path in the record
    cell = cell_path(config, data.name)
    record_path, checkpoint = Path(config.results, f"{cell}.json"), Path(config.runs, f"{cell}.pt")
    identity = {"protocol_version": PROTOCOL_VERSION, "config": plain(config.study()), "data": data.sha256()}
    make_folder(record_path.parent)
    make_folder(checkpoint.parent)
    with lock(checkpoint.with_suffix(".lock")):
        if config.force:
            checkpoint.unlink(missing_ok=True)
            record_path.unlink(missing_ok=True)
        if record_path.exists():
            record = read_record(record_path)
            refuse_other(record_path, record, identity)
            say(f"{record_path} is there already (--force runs it again)")
        else:
            try:
                data = data.to(device)
                run = start(config, data, device, checkpoint, identity)
                fit(run, config, data, checkpoint, identity)
                began = time.perf_counter()
                say(f"trained; evaluating, about {duration(run.evaluation)}")
                final = {**evaluate(run.model, data, config), "untrained": run.untrained}
            except NotFinite as error:
                raise Stop(f"not finite: {error}; nothing is recorded (a good checkpoint from before, if there is one, "
                           f"stays in {checkpoint}); try a lower --lr (--probe-lr for the probe) or a larger --tau")
            record = plain({
                **identity, "final": final, "history": run.history,
                "environment": environment(device, run.model.in_bfloat16),
                "data": {"sha256": identity["data"], "train": len(data.train_labels), "test": len(data.test_labels)},
                "timing": {"seconds": run.seconds + time.perf_counter() - began}})
            record["sha256"] = record_sha256(record)
            write_whole(record_path, (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
        show(record, record_path)
        return record


def start(config: Config, data: Data, device: torch.device, checkpoint: Path, identity: dict) -> Run:
    """The run as its checkpoint left it; else as its seed draws it, with the untrained network's metrics."""
    N, began = len(data.train_images), time.perf_counter()
    say(f"{cell_prefix(config.loss, config.tau)}, {data.name} ({N:,} training images), preset {config.preset}, seed "
        f"{config.seed}: {config.epochs} epochs on {device}, threads: {torch.get_num_threads()}")
    model, optimiser = make_model(config, device)
    saved = load_checkpoint(checkpoint) if checkpoint.exists() else None
    if checkpoint.exists() and not saved:  # kept, as too little memory may look like damage
        checkpoint.replace(checkpoint.with_suffix(".damaged"))
    if saved:
        refuse_other(checkpoint, saved, identity)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        bank = MemoryBank(N, config.dim, config.bank_momentum, saved["bank"], device=device)
        bank.rows = saved["bank"].to(device)  # to the bit: normalising again could move the last digit
        say(f"going on from {checkpoint}: {saved['step']} steps done")
        kept = ("untrained", "step", "history", "seconds", "evaluation")
        return Run(model, optimiser, bank, saved["losses"].to(device), **{key: saved[key] for key in kept})
    init = centre_head(model, data.train_images, config) if config.bank_init == "embeddings" else "random"
    bank = MemoryBank(N, config.dim, config.bank_momentum, init, generator(config.seed, "bank"), device)
    say("evaluating the untrained network")
    untrained = evaluate(model, data, config)
    seconds = time.perf_counter() - began
    # One tensor for an epoch's losses: thousands of small ones would fragment the memory.
    losses = torch.zeros(math.ceil(N / config.batch_size), device=device)
    return Run(model, optimiser, bank, losses, untrained, seconds=seconds, evaluation=seconds)


CHECKPOINT_SECONDS = 60.0  # between two checkpoints: so much work may be lost when the process ends


def fit(run: Run, config: Config, data: Data, checkpoint: Path, identity: dict) -> None:
    """The training loop: one flat pass over the steps that are not done yet."""
    N, steps = len(data.train_images), len(run.losses)  # steps of an epoch
    first, last, spent = run.step, config.epochs * steps, run.seconds
    began = saved = time.perf_counter()
    with tqdm(total=last, initial=first, leave=False, disable=None, unit="step") as bar:
        for step in range(first, last):
            epoch, batch = divmod(step, steps)
            if step == first or batch == 0:
                order = torch.randperm(N, generator=generator(config.seed, "order", epoch))
                order = order.to(data.train_images.device).split(config.batch_size)
            for group in run.optimiser.param_groups:
                group["lr"] = learning_rate(config, epoch + batch / steps)
            draws = generator(config.seed, "views", epoch, batch)
            drawn = draw_augmentation(len(order[batch]), draws, config.size, config.flip)
            run.losses[batch] = train_step(run.model, run.bank, run.optimiser, data.train_images, order[batch], drawn,
                                           config)
            run.step += 1
            bar.update()
            if batch == steps - 1:
                line = end_epoch(run, config, data)
                pace = (time.perf_counter() - began) / (run.step - first)  # seconds a step, since the process began
                left = duration((last - run.step) * pace + run.evaluation)
                say(f"epoch {epoch + 1:4}/{config.epochs}{line}  {N / steps / pace:5.0f} images/s  {left} left")
            run.seconds = spent + time.perf_counter() - began
            if run.step == last or time.perf_counter() - saved > CHECKPOINT_SECONDS:
                save_checkpoint(checkpoint, run, identity)
                saved = time.perf_counter()


def train_step(model: nn.Module, bank: MemoryBank, optimiser: torch.optim.Optimizer, images: Tensor, index: Tensor,
               drawn: Augmentation, config: Config) -> Tensor:
    """One step: images -> views -> embeddings -> similarities -> loss -> weights -> bank. Returns the mean loss, ()."""
    # index: (B,), the images of the batch, and so each anchor's own column
    views = normalise(augment(images[index], drawn.to(images.device)))  # (B, 3, size, size)
    z = model(views)  # (B, dim)
    loss = training_loss(config, bank.similarity(z), index).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    # After backward, which needs the old rows, and after the step, as in the authors' code; z is from before it.
    bank.update(index, z.detach())
    return loss.detach()


def training_loss(config: Config, similarity: Tensor, positive: Tensor) -> Tensor:
    """The loss that the config names, (B,)."""
    function, takes = LOSSES[config.loss]
    loss = function(similarity, positive, **{name: getattr(config, name) for name in takes})
    return config.tau * loss if config.match_step else loss


def end_epoch(run: Run, config: Config, data: Data) -> str:
    """Turn the epoch's losses into an entry of the history, and a line for the log. Raises NotFinite."""
    epoch = len(run.history) + 1
    require(run.finite(), f"the loss, the weights or the bank in epoch {epoch}", NotFinite)
    mean = run.losses.cpu().double().mean().item()
    entry = {"epoch": epoch, "loss": mean, "lr": learning_rate(config, epoch - 1)}  # the rate at the epoch's start
    if config.eval_every and epoch % config.eval_every == 0 and epoch < config.epochs:
        _, train_z = embed(run.model, data.train_images)
        _, test_z = embed(run.model, data.test_images)
        entry |= compare(train_z, data.train_labels, test_z, data.test_labels)  # nothing is chosen by it
    run.history.append(entry)
    return "".join(f"  {key} {value:.5g}" for key, value in entry.items() if key != "epoch")


def in_bfloat16(config: Config, device: torch.device) -> bool:
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bfloat16" or (config.precision == "auto" and native)


def make_model(config: Config, device: torch.device) -> tuple[ResNet18, torch.optim.SGD]:
    """The network as its seed draws it, the same on every device, and its optimiser."""
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU, so that all devices start alike
        torch.default_generator.manual_seed(generator(config.seed, "network").initial_seed())
        model = ResNet18(config.width, config.dim, in_bfloat16(config, device))
    model = model.to(device, memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum,
                                  weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda"))


@torch.no_grad()
def centre_head(model: ResNet18, images: Tensor, config: Config) -> Tensor:
    """Set the head's bias so that its untrained outputs have zero mean; return them, (N, dim), not normalised.

    An untrained network maps all images into one narrow cone (similarity 0.99). Losses that push all negatives alike
    hardly leave it; from zero mean they need not. The pass over augmented views, in training mode, also sets batch
    normalisation's running statistics.
    """
    outputs = []
    for step, batch in enumerate(images.split(config.batch_size)):
        drawn = draw_augmentation(len(batch), generator(config.seed, "centre", step), config.size, config.flip)
        outputs.append(model.project(model.features(normalise(augment(batch, drawn.to(images.device))))))
    outputs = torch.cat(outputs)
    mean = outputs.mean(dim=0)
    model.head.bias -= mean
    return outputs - mean


@torch.no_grad()
def embed(model: ResNet18, images: Tensor, view: Callable = lambda x: x.float() / 255) -> tuple[Tensor, Tensor]:
    """Features h (n, 8·width) and embeddings z (n, dim) of a view of each image (the plain image), in evaluation mode.

    images: uint8 (n, 3, s, s); view: from uint8 to float32 in [0, 1]. Raises ValueError for other images.
    """
    check_images(images)
    training = model.training
    model.eval()
    parts = [model.features(normalise(view(batch))) for batch in images.split(256)]
    z = torch.cat([F.normalize(model.project(part), dim=1) for part in parts])
    model.train(training)
    h = torch.cat(parts)
    return (h.cpu(), z.cpu()) if images.device.type == "mps" else (h, z)  # MPS lacks the metrics' float64


def compare(train_z: Tensor, train_y: Tensor, test_z: Tensor, test_y: Tensor) -> dict:
    """The metrics that need no probe: kNN from training to test images; uniformity and tolerance of test images."""
    train_y, test_y = train_y.to(train_z.device), test_y.to(test_z.device)
    return {"knn": knn_accuracy(train_z, train_y, test_z, test_y), "uniformity": uniformity(test_z),
            "tolerance": tolerance(test_z, test_y)}


def evaluate(model: ResNet18, data: Data, config: Config) -> dict:
    """All metrics: uniformity and tolerance on plain test images, alignment on two augmented views of each, the profile
    of each plain image against one augmented view of all. `accuracy` is the linear probe's on the test set after its
    last epoch, trained on plain and mirrored training images; `accuracy_heldout` that of a probe that sees four fifths
    of the training labels, on the other fifth, plain: the number to choose a tau by."""
    train_h, train_z = embed(model, data.train_images)
    mirror_h, _ = embed(model, data.train_images.flip(-1))
    test_h, test_z = embed(model, data.test_images)
    train_y, test_y = data.train_labels.to(train_h.device), data.test_labels.to(test_h.device)
    views = []
    for name in ("view 1", "view 2"):
        draws = generator(config.seed, name)
        view = lambda x: augment(x, draw_augmentation(len(x), draws, x.shape[-1]).to(x.device))
        views.append(embed(model, data.test_images, view)[1])
    h = torch.stack([train_h, mirror_h])  # (2, N, 8·width)
    order = balanced_order(data.train_labels.cpu(), seed=1).to(h.device)
    kept, held_out = order[len(order) // 5:], order[:len(order) // 5]
    probe = functools.partial(linear_probe, lr=config.probe_lr, seed=config.seed)
    return {
        **compare(train_z, train_y, test_z, test_y),
        "accuracy": probe(h, train_y, test_h, test_y),
        "accuracy_heldout": probe(h[:, kept], train_y[kept], train_h[held_out], train_y[held_out]),
        "alignment": alignment(*views),
        "profile": similarity_profile(test_z, views[0], torch.arange(len(test_z), device=test_z.device)).tolist(),
    }


def take_subset(data: Data, config: Config) -> Data:
    """The images in class-balanced order, the same for every seed; the first of them where the config wants fewer."""
    train = balanced_order(data.train_labels)[:config.subset]
    test = balanced_order(data.test_labels)[:config.test_subset]
    require(min(len(train), len(test)) >= 10, f"{data.name} has too few images: at least 10 are needed", BadInput)
    return Data(data.name, data.train_images[train], data.train_labels[train],
                data.test_images[test], data.test_labels[test])


def pick_device(name: str) -> torch.device:
    """The device of that name; auto: cuda, else mps, else cpu. Raises BadInput where it can't be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise BadInput(f"device {name!r} can't be used: {str(error).splitlines()[0]}")


def save_checkpoint(path: Path, run: Run, identity: dict) -> None:
    """Write all of the run, for `load_checkpoint`. What is not finite is not saved: a good checkpoint stays."""
    if run.finite():
        buffer = io.BytesIO()
        torch.save({**identity, **vars(run), "model": run.model.state_dict(), "optimiser": run.optimiser.state_dict(),
                    "bank": run.bank.rows}, buffer)
        write_whole(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict | None:
    """What a run saved, on the CPU; None, and a line that says so, where the file is damaged."""
    content = Path(path).read_bytes()  # an error in reading it is no damage
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:  # what torch.save writes; torch.load checks no checksum
            require(not file.testzip(), "a checksum")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        needed = {"config", "data", "protocol_version", *(field.name for field in dataclasses.fields(Run))}
        require(needed <= state.keys(), "not a checkpoint")
        return state
    except MemoryError:
        raise
    except Exception:  # zipfile and torch.load raise many kinds on a damaged file
        say(f"the checkpoint {path} is damaged: it is not used")


def refuse_other(path: Path, found: dict, wanted: dict) -> None:
    """Raise BadInput, naming what differs, where a record or checkpoint is of another config, data or version. A record
    may be of `shapes` that another kind of CPU rounded differently."""
    there, here = ({**run["config"], "version": run["protocol_version"], "data": run["data"]}
                   for run in (found, wanted))
    if isinstance(found["data"], dict):  # a record; a checkpoint holds the hash alone
        there["data"] = here["data"] if here["dataset"] == "shapes" else found["data"]["sha256"]
    for key in sorted(there.keys() | here.keys()):
        require(plain(there.get(key)) == here.get(key),
                f"{path} is of another run: {key} is {there.get(key)} there, {here.get(key)} here; move it away, or "
                "give another --results and --runs", BadInput)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under another name in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted while a run lasts
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Raise BadInput where nothing can be written into it: now, not after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"cannot write into {folder}: {error.strerror}")


def lock(path: Path) -> filelock.AcquireReturnProxy:
    """Hold the lock of that name, in a `with`; it goes with the process, however that ends. Raises Busy."""
    try:
        return filelock.FileLock(path, timeout=0).acquire()
    except filelock.Timeout:
        raise Busy(f"another process is at work on this run (it holds {path})")


# ── 7  RECORD AND COMMAND ──────────────────────────────────────────────────────────────── paper, section 5, Table 1 ──

# The paper's Table 1, without ImageNet-100 (ResNet-50): linear accuracy in %, uniformity and tolerance of each cell.
CELLS = (("contrastive", 0.07), ("contrastive", 0.3), ("contrastive", 0.7), ("contrastive", 1.0), ("simple", None),
         ("hard", 0.07), ("hard", 0.3), ("hard", 0.7), ("hard", 1.0), ("hard-simple", None))
TABLE_1 = {
    "cifar10": [(79.75, 83.27, 82.69, 82.21, 74.83, 79.2, 83.63, 84.19, 84.19, 84.84),
                (3.86, 3.60, 3.17, 2.96, 1.68, 3.88, 3.89, 3.87, 3.86, 3.85),
                (0.04, 0.178, 0.333, 0.372, 0.61, 0.034, 0.0267, 0.030, 0.030, 0.030)],
    "cifar100": [(51.82, 56.44, 50.99, 48.33, 39.31, 50.77, 56.55, 57.54, 56.77, 55.71),
                 (3.86, 3.60, 3.18, 2.96, 2.12, 3.87, 3.88, 3.87, 3.86, 3.86),
                 (0.10, 0.269, 0.331, 0.343, 0.39, 0.088, 0.124, 0.158, 0.172, 0.174)],
    "svhn": [(92.55, 95.47, 94.17, 92.07, 70.83, 91.82, 94.79, 95.02, 95.26, 94.99),
             (3.88, 3.65, 3.27, 3.05, 1.50, 3.89, 3.91, 3.90, 3.88, 3.85),
             (0.032, 0.137, 0.186, 0.197, 0.074, 0.025, 0.021, 0.021, 0.023, 0.026)],
}
PAPER = {dataset: dict(zip(CELLS, zip(*columns))) for dataset, columns in TABLE_1.items()}
# What the authors published beside it: linear accuracy of the ordinary loss at more temperatures (of Fig. 9).
PAPER_ACCURACY = {
    "cifar10": {0.05: 76.10, 0.1: 81.82, 0.2: 83.78, 0.4: 83.22, 0.5: 82.54, 0.6: 82.97, 0.8: 82.67, 0.9: 81.97},
    "cifar100": {0.05: 49.80, 0.1: 52.46, 0.2: 56.05, 0.4: 55.47, 0.5: 54.17, 0.6: 53.05, 0.8: 50.08},
}
TABULATED = ("accuracy", "uniformity", "tolerance")


def paper_values(dataset: str, loss: str, tau: float | None) -> dict[str, float | None]:
    """The paper's accuracy, uniformity and tolerance of a cell (a row of its table), None for what it lacks; a folder
    called cifar10-… is put beside CIFAR-10."""
    dataset = dataset.split("-")[0]
    more = PAPER_ACCURACY.get(dataset, {}).get(tau) if loss == "contrastive" else None
    return dict(zip(TABULATED, PAPER.get(dataset, {}).get((loss, tau), (more, None, None))))


def cell_prefix(loss: str, tau: float | None) -> str:
    return loss + (f"_tau{tau!r}" if tau else "")


def cell_path(config: Config, dataset: str) -> Path:
    """<preset>/<dataset>/<loss>[_tau<tau>][_<field>-<value>…]_seed<k>: each setting that departs from the preset is in
    the name, so that no run can stand where another belongs. Raises BadInput where that is too long for a file."""
    same = {field: getattr(config, field) for field in ("loss", "tau", "seed", "dataset")}
    usual = make_config(config.preset, **same).study()
    name = cell_prefix(config.loss, config.tau)
    for field, value in config.study().items():
        if value != usual[field]:
            name += f"_{field}-{'-'.join(map(str, value)) if isinstance(value, tuple) else value}"
    require(len(name) < 181, f"too many settings depart from the preset for a file name: {name}", BadInput)
    return Path(config.preset) / dataset / f"{name}_seed{config.seed}"


def plain(value):
    """The value as JSON has it: lists for tuples, null for NaN and infinities."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record_sha256(record: dict) -> str:
    """Hash of the record without timing and environment (nor an old record's picture): equal for equal runs, and an
    edit by hand shows."""
    rest = {key: value for key, value in record.items() if key not in ("sha256", "timing", "environment", "tsne")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> dict:
    """A record that is whole. Raises BadInput for one that is broken or was edited."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        require(record["sha256"] == record_sha256(record), "sha256")
        alpha = record["config"].pop("alpha", None)  # in old records: k as a share of the training images
        if alpha is not None:
            record["config"]["k"] = max(1, int(alpha * record["data"]["train"]))
        return record
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadInput(f"{path} is broken or was edited: remove it, or run with --force (its sha256 does not fit)")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}")


try:
    SOURCE_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
except (NameError, OSError):  # pasted into a notebook, or in a zip
    SOURCE_SHA256 = None


def environment(device: torch.device, bfloat16: bool) -> dict:
    """Where a run was made; ended, if it was resumed. On CPUs digits agree where cpu, ONEDNN_MAX_CPU_ISA, threads and
    torch do; on GPUs they may differ."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere what Python knows
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "device": f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else name,
        "cpu": cpu[1] if cpu else platform.processor(), "platform": f"{platform.system()} {platform.machine()}",
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT"), "threads": torch.get_num_threads(),
        "precision": "bfloat16" if bfloat16 else "float32", "python": platform.python_version(),
        "torch": torch.__version__, "torchvision": torchvision.__version__, "source_sha256": SOURCE_SHA256}


MEANING = {"accuracy": "linear probe, last epoch, %", "knn": "200 nearest, %", "uniformity": "larger = more uniform",
           "tolerance": "mean similarity in a class", "alignment": "mean squared distance of two views"}


def show(record: dict, path: Path) -> None:
    """The result, beside the paper's where the paper has that cell."""
    config, final = record["config"], record["final"]
    paper = paper_values(config["dataset"], config["loss"], config["tau"])
    say(f"{'':12}{'ours':>9}{'paper':>9}{'untrained':>12}")
    for key, what in MEANING.items():
        ours, before = ("-" if metrics.get(key) is None else f"{metrics[key]:.{2 if '%' in what else 3}f}"
                        for metrics in (final, final["untrained"]))
        say(f"{key:12}{ours:>9}{paper.get(key) or '-':>9}{before:>12}  {what}")
    say(f"preset {config['preset']}, {config['dataset']}: {record['data']['train']:,} training images, "
        f"{config['epochs']} epochs{'; the paper: all images, 200 epochs' if any(paper.values()) else ''}")
    say(f"record: {path}")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


DESCRIPTION = (__doc__ or "").split("Read from")[0].strip()


class Parser(argparse.ArgumentParser):
    """A flag for each field of Config, with its help: the paper's protocol as a table. Errors are BadInput."""

    def __init__(self, name: str = "ctl.py", description: str = DESCRIPTION):
        super().__init__(prog=name, allow_abbrev=False, description=description,
                         formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message: str):
        raise BadInput(f"{message} (--help lists all settings)")

    def add_settings(self) -> None:
        groups = {True: self.add_argument_group("the study: meaning; value in each preset; source"),
                  False: self.add_argument_group("where it runs")}
        for field in dataclasses.fields(Config):
            kind, choices = field.metadata["kind"], field.metadata["choices"]
            values = {preset: filled.get(field.name, field.default) for preset, filled in PRESETS.items()}
            shown = [str(field.default)] if len(set(values.values())) == 1 else [f"{p} {v}" for p, v in values.items()]
            source = "; ".join(filter(None, (", ".join(shown), field.metadata["source"])))
            options = dict(help=f"{field.metadata['words']}\n[{source}]", default=argparse.SUPPRESS)
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                options |= dict(type=kind, choices=choices, metavar="|".join(choices or ()) or kind.__name__.upper())
            if isinstance(field.default, tuple):
                options["nargs"] = "*"
            groups[field.metadata["study"]].add_argument("--" + field.name.replace("_", "-"), **options)


def settle(given: dict) -> Config:
    """The config of a command line. Where it names no preset, choose one and say which."""
    if "preset" not in given:
        gpu = pick_device(given.get("device", "auto")).type == "cuda"
        given = {**given, "preset": "paper" if gpu else "mini"}
        say(f"no preset given: {'paper' if gpu else 'mini, as there is no CUDA GPU (paper is its whole protocol)'}")
    return make_config(**given)


def one_line(name: str, work: Callable, *arguments) -> int:
    """Do the work. Returns the exit status: 0 done, 1 failed, 2 wrong use or bad input, 3 another process is at work on
    the run, 130 interrupted. What went wrong is one line on standard error."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed
            setattr(sys, stream, open(os.devnull, "w"))
        elif hasattr(getattr(sys, stream), "reconfigure"):
            getattr(sys, stream).reconfigure(errors="replace")  # where a terminal has no "…"
    try:
        work(*arguments)
        return 0
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except Stop as stop:
        words, status = str(stop), stop.status
    except KeyboardInterrupt:
        words, status = "interrupted; the same command goes on from the last checkpoint, if there is one", 130
    except OSError as error:
        words, status = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1
    except (NotFinite, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        words, status = f"{type(error).__name__}: {error}", 1
    print(f"{name}: {' '.join(words.split())}", file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status, see `one_line`."""
    def work() -> None:
        parser = Parser()
        parser.add_settings()
        train(settle(vars(parser.parse_args(argv))))

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # a caller's own may be another
    try:
        return one_line("ctl.py", work)
    finally:
        torch.set_default_dtype(dtype)


if __name__ == "__main__":
    sys.exit(main())
