#!/usr/bin/env python3
"""Understanding the Behaviour of Contrastive Loss (Wang & Liu, CVPR 2021), reproduced in one file.

    python ctl.py --tau 0.3         # one run on CIFAR-10: the paper's protocol on a CUDA GPU, else a small one
    python ctl.py --preset quick    # the same in two minutes, on images made by code
    python ctl.py --help            # every setting with its source, and the presets
    bash reproduce.sh               # Table 1 on CIFAR and SVHN; then tables, verdicts and figures

The contrastive loss pulls a view of an image towards that image's other views (the positive) and pushes it from all
other images (the negatives), from the nearest hardest; the temperature tau says by how much. At small tau only the
nearest negatives count: features spread evenly over the sphere (uniformity), and images that are alike are torn
apart. At large tau all count alike: images that are alike may stay together (tolerance), and the sphere is filled
less evenly. No tau gives both. That is the uniformity-tolerance dilemma.

Read from top to bottom; you may stop before room 8, which keeps files and reads flags.

    1 Loss      Eqs. 1-9: the losses; the contrastive loss's gradient in closed form
    2 Metrics   Eqs. 10 and 11, Fig. 8, kNN and the linear probe
    3 Memory    the bank of all N embeddings that an image is compared with
    4 Network   ResNet-18 for images of 32x32
    5 Data      CIFAR, SVHN, a folder of images, or waves made by code; the augmentation
    6 Training  the settings, the step, the loop, the step as one CUDA graph, the evaluation
    7 Result    the paper's Table 1, and a run's result beside it
    8 Files     the record, the checkpoint, the lock of a run; the command line

Data goes one way: images -> views -> embeddings -> similarities with the bank -> loss; embeddings -> metrics.
Shapes are written (B, N): B images of a batch (the anchors) against all N training images.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import socket
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import filelock
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm


class BadInput(ValueError):
    """Wrong arguments or data, or a file of another run."""


class NotFinite(ValueError):
    """Similarities, embeddings, the loss or weights hold NaN or infinity."""


def require(condition: bool | Tensor, words: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(words)


def say(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()


progress = functools.partial(tqdm, leave=False, disable=None)  # a bar on a terminal, nothing elsewhere


# ── 1  LOSS ───────────────────────────────────────────────────────────────────────────── paper, section 3, Eqs. 1-9 ──
#
# Everything here is a function of s_ij = f(x_i)·g(x_j): embedding of anchor i times bank row of image j.
# With d_ij = s_ij - s_ii, how far j is ahead of anchor i's own image, the paper's losses are three ways to
# weigh the d of a row, from the hardest negative alone to all of them alike:
#
#     triplet       max_j d_ij                          tau -> 0         (Eq. 6 times tau)
#     contrastive   tau · log sum_j exp(d_ij / tau)     any tau          (Eq. 1 times tau)
#     simple        mean_j d_ij                         tau -> infinity  (Eq. 7 times tau, less its constant)
#
# All three go over all columns: the positive is one of them, with d_ii = 0. The hard losses (Eq. 9; their penalty
# is Eq. 8) keep the positive and the k largest of the others. `ahead` gives the d.
#
# similarity: (B, N) floating point, s_ij in [-1, 1]; 16 bits are computed in 32. positive: (B,) int64, the column
# of each anchor's own image. tau: a number > 0, or a scalar tensor. k: how many negatives to keep; None: all.
# What would go wrong unseen raises ValueError; values are looked at on the CPU only.


def contrastive_loss(similarity: Tensor, positive: Tensor, tau: float | Tensor, k: int | None = None) -> Tensor:
    """The contrastive loss of each anchor, Eq. 1; with k the hard contrastive loss, Eq. 9. Returns (B,), in
    [0, log N + 2/tau]. It is differentiable in similarity and in tau.

    >>> s = torch.tensor([[0.9, 0.5, -0.2]])
    >>> round(contrastive_loss(s, torch.tensor([0]), tau=0.1).item(), 6)  # log(1 + e^-4 + e^-11)
    0.018166
    """
    d = ahead(similarity, positive, tau, k)
    # Eq. 1: L = -log[ exp(s_ii/tau) / sum_j exp(s_ij/tau) ] = log sum_j exp(d_ij/tau)
    # logsumexp takes the largest out before exp, so that nothing overflows. In place, as (B, N) may be large.
    return torch.logsumexp(d.div_(tau), dim=1)


def simple_loss(similarity: Tensor, positive: Tensor, k: int | None = None) -> Tensor:
    """The simple loss of each anchor: Eq. 3, weighted as in Eq. 7; with k the hard simple loss. (B,), in (-2, 2).

    >>> simple_loss(torch.tensor([[1.0, 0.5, -0.9]]), torch.tensor([0])).item()  # -2/3 · 1 + 1/3 · (0.5 - 0.9)
    -0.800000011920929
    """
    # Eq. 7 · tau - constant, with n columns kept: -(n-1)/n · s_ii + 1/n · sum_{j != i} s_ij
    return ahead(similarity, positive, k=k).mean(dim=1)


def triplet_loss(similarity: Tensor, positive: Tensor) -> Tensor:
    """The limit of tau · (contrastive loss) as tau -> 0, a triplet loss without margin: Eq. 6 times tau. (B,), in
    [0, 2]: 0 where the positive is nearest. Where several negatives are nearest they share the gradient."""
    # Eq. 6 · tau: max(s_max - s_ii, 0); the positive's own column gives the 0
    return ahead(similarity, positive).amax(dim=1)


def ahead(similarity: Tensor, positive: Tensor, tau: float | Tensor = 1.0, k: int | None = None) -> Tensor:
    """d_ij = s_ij - s_ii, (B, N); with k (B, k + 1): the positive, then k nearest negatives. tau is only checked."""
    similarity, s_ii = check_similarity(similarity, positive, tau, k)
    if k is not None:
        similarity = torch.cat([s_ii, nearest_negatives(similarity, positive, k)[0]], dim=1)
    return similarity - s_ii


def loss_gradient(similarity: Tensor, positive: Tensor, tau: float | Tensor, k: int | None = None) -> Tensor:
    """The gradient of `contrastive_loss` in the similarities, in closed form: Eq. 4. (B, N): in [0, 1/tau] at the
    negatives, in [-1/tau, 0] at the positive. For the reader: training uses autograd, tests compare the two."""
    similarity, _ = check_similarity(similarity, positive, tau, k)
    own, dropped = own_and_dropped(similarity, positive, k)
    # Eq. 2: P_ij = exp(s_ij/tau) / sum_m exp(s_im/tau), here at the negatives
    P = torch.softmax(similarity.masked_fill(dropped, -torch.inf) / tau, dim=1).masked_fill(own, 0.0)
    # Eq. 4: dL/ds_ij = P_ij/tau and dL/ds_ii = -(1/tau) sum_{m != i} P_im, exact where P_ii - 1 would cancel
    return torch.where(own, -P.sum(dim=1, keepdim=True), P) / tau


def relative_penalty(similarity: Tensor, positive: Tensor, tau: float | Tensor, k: int | None = None) -> Tensor:
    """How the push on an anchor is shared among its negatives, Eq. 5 (Eq. 8 with k): a Boltzmann distribution.
    (B, N), rows sum to 1: 0 at the positive and at negatives that k drops. For the reader, and for Fig. 3."""
    similarity, _ = check_similarity(similarity, positive, tau, k)
    own, dropped = own_and_dropped(similarity, positive, k)
    # Eq. 5: r_i(s_ij) = exp(s_ij/tau) / sum_{m != i} exp(s_im/tau). The last mask is for N = 1, no negative.
    return torch.softmax(similarity.masked_fill(own | dropped, -torch.inf) / tau, dim=1).masked_fill(own, 0.0)


def nearest_negatives(similarity: Tensor, positive: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest negatives of each anchor, above the quantile of Eq. 8: similarities and columns,
    (B, min(k, N - 1)) both, in any order."""
    # The positive is never among them. (The authors' code takes the nearest of all, normally with the positive.)
    others = similarity.scatter(1, positive[:, None], -torch.inf)
    return others.topk(min(k, similarity.shape[1] - 1), dim=1, sorted=False)


def own_and_dropped(similarity: Tensor, positive: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """(B, N) each: which column is the anchor's own image, and which are the negatives that k drops."""
    own = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, positive[:, None], True)
    if k is None:
        return own, torch.zeros_like(own)
    kept = own.scatter(1, nearest_negatives(similarity, positive, k)[1], True)
    return own, ~kept


def check_similarity(similarity: Tensor, positive: Tensor, tau=1.0, k=None) -> tuple[Tensor, Tensor]:
    """Raise ValueError for what would go wrong unseen. Returns similarity, and s_ii as a column (B, 1)."""
    require(similarity.is_floating_point(), "similarity must be (B, N) floating point")
    require(positive.shape == similarity.shape[:1], f"positive must be of shape ({len(similarity)},)")
    require(k is None or k >= 1, "k must be at least 1")
    if similarity.dtype in (torch.half, torch.bfloat16):
        similarity = similarity.float()
    # Reading values would make a GPU wait, and break a graph that is being compiled. 0 · inf is NaN; isfinite is slow.
    if similarity.device.type == "cpu" and not torch.compiler.is_compiling():
        least = torch.finfo(similarity.dtype).tiny
        require(tau is not True and least <= tau < math.inf, f"tau must be a number above 0, finite, not {tau}")
        require((0 * similarity).sum() == 0, "similarity holds NaN or infinity", NotFinite)
    return similarity, similarity.gather(1, positive[:, None])


# ── 2  METRICS ─────────────────────────────────────────────────────── paper, sections 4 and 5.1, Eqs. 10-11, Fig. 8 ──
#
# z: (n, dim) unit vectors, what the loss sees. h: (n, d) features, what the linear probe sees. y: labels, (n,).

ROWS = 256  # functions over all pairs work on this many rows at a time; nothing is subsampled


@torch.no_grad()
def uniformity(z: Tensor, t: float = 2.0) -> float:
    """How evenly embeddings fill the sphere: -L_uniformity of Eq. 10, over the pairs i < j. In [0, 4t]: 0 if all
    are equal, larger = more uniform (3.94 for many vectors evenly spread in 128 dimensions, t = 2)."""
    check_vectors(z=z)
    n, total = len(z), 0.0
    require(n > 1, "z must hold two vectors or more")
    for i in range(0, n, ROWS):
        s = inner_products(z[i:i + ROWS], z[i:])  # (b, n - i)
        # |z_i - z_j|² = 2 - 2 s_ij for unit vectors, so exp(-t |z_i - z_j|²) = exp(2t (s_ij - 1))
        terms = s.sub_(1).mul_(2 * t).exp_()
        # The first b columns are the block against itself: there only i < j counts.
        total += terms[:, len(s):].sum(dtype=torch.float64).item()
        total += terms[:, :len(s)].triu(1).sum(dtype=torch.float64).item()
    # Eq. 10: L_uniformity = log E exp(-t |f(x) - f(y)|²)
    return -math.log(total / (n * (n - 1) / 2))


@torch.no_grad()
def tolerance(z: Tensor, labels: Tensor) -> float:
    """Mean similarity of two samples of one class: Eq. 11 as text and table mean it, over pairs i < j. In [-1, 1];
    nan where no class has two samples. (Eq. 11 as printed is a mean over *all* pairs, 0 where classes differ: with
    100 classes that is at most 0.01, and Table 1 has 0.39.)"""
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
    """Mean squared distance of the two views of each image, in [0, 4] (Wang & Isola, ICML 2020, exponent 2)."""
    check_vectors(z1=z1, z2=z2)
    require(z1.shape == z2.shape, "z1 and z2 must have one shape")
    return (z1.double() - z2.double()).square().sum(dim=1).mean().item()


@torch.no_grad()
def similarity_profile(z: Tensor, z2: Tensor, positive: Tensor, top: int = 10) -> Tensor:
    """Mean similarity of the positive, then of the nearest, second nearest, … negative: a panel of Fig. 8. z: the
    anchors; z2: (m, dim), what they are compared with, row `positive[i]` being anchor i's own. Returns (1 + top,)
    float64 on the CPU; nan where there are fewer negatives than that."""
    check_vectors(z=z, z2=z2)
    require(positive.shape == z.shape[:1] and top >= 0, f"positive must be of shape ({len(z)},), top at least 0")
    found = min(top, len(z2) - 1)
    total = torch.zeros(1 + found, dtype=torch.float64)
    for anchors, own in zip(z.split(ROWS), positive.split(ROWS)):
        s, s_ii = check_similarity(inner_products(anchors, z2), own)  # (b, m), (b, 1)
        negatives = nearest_negatives(s, own, found)[0].sort(dim=1, descending=True).values  # (b, found)
        total += torch.cat([s_ii, negatives], dim=1).sum(dim=0, dtype=torch.float64).cpu()
    return F.pad(total / len(z), (0, top - found), value=math.nan)


@torch.no_grad()
def knn_accuracy(train_z: Tensor, train_y: Tensor, test_z: Tensor, test_y: Tensor,
                 k: int = 200, temperature: float = 0.07) -> float:
    """Percent of test images whose k nearest training images vote for their class, by exp(s/temperature) each.
    Fewer than k: all vote. The protocol is the authors' (Wu et al., CVPR 2018)."""
    check_vectors(train_z=train_z, test_z=test_z)
    check_labels(train_y=(train_y, train_z), test_y=(test_y, test_z))
    require(k >= 1 and temperature > 0, "k must be at least 1, temperature above 0")
    classes, label = torch.cat([train_y, test_y]).unique(return_inverse=True)  # labels may lie far apart
    train_y, test_y = label.split([len(train_y), len(test_y)])
    correct = 0
    for z, y in zip(test_z.split(ROWS), test_y.split(ROWS)):
        s, neighbour = inner_products(z, train_z).topk(min(k, len(train_z)), dim=1)  # (b, k), the nearest first
        # All of a row's weights are divided by the largest: none overflows, and the nearest never vanishes.
        weight = torch.exp((s - s[:, :1]) / temperature)
        votes = z.new_zeros(len(z), len(classes)).scatter_add(1, train_y[neighbour], weight)  # (b, classes)
        correct += (votes.argmax(dim=1) == y).sum().item()
    return 100 * correct / len(test_y)


@torch.inference_mode(False)  # in a caller's inference mode nothing would learn
@torch.enable_grad()
def linear_probe(train_h: Tensor, train_y: Tensor, test_h: Tensor, test_y: Tensor, epochs: int = 100,
                 lr: float = 30.0, momentum: float = 0.9, milestones: tuple[int, ...] = (40, 60, 80),
                 gamma: float = 0.2, batch_size: int = 256, seed: int = 0) -> float:
    """Percent of test images that a linear classifier on frozen features gets right, after its last epoch.

    train_h: (n, d), or (V, n, d) for V views of each image, of which each epoch picks one at random (an image and
    its mirror image: training with random flips). SGD without weight decay, lr · gamma at the milestones (paper,
    5.1; batch, momentum and flips from the authors' code, which reports its best epoch on the test set)."""
    views = train_h.detach().reshape(-1, *train_h.shape[-2:])  # (V, n, d)
    check_vectors(unit=False, train_h=views.flatten(0, 1), test_h=test_h)
    check_labels(train_y=(train_y, views[0]), test_y=(test_y, test_h))
    require(batch_size >= 1, "batch_size must be at least 1")
    classes, label = torch.cat([train_y, test_y]).unique(return_inverse=True)  # labels may lie far apart
    train_y, test_y = label.split([len(train_y), len(test_y)])
    n_views, n, d = views.shape
    weight = views.new_zeros(len(classes), d, requires_grad=True)  # convex: 0 is as good a start as any
    bias = views.new_zeros(len(classes), requires_grad=True)
    optimiser = torch.optim.SGD([weight, bias], lr=lr, momentum=momentum)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones), gamma)
    rng = torch.Generator().manual_seed(seed)
    with matmul_precision(views.device):
        for _ in progress(range(epochs), "linear probe"):
            image = torch.randperm(n, generator=rng).to(views.device)
            view = torch.randint(n_views, (n,), generator=rng).to(views.device)
            for v, i in zip(view.split(batch_size), image.split(batch_size)):
                optimiser.zero_grad()
                F.cross_entropy(F.linear(views[v, i], weight, bias), train_y[i]).backward()
                optimiser.step()
            schedule.step()
        predicted = F.linear(test_h, weight.detach(), bias.detach()).argmax(dim=1)
    require(weight.isfinite().all() and bias.isfinite().all(), "the linear probe's weights are not finite", NotFinite)
    return 100 * (predicted == test_y).double().mean().item()


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """(n, dim), (m, dim) -> (n, m), in the precision of the vectors, whatever autocast a caller has set."""
    with matmul_precision(a.device):
        return a @ b.T


def matmul_precision(device: torch.device, bfloat16: bool = False):
    """A context for matrix products and convolutions: in bfloat16, or else in their tensors' own dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False)


def check_vectors(unit: bool = True, **sets: Tensor) -> None:
    """All sets must hold vectors that are finite, and of length 1 where `unit`."""
    for name, z in sets.items():
        require(z.ndim == 2 and z.dtype in (torch.float, torch.double), f"{name} must be (n, dim) float or double")
        require(z.isfinite().all(), f"{name} must be finite, but holds NaN or infinity", NotFinite)
        require(not unit or ((torch.linalg.vector_norm(z, dim=1) - 1).abs() < 1e-3).all(),
                f"{name} must hold unit vectors: divide each row by its length first")


def check_labels(**pairs: tuple[Tensor, Tensor]) -> None:
    """There must be a label for each of the rows, one at least. name=(labels, rows)."""
    for name, (labels, rows) in pairs.items():
        require(labels.shape == rows.shape[:1] and len(rows) > 0, f"{name} must be a label for each of the rows")


# ── 3  MEMORY BANK ────────────────────────────────────────────────────────────────────────────── paper, section 5.1 ──


class MemoryBank:
    """g(x_j) of every training image j: a moving average of its embeddings, a unit row each, (N, dim).

    size: N. momentum: the share of the old row that stays. init: "random", rows drawn evenly from the sphere with
    `generator`, or the embeddings (N, dim) to begin with."""

    def __init__(self, size: int, dim: int = 128, momentum: float = 0.5, init: str | Tensor = "random",
                 generator: torch.Generator | None = None, device: torch.device | str = "cpu"):
        require(0 <= momentum <= 1, "momentum must lie in [0, 1]")
        if isinstance(init, str) and init == "random":
            init = torch.randn(size, dim, generator=generator, dtype=torch.float32)
        require(torch.is_tensor(init) and init.shape == (size, dim),
                f'init must be "random" or a tensor of shape ({size}, {dim})')
        with torch.inference_mode(False):  # a bank made inside a caller's inference mode must learn outside it
            self.rows = F.normalize(init.detach().float(), dim=1).to(device)
        require(((self.rows.norm(dim=1) - 1).abs() < 1e-3).all(), "init must hold finite rows, none all zeros")
        self.momentum = momentum

    def similarity(self, z: Tensor) -> Tensor:
        """s_ij = f(x_i)·g(x_j). z: (B, dim). Returns (B, N), float32 whatever the network's precision."""
        return inner_products(z.float(), self.rows)

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor) -> None:
        """Move the rows `index` (B,) towards the embeddings z (B, dim) of their images, back on the sphere."""
        old = self.rows[index]
        require(z.shape == old.shape, f"z must be {tuple(old.shape)}, an embedding for each index")
        mixed = self.momentum * old + (1 - self.momentum) * z.float()
        self.rows[index] = F.normalize(mixed, dim=1)


# ── 4  NETWORK ────────────────────────────────────────────────────────────────────────────────── paper, section 5.1 ──


class Block(nn.Module):
    """A residual block (He et al., CVPR 2016): (B, channels, s, s) -> (B, out, s/stride, s/stride)."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            # As a 1x1 convolution of stride 2, whose gradient fails on some CPUs (uxlfoundation/oneDNN#6035).
            self.shortcut = nn.Sequential(nn.AvgPool2d(1, stride), nn.Conv2d(channels, out, 1, bias=False),
                                          nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """f(x): ResNet-18 with a 3x3 first convolution of stride 1 and no max-pooling, for images of 32x32. width:
    channels of the first stage; dim: of the embedding; bfloat16: run in bfloat16. Convolutions start He-normal
    (fan-out), the head Xavier-uniform (authors' code)."""

    def __init__(self, width: int = 64, dim: int = 128, bfloat16: bool = False):
        super().__init__()
        stages = (width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2)
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
        with matmul_precision(x.device, self.in_bfloat16):
            return self.stages(self.stem(x)).mean(dim=(2, 3)).float()

    def project(self, h: Tensor) -> Tensor:
        """(B, dim) float32: the embedding before it is normalised."""
        with matmul_precision(h.device, self.in_bfloat16):
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

    def sha256(self) -> str:
        parts = (repr(tuple(tensor.shape)).encode() + tensor.cpu().numpy().tobytes() for tensor in self[1:])
        return hashlib.sha256(b"".join(parts)).hexdigest()


DOWNLOADS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100,
             "svhn": torchvision.datasets.SVHN}


def load_dataset(dataset: str, root: str | Path = "data", size: int = 32) -> Data:
    """The dataset of that name, downloaded into `root` unless it is there; or a folder of images."""
    if dataset in DOWNLOADS:
        require(size == 32, f"{dataset} has images of 32x32: give --size 32", BadInput)
        return load_download(dataset, Path(os.path.expanduser(root)))
    return load_waves(size) if dataset == "waves" else load_folder(dataset, size)


def load_download(name: str, root: Path) -> Data:
    """CIFAR-10, CIFAR-100 or SVHN through torchvision, which checks the MD5 sums."""
    tensors, lock = [], filelock.FileLock(root / ".download.lock", mode=0o666)  # for all users
    socket.setdefaulttimeout(socket.getdefaulttimeout() or 30)  # torchvision sets none, and would wait for ever
    try:
        root.mkdir(parents=True, exist_ok=True)
        # One process downloads, the others wait. A folder that can only be read needs no lock.
        with lock if os.access(root, os.W_OK) else contextlib.nullcontext():
            for part in ("train", "test"):
                which = {"split": part} if name == "svhn" else {"train": part == "train"}
                files = DOWNLOADS[name](root, download=True, **which)
                images = torch.as_tensor(files.data)  # CIFAR: (n, 32, 32, 3); SVHN: (n, 3, 32, 32)
                tensors += [images if name == "svhn" else images.permute(0, 3, 1, 2).contiguous(),
                            torch.as_tensor(files.labels if name == "svhn" else files.targets)]
    except Exception as error:  # of the file system, the network, the archive
        broken = root / getattr(DOWNLOADS[name], "base_folder", "*_32x32.mat")
        raise BadInput(f"cannot load {name} ({error}): mend that, or run the command again; if it stays, remove "
                       f"{broken}, or put the files into {root} (--data), or give a --dataset: a folder, or waves")
    return Data(name, *tensors)


def load_folder(folder: str | Path, size: int = 32) -> Data:
    """A folder with train/<class>/* and test/<class>/*: images of any size, upright (EXIF), the shorter side
    resized to `size` (antialiased), the middle square cut out. What is hidden is left out."""
    folder, tensors = Path(os.path.realpath(os.path.expanduser(folder))), []
    square = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])

    def wanted(path: str) -> bool:
        hidden = "/." in Path(path).as_posix().removeprefix(folder.as_posix())
        return not hidden and path.lower().endswith(IMG_EXTENSIONS)
    try:
        train, test = (sorted(entry.name for entry in os.scandir(folder / part)
                              if entry.is_dir() and entry.name[0] != ".") for part in ("train", "test"))
        require(len(train) > 1 and set(test) <= set(train), f"{folder}/train needs two classes, and those of test")
        files = [make_dataset(folder / part, {name: train.index(name) for name in names}, is_valid_file=wanted)
                 for part, names in (("train", train), ("test", test))]
    except (OSError, ValueError) as error:  # no folder, no class, a class without images
        raise BadInput(f"{error}: a dataset is {', '.join(DOWNLOADS)}, waves, or a folder with images in "
                       "train/<class>/ and test/<class>/")
    for part in files:
        images = [square(read_image(path)) for path, _ in progress(part, "reading images")]
        tensors += [torch.stack(images), torch.tensor([label for _, label in part])]
    # The name stands in tables and file names, where it must not be that of a dataset.
    name = re.sub(r"[^\w .-]", "_", folder.name)[:80] or "images"
    return Data(name + "-folder" * (name in (*DOWNLOADS, "waves")), *tensors)


def read_image(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            require(image.mode[0] not in "IF", "it has more than 8 bits a channel")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds on a broken file
        raise BadInput(f"cannot read the image {path} ({error!r}): mend or remove it")


def rank_in_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) each: 0 for the first image of its class, 1 for the second, …; and how many images its class has."""
    _, label, count = labels.unique(return_inverse=True, return_counts=True)
    by_class = label.argsort(stable=True)
    first = count.cumsum(0) - count  # where each class begins in `by_class`
    rank = torch.empty_like(label)
    rank[by_class] = torch.arange(len(labels)) - first[label[by_class]]
    return rank, count[label]


def balanced_order(labels: Tensor, seed: int = 0) -> Tensor:
    """A random order of the images: a prefix has as many of each class, to within one, until a class runs out."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank, _ = rank_in_class(labels[shuffled])
    return shuffled[rank.argsort(stable=True)]


def hold_out(labels: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The images to keep, and a fifth of each class to hold out, one at least; a class of one keeps it."""
    order = balanced_order(labels, seed)
    rank, count = rank_in_class(labels[order])
    held_out = (count > 1) & (rank < (count // 5).clamp(min=1))
    return order[~held_out], order[held_out]


# The augmentation: first what is drawn, on the CPU, so that all devices draw alike; then what is done, where the
# images are, to a whole batch at once.

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
        at_once = torch.device(device).type == "cuda"  # on Apple's MPS it may come out wrong (pytorch#139550)
        return Augmentation(*(value.to(device, non_blocking=at_once) for value in vars(self).values()))


def draw_augmentation(count: int, generator: torch.Generator, size: int = 32, flip: bool = True) -> Augmentation:
    """Draw what to do to `count` images: RandomResizedCrop(size, scale=(0.2, 1)), ColorJitter(0.4, 0.4, 0.4, 0.4),
    horizontal flip, RandomGrayscale(0.2), distributed as in torchvision. A crop that does not fit is drawn again,
    ten times at most; then the whole image is taken."""
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
    # A flip is drawn also where it is not wanted, so that the later draws stay the same.
    return Augmentation(crop=torch.stack([top, left, height, width], dim=1), flip=(rand() < 0.5) & flip,
                        order=rand(4).argsort(dim=1), factor=factor, grey=rand() < 0.2)


def augment(images: Tensor, drawn: Augmentation) -> Tensor:
    """Do to each image, uint8 (B, 3, s, s), what was drawn for it. Returns float32 (B, 3, s, s) in [0, 1]: what
    torchvision's transforms give on float images. Its PIL pipeline rounds to 256 levels after every step."""
    require(images.dtype == torch.uint8, "images must be uint8, 0 to 255")
    if images.device.type != "cpu":
        return augment_at_once(images, drawn)
    parts = range(0, len(images), 64)  # on a CPU, parts that stay in its cache are faster
    return torch.cat([augment_at_once(images[i:i + 64], drawn[i:i + 64]) for i in parts])


def augment_at_once(images: Tensor, drawn: Augmentation) -> Tensor:
    size = images.shape[-1]
    top, left, height, width = drawn.crop.float().unbind(dim=1)
    rows, columns = resize_weights(top, height, size), resize_weights(left, width, size)
    columns = torch.where(drawn.flip[:, None, None], columns.flip(1), columns)
    with matmul_precision(images.device):
        x = rows[:, None] @ (images.float() / 255)  # (B, 3, size, size)
        # One product an image: its channels share `columns`.
        x = (x.flatten(1, 2) @ columns.transpose(1, 2)).unflatten(1, (3, size))
    # Each image has its own order of four colour operations, say contrast, hue, brightness, saturation. Hue is
    # expensive and done once for all: blends with place < hue_place (contrast) run before it, others after.
    hue_place = (drawn.order == HUE).int().argmax(dim=1)  # (B,)
    for place in range(3):
        x = blend(x, drawn, place, place < hue_place)
    x = shift_hue(x, drawn.factor[:, HUE])
    for place in range(1, 4):
        x = blend(x, drawn, place, place > hue_place)
    return torch.where(drawn.grey[:, None, None, None], transforms.functional.rgb_to_grayscale(x), x)


def resize_weights(start: Tensor, length: Tensor, size: int) -> Tensor:
    """(B, size, size): row i holds the weights of the pixels that make pixel i of the enlarged crop (bilinear)."""
    pixel = torch.arange(size, device=start.device, dtype=torch.float32)
    at = (pixel + 0.5) * (length / size)[:, None] - 0.5  # in the crop; its own pixel centres are 0 … length - 1
    at = start[:, None] + torch.minimum(at.clamp(min=0), length[:, None] - 1)
    return (1 - (at[:, :, None] - pixel).abs()).clamp(min=0)


def blend(x: Tensor, drawn: Augmentation, place: int, active: Tensor) -> Tensor:
    """Blend towards black (brightness), mean grey (contrast) or each pixel's grey (saturation), where active."""
    operation = drawn.order[:, place]
    factor = drawn.factor.gather(1, operation[:, None])[:, 0]
    operation, factor = operation[:, None, None, None], torch.where(active, factor, 1.0)[:, None, None, None]
    grey = transforms.functional.rgb_to_grayscale(x)  # (B, 1, s, s)
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
    # HSV to RGB: a channel is V - C · max(0, min(a, 4 - a, 1)), a = (hue + 5) mod 6 for red, + 3 for green, + 1 for
    # blue: each falls from V to V - C and rises again, a third of the circle after the one before.
    corner = torch.arange(5.0, 0.0, -2.0, device=x.device, dtype=torch.float32)[:, None, None]  # 5, 3, 1
    angle = corner + hue[:, None]  # (B, 3, s, s)
    angle -= (angle / 6).floor_().mul_(6)  # modulo 6, at a third of what % costs
    share = torch.minimum(angle, 4 - angle).clamp_(0, 1)
    return share.mul_(chroma[:, None]).neg_().add_(value[:, None])


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, for all datasets (authors' code)


def normalise(x: Tensor) -> Tensor:
    """Views as the network wants them: the authors' mean and standard deviation, channels last."""
    # Made where x is: a GPU would have to wait for a copy from the host.
    mean, std = (torch.cat([x.new_full((1, 1, 1), value) for value in values]) for values in (MEAN, STD))
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def load_waves(size: int = 32, train: int = 4000, test: int = 2000) -> Data:
    """Ten classes of images made by code, for those without a dataset: one to five waves that cross, soft or hard.
    A crop still shows which. All else is nuisance: place, scale, rotation, colours, contrast and noise."""
    n, rng = train + test, torch.Generator().manual_seed(0)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=rng, dtype=torch.float64)

    labels = torch.arange(n) % 10
    waves, hard = (1 + labels // 2).double()[:, None, None], (labels % 2 == 1)[:, None, None]
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    y, x = axis[:, None], axis[None, :]
    angle, frequency = uniform(0, 2 * math.pi, 1, 1), uniform(5, 14, 1, 1)
    # In double precision, so that no kind of CPU rounds a pixel to another level.
    pattern = torch.zeros(n, size, size, dtype=torch.float64)
    for wave in range(5):
        turn = angle + math.pi * wave / waves
        phase = frequency * (x * turn.cos() + y * turn.sin()) + uniform(0, 2 * math.pi, 1, 1)
        pattern += phase.cos() * (wave < waves) / waves.sqrt()
    pattern = torch.where(hard, pattern.sign(), pattern)[:, None]  # (n, 1, size, size)
    colour = uniform(0.3, 0.7, 3, 1, 1)
    contrast = uniform(0.15, 0.3, 1, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    images = colour + contrast * pattern + uniform(-0.05, 0.05, 3, size, size)
    images = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    return Data("waves", images[:train], labels[:train], images[train:], labels[train:])


# ── 6  TRAINING ───────────────────────────────────────────────────────────────────────────────── paper, section 5.1 ──

PROTOCOL_VERSION = 1  # goes up when the same settings would give other results, but for rounding
NO_MEMORY = "out of memory|not enough memory|allocate memory"  # how PyTorch says it

# Each loss, and the settings that it needs. A new one: a row here, its name in Config.loss, new settings as fields.
LOSSES = {
    "contrastive": (contrastive_loss, ("tau",)),
    "hard": (contrastive_loss, ("tau", "k")),
    "simple": (simple_loss, ()),
    "hard-simple": (simple_loss, ("k",)),
    "triplet": (triplet_loss, ()),
}


@dataclass
class Config:
    """The settings of one run; the defaults are the paper's protocol, `make_config` fills in a preset. In brackets
    stands where a value comes from. A setting that is wrong, or that the loss has no use for, raises BadInput."""
    loss: Literal["contrastive", "hard", "simple", "hard-simple", "triplet"] = "contrastive"  # [Eqs. 1, 3, 6, 9]
    tau: float | None = None  # temperature of contrastive and hard [paper, 5]; None: 0.3 [ours]
    dataset: str = "cifar10"  # or cifar100, svhn, waves (made by code), a folder with train/<class>, test/<class>
    preset: Literal["paper", "narrow", "mini", "quick", "smoke"] = "paper"  # fills the rest; none given: paper or mini
    seed: int = 0  # every draw of the training follows from it [paper: one run each]
    epochs: int = 200  # passes over the training images [paper, 5.1]
    batch_size: int = 128  # images of a step; the last step of an epoch may have fewer [paper, 5.1]
    size: int = 32  # height and width of the images, a multiple of 8 [paper, 5.1]
    width: int = 64  # channels of the first stage of ResNet-18 [paper, 5.1]
    dim: int = 128  # dimensions of the embedding [paper, 5.1]
    lr: float = 0.03  # learning rate [paper, 5.1; mini's: ours, by held-out labels]
    momentum: float = 0.9  # of SGD [paper, 5.1]
    weight_decay: float = 5e-4  # of SGD, on all parameters [paper, 5.1]
    schedule: Literal["step", "cosine"] = "step"  # gamma at each milestone [paper], or a cosine to 0 [ours]
    milestones: tuple = (160, 190)  # in epochs, whatever `epochs` is; step schedule [paper, 5.1]
    gamma: float = 0.1  # factor at each milestone; step schedule [paper, 5.1]
    warmup: float = 0.0  # epochs over which the learning rate rises from 0 [ours]
    bank_momentum: float = 0.5  # share of a bank row that an update keeps [authors' code]
    bank_init: Literal["random", "embeddings"] = "random"  # [authors' code]; embeddings: the network's, centred [ours]
    k: int | None = None  # nearest negatives of the hard losses; None: the preset's, see NEGATIVES [paper, 5.2]
    subset: int | None = None  # train on at most that many images, of each class as many [ours]
    test_subset: int | None = None  # test on at most that many images, likewise [ours]
    flip: bool = True  # horizontal flips in pretraining; evaluation has them always [paper, not its code]
    match_step: bool = False  # multiply the loss by tau, so that the step does not grow as 1/tau [ours]
    # Of the network; the loss has float32. auto: bfloat16 on a GPU that has it, else float32 [ours]
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # a GPU may take TF32 in float32's convolutions
    probe_lr: float = 30.0  # of the linear probe [paper, 5.1]; 0.3 suits small widths [ours, by unused images]
    eval_every: int = 10  # epochs between two looks at kNN, uniformity, tolerance; 0: none [ours]
    # Where it runs; no part of the record.
    device: str = "auto"  # cuda, else mps, else cpu; or cpu, cuda, cuda:1, mps, ...
    threads: int | None = None  # of the CPU; None: as PyTorch chooses
    data: str = "data"  # folder where downloads are or go
    out: str = "runs"  # folder of records and checkpoints: <out>/<preset>/<dataset>/
    graph: bool = True  # on a CUDA GPU, launch a step as one graph
    force: bool = False  # begin again: delete the run's checkpoint and record first

    def __post_init__(self):
        # Each setting alone; 1 becomes 1.0 where a float is wanted.
        self.milestones = tuple(self.milestones)
        for name, hint in get_type_hints(Config).items():
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            if get_origin(hint) is Literal:
                require(value in kinds, f"{name} must be one of {', '.join(kinds)}, not {value!r}", BadInput)
                continue
            fits = isinstance(value, kinds) or (kinds[0] is float and type(value) is int)
            require(fits and value != "", f"{name} must be {kinds[0].__name__}, not {value!r}", BadInput)
            if kinds[0] in (int, float) and value is not None:
                least = "at least" if name in MAY_BE_0 else "above"
                in_range = 1e-30 <= value < 2 ** 31 or (value == 0 and name in MAY_BE_0)
                require(in_range, f"{name} must be {least} 0 and below 2^31, not {value}", BadInput)
                setattr(self, name, kinds[0](value))
        require(self.size % 8 == 0 and self.size > 8, "size must be a multiple of 8, 16 or more", BadInput)
        require(max(self.momentum, self.bank_momentum) <= 1, "momentum, bank_momentum: at most 1", BadInput)
        require([0, *self.milestones] == sorted({0, *self.milestones}), "milestones must rise, from 1 on", BadInput)
        _, needs = LOSSES[self.loss]
        for name, usual in (("tau", 0.3), ("k", NEGATIVES[self.preset])):
            value = getattr(self, name)
            require(name in needs or value is None, f"the {self.loss} loss has no {name}: leave it out", BadInput)
            setattr(self, name, usual if name in needs and value is None else value)
        for name in needs:
            require(getattr(self, name, None) is not None, f"the {self.loss} loss needs a {name}", BadInput)
        require(self.tau or not self.match_step, f"match_step: the {self.loss} loss has no tau", BadInput)
        ignored = self.schedule == "cosine" and (self.milestones, self.gamma) != (Config.milestones, Config.gamma)
        require(not ignored, "milestones and gamma are of schedule step: leave them out with cosine", BadInput)

    def recorded(self) -> dict:
        """The settings that the result depends on: what the record holds."""
        return {name: value for name, value in vars(self).items()
                if name not in ("device", "threads", "data", "out", "graph", "force")}


MAY_BE_0 = ("seed", "momentum", "weight_decay", "gamma", "warmup", "bank_momentum", "eval_every")
SMALL = dict(schedule="cosine", warmup=3.0, bank_init="embeddings", probe_lr=0.3)
PRESETS = {
    "paper": {},  # section 5.1; for a GPU
    "narrow": dict(SMALL, width=16, epochs=40, lr=0.1),  # all images: two to three hours on a core
    "mini": dict(SMALL, width=16, epochs=60, lr=0.1, batch_size=64, subset=5000),  # a quarter of an hour
    # A demonstration without data, two minutes on a core; and seconds, for tests.
    "quick": dict(SMALL, width=8, epochs=160, lr=0.01, batch_size=16, subset=500, test_subset=1000, eval_every=0,
                  dataset="waves", size=24),
    "smoke": dict(SMALL, width=4, dim=16, epochs=3, lr=0.03, warmup=1.0, batch_size=16, subset=100,
                  test_subset=100, eval_every=2, dataset="waves"),
}
NEGATIVES = {"paper": 4095, "narrow": 4095, "mini": 409, "quick": 200, "smoke": 8}  # k, where the loss has one


def make_config(preset: str | None = None, **given) -> Config:
    """The preset's settings, but for those given. No preset: paper where the device is a CUDA GPU, else mini."""
    if preset is None:
        preset = "paper" if pick_device(given.get("device", "auto")).type == "cuda" else "mini"
        say(f"no preset given: {preset} (paper, the paper's own protocol, is for a CUDA GPU)")
    return Config(**{**PRESETS.get(preset, {}), **given, "preset": preset})


def learning_rate(config: Config, at: float) -> float:
    """The learning rate at a time, in epochs: 3.5 is half-way through the fourth."""
    rise = min(1.0, at / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        return config.lr * rise * (1 + math.cos(math.pi * at / config.epochs)) / 2
    return config.lr * rise * config.gamma ** sum(at >= milestone for milestone in config.milestones)


def generator(*key) -> torch.Generator:
    """Random numbers that depend on the key alone (seed, purpose, epoch, step), so a run resumes with the same."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def fit(config: Config, data: Data, checkpoint: Path, identity: dict) -> tuple[ResNet18, dict]:
    """Train as in section 5.1, from the checkpoint or else from the start. Returns the network, and the run: the
    metrics before training, an entry for each epoch, the seconds."""
    images, device = data.train_images, data.train_images.device
    model, optimiser, bank, run = start(config, data, checkpoint, identity)
    done, spent = len(run["history"]), run["seconds"]
    steps = (config.epochs - done) * math.ceil(len(images) / config.batch_size)
    step = GraphedStep(device, steps) if in_graph(config, device) else train_step
    began = last_save = time.perf_counter()
    for epoch in range(done, config.epochs):
        shuffled = torch.randperm(len(images), generator=generator(config.seed, "order", epoch))
        batches = shuffled.to(device).split(config.batch_size)
        losses = torch.zeros(len(batches), device=device)  # a look at them would make a GPU wait
        for batch, index in enumerate(progress(batches, f"epoch {epoch + 1}")):
            optimiser.param_groups[0]["lr"] = learning_rate(config, epoch + batch / len(batches))
            rng = generator(config.seed, "views", epoch, batch)
            drawn = draw_augmentation(len(index), rng, config.size, config.flip)
            losses[batch] = step(model, bank, optimiser, images, index, drawn, config)
        for value in (losses, bank.rows, *model.state_dict().values()):
            require(value.isfinite().all(), f"loss, weights or bank are not finite in epoch {epoch + 1}", NotFinite)
        # The last, smaller batch weighs in the mean like the others; lr is that of the epoch's first step.
        mean = losses.cpu().double().mean().item()
        entry = {"epoch": epoch + 1, "loss": mean, "lr": learning_rate(config, epoch)}
        if config.eval_every and (epoch + 1) % config.eval_every == 0 and epoch + 1 < config.epochs:
            entry |= evaluate(model, data, config, in_full=False)  # nothing is chosen by it
        run["history"].append(entry)
        elapsed = time.perf_counter() - began
        run["seconds"] = spent + elapsed
        if epoch + 1 == config.epochs or time.perf_counter() - last_save > CHECKPOINT_SECONDS:
            save_checkpoint(checkpoint, {**identity, "run": run, "model": model.state_dict(), "bank": bank.rows,
                                         "optimiser": optimiser.state_dict()})
            last_save = time.perf_counter()
        pace = elapsed / (epoch + 1 - done)  # seconds an epoch, since this process began
        line = "  ".join(f"{key} {value:.5g}" for key, value in entry.items())
        say(f"{line}  {len(images) / pace:.0f} images/s  {(config.epochs - epoch - 1) * pace / 60:.0f} min left")
    return model, run


def start(config: Config, data: Data, checkpoint: Path, identity: dict):
    """Network, optimiser, bank and run as the checkpoint left them; else as the seed draws them."""
    images, began = data.train_images, time.perf_counter()
    N, device = len(images), images.device
    say(f"{loss_name(config.loss, config.tau)}, {data.name} ({N:,} training images), preset {config.preset}, "
        f"seed {config.seed}: {config.epochs} epochs on {device}, threads: {torch.get_num_threads()}")
    model, optimiser = make_model(config, device)
    if checkpoint.exists():
        saved = load_checkpoint(checkpoint)
        check_same_run(checkpoint, saved, identity)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        bank = MemoryBank(N, config.dim, config.bank_momentum, saved["bank"], device=device)
        bank.rows = saved["bank"].to(device)  # to the bit: normalising again could move the last digit
        say(f"going on from {checkpoint}: {len(saved['run']['history'])} of {config.epochs} epochs done")
        return model, optimiser, bank, saved["run"]
    init = centre_head(model, images, config) if config.bank_init == "embeddings" else "random"
    bank = MemoryBank(N, config.dim, config.bank_momentum, init, generator(config.seed, "bank"), device)
    say("evaluating the untrained network")
    untrained = evaluate(model, data, config)
    return model, optimiser, bank, {"untrained": untrained, "history": [], "seconds": time.perf_counter() - began}


def train_step(model: nn.Module, bank: MemoryBank, optimiser: torch.optim.Optimizer, images: Tensor,
               index: Tensor, drawn: Augmentation, config: Config) -> Tensor:
    """One step: images -> views -> embeddings -> similarities -> loss -> weights -> bank. Returns the loss, ()."""
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
    function, needs = LOSSES[config.loss]
    loss = function(similarity, positive, **{name: getattr(config, name) for name in needs})
    return config.tau * loss if config.match_step else loss


class GraphedStep:
    """`train_step` on a CUDA GPU, launched as one graph: one by one its kernels take longer to launch than to run.

    A graph repeats kernels on the addresses and with the numbers that they were captured with. What changes from
    step to step is copied to where the graph reads it: the batch's indices, what was drawn, the learning rate.
    Weights, momenta, statistics, bank and images stay where they are. The first steps run as they are, so that
    there are momenta; so does a batch of fewer images. steps: how many there will be, for the forecast."""
    WARM_UP, FORECAST = 3, 53  # steps before the capture, and before the forecast

    def __init__(self, device: torch.device, steps: int = 0):
        self.rate = torch.zeros((), dtype=torch.float32, device=device)  # of the type that the fused kernel reads
        self.stream = torch.cuda.Stream(device)  # one for all steps: a capture must not be on the default stream
        self.taken, self.steps, self.graph = 0, steps, None

    def __call__(self, model, bank, optimiser, images, index, drawn, config) -> Tensor:
        """Arguments and value as of `train_step`; the value is overwritten by the next step."""
        for group in optimiser.param_groups:
            group["lr"] = self.rate.fill_(group["lr"])
        outer = torch.cuda.current_stream(images.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            if self.taken < self.WARM_UP or len(index) < config.batch_size:
                loss = train_step(model, bank, optimiser, images, index, drawn, config)
            else:
                if self.graph is None:
                    self.capture(model, bank, optimiser, images, index, drawn, config)
                for held, new in zip((self.index, *vars(self.drawn).values()), (index, *vars(drawn).values())):
                    held.copy_(new, non_blocking=True)
                self.graph.replay()
                loss = self.loss
        outer.wait_stream(self.stream)
        self.taken += 1
        if self.graph and self.taken == self.FORECAST < self.steps:
            self.forecast()
        return loss

    def capture(self, model, bank, optimiser, images, index, drawn, config) -> None:
        """Record the kernels of a step; run none."""
        self.index, self.drawn, self.graph = index.clone(), drawn.to(images.device), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.loss = train_step(model, bank, optimiser, images, self.index, self.drawn, config)
        except RuntimeError as error:
            first = error.__context__ or error  # the end of a capture that has failed raises anew
            hint = "" if re.search(NO_MEMORY, str(first)) else ": --no-graph launches a step kernel by kernel"
            raise RuntimeError(f"cannot capture a step as one graph ({first}){hint}")
        self.began = time.perf_counter()

    def forecast(self) -> None:
        """Say once what the steps that are left will take, by those since the capture."""
        self.stream.synchronize()
        left, pace = self.steps - self.taken, (time.perf_counter() - self.began) / (self.taken - self.WARM_UP)
        gib = torch.cuda.max_memory_reserved(self.rate.device) / 2 ** 30
        say(f"a step is one graph: {left} steps are left, {left * pace / 60:.1f} min, {gib:.1f} GiB of the GPU")


def in_graph(config: Config, device: torch.device) -> bool:
    return config.graph and device.type == "cuda"


def in_bfloat16(config: Config, device: torch.device) -> bool:
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.precision == "bfloat16" or (config.precision == "auto" and has_it)


def make_model(config: Config, device: torch.device) -> tuple[ResNet18, torch.optim.SGD]:
    """The network as its seed draws it, the same on every device, and its optimiser."""
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU, so that all devices start alike
        torch.set_rng_state(generator(config.seed, "network").get_state())
        model = ResNet18(config.width, config.dim, in_bfloat16(config, device))
    model = model.to(device, memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum,
                                  weight_decay=config.weight_decay, fused=device.type in ("cpu", "cuda"))


@torch.no_grad()
def centre_head(model: ResNet18, images: Tensor, config: Config) -> Tensor:
    """Set the head's bias so that its untrained outputs have zero mean; return them, (N, dim), not normalised.
    Otherwise all images lie in one narrow cone, which a loss that pushes all negatives alike can
    hardly leave. The pass over augmented views, in training mode, also sets batch normalisation's statistics."""
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
    """Features h (n, 8·width) and embeddings z (n, dim) of a view of each image, uint8 (n, 3, s, s). view: from
    uint8 to float32 in [0, 1]; not given, the plain image."""
    require(images.dtype == torch.uint8, "images must be uint8, 0 to 255")
    training = model.training
    model.eval()
    parts = [model.features(normalise(view(batch))) for batch in progress(images.split(256), "embedding")]
    z = torch.cat([F.normalize(model.project(part), dim=1) for part in parts])
    model.train(training)
    require((z.norm(dim=1) > 0.5).all(), "embeddings vanish or overflow", NotFinite)
    h = torch.cat(parts)
    return (h.cpu(), z.cpu()) if images.device.type == "mps" else (h, z)  # MPS lacks the metrics' float64


def evaluate(model: ResNet18, data: Data, config: Config, in_full: bool = True) -> dict:
    """The metrics of a network, by name; not in full: only the three that need no probe and no views."""
    train_h, train_z = embed(model, data.train_images)
    test_h, test_z = embed(model, data.test_images)
    train_y, test_y = data.train_labels.to(train_h.device), data.test_labels.to(test_h.device)
    metrics = {"knn": knn_accuracy(train_z, train_y, test_z, test_y), "uniformity": uniformity(test_z),
               "tolerance": tolerance(test_z, test_y)}
    if not in_full:
        return metrics
    views = []
    for name in ("view 1", "view 2"):
        rng = generator(config.seed, name)
        view = lambda x: augment(x, draw_augmentation(len(x), rng, x.shape[-1]).to(x.device))
        views.append(embed(model, data.test_images, view)[1])
    mirror_h, _ = embed(model, data.train_images.flip(-1))
    h = torch.stack([train_h, mirror_h])  # (2, N, 8·width)
    kept, held_out = (index.to(h.device) for index in hold_out(data.train_labels.cpu()))
    probe = functools.partial(linear_probe, lr=config.probe_lr, seed=config.seed)
    return metrics | {
        "accuracy": probe(h, train_y, test_h, test_y),  # learnt from plain and mirrored training images
        # Of a fifth of the training images, whose labels this probe has not seen: the number to choose a tau by.
        "accuracy_heldout": probe(h[:, kept], train_y[kept], train_h[held_out], train_y[held_out]),
        "alignment": alignment(*views),  # of two augmented views of each test image
        # Of each plain test image, against one augmented view of every test image.
        "profile": similarity_profile(test_z, views[0], torch.arange(len(test_z), device=test_z.device)).tolist(),
    }


def take_subset(data: Data, config: Config) -> Data:
    """All images, or the first `subset`, in an order that is balanced by class and the same for every seed."""
    train = balanced_order(data.train_labels)[:config.subset]
    test = balanced_order(data.test_labels)[:config.test_subset]
    train_y, test_y = data.train_labels[train], data.test_labels[test]
    require(min(len(train), len(test)) >= 10, f"{data.name}: at least 10 images are needed in each part", BadInput)
    require((config.k or 0) < len(train) - 1, f"--k {config.k} drops none of {len(train) - 1} negatives", BadInput)
    enough = torch.isin(test_y, train_y).all() and len(hold_out(train_y)[1]) > 0
    require(enough, f"{data.name}: {len(train)} training images (--subset) are too few: each tested class needs "
            "one, and one class two", BadInput)
    return Data(data.name, data.train_images[train], train_y, data.test_images[test], test_y)


def pick_device(name: str) -> torch.device:
    """The device of that name; auto: cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except Exception as error:  # PyTorch raises many kinds
        raise BadInput(f"device {name!r} can't be used: {error}".split("\n")[0])


# ── 7  RESULT ──────────────────────────────────────────────────────────────────────────── paper, section 5, Table 1 ──

# The paper's Table 1, without ImageNet-100 (ResNet-50): linear accuracy in %, uniformity, tolerance of each cell.
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
# What the authors published beside it: linear accuracy of the ordinary loss at more temperatures.
PAPER_ACCURACY = {
    "cifar10": {0.05: 76.10, 0.1: 81.82, 0.2: 83.78, 0.4: 83.22, 0.5: 82.54, 0.6: 82.97, 0.8: 82.67, 0.9: 81.97},
    "cifar100": {0.05: 49.80, 0.1: 52.46, 0.2: 56.05, 0.4: 55.47, 0.5: 54.17, 0.6: 53.05, 0.8: 50.08},
}
TABULATED = ("accuracy", "uniformity", "tolerance")


def paper_values(dataset: str, loss: str, tau: float | None) -> dict[str, float | None]:
    """The paper's values of a cell, or None; a folder called cifar10-… stands beside CIFAR-10."""
    dataset = dataset.split("-")[0]
    more = PAPER_ACCURACY.get(dataset, {}).get(tau) if loss == "contrastive" else None
    return dict(zip(TABULATED, PAPER.get(dataset, {}).get((loss, tau), (more, None, None))))


MEANING = {"accuracy": "linear probe, last epoch, %", "knn": "200 nearest, %", "uniformity": "larger = more uniform",
           "tolerance": "mean similarity in a class", "alignment": "mean squared distance of two views"}


def show(record: dict, path: Path) -> None:
    """The result, beside the paper's where the paper has that cell."""
    config, final = record["config"], record["final"]
    departs = path.stem != f"{loss_name(config['loss'], config['tau'])}_seed{config['seed']}"  # from the preset
    paper = {} if departs else paper_values(config["dataset"], config["loss"], config["tau"])
    say(f"{'':12}{'ours':>9}{'paper':>9}{'untrained':>12}")
    for key, meaning in MEANING.items():
        ours, untrained = ("-" if metrics[key] is None else f"{metrics[key]:.{2 if '%' in meaning else 3}f}"
                           for metrics in (final, final["untrained"]))
        say(f"{key:12}{ours:>9}{paper.get(key) or '-':>9}{untrained:>12}  {meaning}")
    say(f"preset {config['preset']}, {config['dataset']}: {record['images']['train']:,} training images, "
        f"{config['epochs']} epochs{'; the paper: all images, 200 epochs' if any(paper.values()) else ''}")
    say(f"record: {path}")


# ── 8  FILES AND COMMAND ─────────────────────────────────────────────────── nothing of the paper: you may stop here ──

CHECKPOINT_SECONDS = 60.0  # at least so many between two checkpoints, each at an epoch's end; the last comes at once


def train(config: Config) -> dict:
    """Train, evaluate, write the record and return it; what is done already is not done again. Sets PyTorch's
    threads. Raises BadInput, NotFinite, OSError; filelock.Timeout where another process is at work on this run."""
    device = pick_device(config.device)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    data = take_subset(load_dataset(config.dataset, config.data, config.size), config)
    config = dataclasses.replace(config, dataset=data.name)  # a folder's own name: no path in the record
    path = Path(os.path.expanduser(config.out), f"{run_path(config, data.name)}.json")
    checkpoint = path.with_suffix(".pt")
    identity = {"protocol_version": PROTOCOL_VERSION, "config": as_json(config.recorded()),
                "data_sha256": data.sha256()}
    path.parent.mkdir(parents=True, exist_ok=True)  # an error here is better than after hours
    with hold_lock(path.with_suffix(".lock")):
        if config.force:
            checkpoint.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        if path.exists():
            record = read_record(path)
            check_same_run(path, record, identity)
            say(f"{path} is there already (--force runs it again)")
        else:
            machine = environment(device, in_bfloat16(config, device), in_graph(config, device))
            data = Data(data.name, *(tensor.to(device) for tensor in data[1:]))
            model, run = fit(config, data, checkpoint, identity)
            began = time.perf_counter()
            say("trained; evaluating")
            final = {**evaluate(model, data, config), "untrained": run["untrained"]}
            record = as_json({
                **identity, "final": final, "history": run["history"], "environment": machine,
                "images": {"train": len(data.train_labels), "test": len(data.test_labels)},
                "timing": {"seconds": run["seconds"] + time.perf_counter() - began}})
            record["sha256"] = record_sha256(record)
            write_whole(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        show(record, path)
        return record


def loss_name(loss: str, tau: float | None) -> str:
    return loss + (f"_tau{tau!r}" if tau else "")


def run_path(config: Config, dataset: str) -> Path:
    """<preset>/<dataset>/<loss>[_tau<tau>][_<field>-<value>…]_seed<seed>: all that departs from the preset."""
    same = {field: getattr(config, field) for field in ("loss", "tau", "seed", "dataset")}
    usual = make_config(config.preset, **same).recorded()
    name = loss_name(config.loss, config.tau)
    for field, value in config.recorded().items():
        if value != usual[field]:
            name += f"_{field}-{'-'.join(map(str, value)) if isinstance(value, tuple) else value}"
    return Path(config.preset) / dataset / f"{name}_seed{config.seed}"


def as_json(value):
    """The value as it comes back from JSON: lists for tuples, None for NaN and infinities."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def record_sha256(record: dict) -> str:
    """Hash of the record without timing and environment: equal for equal runs; an edit to the rest shows."""
    rest = {key: value for key, value in record.items() if key not in ("sha256", "timing", "environment")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> dict:
    """A record that is whole: not broken, not edited."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        require(record["sha256"] == record_sha256(record), "its sha256 does not fit")
        return record
    except Exception as error:  # what is broken may raise any kind
        raise BadInput(f"{path} is broken or was edited ({error}): remove it, or run with --force")


def save_checkpoint(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict:
    """What a run saved, on the CPU. A damaged file is refused, and stays."""
    try:
        with zipfile.ZipFile(path) as file:  # what torch.save writes; torch.load checks no checksum
            require(not file.testzip(), "a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        require({"data_sha256", "run", "model", "bank", "optimiser"} <= state.keys(), "of another program, or older")
        return state
    except Exception as error:  # zipfile and torch.load raise many kinds on a damaged file
        raise BadInput(f"cannot read the checkpoint {path} ({str(error)[:80]}): if there, remove it, or use --force")


def check_same_run(path: Path, found: dict, wanted: dict) -> None:
    """Refuse a record or checkpoint of another config, data or version, naming what differs."""
    there, here = ({"protocol_version": run.get("protocol_version"), "data_sha256": run.get("data_sha256"),
                    **run.get("config", {})} for run in (found, wanted))
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key, "missing"), here.get(key, "missing")
        require(old == new, f"{path} is of another run: {key} is {old} there, {new} here; move it away, or give "
                "another --out", BadInput)


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
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path))  # a full disk does not say which file


def hold_lock(path: Path) -> filelock.AcquireReturnProxy:
    """Hold the lock of that name, in a `with`; it goes with the process, however that ends."""
    try:
        return filelock.FileLock(path, timeout=0).acquire()
    except OSError as error:  # such as NFS without its lock service
        if isinstance(error, filelock.Timeout):
            raise
        raise OSError(f"{path.parent} can't lock files ({error}): give an --out on another file system")


def environment(device: torch.device, bfloat16: bool, graph: bool) -> dict:
    """Where a run ends. On CPUs digits agree where cpu, device, ONEDNN_MAX_CPU_ISA, threads and torch do."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere what Python knows
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "device": f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else name,
        "cpu": cpu[1] if cpu else platform.processor(), "platform": f"{platform.system()} {platform.machine()}",
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT"), "threads": torch.get_num_threads(),
        "precision": "bfloat16" if bfloat16 else "float32", "graph": graph, "python": platform.python_version(),
        "torch": torch.__version__, "torchvision": torchvision.__version__,
        "source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}


def make_parser(name: str = "ctl.py", description: str | None = __doc__) -> argparse.ArgumentParser:
    """A flag for each field of Config. --help prints the fields as they stand above, and the presets."""
    fields = inspect.getsource(Config).split('"""')[2].split("    def ")[0]
    presets = "\n".join(f"    {preset}: {values}" for preset, values in PRESETS.items())
    settings = f"Flags (--lr 0.1, --no-flip):\n{fields}\nThe presets change:\n{presets}\nNEGATIVES: {NEGATIVES}"
    parser = argparse.ArgumentParser(name, argparse.SUPPRESS, (description or "").split("Read from")[0], settings,
                                     formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    for field, hint in get_type_hints(Config).items():
        options = {} if get_origin(hint) is Literal else dict(type=(get_args(hint) or (hint,))[0])
        if hint is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        if hint is tuple:
            options = dict(type=int, nargs="*")
        options |= dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        parser.add_argument(f"--{field.replace('_', '-')}", **options)
    return parser


def exit_status(name: str, work: Callable, *arguments) -> int:
    """Do the work; a foreseen failure is one line on standard error. Returns 0: done, 1: failed, 2: wrong use or bad
    input, 3: another process is at work on the run, 130: interrupted."""
    try:
        work(*arguments)
        return 0
    except SystemExit as stop:  # argparse has said why
        return int(stop.code or 0)
    except KeyboardInterrupt:
        words, status = "interrupted; the same command goes on from the last checkpoint, but for --force", 130
    except BadInput as error:
        words, status = str(error), 2
    except filelock.Timeout as error:
        words, status = f"another process is at work on this run (it holds {error.lock_file})", 3
    except NotFinite as error:
        words, status = f"not finite: {error}; try a lower --lr (or --probe-lr) or a larger --tau", 1
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(f"{NO_MEMORY}|--no-graph", str(error)):
            raise
        words, status = f"{type(error).__name__}: {error}", 1
    print(f"{name}: {' '.join(words.split())}", file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status, see `exit_status`."""
    return exit_status("ctl.py", lambda: train(make_config(**vars(make_parser().parse_args(argv)))))


if __name__ == "__main__":
    sys.exit(main())
