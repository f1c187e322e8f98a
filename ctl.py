#!/usr/bin/env python3
"""Understanding the Behaviour of Contrastive Loss (Wang & Liu, CVPR 2021), reproduced in one file.

    python ctl.py --tau 0.3          # train at one temperature, evaluate, put the result beside the paper's
    python ctl.py --report           # the table of everything that was measured so far
    python ctl.py --help             # every setting with its meaning, its value in each preset, and its source

What the paper says. The contrastive loss pulls an image towards its own view and pushes it from all the others,
and it pushes the nearest of them hardest; the temperature tau says by how much. At small tau only the nearest
negatives count: features spread evenly over the sphere (uniformity), and images that are alike are torn apart.
At large tau all negatives count alike: images that are alike may stay together (tolerance), and the sphere is
filled less evenly. No tau gives both: the uniformity-tolerance dilemma.

Reading order, the paper's subject first and the plumbing last:

    1 Loss       Eqs. 1-9: the losses, their gradients in closed form
    2 Metrics    Eqs. 10, 11, Fig. 8, kNN and the linear probe
    3 Memory     the bank of all N embeddings that an image is compared with
    4 Network    ResNet-18 for 32x32 images
    5 Data       CIFAR, SVHN, a folder of images, or shapes made by code; and the augmentation
    6 Training   the settings, one flat loop, evaluation, checkpoints; what a step costs
    7 Results    the record of a run; tables beside the paper's, verdicts on its claims, figures
    8 Command    main()

Shapes are written (B, N): B images of a batch (the anchors) against all N training images.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import math
import numbers
import os
import platform
import re
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads, which takes seconds: no traceback

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: there two runs of one cell are not kept apart, and memory is not measured
    fcntl = resource = None

SOURCE_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # now: the file may be edited while a run lasts
PROTOCOL_VERSION = 1  # goes up when the same settings would give other results; versions are never averaged


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ 1  LOSS                                                               paper, section 3, Eqs. 1-9 │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
#
# Everything here is a function of s_ij = f(x_i)·g(x_j), the similarity of anchor i with training image j.
# With d_ij = s_ij - s_ii, how far j is ahead of anchor i's own image, the paper's losses are three ways to
# take the "typical" d of a row, from the hardest negative alone to all of them alike:
#
#     triplet       max_j d_ij                    tau -> 0         (Eq. 6 times tau)
#     contrastive   log sum_j exp(d_ij / tau)     any tau          (Eq. 1)
#     simple        mean_j d_ij                   tau -> infinity  (Eq. 7 times tau, less its constant)
#
# The sums run over all columns: the positive is one of them, with d_ii = 0. The hard losses (Eq. 9) keep the
# positive and the k largest of the others.


class NotFinite(ValueError):
    """A similarity, an embedding or a weight is NaN or infinite."""


def contrastive_loss(similarity: Tensor, positive: Tensor, tau: float, k: int | None = None) -> Tensor:
    """The contrastive loss of each anchor, Eq. 1; with k the hard contrastive loss, Eq. 9.

    similarity: (B, N) floating point, s_ij in [-1, 1] (any finite values will do).
    positive: (B,) int64, the column of each anchor's own image. tau: the temperature, > 0.
    k: keep only the k nearest negatives (all where there are fewer; ties at place k as `topk` breaks them).
    Returns (B,), in [0, log N + 2/tau] for |s| <= 1. Raises ValueError where an argument is wrong (values are looked at on
    the CPU only).

    >>> s = torch.tensor([[0.9, 0.5, -0.2]])
    >>> round(contrastive_loss(s, torch.tensor([0]), tau=0.1).item(), 6)  # log(1 + e^-4 + e^-11)
    0.018166
    """
    s_ii = _positive_similarity(similarity, positive, tau, k)  # (B, 1)
    if k is not None:
        similarity = torch.cat([s_ii, nearest_negatives(similarity, positive, k)[0]], dim=1)  # (B, 1 + k)
    # Eq. 1: L = -log[ exp(s_ii/tau) / sum_k exp(s_ik/tau) ] = log sum_k exp((s_ik - s_ii)/tau)
    return torch.logsumexp((similarity - s_ii).div_(tau), dim=1)  # in place: (B, N) may be large


def simple_loss(similarity: Tensor, positive: Tensor, k: int | None = None) -> Tensor:
    """The simple loss of each anchor: Eq. 3, weighted as in Eq. 7; with k the hard simple loss.

    Arguments as in `contrastive_loss`. Returns (B,), in (-2, 2) for |s| <= 1; the minimum is negative.
    Raises ValueError where an argument is wrong.

    >>> simple_loss(torch.tensor([[1.0, 0.5, -0.9]]), torch.tensor([0])).item()  # -2/3 · 1 + 1/3 · (0.5 - 0.9)
    -0.800000011920929
    """
    s_ii = _positive_similarity(similarity, positive, k=k)
    if k is not None:
        similarity = torch.cat([s_ii, nearest_negatives(similarity, positive, k)[0]], dim=1)
    # Eq. 7 · tau - constant: -(n-1)/n · s_ii + 1/n · sum_{kept negatives} s_ij, with n = 1 + (negatives kept)
    return (similarity - s_ii).mean(dim=1)


def triplet_loss(similarity: Tensor, positive: Tensor) -> Tensor:
    """What tau · (contrastive loss) tends to as tau -> 0: a triplet loss without margin, Eq. 6 times tau.

    similarity, positive: as in `contrastive_loss`. Returns (B,), in [0, 2] for |s| <= 1: 0 where the positive is
    nearest. Where several negatives are nearest they share the gradient. Raises ValueError where an argument is wrong.
    """
    s_ii = _positive_similarity(similarity, positive)
    # Eq. 6 · tau: max(s_max - s_ii, 0); the positive's own column gives the 0
    return (similarity - s_ii).amax(dim=1)


def loss_gradient(similarity: Tensor, positive: Tensor, tau: float, k: int | None = None) -> Tensor:
    """The gradient of `contrastive_loss` with respect to the similarities, in closed form: Eq. 4. For readers and tests:
    training takes it by autograd.

    Arguments and errors as in `contrastive_loss`. Returns (B, N): in [0, 1/tau] at the negatives, in [-1/tau, 0] at
    the positive, 0 at negatives that k drops. Each row sums to 0.
    """
    s_ii = _positive_similarity(similarity, positive, tau, k)
    kept = _negatives(similarity, positive, k).scatter(1, positive[:, None], s_ii)  # (B, N)
    # Eq. 2: P_ij = exp(s_ij/tau) / sum_k exp(s_ik/tau), here at the negatives
    P = torch.softmax(kept / tau, dim=1).scatter(1, positive[:, None], 0.0)
    # Eq. 4: dL/ds_ij = P_ij / tau and dL/ds_ii = -(1/tau) sum_{k != i} P_ik, which is exact where P_ii - 1 would cancel
    return P.scatter(1, positive[:, None], -P.sum(dim=1, keepdim=True)) / tau


def relative_penalty(similarity: Tensor, positive: Tensor, tau: float, k: int | None = None) -> Tensor:
    """How the push on an anchor is shared among its negatives, Eq. 5 (Eq. 8 with k): a Boltzmann distribution.

    Arguments and errors as in `contrastive_loss`. Returns (B, N), in [0, 1], each row summing to 1 (to 0 where there is
    no negative, N = 1); 0 at the positive, whose similarity does not matter, and at negatives that k drops.
    """
    _positive_similarity(similarity, positive, tau, k)
    # Eq. 5: r_i(s_ij) = exp(s_ij/tau) / sum_{k != i} exp(s_ik/tau)
    r = torch.softmax(_negatives(similarity, positive, k) / tau, dim=1)
    return r.scatter(1, positive[:, None], 0.0)


def nearest_negatives(similarity: Tensor, positive: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest negatives of each anchor, Eq. 8: similarities and columns, (B, min(k, N - 1)), in no order."""
    hidden = similarity.scatter(1, positive[:, None], -torch.inf)  # the positive is never among them
    return hidden.topk(min(k, similarity.shape[1] - 1), dim=1, sorted=False)


def _negatives(similarity: Tensor, positive: Tensor, k: int | None) -> Tensor:
    """(B, N): similarity with -inf at the positive and at the negatives that k drops."""
    if k is None:
        return similarity.scatter(1, positive[:, None], -torch.inf)
    values, columns = nearest_negatives(similarity, positive, k)
    return torch.full_like(similarity, -torch.inf).scatter(1, columns, values)


def _positive_similarity(similarity, positive, tau=1.0, k=None) -> Tensor:
    """s_ii, as a column (B, 1), once the arguments are found right."""
    if similarity.ndim != 2 or similarity.shape[1] == 0 or not similarity.is_floating_point():
        raise ValueError(f"similarity must be (B, N) floating point with N >= 1, not {_describe(similarity)}")
    if positive.dtype != torch.int64 or positive.shape != similarity.shape[:1]:
        raise ValueError(f"positive must be int64 of shape ({len(similarity)},), not {_describe(positive)}")
    if positive.device != similarity.device:
        raise ValueError(f"positive is on {positive.device}, similarity on {similarity.device}")
    if isinstance(tau, bool) or not isinstance(tau, numbers.Real) or not 0 < tau < math.inf:
        raise ValueError(f"tau must be a finite number above 0, not {tau!r}")
    if tau < torch.finfo(similarity.dtype).tiny:
        raise ValueError(f"tau {tau!r} is 0 in {similarity.dtype}: take a larger one")
    if k is not None and (isinstance(k, bool) or not isinstance(k, numbers.Integral) or k < 1):
        raise ValueError(f"k must be a whole number, at least 1, not {k!r}")
    # Values are looked at on the CPU alone: on a GPU a look would make it wait.
    if similarity.device.type == "cpu" and not torch.compiler.is_compiling():
        if len(positive) and not 0 <= positive.min() <= positive.max() < similarity.shape[1]:
            raise ValueError(f"positive must lie in 0..{similarity.shape[1] - 1}, the columns of similarity")
        if not similarity.isfinite().all():
            raise NotFinite("similarity holds NaN or infinity")
    return similarity.gather(1, positive[:, None])


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ 2  METRICS                                          paper, sections 4 and 5.1, Eqs. 10-11, Fig. 8 │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘
#
# z: (n, dim) unit vectors, what the loss sees. h: (n, features), what the linear probe sees.
# All are exact. What looks at every pair goes a block of rows at a time: 10,000 embeddings need less than 200 MiB.

ROWS = 1024  # rows of a block


def uniformity(z: Tensor, t: float = 2.0) -> float:
    """How evenly embeddings fill the sphere: -L_uniformity of Eq. 10, over the pairs i < j.

    z: (n, dim) unit vectors. Returns a value in [0, 4t]: 0 if all are equal, larger = more uniform (3.94 for many
    vectors spread evenly over the sphere in 128 dimensions, at t = 2); nan for fewer than two vectors, inf where every
    term underflows (a huge t). Raises ValueError for other vectors.
    """
    _unit_vectors(z=z)
    n, total = len(z), 0.0
    if n < 2:
        return math.nan
    for i in range(0, n, ROWS):
        s = z[i:i + ROWS] @ z[i:].T  # (b, n - i)
        # |z_i - z_j|² = 2 - 2 s_ij for unit vectors, so exp(-t |z_i - z_j|²) = exp(2t (s_ij - 1))
        total += torch.exp(2 * t * (s - 1)).triu(1).sum(dtype=torch.float64).item()
    # Eq. 10: L_uniformity = log E exp(-t |f(x) - f(y)|²)
    return -math.log(total / (n * (n - 1) / 2)) if total else math.inf


def tolerance(z: Tensor, labels: Tensor) -> float:
    """Mean similarity of two samples of the same class: Eq. 11 as the paper's text and table mean it, over pairs i < j.

    z: (n, dim) unit vectors; labels: (n,) integers. Returns a value in [-1, 1]; nan where no class has two samples.
    Raises ValueError for other vectors or labels. (Eq. 11 as printed averages over *all* pairs, 0 where classes
    differ: with 100 classes that could not exceed 0.01, and Table 1 has 0.39.)
    """
    _unit_vectors(z=z)
    if labels.shape != z.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be integers of shape ({len(z)},), not {_describe(labels)}")
    _, label, count = labels.unique(return_inverse=True, return_counts=True)
    z = z.double()
    S = z.new_zeros(len(count), z.shape[1]).index_add(0, label, z)  # S_c: the sum of class c's vectors
    # The pairs of class c, in either order and without self-pairs, add up to |S_c|² - sum_i |z_i|².
    pairs = (count * (count - 1)).sum().item()
    return ((S.square().sum() - z.square().sum()) / pairs).item() if pairs else math.nan


def alignment(z1: Tensor, z2: Tensor) -> float:
    """Mean squared distance of the two views of each image (Wang & Isola, ICML 2020, with exponent 2).

    z1, z2: (n, dim) unit vectors, row i of both from image i. Returns a value in [0, 4], 0 if views do not matter.
    Raises ValueError for other vectors.
    """
    _unit_vectors(z1=z1, z2=z2)
    if z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have one shape, not {tuple(z1.shape)} and {tuple(z2.shape)}")
    return (z1.double() - z2.double()).square().sum(dim=1).mean().item()


def similarity_profile(z: Tensor, bank_or_z2: Tensor, positive: Tensor, top: int = 10) -> Tensor:
    """Mean similarity of the positive, then of the nearest, second nearest, … negative: a panel of Fig. 8.

    z: (n, dim) unit vectors, the anchors. bank_or_z2: (m, dim) unit vectors to compare with, row `positive[i]` being
    anchor i's own. Returns (1 + top,) float64 on the CPU, in [-1, 1]; nan where there are fewer negatives than that.
    Raises ValueError for other vectors.
    """
    _unit_vectors(z=z, bank_or_z2=bank_or_z2)
    if positive.shape != z.shape[:1]:
        raise ValueError(f"positive must be int64 of shape ({len(z)},), not {_describe(positive)}")
    kept = min(top, len(bank_or_z2) - 1)
    total = torch.zeros(1 + kept, dtype=torch.float64)
    for rows, own in zip(z.split(ROWS), positive.split(ROWS)):
        s = rows @ bank_or_z2.T  # (b, m)
        s_ii = _positive_similarity(s, own)
        negatives = nearest_negatives(s, own, kept)[0].sort(dim=1, descending=True).values  # (b, kept)
        total += torch.cat([s_ii, negatives], dim=1).sum(dim=0, dtype=torch.float64).cpu()
    return F.pad(total / len(z), (0, top - kept), value=math.nan)


def knn_accuracy(train_z: Tensor, train_y: Tensor, test_z: Tensor, test_y: Tensor,
                 k: int = 200, temperature: float = 0.07) -> float:
    """Percent of test images whose k nearest training images vote for their class, with weights exp(s/temperature).

    train_z, test_z: (n, dim), (m, dim) unit vectors; train_y, test_y: (n,), (m,) int64 classes from 0. All n vote
    where n < k. The protocol is the authors' (Wu et al., CVPR 2018). Raises ValueError for other vectors.
    """
    _unit_vectors(train_z=train_z, test_z=test_z)
    classes, right = 1 + max(train_y.max().item(), test_y.max().item()), 0
    for z, y in zip(test_z.split(ROWS), test_y.split(ROWS)):
        s, neighbour = (z @ train_z.T).topk(min(k, len(train_z)), dim=1)  # (b, k)
        weight = torch.exp((s - 1) / temperature)  # s - 1: scales all votes alike, and can not overflow
        votes = z.new_zeros(len(z), classes).scatter_add(1, train_y[neighbour], weight)
        right += (votes.argmax(dim=1) == y).sum().item()
    return 100 * right / len(test_y)


def linear_probe(train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, epochs: int = 100, lr: float = 30.0,
                 momentum: float = 0.9, milestones: tuple[int, ...] = (40, 60, 80), gamma: float = 0.2,
                 batch_size: int = 256, seed: int = 0) -> float:
    """Percent of test images that a linear classifier on frozen features gets right, after its last epoch.

    train_h: (n, d) features, or (V, n, d) for V views of each image, of which each epoch picks one at random (an
    image and its mirror image: then this is training with random flips). test_h: (m, d). train_y, test_y: int64
    classes from 0. SGD without weight decay, lr · gamma at the milestones (paper, section 5.1; batch, momentum and
    flips from the authors' code, which reports its best epoch on the test set: this reports the last). Raises NotFinite where
    it diverges.
    """
    views = train_h if train_h.ndim == 3 else train_h[None]  # (V, n, d)
    V, n, d = views.shape
    rows = views.reshape(V * n, d)
    classes = 1 + int(max(train_y.max(), test_y.max()))
    layer = nn.utils.skip_init(nn.Linear, d, classes, device=rows.device, dtype=rows.dtype)
    nn.init.zeros_(layer.bias)
    nn.init.zeros_(layer.weight)  # a convex problem: 0 is as good a start, and needs no draw
    optimiser = torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones), gamma)
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(n, generator=random)
        view = torch.randint(V, (n,), generator=random)
        for image, row in zip(order.to(rows.device).split(batch_size), (view * n + order).to(rows.device).split(batch_size)):
            optimiser.zero_grad()
            F.cross_entropy(layer(rows[row]), train_y[image]).backward()
            optimiser.step()
        schedule.step()
    if not (layer.weight.isfinite().all() and layer.bias.isfinite().all()):
        raise NotFinite("the linear probe's weights")
    with torch.no_grad():
        return 100 * (layer(test_h).argmax(dim=1) == test_y).double().mean().item()


def _unit_vectors(**embeddings: Tensor) -> None:
    for name, z in embeddings.items():
        if z.ndim != 2 or not z.is_floating_point():
            raise ValueError(f"{name} must be (n, dim) floating point, not {_describe(z)}")
        if not z.isfinite().all():
            raise NotFinite(f"{name} must be finite, but holds NaN or infinity")
        if not ((torch.linalg.vector_norm(z, dim=1) - 1).abs() < 1e-3).all():
            raise ValueError(f"{name} must hold unit vectors: divide each row by its length first")


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ 3  MEMORY BANK                                                                paper, section 5.1 │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


class MemoryBank:
    """g(x_j) of every training image j: a moving average of its embeddings, a unit row each, (N, dim).

    size: N. momentum: the share of the old row that stays, in [0, 1] (0.5 in the authors' code). init: "random", rows
    drawn evenly from the sphere with `generator`, or the embeddings (N, dim) to begin with. Raises ValueError.
    """

    def __init__(self, size: int, dim: int = 128, momentum: float = 0.5, init: str | Tensor = "random",
                 generator: torch.Generator | None = None, device: torch.device | str = "cpu"):
        if not isinstance(momentum, numbers.Real) or not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], not {momentum!r}")
        rows = torch.randn(size, dim, generator=generator) if isinstance(init, str) and init == "random" else init
        if not isinstance(rows, Tensor) or rows.shape != (size, dim):
            raise ValueError(f'init must be "random" or a tensor of shape ({size}, {dim})')
        if not (rows.isfinite().all() and (rows != 0).any(dim=1).all()):
            raise ValueError("init must hold finite rows, none of them all zeros")
        self.rows = F.normalize(rows.detach().float(), dim=1).to(device)
        self.momentum = momentum

    def similarity(self, z: Tensor) -> Tensor:
        """s_ij = f(x_i)·g(x_j). z: (B, dim). Returns (B, N), float32 whatever the network's precision."""
        return z.float() @ self.rows.T

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor) -> None:
        """Move the rows `index` (B,) towards the embeddings z (B, dim) of the same images, and back to the sphere."""
        old = self.rows[index]
        mixed = self.momentum * old + (1 - self.momentum) * z.float()
        opposite = (mixed == 0).all(dim=1, keepdim=True)  # nothing to normalise: such a row stays
        self.rows[index] = F.normalize(torch.where(opposite, old, mixed), dim=1)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ 4  NETWORK                                                                    paper, section 5.1 │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


class Block(nn.Module):
    """Two 3x3 convolutions and the way around them (He et al., CVPR 2016). (B, channels, s, s) -> (B, out, s/stride, s/stride)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            # Every second pixel, then a convolution of stride 1: the same operation, to the bit, as a strided 1x1 convolution,
            # whose weight gradient writes out of bounds on CPUs where channels are few (uxlfoundation/oneDNN#6035).
            self.shortcut = nn.Sequential(nn.AvgPool2d(1, stride), nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """f(x): ResNet-18 with a 3x3 first convolution of stride 1 and no max-pooling, for images of 32x32.

    x: (B, 3, size, size), normalised. width: channels of the first stage (64 in the paper); dim: of the embedding.
    Convolutions start He-normal (fan-out), the head Xavier-uniform, as in the authors' code.
    """

    def __init__(self, width: int = 64, dim: int = 128):
        super().__init__()
        stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2)]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(*(nn.Sequential(Block(i, o, s), Block(o, o, 1)) for i, o, s in stages))
        self.head = nn.Linear(8 * width, dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        """h, (B, 8·width): the pooled features that the linear probe sees."""
        return self.stages(self.stem(x)).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """z, (B, dim): the embedding, of unit length, in float32 also where the network runs in bfloat16."""
        return F.normalize(self.head(self.features(x)).float(), dim=1)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ 5  DATA                                                                       paper, section 5.1 │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


class Stop(Exception):
    """A run can't go on: one line that says why, and the exit status."""
    status = 1  # the run failed


class BadInput(Stop, ValueError):
    status = 2  # wrong use: arguments, data, a record or checkpoint of another config


class Busy(Stop):
    status = 3  # another process is at work on this cell


class Interrupted(Stop):
    """SIGINT, SIGTERM or SIGHUP; the status is 128 + the signal's number, as shells have it."""


@dataclass
class Data:
    """A dataset whole: images uint8 (n, 3, size, size), labels int64 (n,) from 0."""
    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().view(-1).numpy())
        return digest.hexdigest()


DOWNLOADS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100,
             "svhn": torchvision.datasets.SVHN}


def load_dataset(dataset: str, root: str | Path = "data", size: int = 32) -> Data:
    """The dataset of that name, downloaded into `root` unless it is there; or, for any other name, a folder of images.

    Raises BadInput for data that is missing, broken or out of reach; Stop for a download that broke off.
    """
    if dataset == "shapes":
        return load_shapes(size)
    if dataset in DOWNLOADS:
        return load_download(dataset, Path(root), size)
    return load_folder(Path(dataset), size)


def load_download(name: str, root: Path, size: int = 32) -> Data:
    """CIFAR-10, CIFAR-100 or SVHN through torchvision, which checks the MD5 sums. Files already in `root` are used."""
    if size != 32:
        raise BadInput(f"{name} has images of 32x32: leave --size at 32")
    parts = [{"split": "train"}, {"split": "test"}] if name == "svhn" else [{"train": True}, {"train": False}]

    def read(download: bool) -> Data:
        tensors = []
        for part in parts:
            data = DOWNLOADS[name](root, download=download, **part)
            images = torch.as_tensor(data.data)  # CIFAR: (n, 32, 32, 3); SVHN: (n, 3, 32, 32)
            tensors.append((images if name == "svhn" else images.permute(0, 3, 1, 2)).contiguous())
            tensors.append(torch.as_tensor(data.labels if name == "svhn" else data.targets))
        return Data(name, *tensors)

    try:
        return read(download=False)
    except RuntimeError:
        pass  # not there, or not whole
    timeout = socket.getdefaulttimeout()
    probe_writable(root)
    try:
        with lock(root / ".download.lock", wait=True):  # several runs may start at once
            socket.setdefaulttimeout(30)
            return read(download=True)
    except urllib.error.URLError as error:
        raise BadInput(f"cannot download {name} ({getattr(error, 'reason', error)}): put its files into {root} (--data), "
                       "or name a folder of images or 'shapes' with --dataset")
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise Stop(f"the download of {name} into {root} broke off ({error}): run the command again")
    finally:
        socket.setdefaulttimeout(timeout)


def load_folder(folder: Path, size: int = 32) -> Data:
    """A folder with train/<class>/* and test/<class>/*: images of any size, resized so that the shorter side fits
    (antialiased), the middle square cut out. Classes are numbered as sorted by name, as `train` has them. Raises BadInput."""
    functional = torchvision.transforms.functional

    def read(path: str) -> Tensor:
        try:
            with open(path, "rb") as file:
                image = Image.open(file)
                if image.mode[0] in "IF":
                    raise ValueError("it has more than 8 bits a channel")
                image = image.convert("RGB")
            if image.size != (size, size):
                image = functional.center_crop(functional.resize(image, size), [size, size])
            return functional.pil_to_tensor(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many kinds on a broken file
            raise BadInput(f"cannot read the image {path} ({str(error) or type(error).__name__}): mend or remove it")

    tensors, classes = [], None
    for part in ("train", "test"):
        try:
            files = torchvision.datasets.ImageFolder(folder / part)  # lists, and reads nothing yet
        except OSError as error:
            if not (folder / part).is_dir():
                raise BadInput(f"no folder {folder / part}: a folder of images holds train/<class>/* and test/<class>/*")
            raise BadInput(f"{folder / part}: {str(error).splitlines()[0]}")
        classes = classes or files.class_to_idx
        unknown = sorted(set(files.classes) - set(classes))
        if unknown:
            raise BadInput(f"{folder / part / unknown[0]}: {folder / 'train'} has no class of that name")
        images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
        for image, (path, _) in zip(images, files.samples):
            image.copy_(read(path))
        tensors.append(images)
        tensors.append(torch.tensor([classes[files.classes[label]] for _, label in files.samples]))
    name = folder.resolve().name
    if not name.isprintable() or not 0 < len(name.encode()) <= 100 or set(name) & set("|<>[]()`"):
        raise BadInput(f"{name!a}, the folder's name, stands in tables and file names: rename it, or name a link to it")
    # A folder that is called like a dataset must not stand where the dataset's own records stand.
    return Data(f"{name}-folder" if name in (*DOWNLOADS, "shapes") else name, *tensors)


SHAPES = ("disk", "ring", "crescent", "square", "frame", "triangle", "star", "cross", "bar", "dots")


def load_shapes(size: int = 32, train: int = 4000, test: int = 2000) -> Data:
    """Ten classes of shape, made by code, always the same, up to a pixel that another kind of CPU rounds differently. An image is
    papered with one shape, light and dark pieces in turn, so that a crop of it still shows which, and neither colour nor mean brightness
    tells. All else is nuisance: position, size, rotation, the colours, a texture behind, from coarse to fine, and noise."""
    n, random = train + test, torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=random)

    def loguniform(low: float, high: float) -> Tensor:
        return uniform(math.log(low), math.log(high)).exp()

    labels = torch.arange(n) % len(SHAPES)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1  # pixel centres, in [-1, 1]
    y, x = axis[:, None], axis[None, :]
    # In the frame of the pattern: moved, turned and scaled so that a shape fills about the unit disk, a piece is 2.4 wide.
    angle, radius = uniform(0, 2 * math.pi), loguniform(0.25, 0.65)
    dx, dy = (x - uniform(-1, 1)) / radius, (y - uniform(-1, 1)) / radius
    u, v = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()  # (n, 1, size, size)
    light = 1 - 2 * (((u / 2.4).floor() + (v / 2.4).floor()) % 2)  # 1 and -1, as on a chessboard
    u, v = u % 2.4 - 1.2, v % 2.4 - 1.2
    inside = torch.empty(n, 1, size, size)
    for label, shape in enumerate(SHAPES):
        of_class = labels == label
        inside[of_class] = depth_inside(shape, u[of_class], v[of_class])
    mask = (0.5 + inside * radius * size / 2).clamp(0, 1)  # edges one pixel wide
    saturation = uniform(0, 0.6)
    behind = uniform(0.4, 0.6) + saturation * uniform(-0.5, 0.5, 3)  # (n, 3, 1, 1)
    front = behind + uniform(0.35, 0.45) * light + saturation * uniform(-0.5, 0.5, 3)
    for cells in (2, 4, 8, 16):
        texture = torch.rand(n, 3, cells + 1, cells + 1, generator=random) * 2 - 1
        texture = torch.lerp(texture.mean(dim=1, keepdim=True), texture, uniform(0, 1))  # from grey to coloured
        behind = behind + loguniform(0.02, 0.25) * F.interpolate(texture, size=(size, size), mode="bilinear", align_corners=True)
    images = torch.lerp(behind, front, mask)
    images = images + 0.02 * torch.randn(images.shape, generator=random)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Data("shapes", images[:train], labels[:train], images[train:], labels[train:])


def depth_inside(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """About how far the point (u, v) lies inside the shape's edge; below 0 outside."""
    r, box = torch.hypot(u, v), torch.maximum(u.abs(), v.abs())
    if shape == "disk":
        return 0.85 - r
    if shape == "ring":
        return 0.17 - (r - 0.8).abs()
    if shape == "crescent":
        return torch.minimum(1 - r, torch.hypot(u - 0.5, v) - 0.8)
    if shape == "square":
        return 0.75 - box
    if shape == "frame":
        return 0.15 - (box - 0.7).abs()
    if shape == "triangle":
        return 0.5 - torch.stack([u * math.cos(a) + v * math.sin(a) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]).amax(0)
    if shape == "star":
        fold = (torch.atan2(v, u) % (2 * math.pi / 5) - math.pi / 5).abs() / (math.pi / 5)  # 1 at a tip, 0 between two
        return 0.4 + 0.7 * fold - r
    if shape == "cross":
        return torch.maximum(torch.minimum(1 - u.abs(), 0.27 - v.abs()), torch.minimum(1 - v.abs(), 0.27 - u.abs()))
    if shape == "bar":
        return torch.minimum(1 - u.abs(), 0.3 - v.abs())
    return 0.38 - torch.hypot(u.abs() - 0.62, v)  # dots


def balanced_order(labels: Tensor, seed: int = 0) -> Tensor:
    """The images in a random order in which any first part holds the same number of each class, to within one, as long as
    there are any."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    one_hot = F.one_hot(labels[shuffled])  # (n, classes)
    rank = one_hot.cumsum(0)[torch.arange(len(labels)), labels[shuffled]]  # 1 for the first of a class, 2, …
    return shuffled[rank.argsort(stable=True)]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On a CUDA GPU without waiting; on MPS such a copy may read memory that was freed meanwhile (pytorch#139550)."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


# Augmentation in two parts: what is drawn (on the CPU, so that all devices draw alike), and what is done with it
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
        return Augmentation(*(to_device(value, device) for value in vars(self).values()))


def draw_augmentation(count: int, generator: torch.Generator, size: int = 32, flip: bool = True) -> Augmentation:
    """Draw what to do to `count` images of size x size, by the paper's settings and torchvision's law.

    RandomResizedCrop(size, scale=(0.2, 1)), ColorJitter(0.4, 0.4, 0.4, 0.4), horizontal flip, RandomGrayscale(0.2).
    A crop that does not fit is drawn again, up to ten times in all, then the whole image is taken, as torchvision does.
    """
    def rand(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

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


def augment(images: Tensor, parameters: Augmentation) -> Tensor:
    """Do to each image what was drawn for it, on one device. images: uint8 (B, 3, s, s). Returns float32 (B, 3, s, s) in [0, 1].

    Equal to torchvision's transforms on float images; its PIL pipeline rounds to 256 levels after every step.
    """
    if images.device.type == "cpu" and len(images) > 64:  # on a CPU, parts that stay in its cache are faster
        parts = range(0, len(images), 64)
        return torch.cat([augment(images[i:i + 64], parameters[i:i + 64]) for i in parts])
    a, size = parameters, images.shape[-1]
    top, left, height, width = a.crop.float().unbind(dim=1)
    rows, columns = _resize_weights(top, height, size), _resize_weights(left, width, size)
    columns = torch.where(a.flip[:, None, None], columns.flip(1), columns)
    x = rows[:, None] @ images.float().div_(255)  # (B, 3, size, size)
    x = (x.flatten(1, 2) @ columns.transpose(1, 2)).unflatten(1, (3, size))  # one product an image: its channels share `columns`
    # Brightness, contrast and saturation are one blend, cheap; the hue is dear: it is shifted once, between the
    # blends that come before it and those that come after.
    hue_place = (a.order == HUE).int().argmax(dim=1)
    for place in range(3):
        x = _blend(x, a, place, place < hue_place)
    x = _shift_hue(x, a.factor[:, HUE])
    for place in range(1, 4):
        x = _blend(x, a, place, place > hue_place)
    return torch.where(a.grey[:, None, None, None], _grey(x), x)


def _resize_weights(start: Tensor, length: Tensor, size: int) -> Tensor:
    """(B, size, size): row i holds the weights of the pixels that pixel i of the enlarged crop is made of (bilinear)."""
    pixel = torch.arange(size, device=start.device)
    at = (pixel + 0.5) * (length / size)[:, None] - 0.5  # in the crop; its own pixel centres are 0 … length - 1
    at = start[:, None] + torch.minimum(at.clamp(min=0), length[:, None] - 1)
    return (1 - (at[:, :, None] - pixel).abs()).clamp(min=0)


def _grey(x: Tensor) -> Tensor:
    r, g, b = x.unbind(dim=1)
    return (GREY[0] * r + GREY[1] * g + GREY[2] * b)[:, None]  # (B, 1, s, s)


def _blend(x: Tensor, a: Augmentation, place: int, active: Tensor) -> Tensor:
    """The operation at that place: towards black, the mean grey or the pixel's own grey; nothing where not active."""
    operation = a.order[:, place]
    factor = a.factor.gather(1, operation[:, None])[:, 0]
    operation, factor = operation[:, None, None, None], torch.where(active, factor, 1.0)[:, None, None, None]
    grey = _grey(x)
    towards = torch.where(operation == SATURATION, grey, grey.mean(dim=(2, 3), keepdim=True))
    towards = torch.where(operation == BRIGHTNESS, 0.0, towards)
    return (factor * x).add_((1 - factor) * towards).clamp_(0, 1)  # in place: new memory costs more than the sums


def _shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` (B,), a share of the whole circle, keeping value and chroma (HSV)."""
    r, g, b = x.unbind(dim=1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    c = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == r, (g - b).div_(c), torch.where(value == g, (b - r).div_(c).add_(2), (r - g).div_(c).add_(4)))
    hue += 6 * shift[:, None, None]  # in sixths of the circle
    # HSV to RGB: channel n is V - C · max(0, min(k, 4 - k, 1)) with k = (n + hue) mod 6, and n = 5, 3, 1 for red, green,
    # blue: each falls from V to V - C and rises again, a third of the circle after the one before.
    corner = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = corner + hue[:, None]  # (B, 3, s, s)
    k -= (k / 6).floor_().mul_(6)  # k modulo 6, at a third of what % costs
    share = torch.minimum(k, 4 - k).clamp_(0, 1)
    return share.mul_(chroma[:, None]).neg_().add_(value[:, None])


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, by the authors' code used for every dataset


def normalise(x: Tensor) -> Tensor:
    """Views as the network wants them: the authors' mean and standard deviation, channels last."""
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ 6  TRAINING                                                                   paper, section 5.1 │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘

LOSSES = ("contrastive", "hard", "simple", "hard-simple", "triplet")
WITH_TAU, WITH_K = ("contrastive", "hard"), ("hard", "hard-simple")


def setting(default, help: str, source: str, type=None, choices=None, study: bool = True):
    """A field of Config. study: it is part of what is studied, and so of the record; not where or how fast it runs."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, source=source, type=type or default.__class__, choices=choices, study=study))


@dataclass
class Config:
    """The settings of one run; the defaults are the paper's protocol. Raises BadInput for a setting that is wrong, and for
    one that its loss would ignore."""
    loss: str = setting("contrastive", "which loss", "paper, Eqs. 1, 3, 6, 9", choices=LOSSES)
    tau: float | None = setting(None, "temperature of the losses contrastive and hard; 0.3 if not given",
                                "paper, Table 1: 0.07, 0.3, 0.7, 1.0", float)
    dataset: str = setting("cifar10", "cifar10, cifar100, svhn, shapes, or a folder with train/<class>/* and "
                           "test/<class>/*; not given: cifar10 if it can be had, else shapes", "paper, 5.1")
    preset: str = setting("paper", "fills what the command line leaves open; not given: paper on a GPU, else mini",
                          "paper, 5.1, or our choice", choices=("paper", "narrow", "mini", "quick", "smoke"))
    seed: int = setting(0, "every random draw follows from it", "paper: one run each")
    epochs: int = setting(200, "passes over the training images", "paper, 5.1")
    batch_size: int = setting(128, "images of a step; the last step of an epoch may have fewer", "paper, 5.1")
    size: int = setting(32, "height and width of the images", "paper, 5.1")
    width: int = setting(64, "channels of the first stage of ResNet-18", "paper, 5.1")
    dim: int = setting(128, "dimensions of the embedding", "paper, 5.1")
    lr: float = setting(0.03, "learning rate", "paper, 5.1; mini: by accuracy_heldout (README)")
    momentum: float = setting(0.9, "of SGD", "paper, 5.1")
    weight_decay: float = setting(5e-4, "of SGD, on all parameters", "paper, 5.1")
    schedule: str = setting("step", "of the learning rate: times gamma at the milestones, or cosine to 0", "paper, 5.1",
                            choices=("step", "cosine"))
    milestones: tuple = setting((160, 190), "epochs at which the learning rate falls (step schedule)", "paper, 5.1", int)
    gamma: float = setting(0.1, "factor at each milestone (step schedule)", "paper, 5.1")
    warmup: float = setting(0.0, "epochs over which the learning rate rises from 0", "our choice", float)
    bank_momentum: float = setting(0.5, "share of a bank row that an update keeps", "authors' code")
    bank_init: str = setting("random", "start of the bank: random, or embeddings of one augmented view of each image, "
                             "after centring the head", "random: authors' code, but on the sphere; embeddings: our choice",
                             choices=("random", "embeddings"))
    k: int | None = setting(None, "nearest negatives that the hard losses keep; 4095 if neither k nor alpha is given",
                            "paper, 5.2", int)
    alpha: float | None = setting(None, "the same as a share of the training images, rounded down", "paper, 5.2", float)
    subset: int | None = setting(None, "train on that many images, of each class as many (the same for every seed); a preset's own "
                                 "number means: at most",
                                 "our choice", int)
    test_subset: int | None = setting(None, "test on that many images, of each class as many", "our choice", int)
    flip: bool = setting(True, "horizontal flips in pretraining (evaluation has them always)", "paper, 5.1; the authors' code has none")
    match_step: bool = setting(False, "multiply the loss by tau, so that the step does not grow as 1/tau", "our choice")
    precision: str = setting("auto", "of the network; similarities and loss are float32 always. auto: bfloat16 on a GPU "
                             "that has it, else float32 (a GPU's convolutions may take TF32 for it, as PyTorch chooses)", "our choice",
                             choices=("auto", "float32", "bfloat16"))
    probe_lr: float = setting(30.0, "learning rate of the linear probe; 0.3 does better on the few features of small widths",
                              "paper, 5.1; mini: tuned on training images that it does not use")
    eval_every: int = setting(10, "epochs between two looks at kNN, uniformity and tolerance; 0: none", "our choice")
    device: str = setting("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps, …", "", study=False)
    threads: int | None = setting(None, "of the CPU; as PyTorch chooses if not given", "", int, study=False)
    data: str = setting("data", "folder where downloads are or go", "", study=False)
    results: str = setting("results", "folder for the record", "", study=False)
    runs: str = setting("runs", "folder for the checkpoint", "", study=False)
    force: bool = setting(False, "run it again where its record is there already", "", study=False)

    def __post_init__(self):
        def need(right: bool, what: str):
            if not right:
                raise BadInput(what)

        for field in dataclasses.fields(self):
            name, value, kind, choices = field.name, getattr(self, field.name), field.metadata["type"], field.metadata["choices"]
            if value is None and field.default is None:
                continue
            if name == "milestones":
                need(isinstance(value, (tuple, list)) and all(type(m) is int and m > 0 for m in value)
                     and list(value) == sorted(set(value)), f"milestones must be rising whole epochs, not {value!r}")
                self.milestones = tuple(value)
                continue
            if kind is float and type(value) is int:
                value = float(value)
                setattr(self, name, value)
            need(type(value) is kind, f"{name} must be of type {kind.__name__}, not {value!r}")
            need(kind is not float or abs(value) <= 1e30, f"{name} must be finite, and not beyond 1e30, not {value!r}")
            need(kind is not int or abs(value) < 2 ** 31, f"{name} must be below 2^31, not {value!r}")
            need(not choices or value in choices, f"{name} must be one of {', '.join(choices or ())}, not {value!r}")
        for name in ("epochs", "batch_size", "width", "dim", "lr", "probe_lr", "k", "subset", "test_subset", "threads", "tau"):
            need(getattr(self, name) is None or getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("seed", "weight_decay", "gamma", "warmup", "eval_every"):
            need(getattr(self, name) >= 0, f"{name} must not be below 0, not {getattr(self, name)}")
        for name in ("momentum", "bank_momentum"):
            need(0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], not {getattr(self, name)}")
        need(self.tau is None or self.tau >= 1e-30, f"tau must be at least 1e-30, not {self.tau}")
        need(self.threads is None or self.threads <= 1024, f"threads must be at most 1024, not {self.threads}")
        need(self.batch_size > 1, "batch_size must be at least 2: batch normalisation compares images")
        need(16 <= self.size <= 1024 and self.size % 8 == 0, f"size must be a multiple of 8, from 16 to 1024, not {self.size}")
        need(self.dataset != "", "dataset must not be empty")
        # What would be ignored is refused.
        need(self.tau is None or self.loss in WITH_TAU, f"the {self.loss} loss has no temperature: leave out tau")
        need(not self.match_step or self.loss in WITH_TAU, f"the {self.loss} loss has no temperature: leave out match_step")
        need((self.k is None and self.alpha is None) or self.loss in WITH_K,
             f"the {self.loss} loss takes all negatives: leave out k and alpha")
        need(self.k is None or self.alpha is None, "k and alpha say the same thing: give one of them")
        need(self.alpha is None or 0 < self.alpha <= 1, f"alpha must lie in (0, 1], not {self.alpha}")
        if self.loss in WITH_TAU and self.tau is None:
            self.tau = 0.3
        if self.loss in WITH_K and self.k is None and self.alpha is None:
            self.k = 4095

    def study(self) -> dict:
        """The settings that the result depends on: what the record holds. (On another device, precision or number of threads
        sums are rounded otherwise: digits agree on one kind of CPU, and a GPU may add in another order each time; the record's
        `environment` says which it was.)"""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["study"]}


MINI = dict(epochs=60, batch_size=64, width=16, lr=0.1, schedule="cosine", warmup=3.0, bank_init="embeddings", alpha=0.0819,
            subset=5000, probe_lr=0.3)
PRESETS = {
    "paper": {},
    "narrow": dict(epochs=40, width=16, lr=0.1, schedule="cosine", warmup=3.0, bank_init="embeddings", probe_lr=0.3),
    "mini": MINI,
    "quick": {**MINI, "dataset": "shapes", "size": 24, "width": 8, "subset": 500, "test_subset": 1000, "batch_size": 16,
              "epochs": 160, "lr": 0.01, "eval_every": 0},
    "smoke": {**MINI, "dataset": "shapes", "epochs": 3, "batch_size": 16, "width": 4, "dim": 16, "lr": 0.03, "warmup": 1.0, "subset": 100,
              "test_subset": 100, "eval_every": 2},
}


def make_config(preset: str = "paper", **given) -> Config:
    """The preset's settings, but for those that are given. The preset's alpha falls away beside a given k, or with a loss
    that has no k. Raises BadInput for milestones or gamma given beside the cosine schedule, which has none."""
    if preset not in PRESETS:
        raise BadInput(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    filled = dict(PRESETS[preset])
    if given.get("loss", "contrastive") not in WITH_K or "k" in given:
        filled.pop("alpha", None)
    if {**filled, **given}.get("schedule") == "cosine" and given.keys() & {"milestones", "gamma"}:
        raise BadInput("the cosine schedule has no milestones and no gamma: leave them out, or give schedule step")
    return Config(**{**filled, **given, "preset": preset})


def cell_path(config: Config, dataset: str) -> Path:
    """<preset>/<dataset>/<loss>[_tau<tau>][_<field>-<value>…]_seed<k>: each setting that departs from the preset is in
    the name, so that no run can stand where another belongs."""
    same = {"loss": config.loss, "seed": config.seed, "dataset": config.dataset}
    usual = make_config(config.preset, **same, **({"tau": config.tau} if config.tau else {})).study()
    name = cell_prefix(config.loss, config.tau)
    for field, value in config.study().items():
        if value != usual[field]:
            name += f"_{field}-{'-'.join(map(str, value)) if isinstance(value, tuple) else value}"
    return Path(config.preset) / dataset / f"{name}_seed{config.seed}"


def cell_prefix(loss: str, tau: float | None) -> str:
    return loss + (f"_tau{tau!r}" if tau else "")


def learning_rate(config: Config, at: float) -> float:
    """The learning rate at a time, in epochs: 3.5 is half-way through the fourth."""
    rise = min(1.0, at / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        return config.lr * rise * (1 + math.cos(math.pi * at / config.epochs)) / 2
    return config.lr * rise * config.gamma ** sum(at >= milestone for milestone in config.milestones)


def training_loss(config: Config, similarity: Tensor, positive: Tensor, k: int | None) -> Tensor:
    """The loss that the config names, (B,)."""
    if config.loss == "triplet":
        return triplet_loss(similarity, positive)
    if config.loss in ("simple", "hard-simple"):
        return simple_loss(similarity, positive, k)
    loss = contrastive_loss(similarity, positive, config.tau, k)
    return config.tau * loss if config.match_step else loss


def generator(*key) -> torch.Generator:
    """Random numbers that depend on the key alone (seed, purpose, epoch, step): a run can go on anywhere, exactly."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


CHECKPOINT_SECONDS = 60.0  # at most so much work is lost to a crash


def train(config: Config) -> dict:
    """Train, evaluate, write the record and return it. A finished record of the same config is returned as it is; an
    unfinished run goes on from its checkpoint. Sets PyTorch's threads and CUDA device for the whole process. Raises Stop or
    one of its kinds (BadInput, Busy, Interrupted)."""
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data, available = take_subset(load_dataset(config.dataset, config.data, config.size), config)
    config = dataclasses.replace(config, dataset=data.name)  # a folder's own name: no path in the record
    cell = cell_path(config, data.name)
    if len(cell.name) > 200:
        raise BadInput(f"too many settings depart from the preset for a file name: {cell.name}")
    record_path = Path(config.results) / f"{cell}.json"
    checkpoint_path = Path(config.runs) / f"{cell}.pt"
    identity = {"protocol_version": PROTOCOL_VERSION, "config": plain(config.study()), "data": data.sha256()}
    for path in (record_path, checkpoint_path):
        probe_writable(path.parent)
    with lock(checkpoint_path.with_suffix(".lock")), Signals() as signals:
        if record_path.exists() and not config.force:
            record = read_record(record_path)
            refuse_other(record_path, record, identity)
            say(f"{record_path} is there already (--force runs it again)")
            show(record, record_path)
            return record
        try:
            return run_cell(config, data, available, device, identity, record_path, checkpoint_path, signals)
        except NotFinite as error:
            raise Stop(f"not finite: {error}; nothing is recorded (a good checkpoint from before, if there is one, stays in "
                       f"{checkpoint_path}); try a lower --lr (--probe-lr, if it is the probe) or a larger --tau")


def run_cell(config: Config, data: Data, available: int, device: torch.device, identity: dict, record_path: Path,
             checkpoint_path: Path, signals: Signals) -> dict:
    """The run itself: start or go on, train epoch by epoch, evaluate, write the record. `available`: how many training images
    there were to take from; `identity`: what a checkpoint and a record must agree in; `signals`: asked after each step."""
    N, began = len(data.train_images), time.perf_counter()
    k, bfloat16 = negatives_kept(config, N), in_bfloat16(config, device)
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    data = dataclasses.replace(data, train_images=images, train_labels=labels,
                               test_images=data.test_images.to(device), test_labels=data.test_labels.to(device))
    model, optimiser = make_model(config, device)
    saved = find_checkpoint(config, checkpoint_path, identity)
    steps = math.ceil(N / config.batch_size)
    name = f"{config.loss}{f' tau {config.tau}' if config.tau else ''}"
    left = steps * config.epochs - (saved["epoch"] * steps + saved["step"] if saved else 0)
    estimate = seconds_per_step(config, min(N, config.batch_size), device, bfloat16) * left
    say(f"{name}, {data.name} ({N:,} of {available:,} training images), preset {config.preset}, seed {config.seed}: "
        f"{config.epochs} epochs, about {duration(estimate)} of training on {device}"
        f"{f', threads: {torch.get_num_threads()}' if device.type == 'cpu' else ''}")

    if saved:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        bank = MemoryBank(N, config.dim, config.bank_momentum, saved["bank"], device=device)
        bank.rows = saved["bank"].to(device)  # to the bit: not even normalised again
        epoch, step, losses = saved["epoch"], saved["step"], list(saved["losses"])
        history, untrained, seconds = saved["history"], saved["untrained"], saved["seconds"]
        place = f"epoch {epoch + 1}, step {step + 1}" if epoch < config.epochs else "trained, to be evaluated"
        say(f"going on from {checkpoint_path}: {place}")
    else:
        init: str | Tensor = "random"
        if config.bank_init == "embeddings":
            init = centre_head(model, images, config, device, bfloat16)
        bank = MemoryBank(N, config.dim, config.bank_momentum, init, generator(config.seed, "bank"), device)
        epoch, step, losses, history, seconds = 0, 0, [], [], 0.0
        untrained = evaluate(model, data, config, bfloat16)

    def finite() -> bool:  # what is not finite is neither saved nor recorded
        return all(value.isfinite().all() for value in (*model.state_dict().values(), bank.rows, *losses))

    def save(forced: bool = config.force) -> None:
        if finite():
            save_checkpoint(checkpoint_path, {
                **identity, "model": model.state_dict(), "optimiser": optimiser.state_dict(), "bank": bank.rows, "epoch": epoch,
                "step": step, "losses": [loss.cpu() for loss in losses], "history": history, "untrained": untrained,
                "forced": forced, "seconds": seconds + time.perf_counter() - began})

    last_saved = time.perf_counter()
    while epoch < config.epochs:
        order = torch.randperm(N, generator=generator(config.seed, "order", epoch)).split(config.batch_size)
        epoch_began, first = time.perf_counter(), step
        with tqdm(total=steps, initial=step, leave=False, disable=None, unit="step") as bar, signals.waiting():
            for step in range(first, steps):  # from 0, but where a run goes on in the middle of an epoch
                index = order[step]
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate(config, epoch + step / steps)
                drawn = draw_augmentation(len(index), generator(config.seed, "views", epoch, step), config.size, config.flip)
                loss = train_step(model, bank, optimiser, images, index, drawn, config, k, bfloat16)
                losses.append(loss)  # stays on the device: to look at it would make a GPU wait
                step += 1  # from here, and in a checkpoint, the number of steps done
                bar.update()
                if signals.caught or time.perf_counter() - last_saved > CHECKPOINT_SECONDS:
                    save()
                    last_saved = time.perf_counter()
                    signals.leave(checkpoint_path)
        mean = torch.stack([loss.cpu() for loss in losses]).double().mean().item()
        if not finite():
            raise NotFinite(f"the loss, the weights or the bank in epoch {epoch + 1}")
        entry = {"epoch": epoch + 1, "loss": mean, "lr": learning_rate(config, epoch)}  # the rate at the epoch's start
        rate = max(1, N - first * config.batch_size) / (time.perf_counter() - epoch_began)
        epoch, step, losses = epoch + 1, 0, []
        if config.eval_every and epoch % config.eval_every == 0 and epoch < config.epochs:
            entry |= look(model, data, bfloat16)
        history.append(entry)
        left = (config.epochs - epoch) * N / rate
        say(f"epoch {epoch:4}/{config.epochs}  loss {mean:8.4f}  lr {entry['lr']:.5f}  {rate:6.0f} images/s  "
            f"{duration(left):>8} left" + "".join(f"  {key} {entry[key]:.3f}" for key in ("knn", "uniformity", "tolerance")
                                                  if key in entry))
    save()
    final = {**evaluate(model, data, config, bfloat16), "untrained": untrained}
    total = seconds + time.perf_counter() - began
    record = {**identity, "final": final, "history": history, "timing": {"seconds": total},
              "environment": environment(device, bfloat16)}
    record["data"] = {"sha256": identity["data"], "train": N, "test": len(data.test_images)}
    if (config.loss, config.tau) in FIG_2:
        record["tsne"] = tsne(embed(model, data.test_images[:1000], bfloat16=bfloat16)[1], data.test_labels[:1000])
    record = plain(record)
    record["sha256"] = record_sha256(record)
    write_whole(record_path, (json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    if config.force:
        save(forced=False)  # there is nothing left to go on with
    show(record, record_path)
    return record


PARTS = ("augmentation", "forward", "similarities and loss", "backward", "optimiser", "bank update")  # of a step


def train_step(model: nn.Module, bank: MemoryBank, optimiser: torch.optim.Optimizer, images: Tensor, index: Tensor,
               drawn: Augmentation, config: Config, k: int | None, bfloat16: bool, mark=lambda part: None) -> Tensor:
    """One step: images -> views -> embeddings -> similarities -> loss -> weights -> bank. Returns the mean loss, ().
    `mark` is told what has just been done, for --profile."""
    index = to_device(index, images.device)  # (B,), and the column of each anchor's own image
    views = normalise(augment(images[index], drawn.to(images.device)))  # (B, 3, size, size)
    mark("augmentation")
    with half_precision(images.device, bfloat16):
        z = model(views)  # (B, dim)
    mark("forward")
    loss = training_loss(config, bank.similarity(z), index, k).mean()
    mark("similarities and loss")
    optimiser.zero_grad()
    loss.backward()
    mark("backward")
    optimiser.step()
    mark("optimiser")
    bank.update(index, z.detach())  # after the step, as in the authors' code
    mark("bank update")
    return loss.detach()


def half_precision(device: torch.device, bfloat16: bool):
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()


def make_model(config: Config, device: torch.device) -> tuple[ResNet18, torch.optim.Optimizer]:
    """The network as its seed draws it, the same on every device, and its optimiser."""
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU, so that all devices start alike
        torch.manual_seed(generator(config.seed, "network").initial_seed())
        model = ResNet18(config.width, config.dim)
    model = model.to(device, memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum,
                                  weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda"))


def negatives_kept(config: Config, N: int) -> int | None:
    """How many nearest negatives the hard losses keep among N training images; None for the others."""
    return config.k if config.alpha is None else max(1, int(config.alpha * N))


def in_bfloat16(config: Config, device: torch.device) -> bool:
    return config.precision == "bfloat16" or (
        config.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))


@torch.no_grad()
def centre_head(model: ResNet18, images: Tensor, config: Config, device: torch.device, bfloat16: bool) -> Tensor:
    """Set the head's bias so that its untrained outputs have zero mean; return them, (N, dim), not normalised.

    An untrained network maps all images into one narrow cone (similarity 0.99). Losses that push all negatives alike
    hardly leave it; from zero mean they need not. One pass over augmented views, in training mode, so that batch
    normalisation's running means are of images too.
    """
    outputs = []
    for step, batch in enumerate(images.split(config.batch_size)):
        drawn = draw_augmentation(len(batch), generator(config.seed, "centre", step), config.size, config.flip)
        with half_precision(device, bfloat16):
            outputs.append(model.head(model.features(normalise(augment(batch, drawn.to(device))))).float())
    outputs = torch.cat(outputs)
    mean = outputs.mean(dim=0)
    model.head.bias -= mean
    return outputs - mean


@torch.no_grad()
def embed(model: ResNet18, images: Tensor, view=lambda images: images.float() / 255, bfloat16: bool = False) -> tuple[Tensor, Tensor]:
    """Features h (n, 8·width) and embeddings z (n, dim) of a view of each image (the plain image), in evaluation mode."""
    training, h, z = model.training, [], []
    model.eval()
    for batch in images.split(256):
        with half_precision(images.device, bfloat16):
            features = model.features(normalise(view(batch)))
            h.append(features.float())
            z.append(F.normalize(model.head(features).float(), dim=1))
    model.train(training)
    h, z = torch.cat(h), torch.cat(z)
    return (h.cpu(), z.cpu()) if images.device.type == "mps" else (h, z)  # MPS lacks the metrics' float64


def look(model: ResNet18, data: Data, bfloat16: bool) -> dict:
    """What is logged on the way; nothing is chosen by it."""
    (_, train_z), (_, test_z) = (embed(model, images, bfloat16=bfloat16) for images in (data.train_images, data.test_images))
    train_y, test_y = data.train_labels.to(train_z.device), data.test_labels.to(test_z.device)
    return {"knn": knn_accuracy(train_z, train_y, test_z, test_y), "uniformity": uniformity(test_z),
            "tolerance": tolerance(test_z, test_y)}


def evaluate(model: ResNet18, data: Data, config: Config, bfloat16: bool) -> dict:
    """All metrics: uniformity and tolerance on plain test images, alignment on two augmented views of each, the profile
    of each plain image against one augmented view of all. `accuracy` is the linear probe's on the test set after its
    last epoch; `accuracy_heldout` that of a probe that sees four fifths of the training labels, on the last fifth: the
    number to choose a tau by."""
    train_h, train_z = embed(model, data.train_images, bfloat16=bfloat16)
    mirror_h, _ = embed(model, data.train_images.flip(-1), bfloat16=bfloat16)
    test_h, test_z = embed(model, data.test_images, bfloat16=bfloat16)
    train_y, test_y = data.train_labels.to(train_h.device), data.test_labels.to(test_h.device)
    views = []
    for name in ("view 1", "view 2"):
        random = generator(config.seed, name)
        view = lambda images: augment(images, draw_augmentation(len(images), random, images.shape[-1]).to(images.device))
        views.append(embed(model, data.test_images, view, bfloat16)[1])
    h = torch.stack([train_h, mirror_h])  # (2, N, 8·width)
    order = balanced_order(data.train_labels.cpu(), seed=1).to(h.device)
    kept, held_out = order[len(order) // 5:], order[:len(order) // 5]
    return {
        "accuracy": linear_probe(h, train_y, test_h, test_y, lr=config.probe_lr, seed=config.seed),
        "accuracy_heldout": linear_probe(h[:, kept], train_y[kept], train_h[held_out], train_y[held_out],
                                         lr=config.probe_lr, seed=config.seed),
        "knn": knn_accuracy(train_z, train_y, test_z, test_y),
        "uniformity": uniformity(test_z),
        "tolerance": tolerance(test_z, test_y),
        "alignment": alignment(*views),
        "profile": similarity_profile(test_z, views[0], torch.arange(len(test_z), device=test_z.device)).tolist(),
    }


def take_subset(data: Data, config: Config) -> tuple[Data, int]:
    """The images that the config asks for, and how many training images there were."""
    available = {"subset": len(data.train_labels), "test_subset": len(data.test_labels)}
    for field, there in available.items():  # the preset's own number means: at most
        if (getattr(config, field) or 0) > there and getattr(config, field) != PRESETS[config.preset].get(field):
            raise BadInput(f"{field} {getattr(config, field)} is more than the {there} images that {data.name} has")
    train = balanced_order(data.train_labels)[:config.subset]
    test = balanced_order(data.test_labels)[:config.test_subset]
    if len(train) < 10:
        raise BadInput(f"{data.name} has {len(train)} training images: at least 10 are needed")
    return Data(data.name, data.train_images[train], data.train_labels[train],
                data.test_images[test], data.test_labels[test]), available["subset"]


def pick_device(name: str) -> torch.device:
    """The device of that name; auto: cuda, else mps, else cpu. Raises BadInput where it can't be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # so that events are timed there
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise BadInput(f"device {name!r} can't be used: {str(error).splitlines()[0]}")
    return device


# Checkpoints, locks and signals: nothing that is written is ever half there, and a run that is stopped goes on.


def save_checkpoint(path: Path, state: dict) -> None:
    """A SHA-256, then what torch.save writes; the checkpoint before stays beside it as .previous."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    if whole_checkpoint(path):  # a damaged one must not take the place of a good one
        os.replace(path, path.with_suffix(".previous"))
    write_whole(path, hashlib.sha256(content).digest() + content)


def load_checkpoint(path: Path, identity: dict | None = None) -> dict | None:
    """The newest whole checkpoint, or None. Raises BadInput where it is of another config, data or code version."""
    for candidate in (path, path.with_suffix(".previous")):
        if not candidate.exists():
            continue
        content = whole_checkpoint(candidate)
        if not content:
            say(f"the checkpoint {candidate} is damaged: it is not used")
            continue
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if identity:
            refuse_other(candidate, state, identity)
        return state
    return None


def whole_checkpoint(path: Path) -> bytes | None:
    """What torch.save wrote; None where there is no such file, or its checksum does not fit."""
    content = path.read_bytes() if path.exists() else b""
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def find_checkpoint(config: Config, path: Path, identity: dict) -> dict | None:
    """The checkpoint to go on from. With --force only from one that was forced too, and has left no record yet."""
    if not config.force:
        return load_checkpoint(path, identity)
    with contextlib.suppress(BadInput):
        saved = load_checkpoint(path, identity)
        if saved and saved["forced"]:
            return saved
    return None


def refuse_other(path: Path, found: dict, wanted: dict) -> None:
    """Raise BadInput, naming what differs, where a record or checkpoint is of another config, data or version. A record may be
    of `shapes` that another kind of CPU rounded differently."""
    there, here = dict(found["config"]), dict(wanted["config"])
    data = found["data"]
    there |= {"data": data["sha256"] if isinstance(data, dict) else data, "protocol_version": found["protocol_version"]}
    here |= {"data": wanted["data"], "protocol_version": wanted["protocol_version"]}
    for key in sorted(there.keys() | here.keys()):
        if key == "data" and here["dataset"] == "shapes" and isinstance(data, dict):
            continue
        if plain(there.get(key)) != here.get(key):
            raise BadInput(f"{path} is of another run: {key} is {there.get(key)} there, {here.get(key)} here; "
                           "move it away, or give another --results and --runs")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under another name in the same folder, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")  # not the pid: another machine may write here too
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def probe_writable(folder: Path) -> None:
    """Make the folder, and raise BadInput where nothing can be written into it: now, not after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"cannot write into {folder}: {error.strerror}")


@contextlib.contextmanager
def lock(path: Path, wait: bool = False):
    """Hold the lock of that name; it goes with the process that holds it, however that ends. Raises Busy where another
    process holds it, or waits for that."""
    with open(path, "w") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise Busy(f"another process is at work on this cell (it holds {path})")
            except OSError as error:
                raise Stop(f"cannot lock {path} ({error.strerror}): name a folder on a file system that has locks (--runs, --data)")
        yield


class Signals:
    """SIGINT, SIGTERM and SIGHUP (unless it is ignored, as under nohup) end the run at once, or, while waiting(), when
    leave() is called at the end of a step."""

    def __init__(self):
        self.caught, self.wait, self.before = 0, False, {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            watched = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                watched.append(signal.SIGHUP)
            self.before = {number: signal.signal(number, self.handle) for number in watched}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, _frame) -> None:
        self.caught = number
        if not self.wait:
            self.leave()

    def leave(self, checkpoint: Path | None = None) -> None:
        if self.caught:
            stop = Interrupted(f"{signal.Signals(self.caught).name}: stopped; the same command goes on"
                               + (f" from {checkpoint}" if checkpoint else " from its last checkpoint, if there is one"))
            stop.status = 128 + self.caught
            raise stop

    @contextlib.contextmanager
    def waiting(self):
        self.wait = True
        yield
        self.wait = False
        self.leave()


# What a step costs: --profile.


def network_alone(model: ResNet18, views: Tensor, bfloat16: bool) -> None:
    """The least that a step costs: forward and backward of the network, and nothing else."""
    model.zero_grad()
    with half_precision(views.device, bfloat16):
        z = model(views)
    z.backward(torch.ones_like(z))


def seconds_per_step(config: Config, count: int, device: torch.device, bfloat16: bool) -> float:
    """Time of a step of the network alone, of `count` images, measured on a copy, for the estimate in the first line."""
    model, views = make_model(config, device)[0], torch.zeros(count, 3, config.size, config.size, device=device)
    for _ in range(2):  # the first is the warm-up
        clock = Clock(device)
        network_alone(model, normalise(views), bfloat16)
        clock.mark("network")
    return clock.read()["network"] / 1000


class Clock:
    """Milliseconds from mark to mark. A GPU runs behind the program: there events stand in for the clock."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []
        self.mark("start")

    def mark(self, part: str) -> None:
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            if self.device.type == "mps":
                torch.mps.synchronize()
            now = time.perf_counter()
        self.marks.append((part, now))

    def read(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return {part: before.elapsed_time(now) for (_, before), (part, now) in zip(self.marks, self.marks[1:])}
        return {part: 1000 * (now - before) for (_, before), (part, now) in zip(self.marks, self.marks[1:])}


def profile(config: Config, seconds: float = 20.0) -> dict:
    """What a training step costs on this machine, part by part, beside its network alone and beside torchvision's
    transforms on PIL images: medians over steps, of which as many are taken as fit into `seconds`, at least five."""
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    data, _ = take_subset(load_dataset(config.dataset, config.data, config.size), config)
    N, images = len(data.train_images), data.train_images.to(device)
    k, bfloat16 = negatives_kept(config, N), in_bfloat16(config, device)
    model, optimiser = make_model(config, device)
    bank = MemoryBank(N, config.dim, config.bank_momentum, "random", generator(config.seed, "bank"), device)
    index = torch.randperm(N, generator=generator(config.seed, "order", 0))[:config.batch_size]
    views = normalise(images[index.to(device)].float() / 255)
    rounds, alone, warm_up, began = [], [], 2, math.inf
    while len(rounds) < warm_up + 5 or time.perf_counter() - began < seconds:
        clock = Clock(device)
        drawn = draw_augmentation(len(index), generator(config.seed, "views", 0, len(rounds)), config.size, config.flip)
        train_step(model, bank, optimiser, images, index, drawn, config, k, bfloat16, clock.mark)
        rounds.append(clock.read())
        clock = Clock(device)  # in turn with the step, so that both see the same machine
        network_alone(model, views, bfloat16)
        clock.mark("network")
        alone.append(clock.read()["network"])
        if len(rounds) == warm_up:
            began = time.perf_counter()
    rounds, alone = rounds[warm_up:], alone[warm_up:]
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2 ** 20
    else:
        memory = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    step, network = statistics.median(sum(parts.values()) for parts in rounds), statistics.median(alone)
    with FlopCounterMode(display=False) as counter:
        network_alone(model, views, bfloat16)
    product = matrix_product_gflops(device, bfloat16)
    metrics = Clock(device)
    z = F.normalize(torch.randn(10_000, config.dim, generator=generator("z")), dim=1).to(device)
    metrics.mark("")  # what was made meanwhile is not counted
    uniformity(z), tolerance(z, torch.arange(10_000, device=device) % 10)
    metrics.mark("uniformity_and_tolerance")
    h = torch.randn(2, N, 8 * config.width, generator=generator("h")).to(device)
    y = torch.arange(N, device=device) % 10
    metrics.mark("")
    linear_probe(h, y, h[0, :10], y[:10], epochs=1, lr=config.probe_lr)
    metrics.mark("probe_epoch")
    batched, pil = augmentation_rates(config, data.train_images[index], images[index.to(device)])
    steps = math.ceil(N / config.batch_size) * config.epochs
    return {
        "config": plain(config.study()), "environment": environment(device, bfloat16), "train_images": N, "rounds": len(rounds),
        "parts_ms": {part: statistics.median(parts[part] for parts in rounds) for part in rounds[0]},
        "step_ms": step, "network_ms": network, "step_over_network": step / network,
        "images_per_second": 1000 * len(index) / step, "training_hours": step * steps / 3.6e6,
        "network_gflop": counter.get_total_flops() / 1e9, "network_gflops": counter.get_total_flops() / network / 1e6,
        "matrix_product_gflops": product, "peak_memory_mib": memory,
        "batched_images_per_second": batched, "pil_images_per_second": pil, "pil_over_batched": batched / pil,
        "uniformity_and_tolerance_of_10000_ms": metrics.read()["uniformity_and_tolerance"],
        "probe_seconds": metrics.read()["probe_epoch"] / 1000 * 100,  # of 100 epochs
    }


def matrix_product_gflops(device: torch.device, bfloat16: bool) -> float:
    """What one plain matrix product reaches, in 10^9 operations a second: the best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    times = []
    for _ in range(5):
        clock = Clock(device)
        a @ a
        clock.mark("product")
        times.append(clock.read()["product"])
    return 2 * n ** 3 / min(times) / 1e6


def augmentation_rates(config: Config, host: Tensor, images: Tensor) -> tuple[float, float]:
    """Images a second of the batched augmentation, where the images are, and of torchvision's transforms of the same
    images one by one as PIL images; on the CPU both with one thread."""
    T, threads = torchvision.transforms, torch.get_num_threads()
    one_by_one = T.Compose([T.RandomResizedCrop(config.size, scale=(0.2, 1)), T.ColorJitter(0.4, 0.4, 0.4, 0.4),
                            T.RandomHorizontalFlip(0.5 * config.flip), T.RandomGrayscale(0.2), T.ToTensor(),
                            T.Normalize(MEAN, STD)])
    pictures = [T.functional.to_pil_image(image) for image in host]
    torch.set_num_threads(1)
    times: dict[str, list] = {"batched": [], "PIL": []}
    try:
        for turn in range(6):
            clock = Clock(images.device)
            normalise(augment(images, draw_augmentation(len(images), generator(turn), config.size, config.flip).to(images.device)))
            clock.mark("batched")
            with torch.random.fork_rng(devices=[]):
                torch.stack([one_by_one(picture) for picture in pictures])
            clock.mark("PIL")
            for part, took in clock.read().items():
                times[part].append(took)
    finally:
        torch.set_num_threads(threads)
    return tuple(1000 * len(images) / statistics.median(took[1:]) for took in times.values())  # the first is the warm-up


def show_profile(p: dict) -> None:
    c, e = p["config"], p["environment"]
    say(f"{c['loss']}{' tau ' + str(c['tau']) if c['tau'] else ''}, {c['dataset']}, preset {c['preset']}: {p['train_images']:,} images, batch "
        f"{c['batch_size']}, width {c['width']}, {e['precision']}, on {e['device']}, threads: {e['threads']}; medians of {p['rounds']} steps")
    for part, took in p["parts_ms"].items():
        say(f"  {part:26}{took:10.2f} ms{100 * took / p['step_ms']:8.1f} %")
    say(f"  {'the whole step':26}{p['step_ms']:10.2f} ms{p['images_per_second']:8.0f} images/s")
    say(f"  {'the network alone':26}{p['network_ms']:10.2f} ms{'':8}   step / network {p['step_over_network']:.3f}")
    say(f"network: {p['network_gflop']:.1f} GFLOP a step, {p['network_gflops']:.0f} GFLOP/s; a matrix product reaches "
        f"{p['matrix_product_gflops']:.0f} GFLOP/s")
    say(f"augmentation: {p['batched_images_per_second']:.0f} images/s batched, {p['pil_images_per_second']:.0f} by torchvision on PIL "
        f"images: {p['pil_over_batched']:.1f} times")
    say(f"evaluation: uniformity and tolerance of 10,000 embeddings {p['uniformity_and_tolerance_of_10000_ms'] / 1000:.2f} s, "
        f"the linear probe {p['probe_seconds']:.1f} s")
    say(f"peak memory: {p['peak_memory_mib'] or math.nan:.0f} MiB; training with these settings: {duration(3600 * p['training_hours'])}")


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ 7  RESULTS                                                                 paper, section 5, Table 1 │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘

# The paper's Table 1, without ImageNet-100 (ResNet-50): (loss, tau) -> linear accuracy in percent, uniformity, tolerance
PAPER = {
    "cifar10": {
        ("contrastive", 0.07): (79.75, 3.86, 0.04), ("contrastive", 0.3): (83.27, 3.60, 0.178),
        ("contrastive", 0.7): (82.69, 3.17, 0.333), ("contrastive", 1.0): (82.21, 2.96, 0.372),
        ("simple", None): (74.83, 1.68, 0.61),
        ("hard", 0.07): (79.2, 3.88, 0.034), ("hard", 0.3): (83.63, 3.89, 0.0267),
        ("hard", 0.7): (84.19, 3.87, 0.030), ("hard", 1.0): (84.19, 3.86, 0.030),
        ("hard-simple", None): (84.84, 3.85, 0.030)},
    "cifar100": {
        ("contrastive", 0.07): (51.82, 3.86, 0.10), ("contrastive", 0.3): (56.44, 3.60, 0.269),
        ("contrastive", 0.7): (50.99, 3.18, 0.331), ("contrastive", 1.0): (48.33, 2.96, 0.343),
        ("simple", None): (39.31, 2.12, 0.39),
        ("hard", 0.07): (50.77, 3.87, 0.088), ("hard", 0.3): (56.55, 3.88, 0.124),
        ("hard", 0.7): (57.54, 3.87, 0.158), ("hard", 1.0): (56.77, 3.86, 0.172),
        ("hard-simple", None): (55.71, 3.86, 0.174)},
    "svhn": {
        ("contrastive", 0.07): (92.55, 3.88, 0.032), ("contrastive", 0.3): (95.47, 3.65, 0.137),
        ("contrastive", 0.7): (94.17, 3.27, 0.186), ("contrastive", 1.0): (92.07, 3.05, 0.197),
        ("simple", None): (70.83, 1.50, 0.074),
        ("hard", 0.07): (91.82, 3.89, 0.025), ("hard", 0.3): (94.79, 3.91, 0.021),
        ("hard", 0.7): (95.02, 3.90, 0.021), ("hard", 1.0): (95.26, 3.88, 0.023),
        ("hard-simple", None): (94.99, 3.85, 0.026)},
}
CELLS = list(PAPER["cifar10"])  # the ten rows of Table 1 for a dataset
# What the authors published beside it: linear accuracy of the ordinary loss at more temperatures (of Fig. 9).
PAPER_ACCURACY = {
    "cifar10": {0.05: 76.10, 0.1: 81.82, 0.2: 83.78, 0.4: 83.22, 0.5: 82.54, 0.6: 82.97, 0.8: 82.67, 0.9: 81.97},
    "cifar100": {0.05: 49.80, 0.1: 52.46, 0.2: 56.05, 0.4: 55.47, 0.5: 54.17, 0.6: 53.05, 0.8: 50.08},
}
TABULATED = ("accuracy", "uniformity", "tolerance")


def paper_values(dataset: str, loss: str, tau: float | None) -> dict[str, float | None]:
    """The paper's accuracy, uniformity and tolerance of a cell, None for what it lacks; a folder called cifar10-… is put beside
    CIFAR-10."""
    dataset = dataset.split("-")[0]
    more = PAPER_ACCURACY.get(dataset, {}).get(tau) if loss == "contrastive" else None
    return dict(zip(TABULATED, PAPER.get(dataset, {}).get((loss, tau), (more, None, None))))


def plain(value):
    """The value as JSON has it: lists for tuples, null for NaN and infinities."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record_sha256(record: dict) -> str:
    """Of all but the clock, the machine and a picture that needs a library: two runs that agree have one sum, and a number
    edited by hand shows."""
    rest = {key: value for key, value in record.items() if key not in ("sha256", "timing", "environment", "tsne")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> dict:
    """A record that is whole. Raises BadInput for one that is broken or was edited, or that this code can't make sense of."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = record["sha256"] == record_sha256(record)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise BadInput(f"{path} is broken or was edited: its sha256 does not fit; remove it, or run with --force")
    try:
        sane = makes_sense(record)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
        sane = False
    if not sane:
        raise BadInput(f"{path} is no record of this program, or of one too different: move it away")
    return record


def makes_sense(record: dict) -> bool:
    """Whether what a report takes from a record is there, and of the right kind. May raise instead."""
    config, final, tsne_ = record["config"], record["final"], record.get("tsne")
    values = [*(final[key] for key in (*TABULATED, "knn", "accuracy_heldout")), *final["profile"], final["untrained"]["accuracy"],
              *(final["untrained"].get(key) for key in (*TABULATED, "knn"))]
    return (all(value is None or type(value) in (int, float) and abs(value) < 1e6 for value in values) and len(final["profile"]) == 11
            and config["loss"] in LOSSES and (config["tau"] is None or type(config["tau"]) is float)
            and all(type(value) is str for value in (config["preset"], config["dataset"], record["data"]["sha256"]))
            and all(type(value) is int and abs(value) < 2 ** 31 for value in (record["protocol_version"], config["seed"], record["data"]["train"]))
            and (record["protocol_version"] != PROTOCOL_VERSION or bool(Config(**config)))
            and {"epochs", "batch_size", "width", "lr", "schedule", "bank_init", "probe_lr"} <= config.keys()
            and {"torch", "precision", "device"} <= record["environment"].keys() and isinstance(record["history"], list)
            and (tsne_ is None or len(tsne_["x"]) == len(tsne_["y"]) == len(tsne_["label"])
                 and all(type(value) in (int, float) for key in ("x", "y", "label") for value in tsne_[key])))


def environment(device: torch.device, bfloat16: bool) -> dict:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere what Python knows
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(), "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {torch.backends.cpu.get_cpu_capability()}",
        "platform": f"{platform.system()} {platform.machine()}", "precision": "bfloat16" if bfloat16 else "float32",
        "python": platform.python_version(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "source_sha256": SOURCE_SHA256}


def show(record: dict, path: Path) -> None:
    """The result, beside the paper's where the paper has that cell."""
    config, final = record["config"], record["final"]
    paper = paper_values(config["dataset"], config["loss"], config["tau"])
    say(f"{'':12}{'ours':>9}{'paper':>9}{'untrained':>12}")
    meaning = {"accuracy": "linear probe, last epoch, %", "knn": "200 nearest, %", "uniformity": "larger = more uniform",
               "tolerance": "mean similarity in a class", "alignment": "mean squared distance of two views"}
    for key, what in meaning.items():
        ours, before = (f"{x:.{2 if key in ('accuracy', 'knn') else 3}f}" if x is not None else "-"
                        for x in (final.get(key), final["untrained"].get(key)))
        say(f"{key:12}{ours:>9}{paper.get(key) or '-':>9}{before:>12}  {what}")
    if any(paper.values()):
        say(f"paper: {config['dataset'].split('-')[0]}; this run: preset {config['preset']}, {record['data']['train']:,} "
            f"training images, {config['epochs']} epochs")
    say(f"record: {path}")


Rows = dict  # (loss, tau, what departs from the preset) -> [(path, record) of each seed], in the order of Table 1


def report(results: Path, preset: str | None = None) -> None:
    """From the records alone: print the tables, and write, for each preset, TABLE.md, CLAIMS.md and the figures; the parts
    of the README between markers too. Raises BadInput, and writes nothing, where there is no record, or one that is broken,
    was edited, or stands where it does not belong."""
    groups = read_groups(results, preset)
    if not groups:
        raise BadInput(f"no records of {'preset ' + preset if preset else 'any preset'} in {results}: run some first")
    text: dict[Path, str] = {}
    files: dict[Path, bytes] = {}
    for (name, dataset, version), rows in groups.items():
        title = f"preset {name}, dataset {dataset}, protocol version {version}"
        ours, verdicts = table(rows, results / name), claims_table(rows)
        say(f"\n{title}\n\n{ours}\n\n{verdicts}")
        tables, claims = results / name / "TABLE.md", results / name / "CLAIMS.md"
        text.setdefault(tables, f"# Table 1, preset {name}: ours beside the paper's\n")
        text.setdefault(claims, f"# The paper's claims, preset {name}\n\n{NEEDS}")
        text[tables] += f"\n## {title}\n\n{ours}\n\n{caption(rows)}\n"
        text[claims] += f"\n## {title}\n\n{verdicts}\n"
        files |= {results / name / file: content for file, content in draw(rows, dataset, version).items()}
    readme = Path(__file__).with_name("README.md")
    own = readme.with_name("results")
    if readme.exists() and results.resolve() == own.resolve():
        text[readme] = fill_in(readme.read_text(encoding="utf-8"), own)
    for path, content in (files | {path: words.encode() for path, words in text.items()}).items():
        if not path.exists() or path.read_bytes() != content:
            write_whole(path, content)


def read_groups(results: Path, preset: str | None = None) -> dict[tuple, Rows]:
    """(preset, dataset, protocol version) -> rows. What differs in one of the three is never averaged; nor are runs on other
    images, for which BadInput is raised (but for `shapes`, see load_shapes)."""
    groups: dict[tuple, Rows] = {}
    images: dict[tuple, tuple] = {}
    for path in sorted(results.glob(f"{preset or '*'}/*/*.json")):
        record = read_record(path)
        config = record["config"]
        key = config["preset"], config["dataset"], record["protocol_version"]
        # Which settings depart from the preset is in the file's name, see cell_path.
        departs = path.stem.removeprefix(cell_prefix(config["loss"], config["tau"])).removesuffix(f"_seed{config['seed']}").strip("_")
        if path.parts[-3:-1] != key[:2] or key[2] == PROTOCOL_VERSION and path.stem != cell_path(Config(**config), key[1]).name:
            raise BadInput(f"{path} holds a record of another cell, or is a copy: move it away")
        sha256, first = images.setdefault((key, departs), (record["data"]["sha256"], path))
        if sha256 != record["data"]["sha256"] and key[1] != "shapes":
            raise BadInput(f"{path} was run on other images than {first}: move one of them away, or rename its dataset's folder")
        group = groups.setdefault(key, {(loss, tau, ""): [] for loss, tau in CELLS})  # a cell without a record is shown as missing
        group.setdefault((config["loss"], config["tau"], departs), []).append((path, record))
    order = {loss: place for place, loss in enumerate(("contrastive", "simple", "hard", "hard-simple", "triplet"))}
    for rows in groups.values():
        for runs in rows.values():
            runs.sort(key=lambda run: run[1]["config"]["seed"])
    return {key: dict(sorted(rows.items(), key=lambda row: (row[0][2], order[row[0][0]], row[0][1] or 0)))
            for key, rows in groups.items()}


def table(rows: Rows, folder: Path) -> str:
    """Ours, mean ± standard deviation over seeds (their number), beside the paper's where it has the dataset; in the last row
    the network before training. Links are relative to `folder`."""
    records = [record for runs in rows.values() for _, record in runs]
    dataset = records[0]["config"]["dataset"]
    columns = [("accuracy", "accuracy, %", 2), ("knn", "kNN, %", 2), ("uniformity", "uniformity", 3), ("tolerance", "tolerance", 3)]
    beside = TABULATED if dataset.split("-")[0] in PAPER else ()

    def line(loss: str, tau, finals: list[dict], paper: dict, links: str) -> str:
        cells = [loss, f"{tau or ''}"]
        for key, _, digits in columns:
            cells.append(mean_sd([final[key] for final in finals if final.get(key) is not None], digits))
            if key in beside:
                cells.append(str(paper.get(key) or "–"))
        return f"| {' | '.join([*cells, links])} |"

    head = ["loss", "τ"]
    for key, title, _ in columns:
        head += [title, "paper"] if key in beside else [title]
    lines = [f"| {' | '.join([*head, 'records'])} |", "|---" * (len(head) + 1) + "|"]
    untrained = {}  # by seed: all its cells start from the same network
    for (loss, tau, departs), runs in rows.items():
        links = [f"[{record['config']['seed']}]({path.relative_to(folder).as_posix().replace(' ', '%20')})" for path, record in runs]
        lines.append(line(f"{loss}, {departs}" if departs else loss, tau, [record["final"] for _, record in runs],
                          {} if departs else paper_values(dataset, loss, tau), " ".join(links) or "missing"))
        untrained |= {record["config"]["seed"]: record["final"]["untrained"] for _, record in runs if not departs}
    if untrained:
        lines.append(line("untrained", None, list(untrained.values()), {}, ""))
    return "\n".join(lines)


def mean_sd(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} ({len(values)})"


def caption(rows: Rows) -> str:
    """The protocol of a table, from its records."""
    records = [record for runs in rows.values() for _, record in runs]
    c = records[0]["config"]
    machines = sorted({"torch {torch}, {precision}, {device}".format(**record["environment"]) for record in records})
    return (f"{records[0]['data']['train']:,} training images, {c['epochs']} epochs, batch {c['batch_size']}, ResNet-18 of width {c['width']}, "
            f"SGD lr {c['lr']}, {c['schedule']} schedule, bank from {c['bank_init']}; linear probe lr {c['probe_lr']}, accuracy after its last "
            f"epoch, unless a row says otherwise; kNN: k = 200; last row: before training; mean ± standard deviation (seeds). Run with {'; '.join(machines)}.")


# The verdicts. What each needs stands here, not to be moved as results come in: it was written before the first records of `narrow` and `paper`
# and after those of `mini`. Where the paper gives no number for its words, these do: "competitive" is at most 1 point of accuracy worse,
# "much worse" is more than 2 (the authors' one repeated setting has a standard deviation of 0.30); "flat", and "nothing useful", are at most
# a quarter of the ordinary loss's range or gain.

NEEDS = """τ is 0.07, 0.3, 0.7, 1.0. C1, C2 and C8 say that something grows or falls with τ: Page's trend test over the seeds that have all four τ,
one-sided, 2.5 % each way. It rejects equality, not a step in the wrong place; so the largest step against the trend stands beside it, and where that step's
interval lies wholly on the wrong side the verdict names it. C8 is confirmed if both its trends are, refuted if either is.
The other claims have an effect for every seed with all cells it needs; above 0 speaks for the claim. Confirmed: the 95 % interval (Student's t over the seeds)
lies above 0; refuted: below 0; else undecided. Fewer than two seeds decide nothing; the claims are tested without correction for their number. The best τ of a loss
is chosen by `accuracy_heldout`, the accuracy on a fifth of the training labels, never on test data. These rules were written before the first records of `narrow` and
`paper`, and after those of `mini` had been seen.
"""
TAUS = (0.07, 0.3, 0.7, 1.0)
MATCHED = "contrastive, match_step-True"


def over_tau(cells: dict, key: str, loss: str = "contrastive") -> list[float]:
    return [cells[loss, tau][key] for tau in TAUS]


def best(cells: dict, loss: str = "contrastive", taus: tuple = TAUS) -> float:
    return max(taus, key=lambda tau: cells[loss, tau]["accuracy_heldout"])


def accuracy_at_best(cells: dict) -> float:
    return cells["contrastive", best(cells)]["accuracy"]


def reverse_u(cells: dict, loss: str = "contrastive") -> float:
    inside = cells[loss, best(cells, loss, TAUS[1:-1])]["accuracy"]
    return inside - max(cells[loss, TAUS[0]]["accuracy"], cells[loss, TAUS[-1]]["accuracy"])


def flatness(cells: dict) -> float:
    ordinary, hard = over_tau(cells, "uniformity"), over_tau(cells, "uniformity", "hard")
    flat = (max(ordinary) - min(ordinary)) / 4 - (max(hard) - min(hard))
    return flat if best(cells, "hard") > best(cells) else min(flat, 0.0)


def uselessness(cells: dict) -> float:
    untrained = cells["triplet", None]["untrained"]["accuracy"]
    return (accuracy_at_best(cells) - untrained) / 4 - (cells["triplet", None]["accuracy"] - untrained)


TRENDS = {  # claim -> (what should grow with τ, in words; its values at the four τ for one seed)
    "C1": [("−uniformity", lambda c: [-u for u in over_tau(c, "uniformity")])],
    "C2": [("tolerance", lambda c: over_tau(c, "tolerance"))],
    "C8": [("−gap", lambda c: [profile[1] - profile[0] for profile in over_tau(c, "profile")]),
           ("positive", lambda c: [profile[0] for profile in over_tau(c, "profile")])],
}
CLAIMS = [  # (claim, in words; what its effect is, in words; the effect of one seed, from (loss, tau) -> final metrics)
    ("C1", "ordinary loss: uniformity falls as τ grows", "trend", None),
    ("C2", "ordinary loss: tolerance grows with τ", "trend", None),
    ("C3", "ordinary loss: accuracy against τ is a reverse U",
     "accuracy at τ = 0.3 or 0.7 (by the held-out labels), less that at the better end (0.07 or 1, by the test images)", reverse_u),
    ("C4", "the simple loss is much worse than the ordinary loss at its best τ", "accuracy lost, less 2 points",
     lambda c: accuracy_at_best(c) - c["simple", None]["accuracy"] - 2),
    ("C5", "hard simple is competitive with the ordinary loss at its best τ", "accuracy gained, plus 1 point",
     lambda c: c["hard-simple", None]["accuracy"] - accuracy_at_best(c) + 1),
    ("C6", "hard loss: more uniform than the ordinary loss at the same τ", "the gain in uniformity, mean over the four τ",
     lambda c: statistics.mean(h - o for h, o in zip(over_tau(c, "uniformity", "hard"), over_tau(c, "uniformity")))),
    ("C7", "hard loss: uniformity almost flat in τ, best τ larger than the ordinary loss's",
     "a quarter of the ordinary loss's range of uniformity over τ, less the hard loss's; 0 at most where its best τ is not larger", flatness),
    ("C8", "as τ falls the gap from the positive to the nearest negative widens; as τ grows the positive's similarity does", "trends", None),
    ("C9", "the τ→0 loss learns nothing useful", "a quarter of the ordinary loss's gain in accuracy over the untrained network, less the "
     "triplet loss's gain", uselessness),
    ("M", "ours, not the paper's: C3 holds also where the step does not grow as 1/τ", "as C3, of the loss times τ (`--match-step`)",
     lambda c: reverse_u(c, MATCHED)),
]


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by Student's t: infinite for one value."""
    from scipy.stats import ttest_1samp
    mean = statistics.mean(values)
    if len(values) < 2 or max(values) == min(values):
        return (mean, mean, mean) if len(values) > 1 else (mean, -math.inf, math.inf)
    low, high = ttest_1samp(values, 0).confidence_interval()
    return mean, float(low), float(high)


def shown_interval(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f}" + (f" ({low:.3f} to {high:.3f})" if math.isfinite(low) else "")


def verdict(effects: list[float]) -> str:
    _, low, high = mean_interval(effects) if effects else (0.0, -math.inf, math.inf)
    return "confirmed" if low > 0 else "refuted" if high < 0 else "undecided"


def trend(seeds: list[list[float]]) -> tuple[str, str]:
    """(verdict, in words) on values (seeds, 4) that should grow from τ to τ, by Page's test."""
    from scipy.stats import page_trend_test
    steps = [mean_interval([row[i + 1] - row[i] for row in seeds]) for i in range(len(TAUS) - 1)]
    at = min(range(len(steps)), key=lambda i: steps[i][0])
    words = f"smallest step, τ {TAUS[at]} → {TAUS[at + 1]}: {shown_interval(*steps[at])}"
    if len(seeds) < 2:
        return "undecided", words
    rises, falls = (page_trend_test(rows).pvalue for rows in (seeds, [row[::-1] for row in seeds]))
    decided = "confirmed" if rises <= 0.025 else "refuted" if falls <= 0.025 else "undecided"
    if decided == "confirmed" and steps[at][2] < 0:
        decided = f"confirmed, except τ {TAUS[at]} → {TAUS[at + 1]}"
    return decided, f"p = {rises:.2g}; {words}"


def claims_table(rows: Rows) -> str:
    seeds: dict[int, dict] = {}
    for (loss, tau, departs), runs in rows.items():
        for _, record in runs:
            name = f"{loss}, {departs}" if departs else loss
            seeds.setdefault(record["config"]["seed"], {})[name, tau] = record["final"]

    def of_each_seed(effect) -> dict:
        effects = {}
        for seed, cells in sorted(seeds.items()):
            with contextlib.suppress(KeyError, TypeError):  # a cell, or a metric of it, is missing
                effects[seed] = effect(cells)
        return effects

    lines = ["| | claim | verdict | effect (95 % interval) | of each seed | what the effect is |", "|---|---|---|---|---|---|"]
    for name, claim, words, effect in CLAIMS:
        if name in TRENDS:
            values = [(what, list(of_each_seed(value).values())) for what, value in TRENDS[name]]
            found = [(what, len(seen), *(trend(seen) if seen else ("undecided", "–"))) for what, seen in values]
            verdicts = [one for _, _, one, _ in found]
            refuted, undecided = "refuted" in verdicts, "undecided" in verdicts
            decided = "refuted" if refuted else "undecided" if undecided else max(verdicts, key=len)
            shown, each = "; ".join(f"{what}: {one}" for what, _, _, one in found), f"seeds: {found[0][1]}"
            words = "should grow with τ, Page's test: " + ", ".join(what for what, *_ in found)
        else:
            effects = of_each_seed(effect)
            decided, shown = verdict(list(effects.values())), shown_interval(*mean_interval(list(effects.values()))) if effects else "–"
            each = ", ".join(f"{seed}: {value:.3f}" for seed, value in effects.items()) or "–"
        lines.append(f"| {name} | {claim} | **{decided}** | {shown} | {each} | {words} |")
    return "\n".join(lines)


FIG_2 = (("contrastive", 0.07), ("contrastive", 0.2))  # the cells whose embeddings the paper shows on a plane


def tsne(z: Tensor, labels: Tensor) -> dict | None:
    """Where t-SNE puts embeddings (n, dim) on a plane, for Fig. 2; None, and a line that says why, where it can't."""
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits  # scikit-learn needs it too
        with threadpool_limits(1):  # another number of threads gives another picture
            # From a random start: the one by PCA crashes on embeddings that are all equal.
            places = TSNE(perplexity=min(30.0, len(z) / 4), init="random", random_state=0).fit_transform(z.cpu().numpy())  # (n, 2)
    except Stop:  # a signal's
        raise
    except Exception as error:  # a picture must not cost a run its record
        say(f"no t-SNE for Fig. 2: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return None
    x, y = ([round(value, 1) for value in column] for column in places.T.tolist())
    return {"x": x, "y": y, "label": labels.tolist()}


COLOURS = {"contrastive": "#0072b2", "hard": "#d55e00", "match_step": "#009e73"}  # Okabe and Ito: told apart by all readers


def draw(rows: Rows, dataset: str, version: int) -> dict[str, bytes]:
    """The paper's Figs. 2 to 9 from the records, as SVG and PNG: file name -> content."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's own may not be there
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcdefaults()  # nor does a user's matplotlibrc matter
    matplotlib.rcParams.update({"svg.hashsalt": "ctl", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
                                "figure.constrained_layout.use": True})
    from matplotlib import pyplot

    figures = {f"{dataset}-v{version}-dilemma": draw_dilemma(pyplot, rows, dataset), f"{dataset}-v{version}-profile": draw_profiles(pyplot, rows),
               f"{dataset}-v{version}-tsne": draw_planes(pyplot, rows), "penalty": draw_penalty(pyplot)}
    if not figures[f"{dataset}-v{version}-tsne"]:
        say(f"Fig. 2 is skipped: {dataset} has no record with t-SNE (contrastive, tau 0.07 or 0.2, run where scikit-learn is installed)")
    files = {}
    for name, figure in figures.items():
        if not figure:
            continue
        for kind in ("svg", "png"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
            files[f"{name}.{kind}"] = buffer.getvalue()
    pyplot.close("all")
    return files


def finals(rows: Rows, loss: str, departs: str = "") -> list[tuple]:
    """(tau, the final metrics of each seed), for each tau that has a record."""
    return [(tau, [record["final"] for _, record in runs]) for (name, tau, what), runs in rows.items()
            if name == loss and what == departs and runs]


def draw_dilemma(pyplot, rows: Rows, dataset: str):
    """Figs. 4 and 6, 5 and 7, 9: uniformity, tolerance and accuracy against tau, the paper's dashed. Accuracies of a small
    preset lie far below the paper's, so these have a panel of their own."""
    panels = [("uniformity", "both"), ("tolerance", "both"), ("accuracy", "ours"), ("accuracy", "paper")]
    panels = panels if dataset.split("-")[0] in PAPER else panels[:3]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.8))
    for axis, (key, whose) in zip(axes, panels):
        for loss, departs, colour in (("contrastive", "", "contrastive"), ("hard", "", "hard"),
                                      ("contrastive", "match_step-True", "match_step")):
            points = [(tau, [f[key] for f in seeds if f[key] is not None]) for tau, seeds in finals(rows, loss, departs)]
            points = [(tau, values) for tau, values in points if values]
            if points and whose != "paper":
                axis.errorbar([tau for tau, _ in points], [statistics.mean(values) for _, values in points],
                              [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points], marker="o", capsize=3,
                              color=COLOURS[colour], label=f"{loss}{', loss times τ' if departs else ''}, ours")
            theirs = [(tau, paper_values(dataset, loss, tau)[key]) for tau in sorted({*TAUS, *PAPER_ACCURACY["cifar10"]})]
            theirs = [(tau, value) for tau, value in theirs if value is not None]
            if theirs and not departs and whose != "ours":
                axis.plot(*zip(*theirs), "--", marker="s", markersize=4, alpha=0.7, color=COLOURS[colour], label=f"{loss}, paper")
        axis.set(xlabel="temperature τ", title=key if whose == "both" else f"linear accuracy, %, {whose}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure


def draw_profiles(pyplot, rows: Rows):
    """Fig. 8: the mean similarity of the positive and of the ten nearest negatives, a panel for each tau."""
    panels = [(tau, [f["profile"] for f in seeds if None not in f["profile"]]) for tau, seeds in finals(rows, "contrastive")]
    panels = [(tau, profiles) for tau, profiles in panels if profiles]
    if not panels:
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3 * len(panels), 3.2), sharey=True, squeeze=False)
    for axis, (tau, profiles) in zip(axes[0], panels):
        negatives = len(profiles[0]) - 1
        axis.bar(["pos", *(f"n{place}" for place in range(1, 1 + negatives))], [statistics.mean(values) for values in zip(*profiles)],
                 color=["#d55e00"] + ["#0072b2"] * negatives)
        axis.tick_params(axis="x", rotation=90)
        axis.set(title=f"τ = {tau}", ylim=(0, 1))
    axes[0][0].set_ylabel("mean similarity")
    return figure


def draw_planes(pyplot, rows: Rows):
    """Fig. 2: t-SNE of embeddings at a small and a larger tau, of the first seed that has it."""
    planes = [(tau, next((record["tsne"] for _, record in rows.get((loss, tau, ""), []) if record.get("tsne")), None)) for loss, tau in FIG_2]
    planes = [(tau, points) for tau, points in planes if points]
    if not planes:
        return None
    figure, axes = pyplot.subplots(1, len(planes), figsize=(5 * len(planes), 4.6), squeeze=False)
    for axis, (tau, points) in zip(axes[0], planes):
        for label in sorted(set(points["label"])):  # five colours, then the next marker: told apart without the hue
            x, y = ([value for value, own in zip(points[key], points["label"]) if own == label] for key in "xy")
            axis.scatter(x, y, s=9, color=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")[label % 5], marker="ox^s+"[label // 5 % 5])
        axis.set(title=f"τ = {tau}", xticks=[], yticks=[])
    return figure


def draw_penalty(pyplot):
    """Fig. 3: Eq. 5 of negatives drawn evenly from [-1, 1]."""
    figure, axis = pyplot.subplots(figsize=(5, 3.4))
    s = torch.rand(1, 200, generator=generator("figure 3"), dtype=torch.float64).sort(dim=1).values * 2 - 1
    for tau, line, colour in zip(TAUS, ("-", "--", "-.", ":"), (*COLOURS.values(), "#cc79a7")):
        r = relative_penalty(s, torch.tensor([0]), tau)  # the first is the positive
        axis.plot(s[0, 1:], r[0, 1:], line, color=colour, label=f"τ = {tau}")
    axis.set(xlabel="similarity of the negative", ylabel="relative penalty r", yscale="log", ylim=(1e-6, 1))
    axis.legend()
    return figure


def costs(folder: Path, home: Path) -> str:
    """What `--profile --json` measured: a row for each file of `folder`; links are relative to `home`."""
    lines = ["| | threads | " + " | ".join(PARTS) + " | the step, ms | network alone | step / network | images/s | MiB | training |"]
    lines.append("|---" * (len(PARTS) + 8) + "|")
    for path in sorted(folder.glob("*.json")):
        try:
            p = json.loads(path.read_text(encoding="utf-8"))
            columns = [*(f"{p['parts_ms'][part]:.1f}" for part in PARTS), f"{p['step_ms']:.1f}", f"{p['network_ms']:.1f}",
                       f"{p['step_over_network']:.3f}", f"{p['images_per_second']:.0f}", f"{p['peak_memory_mib']:.0f}" if p["peak_memory_mib"] else "–",
                       duration(3600 * p["training_hours"])]
            lines.append(f"| [{path.stem}]({path.relative_to(home).as_posix()}) | {p['environment']['threads']} | {' | '.join(columns)} |")
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError, OSError):
            raise BadInput(f"{path} is not what --profile --json prints")
    return "\n".join(lines)


MARKER = re.compile(r"(<!-- report: (?:(\S+) (\S+) (table|claims)|costs) -->\n).*?(<!-- /report -->)", re.DOTALL)


def fill_in(text: str, results: Path) -> str:
    """A README's text, made anew between `<!-- report: PRESET DATASET table|claims -->`, or `<!-- report: costs -->`, and
    `<!-- /report -->`, and in links to a line of this file, [`name`](ctl.py#L1). Raises BadInput for a broken marker."""
    def anew(match: re.Match) -> str:
        opening, preset, dataset, what, closing = match.groups()
        if not what:
            return opening + costs(results / "profile", results.parent) + "\n" + closing
        parts = [(table(rows, results.parent) if what == "table" else claims_table(rows))
                 for (_, name, version), rows in read_groups(results, preset).items() if name == dataset and version == PROTOCOL_VERSION]
        return opening + "\n\n".join(parts or ["No records yet."]) + "\n" + closing

    def link(match: re.Match) -> str:
        return f"[`{match[1]}`](ctl.py#L{lines[match[1]]})" if match[1] in lines else match[0]

    code = Path(__file__).read_text(encoding="utf-8").splitlines()
    lines = {found[1]: number for number, line in enumerate(code, start=1) if (found := re.match(r"(?:def|class) (\w+)", line))}
    made, parts = MARKER.subn(anew, re.sub(r"\[`(\w+)`\]\(ctl\.py#L\d+\)", link, text))
    if not text.count("<!-- report: ") == text.count("<!-- /report -->") == parts:
        raise BadInput("the README has a `<!-- report: … -->` that is misspelt, or has no `<!-- /report -->`: mend it")
    return made


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def say(line: str) -> None:
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on, and the work goes on
        sys.stdout = open(os.devnull, "w")


# ┌──────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ 8  COMMAND LINE                                                                                  │
# └──────────────────────────────────────────────────────────────────────────────────────────────────┘


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise BadInput(f"{message} (--help lists all settings)")


def make_parser() -> Parser:
    """The flags are Config's fields, with their help: the paper's protocol as a table."""
    parser = Parser(prog="ctl.py", allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter,
                    description=(__doc__ or "").split("Reading order")[0].strip())
    groups = {True: parser.add_argument_group("the study: meaning; value in each preset; source"),
              False: parser.add_argument_group("where it runs")}
    for field in dataclasses.fields(Config):
        meta = field.metadata
        values = {preset: values.get(field.name, field.default) for preset, values in PRESETS.items()}
        shown = str(field.default) if len(set(values.values())) == 1 else ", ".join(f"{p} {v}" for p, v in values.items())
        text = f"{meta['help']}\n[{shown}{'; ' + meta['source'] if meta['source'] else ''}]".replace("%", "%%")
        options: dict = dict(help=text, default=argparse.SUPPRESS, dest=field.name)
        if meta["type"] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= dict(type=meta["type"], choices=meta["choices"], metavar="|".join(meta["choices"] or ()) or meta["type"].__name__.upper())
        if field.name == "milestones":
            options |= dict(nargs="*", metavar="EPOCH")
        groups[meta["study"]].add_argument("--" + field.name.replace("_", "-"), **options)
    parser.add_argument("--report", action="store_true", help="from the records in --results: write tables, figures and verdicts, and stop")
    parser.add_argument("--profile", action="store_true", help="time a training step of these settings, part by part, and stop")
    parser.add_argument("--json", action="store_true", help="with --profile: JSON on standard output, all else on standard error")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 failed, 2 wrong use or bad input, 3 another process is at
    work on the cell, 129 hung up, 130 interrupted, 143 terminated."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="replace")  # where a terminal has no τ
    try:
        given = vars(make_parser().parse_args(argv))
        reporting, profiling, as_json = (given.pop(mode) for mode in ("report", "profile", "json"))
        if as_json and not profiling or reporting and profiling:
            raise BadInput("--json goes with --profile, and --profile not with --report")
        ignored = given.keys() - {"preset", "results"} if reporting else given.keys() & {"force", "eval_every", "results", "runs"}
        if ignored and (reporting or profiling):
            raise BadInput(f"--{'report' if reporting else 'profile'} takes no --{sorted(ignored)[0].replace('_', '-')}")
        if reporting:
            report(Path(given.get("results", "results")), given.get("preset"))
            return 0
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            config = settle(given)
            if not profiling:
                train(config)
                return 0
            figures = profile(config)
        if as_json:
            print(json.dumps(figures, indent=1))
        else:
            show_profile(figures)
        return 0
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except Stop as stop:
        complaint, status = str(stop), stop.status
    except NotFinite as error:
        complaint, status = f"not finite: {error}", 1
    except KeyboardInterrupt:
        complaint, status = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):  # a GPU's, a CPU's
            raise
        complaint, status = f"out of memory: {str(error) or 'no more to be had'}".splitlines()[0], 1
    except OSError as error:
        complaint, status = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1
    print("ctl.py: " + " ".join(complaint.split()), file=sys.stderr)
    return status


def settle(given: dict) -> Config:
    """The config of a command line: a preset and a dataset are found where none is given, and it is said which."""
    if "preset" not in given:
        given["preset"] = "paper" if pick_device(given.get("device", "auto")).type == "cuda" else "mini"
        say(f"no preset given: {given['preset']}" + (" (there is no CUDA GPU; --preset paper runs the paper's protocol)"
                                                     if given["preset"] == "mini" else ""))
    config = make_config(**given)
    return config if "dataset" in given or "dataset" in PRESETS[config.preset] else fall_back(config)


def fall_back(config: Config) -> Config:
    """CIFAR-10 where it is there or can be downloaded, else shapes, with a notice."""
    if config.size != 32:
        raise BadInput("CIFAR-10 has images of 32x32: leave --size at 32, or name another --dataset")
    try:
        load_download("cifar10", Path(config.data), config.size)
        return config
    except BadInput as error:
        say(f"NOTICE: {error}.\nNOTICE: no --dataset was named, so this run uses 'shapes', made by code, NOT CIFAR-10.")
        return dataclasses.replace(config, dataset="shapes")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
