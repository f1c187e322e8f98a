"""The proof that ctl.py does what the paper and the mathematics say.

    bash reproduce.sh test

Room by room, in the order of ctl.py. Loss, metrics and memory bank are held to properties: each test quotes the
statement that it checks. P = softmax(s/tau) over a row of similarities, r the same over its negatives,
R = max s - min s, g the gap below the maximum. The references are plain Python loops with math.exp and math.fsum.
Network, data and augmentation are compared with torchvision. The tests make all the data that they need.
"""
import collections
import contextlib
import copy
import dataclasses
import doctest
import errno
import functools
import hashlib
import http.client
import io
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import types
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import filelock
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image, ImageOps
import pytest
import scipy.io
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
import torchvision
import torchvision.transforms.functional as TF
from torchvision import transforms

import ctl

torch.set_num_threads(1)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there is a GPU too, the tests are of the CPU
torch.backends.mps.is_available = lambda: False

# What is drawn depends on the constants in the code too, so how many draws a test filters out may change with any edit.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=100,
                          suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
settings.load_profile("ci")
fewer, few = settings(max_examples=40), settings(max_examples=10)

EPS, EPS32 = 2.0 ** -52, 2.0 ** -23
HOME = Path(ctl.__file__).parent
CPU = torch.device("cpu")
# A caller's context, in which nothing may come out otherwise.
CONTEXTS = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "no_grad": torch.no_grad,
            "inference_mode": torch.inference_mode}
waves = functools.cache(ctl.load_waves)  # made once for the whole file; nothing writes into it


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ctl, "load_waves", waves)


def same(found, right, **tolerance):
    found, right = torch.as_tensor(found).detach(), torch.as_tensor(right).detach()
    torch.testing.assert_close(found, right, **(tolerance or dict(rtol=0, atol=0)))


def refused(word, f, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=f"^{word}"):
        f(*arguments, **options)


# --------------------------------------------------------------------------------------------------------------- 1 Loss
taus = st.floats(-3, 4).map(lambda e: 10.0 ** e)
ties = st.integers(-64, 64).map(lambda i: i / 64)
free = st.floats(-1, 1)
ks = st.none() | st.integers(1, 12)
seeds = st.integers(0, 2 ** 32 - 1)
ROOM_1 = {
    "contrastive": ctl.contrastive_loss, "gradient": ctl.loss_gradient, "penalty": ctl.relative_penalty,
    "simple": lambda s, p, tau=1.0, k=None: ctl.simple_loss(s, p, k),
    "triplet": lambda s, p, tau=1.0, k=None: ctl.triplet_loss(s, p)}
WITH_TAU = ("contrastive", "gradient", "penalty")


def seeded(seed): return torch.Generator().manual_seed(seed)
def at_a_column(s): return st.tuples(st.just(s), st.integers(0, len(s) - 1))
def rows(least=1, most=10): return values(least, most).flatmap(at_a_column)  # (row, column of the positive)
def t(s, dtype=torch.float64): return torch.tensor([s], dtype=dtype)
def p_(p): return torch.tensor([p])
def loss(s, p, tau, k=None): return ctl.contrastive_loss(t(s), p_(p), tau, k).item()
def simple(s, p, k=None): return ctl.simple_loss(t(s), p_(p), k).item()
def triplet(s, p): return ctl.triplet_loss(t(s), p_(p)).item()
def push(s, p, tau, k=None): return [tau * g for g in ctl.loss_gradient(t(s), p_(p), tau, k)[0].tolist()]
def penalty(s, p, tau, k=None): return ctl.relative_penalty(t(s), p_(p), tau, k)[0].tolist()
def slack(tau): return 4 * EPS * (10 + 2 / tau)  # "float64: 4 eps (10 + 2/tau) on L"
def mean(x): return math.fsum(x) / len(x)
def entropy(P): return -math.fsum(v * math.log(v) for v in P if v > 0)
def ref_P(s, p, tau, k=None): return ref_softmax(s, kept(s, p, k), tau)
def kept(s, p, k=None): return [p] + sorted((j for j in range(len(s)) if j != p), key=lambda j: -s[j])[:k]
def within(a, b, tol): assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) <= tol, (a, b)
def no_ties(s, k): assume(k is None or len(set(s)) == len(s))  # which of them k drops is not said


def values(least=1, most=10):
    two = st.tuples(ties, ties).flatmap(lambda p: st.lists(st.sampled_from(p), min_size=least, max_size=most))
    return st.one_of(st.lists(ties, min_size=least, max_size=most), st.lists(free, min_size=least, max_size=most), two)


def random_rows(seed, B, N, dtype=torch.float64):
    g = seeded(seed)
    return (torch.rand(B, N, generator=g, dtype=torch.float64) * 2 - 1).to(dtype), torch.randint(N, (B,), generator=g)


def ref_softmax(s, columns, tau):
    """Each column's share of the sum over the columns given, 0 for the others."""
    top = max((s[j] for j in columns), default=0)
    e = [math.exp((v - top) / tau) if j in columns else 0.0 for j, v in enumerate(s)]
    return [v / (math.fsum(e) or 1) for v in e]


def ref_loss(s, p, tau, k=None):
    d = [(s[j] - s[p]) / tau for j in kept(s, p, k)]
    return max(d) + math.log(math.fsum(math.exp(v - max(d)) for v in d))


def ref_push(s, p, tau, k=None):
    P = ref_P(s, p, tau, k)
    return P[:p] + [-math.fsum(P[:p] + P[p + 1:])] + P[p + 1:]


@given(rows(), taus, ks)
@example(([1.0, -1.0], 1), 1e-3, None)  # exp without the max subtracted overflows
@example(([1.0, -1.0], 1), 1 / 89, None)
@example(([0.0, -1.0], 0), 1e-2, None)  # log(p + 1e-7) goes below 0
def test_the_losses_are_the_slow_loop(row, tau, k):
    # Eq. 7 (Eq. 9 with k): the mean is over N, not N - 1; Eq. 6 times tau
    ahead = [row[0][j] - row[0][row[1]] for j in kept(*row, k)]
    assert abs(simple(*row, k) - mean(ahead)) <= 10 * EPS and triplet(*row) == max(ahead)
    # Eqs. 1 and 9; "float64: 4 eps (10 + 2/tau) on L"; "float32: about 0.84 eps (1 + R/tau + log N): allow 4"
    assert abs(loss(*row, tau, k) - ref_loss(*row, tau, k)) <= slack(tau)
    s = t(row[0], torch.float32)
    L = ctl.contrastive_loss(s, p_(row[1]), tau, k)
    assert L.dtype == torch.float32 and L.shape == (1,)
    bound = 4 * EPS32 * (1 + (s.max() - s.min()).item() / tau + math.log(len(row[0])))
    assert abs(L.item() - ref_loss(s[0].tolist(), row[1], tau, k)) <= bound


@given(rows(), taus, ks)
@example(([0.0, 0.0], 0), 0.07, None)  # where log(p + 1e-7) has the positive's gradient 1.1 % short
def test_the_gradient_by_closed_form_autograd_and_loop(row, tau, k):
    # "tau dL/ds_j = P_j; tau dL/ds_pos = P_pos - 1"; "1e-12 on tau grad L; float32: 7.2 eps (1 + R/tau): allow 32"
    no_ties(torch.tensor(row[0]).tolist(), k)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 32 * EPS32 * (1 + (max(row[0]) - min(row[0])) / tau))):
        s, p = t(row[0], dtype).requires_grad_(), p_(row[1])
        expected = ref_push(s[0].tolist(), row[1], tau, k)
        ctl.contrastive_loss(s, p, tau, k).sum().backward()
        for g in (ctl.loss_gradient(s.detach(), p, tau, k), s.grad):
            within((g[0].double() * tau).tolist(), expected, bound)
    # At the positive to the last digits, where P_pos - 1 would cancel; expected is of float32 here.
    exact, own = ref_push(row[0], row[1], tau, k)[row[1]], push(*row, tau, k)[row[1]]
    assert abs(own - exact) <= 1e-12 * (1 + 1 / tau) * abs(exact) + 1e-300
    # "they sum to 0; ||tau grad L||_1 = 2(1 - P_pos). ||grad L||_2 <= sqrt(2)/tau"
    g = push(*row, tau)
    assert abs(math.fsum(g)) <= 1e-12 and math.hypot(*g) <= math.sqrt(2) + 1e-12
    assert abs(math.fsum(map(abs, g)) - 2 * (1 - ref_P(*row, tau)[row[1]])) <= 1e-12
    assert all(v <= 0 if j == row[1] else v >= 0 for j, v in enumerate(g))


@pytest.mark.parametrize("tau", [1e-3, 0.07, 1.0, 1e4])
def test_large_n_float32(tau):
    # "At N = 50,000 and tau = 1e4, float32 logsumexp((s - s_pos)/tau) errs by 4e-7 where cross_entropy errs by 3e-5";
    # P is compared relatively, as N·P ("assert_close's default tolerance is half of a uniform P at N = 50,000")
    N = 50_000
    s, p = random_rows(7, 2, N, torch.float32)
    exact, spread = s.double(), 1 + (s.max() - s.min()).item() / tau
    P = torch.log_softmax(exact / tau, dim=1).exp()
    own = torch.zeros_like(P).scatter(1, p[:, None], 1).bool()
    seen = ~own & (P > 1e-30)
    L = torch.logsumexp((exact - exact.gather(1, p[:, None])) / tau, dim=1)
    learned = s.clone().requires_grad_()
    found = ctl.contrastive_loss(learned, p, tau)
    found.sum().backward()
    assert (found.double() - L).abs().max() <= min(4 * EPS32 * (spread + math.log(N)), 1e-6 if tau == 1e4 else 1)
    by_autograd = tau * learned.grad.double()
    assert ((by_autograd / P - 1).abs()[seen] <= 32 * EPS32 * spread).all()
    assert (by_autograd + 1 - P)[own].abs().max() <= 32 * EPS32 * spread


@given(rows(2), taus, ks, free)
def test_relative_penalty(row, tau, k, moved):
    # Eqs. 5 and 8; "r_j = d_jL/|d_posL|, independent of s_pos; sums to 1"
    no_ties(row[0], k)
    s, p = row
    r, g = penalty(s, p, tau, k), push(s, p, tau, k)
    within(r, ref_softmax(s, kept(s, p, k)[1:], tau), 1e-12)
    assert abs(math.fsum(r) - 1) <= 1e-12 and r[p] == 0 and min(r) >= 0
    assert penalty(s[:p] + [moved] + s[p + 1:], p, tau, k) == r
    if -g[p] > 1e-200:
        within([0.0 if j == p else v / -g[p] for j, v in enumerate(g)], r, 1e-11)
    # "dH(r)/dtau = Var_r(s)/tau³ >= 0", as tau dH/dtau by central differences
    h = 1e-4
    slope = (entropy(penalty(s, p, tau * (1 + h), k)) - entropy(penalty(s, p, tau * (1 - h), k))) / (2 * h)
    m = math.fsum(a * b for a, b in zip(r, s))
    expected = math.fsum(a * (b - m) ** 2 for a, b in zip(r, s)) / tau ** 2
    assert abs(slope - expected) <= 1e-4 * expected + 1e-8
    assert entropy(penalty(s, p, 2 * tau, k)) >= entropy(r) - 1e-12


@given(st.integers(1, 4), st.integers(1, 40), taus, ks, seeds)
@fewer
def test_rows_of_a_batch_do_not_mix(B, N, tau, k, seed):
    s, p = random_rows(seed, B, N)
    for name, f in ROOM_1.items():
        whole = f(s, p, tau, k)
        alone = torch.cat([f(s[i:i + 1], p[i:i + 1], tau, k) for i in range(B)])
        assert ((alone - whole).abs() * (tau if name == "gradient" else 1)).max() <= slack(tau), name


@given(rows(), taus)
def test_the_limits_of_small_and_large_tau(row, tau):
    # "0 <= log(m + (N-m)e^{-R/tau}) <= L - max(0, s_max - s_pos)/tau <= log(m + (N-m)e^{-g/tau}) <= log N,
    #  with equality on two-valued rows" (s_max: the hardest negative, or the positive; m: how often it occurs)
    s, p = row
    N, R, m = len(s), max(s) - min(s), s.count(max(s))
    g = max(s) - max([v for v in s if v < max(s)], default=max(s))
    rest = loss(s, p, tau) - triplet(s, p) / tau
    low, high = math.log(m + (N - m) * math.exp(-R / tau)), math.log(m + (N - m) * math.exp(-g / tau))
    assert 0 <= low <= rest + slack(tau) <= high + 2 * slack(tau) <= math.log(N) + 3 * slack(tau)
    assert len(set(s)) > 2 or abs(rest - low) <= slack(tau) >= abs(rest - high)
    # "0 <= L - log N - (mean s - s_pos)/tau <= R²/(8 tau²)" and
    # "|L - log N - (mean s - s_pos)/tau - Var(s)/(2 tau²)| <= R³/(36 sqrt3 tau³)"; Eq. 7
    rest = loss(s, p, tau) - math.log(N) - simple(s, p) / tau
    assert -slack(tau) <= rest <= R ** 2 / (8 * tau ** 2) + slack(tau)
    last = rest - mean([(v - mean(s)) ** 2 for v in s]) / (2 * tau ** 2)
    assert abs(last) <= R ** 3 / (36 * math.sqrt(3) * tau ** 3) + slack(tau) + 8 * EPS / tau ** 2


@given(st.lists(ties, min_size=2, max_size=10).flatmap(at_a_column))
def test_the_gradient_as_tau_tends_to_0(row):
    # "r always tends to one-hot on the hardest negative (ties share equally). tau grad L does so only if
    #  s_max > s_pos; if the positive is largest, tau grad L -> 0." Gaps are >= 1/64, so e^{-g/tau} < 1e-67 here.
    s, p = row
    tau, hardest = 1e-4, max(s[:p] + s[p + 1:])
    at = [j for j in range(len(s)) if j != p and s[j] == hardest]
    one_hot = [1 / len(at) if j in at else 0.0 for j in range(len(s))]
    within(penalty(s, p, tau), one_hot, 1e-12)
    # Where they tie the positive takes its share.
    share = 1.0 if hardest > s[p] else 0.0 if hardest < s[p] else len(at) / (1 + len(at))
    within(push(s, p, tau), [-share if j == p else v * share for j, v in enumerate(one_hot)], 1e-12 if share else 1e-60)


@given(values(2), taus)
def test_the_rates_at_which_shares_tend_to_their_limits(s, tau):
    # tau -> 0, "for m = 1, q = e^{-g/tau}: q/(1+q) <= 1 - P_max <= (N-1)q/(1+(N-1)q)"; relatively, to the last digits
    N, R, top = len(s), max(s) - min(s), s.index(max(s))
    q = math.exp((max(s[:top] + s[top + 1:]) - s[top]) / tau)
    if q < 1 and q > 1e-250:
        tol = 1e-12 * (1 + 1 / tau)
        assert q / (1 + q) * (1 - tol) <= -push(s, top, tau)[top] <= (N - 1) * q / (1 + (N - 1) * q) * (1 + tol)
    # tau -> infinity: "|log(N P_j)| <= R/tau" (the loss with j as positive is -log P_j);
    # "|N P_j - 1 - (s_j - mean s)/tau| <= 1.5 R²/tau² for tau >= R"
    every, own = t(s).expand(N, N), torch.arange(N)
    assert (math.log(N) - ctl.contrastive_loss(every, own, tau)).abs().max() <= R / tau + slack(tau)
    if tau >= R:
        P = ctl.loss_gradient(every, own, tau) * tau + torch.eye(N)
        assert (N * P - 1 - (t(s) - mean(s)) / tau).abs().max() <= 1.5 * (R / tau) ** 2 + N * 1e-14


@given(rows(), taus, ks)
def test_derivative_in_tau(row, tau, k):
    # "d(tau L)/dtau = H(P) in [0, log N]", over the columns kept: tau dL/dtau is H - L
    s, p = row
    H = entropy(ref_P(s, p, tau, k))
    assert -1e-12 <= H <= math.log(len(s)) + 1e-12
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        learned = nn.Parameter(torch.tensor(tau, dtype=dtype))
        ctl.contrastive_loss(t(s), p_(p), learned, k).sum().backward()
        expected = H - ref_loss(s, p, tau, k)
        assert abs(tau * learned.grad.item() - expected) <= tolerance * (1 + 1 / tau ** 2)
        for f in map(ROOM_1.get, WITH_TAU):  # tau as a tensor gives what the number gives
            found = f(t(s), p_(p), learned, k)
            assert found.dtype == torch.float64 and torch.equal(found, f(t(s), p_(p), learned.item(), k))


@given(rows(2), taus, st.integers(1, 12))
def test_bounds_of_the_loss(row, tau, k):
    # "For |s| <= 1: log(1+(N-1)e^{-2/tau}) <= L <= log(1+(N-1)e^{2/tau})", and both are reached
    s, p = row
    n, L = len(s) - 1, loss(s, p, tau)
    low, high = math.log1p(n * math.exp(-2 / tau)), 2 / tau + math.log(math.exp(-2 / tau) + n)
    assert max(0, low - slack(tau)) <= L <= high + slack(tau)
    assert abs(loss([1.0] + n * [-1.0], 0, tau) - low) <= slack(tau) >= abs(loss([-1.0] + n * [1.0], 0, tau) - high)
    # "Invariant to a shift of all s, to a permutation of the negatives, and to (s, tau) -> (cs, c tau), c > 0"
    for same_row, q, c in (([v + 8 for v in s], p, 1), (s[::-1], n - p, 1), ([3 * v for v in s], p, 3)):
        assert abs(loss(same_row, q, c * tau) - L) <= 3 * slack(tau)
        within(sorted(push(same_row, q, c * tau)), sorted(push(s, p, tau)), 1e-12 * (1 + 1 / tau))
    # "0 <= L - L_hard(k) <= log((N-1)/k), zero at k = N-1"; beyond N - 1 too
    assert -slack(tau) <= L - loss(s, p, tau, k) <= max(0.0, math.log(n / k)) + slack(tau)
    if k >= n:
        assert push(s, p, tau, k) == push(s, p, tau) and penalty(s, p, tau, k) == penalty(s, p, tau)
        assert abs(simple(s, p, k) - simple(s, p)) <= 10 * EPS


@given(rows(2), taus, st.integers(1, 12))
def test_the_positive_and_the_k_nearest(row, tau, k):
    # "The positive is never among the k negatives and always in the denominator", wherever it ranks
    s, p = row
    for s in (s, s[:p] + [-1.0] + s[p + 1:], s[:p] + [1.0] + s[p + 1:]):
        found, columns = (x[0].tolist() for x in ctl.nearest_negatives(t(s), p_(p), k))
        nearest = [s[j] for j in kept(s, p, k)[1:]]
        assert p not in columns and len(set(columns)) == len(columns) and found == [s[j] for j in columns]
        assert sorted(found, reverse=True) == nearest
        assert abs(loss(s, p, tau, k) - ref_loss([s[p]] + nearest, 0, tau)) <= slack(tau) and loss(s, p, tau, k) >= 0
        for g in (push(s, p, tau, k), penalty(s, p, tau, k)):
            assert sum(v != 0 for j, v in enumerate(g) if j != p) <= k


@pytest.mark.parametrize("tau", [1e-3, 0.07, 1e4])
def test_closed_cases_of_the_loss(tau):
    for N in (2, 3, 64):  # ties throughout: L = log N, r and P uniform, whatever tau
        s = [0.5] * N
        assert abs(loss(s, 0, tau) - math.log(N)) <= slack(tau)
        within(push(s, 0, tau), [1 / N - 1] + [1 / N] * (N - 1), 1e-12)
        within(penalty(s, 0, tau), [0] + [1 / (N - 1)] * (N - 1), 1e-12)
        assert abs(loss(s, 0, tau, 1) - math.log(2)) <= slack(tau)  # tied with the positive, one negative is kept
    for k in (None, 1, 9):  # "N = 1: the loss is 0": the positive alone, nothing to push
        assert [loss([0.3], 0, tau, k), simple([0.3], 0, k), triplet([0.3], 0)] == [0, 0, 0]
        assert penalty([0.3], 0, tau, k) == push([0.3], 0, tau, k) == [0]
    tied = t([0.0, 0.5, 0.5, 0.1]).requires_grad_()
    ctl.triplet_loss(tied, p_(0)).sum().backward()
    assert tied.grad[0].tolist() == [-1.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("k", [None, 7])
def test_16_bits_are_summed_in_32(dtype, k):
    s, p = random_rows(3, 4, 3000)
    for name, f in ROOM_1.items():
        low, full = s.to(dtype).requires_grad_(), s.to(dtype).float().requires_grad_()
        found, right = f(low, p, 0.07, k), f(full, p, 0.07, k)
        assert found.dtype == torch.float32 and torch.equal(found, right), name
        assert torch.equal(*(torch.autograd.grad(x.sum(), y)[0].to(dtype) for x, y in ((found, low), (right, full))))


@pytest.mark.parametrize("name", ROOM_1)
def test_wrong_arguments_that_would_pass_unseen(name):
    f, s, p = ROOM_1[name], torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]), torch.tensor([0, 2])
    bad_tau = [0, -0.1, math.nan, math.inf, 1e-50, True, torch.tensor(0.0), torch.tensor(math.nan)]
    for tau in bad_tau if name in WITH_TAU else ():
        refused("tau must", f, s, p, tau)
    for k in (0, -1, False) if name != "triplet" else ():
        refused("k must", f, s, p, 0.1, k)
    for positive in (p[:1], p[:, None], p[0]):
        refused("positive must", f, s, positive, 0.1)
    for wrong in (s.long(), s.bool(), s + 0j):
        refused("similarity must", f, wrong, p, 0.1)
    for value in (math.nan, math.inf, -math.inf):
        refused("similarity holds", f, torch.where(s == 0.1, value, s), p, 0.1, error=ctl.NotFinite)


# ------------------------------------------------------------------------------------------------------------ 2 Metrics
def metric(name, **given): return METRICS[name][0](**{**METRICS[name][1], **given})
def simplex(M): return F.normalize(torch.eye(M, dtype=torch.float64) - 1 / M, dim=1)


def sphere(n, d, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(n, d, generator=seeded(seed), dtype=torch.float64), dim=1).to(dtype)


def in_blocks(rows, f, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctl, "ROWS", rows)
        return f(*arguments)


@pytest.mark.parametrize("t_", [0.5, 2.0, 5.0])
def test_closed_cases_of_the_metrics(t_):
    # "Orthonormal set -2t; antipodal pair -4t; all equal 0; regular simplex of M points -2tM/(M-1)" (sign turned);
    # tolerance: "One-point classes add nothing; all points equal: 1; the antipodal pair in one class: -1"
    pair, one = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), sphere(1, 5)
    cases = [(torch.eye(6).double(), 2 * t_, 0), (pair, 4 * t_, -1), (one.expand(7, 5), 0, 1)]
    for z, uniformity, tolerance in cases + [(simplex(M), 2 * t_ * M / (M - 1), -1 / (M - 1)) for M in (2, 3, 9)]:
        assert ctl.uniformity(z, t_) == pytest.approx(uniformity, abs=1e-12)
        assert ctl.tolerance(z, torch.full((len(z),), 5)) == pytest.approx(tolerance, abs=1e-12)
    assert math.isnan(ctl.tolerance(pair, torch.tensor([0, 1])))


def test_uniformity_of_the_sphere():
    # "uniform on the sphere: -2t + log 0F1(; d/2; t²) = -3.93753001 for d = 128, t = 2", within 5 standard deviations
    # of "about sqrt(0.2653/(M(M-1)))"
    M, expected = 2000, -4 + math.log(scipy.special.hyp0f1(64, 4.0))
    bank = ctl.MemoryBank(M, 128, generator=seeded(0)).rows  # a random bank is uniform too
    for z in (sphere(M, 128, 1, torch.float32), bank):
        assert abs(ctl.uniformity(z) + expected) <= 5 * math.sqrt(0.2653 / (M * (M - 1)))


@given(st.integers(2, 14), st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 5), st.integers(1, 15), seeds)
@fewer
@example(259, 4, 3, 2.0, 256, 0)  # the real block, the paper's t
def test_uniformity_tolerance_and_alignment_by_pairs(n, d, classes, t_, block, seed):
    z, other, (i, j) = sphere(n, d, seed), sphere(n, d, seed // 2 + 1), torch.tril_indices(n, n, -1)
    # "mean over i<j of exp(-t||.||²), then log"; "the lowest value any M points can have" is the simplex's
    found = ctl.uniformity(z) if n == 259 else in_blocks(block, ctl.uniformity, z, t_)
    terms = torch.exp(-t_ * (z[i] - z[j]).square().sum(dim=1))
    assert abs(found + terms.mean().log()) <= 1e-11 and found <= 2 * t_ * n / (n - 1) + 1e-11
    # mean over pairs i < j of one class, all such pairs weighing alike; labels need not be 0, 1, 2, …
    y = torch.randint(classes, (n,), generator=seeded(seed)) * 7 + 1
    expected = (z[i] * z[j]).sum(dim=1)[y[i] == y[j]].mean().item()  # nan if there are none
    alone = torch.cat([z, other[:1]]), torch.cat([y, torch.tensor([99])])
    assert [ctl.tolerance(z, y), ctl.tolerance(*alone)] == pytest.approx(2 * [expected], abs=1e-12, nan_ok=True)
    assert abs(ctl.alignment(z, other) - (z - other).square().sum(dim=1).mean()) <= 1e-12
    assert ctl.alignment(z, z) == 0 and ctl.alignment(z, -z) == pytest.approx(4, abs=1e-12)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 10), st.integers(1, 10), seeds)
@fewer
def test_similarity_profile_is_the_slow_loop(n, m, top, block, seed):
    # the positive's similarity, then the sorted negatives', averaged over anchors; nan where negatives run out
    z, bank = sphere(n, 5, seed), sphere(m, 5, seed // 2 + 1)
    own = torch.randint(m, (n,), generator=seeded(seed))
    lines = []
    for s, p in zip((z @ bank.T).tolist(), own.tolist()):
        lines.append([s[p]] + sorted(s[:p] + s[p + 1:], reverse=True) + 11 * [math.nan])
    found = in_blocks(block, ctl.similarity_profile, z, bank, own, top)
    same(found, torch.tensor(lines, dtype=torch.float64)[:, :1 + top].mean(dim=0), atol=1e-12, rtol=0, equal_nan=True)
    assert found.device.type == "cpu" and len(ctl.similarity_profile(z, bank, own)) == 11  # "pos", "n1" … "n10"


def ref_knn(train, train_y, test, test_y, k=200, temperature=0.07):
    """The vote with weights exp(s/temperature), summed as logarithms: no temperature is too small."""
    right = 0
    for x, y in zip(test, test_y):
        s, nearest = (train @ x).sort(descending=True)
        voters = train_y[nearest[:k]]
        score = [torch.logsumexp(s[:k][voters == c] / temperature, dim=0) for c in range(5)]  # -inf without a vote
        right += score.index(max(score)) == y.item()
    return 100 * right / len(test)


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 25), st.sampled_from([1e-4, 0.005, 0.07, 0.5]),
       st.integers(1, 10), seeds)
@fewer
@example(300, 200, 4, 0.07, 7, 1)  # so many that one neighbour more or fewer shows
def test_knn_is_the_slow_loop(n, m, k, temperature, block, seed):
    train, test = (sphere(n, 4, seed), torch.arange(n) % 4), (sphere(m, 4, seed // 2 + 1), torch.arange(m) * 3 % 4)
    expected = ref_knn(*train, *test, k, temperature)
    assert in_blocks(block, ctl.knn_accuracy, *train, *test, k, temperature) == pytest.approx(expected, abs=1e-9)


def probe_loop(views, y, test, test_y, epochs, lr, momentum, milestones, gamma, batch_size, seed):
    """SGD by hand on (W, b) from 0, with the draws that linear_probe documents. Accuracy after every epoch."""
    V, n, d = views.shape
    views, test = F.pad(views, (0, 1), value=1.0), F.pad(test, (0, 1), value=1.0)  # for b
    W = torch.zeros(1 + int(max(y.max(), test_y.max())), d + 1, dtype=views.dtype)
    g, moving, curve = seeded(seed), 0, []
    for epoch in range(epochs):
        rate = lr * gamma ** sum(epoch >= m for m in milestones)
        order, view = torch.randperm(n, generator=g), torch.randint(V, (n,), generator=g)
        for at, of in zip(order.split(batch_size), view.split(batch_size)):
            h = views[of, at]
            error = (torch.softmax(h @ W.T, dim=1) - F.one_hot(y[at], len(W))) / len(at)
            moving = momentum * moving + error.T @ h
            W = W - rate * moving
        curve.append(100 * ((test @ W.T).argmax(dim=1) == test_y).double().mean().item())
    return curve


def features(n, d, seed, noise):
    y = torch.randint(4, (n,), generator=seeded(seed))
    return torch.eye(4, d).double()[y] + noise * torch.randn(n, d, generator=seeded(seed), dtype=torch.float64), y


@pytest.mark.parametrize("V", [1, 2, 3])
def test_linear_probe_is_sgd_by_hand_and_takes_the_last_epoch(V):
    (h, y), test, past_best = features(150, 6, 0, 0.5), features(2011, 6, 9, 0.5), 0
    views = torch.stack([h.roll(v, dims=1) for v in range(V)])
    for seed in range(4):
        options = dict(epochs=6, lr=3.0, momentum=0.7, milestones=(2, 4), gamma=0.3, batch_size=32, seed=seed)
        curve = probe_loop(views, y, *test, **options)
        torch.rand(1)  # the global generator does not matter
        found = [ctl.linear_probe(views if V > 1 else h, y, *test, **options) for _ in range(2)]
        assert found == pytest.approx(2 * [curve[-1]], abs=1e-9)
        past_best += curve[-1] < max(curve)
    assert past_best  # so that reporting the best epoch would have failed


Z, OTHER, Y = sphere(40, 16, 7), sphere(40, 16, 8), torch.arange(40) % 4
PROBE = functools.partial(ctl.linear_probe, epochs=5, lr=1.0, batch_size=8)
METRICS = {
    "uniformity": (ctl.uniformity, dict(z=Z)),
    "tolerance": (ctl.tolerance, dict(z=Z, labels=Y)),
    "alignment": (ctl.alignment, dict(z1=Z, z2=OTHER)),
    "profile": (ctl.similarity_profile, dict(z=Z, z2=OTHER, positive=torch.arange(40))),
    "knn": (ctl.knn_accuracy, dict(train_z=Z[:25], train_y=Y[:25], test_z=Z[25:], test_y=Y[25:])),
    "probe": (PROBE, dict(train_h=Z[:25], train_y=Y[:25], test_h=Z[25:], test_y=Y[25:]))}


@pytest.mark.parametrize("name", METRICS)
def test_labels_and_vectors_that_do_not_fit(name):
    for argument, x in METRICS[name][1].items():
        wrong = [x[:-1], x[:, None], x[:0]]
        if x.is_floating_point():
            wrong = [x[0], x.long(), x.half(), *([x[None], 1.01 * x, 0 * x] if name != "probe" else [])]
            for value in (math.nan, math.inf):
                refused(f"{argument} must", metric, name, error=ctl.NotFinite, **{argument: x * value})
        for bad in wrong:
            refused(f"{argument} must", metric, name, **{argument: bad})


def test_options_that_do_not_fit_and_labels_far_apart():
    refused("z must hold two", metric, "uniformity", z=Z[:1])
    refused("z1 and z2 must have one shape", metric, "alignment", z2=Z[:3])
    refused(".*top", metric, "profile", top=-1)
    refused("batch_size must", ctl.linear_probe, Z, Y, Z, Y, batch_size=0)
    for wrong in (dict(k=0), dict(temperature=0), dict(temperature=-0.07), dict(temperature=math.nan)):
        refused("k must be at least 1, temperature above 0", metric, "knn", **wrong)
    for name, part in (("knn", "train"), ("knn", "test"), ("probe", "test")):  # no image
        empty = {f"{part}_{'z' if name == 'knn' else 'h'}": Z[:0], f"{part}_y": Y[:0]}
        refused(f"{part}_y must", metric, name, **empty)
    for name in ("tolerance", "knn", "probe"):  # as with 0, 1, 2, …, and no more memory
        labels = {argument: 10 ** 12 * x - 7 for argument, x in METRICS[name][1].items() if not x.is_floating_point()}
        assert metric(name, **labels) == metric(name)
    refused(".*probe", ctl.linear_probe, 1e6 * Z.float(), Y, Z.float(), Y, 3, 1e35, error=ctl.NotFinite)


# -------------------------------------------------------------------------------------------------------- 3 Memory bank
@given(st.integers(1, 9), st.integers(2, 6), st.sampled_from([0.0, 0.25, 0.9, 1.0, None]), st.integers(1, 5), seeds)
@fewer
def test_bank_updates(N, d, momentum, steps, seed):
    # rows stay unit; exactly the given rows move, to normalise(m·row + (1 - m)·z); m = 0.5 if not given
    g = seeded(seed)
    bank = ctl.MemoryBank(N, d, generator=g, **({} if momentum is None else {"momentum": momentum}))
    m = 0.5 if momentum is None else momentum
    assert bank.rows.shape == (N, d) and bank.rows.dtype == torch.float32
    for _ in range(steps):
        index, still = torch.randperm(N, generator=g).split([n := 1 + seed % N, N - n])
        z = sphere(n, d, seed, torch.float32).requires_grad_()
        before, mixed = bank.rows.clone(), m * bank.rows[index] + (1 - m) * z.detach()
        assume(mixed.norm(dim=1).min() > 0.05)
        bank.update(index, z)
        assert torch.equal(bank.rows[still], before[still]) and not bank.rows.requires_grad
        assert (bank.rows[index] - mixed / mixed.norm(dim=1, keepdim=True)).abs().max() <= 1e-5
        assert (bank.rows.norm(dim=1) - 1).abs().max() <= 4 * EPS32


def test_bank_similarity_and_init():
    init = 3 * sphere(7, 5, 3, torch.float32)
    bank, z = ctl.MemoryBank(7, 5, init=init), sphere(4, 5, 4, torch.float32).requires_grad_()
    assert (bank.rows - init / 3).abs().max() <= 4 * EPS32
    bank.similarity(z).sum().backward()
    assert (z.grad - bank.rows.sum(dim=0)).abs().max() <= 1e-6  # the gradient reaches z
    for dtype in (torch.float32, torch.bfloat16, torch.half, torch.float64):
        low = z.detach().to(dtype)
        same(bank.similarity(low), low.float() @ bank.rows.T)


def test_what_does_not_fit_the_bank():
    for momentum in (-0.1, 1.1, math.nan):
        refused("momentum must", ctl.MemoryBank, 3, 4, momentum)
    for wrong in ("zeros", None, torch.ones(3, 5), torch.ones(12), torch.zeros(3, 4), torch.full((3, 4), math.nan)):
        refused("init must", ctl.MemoryBank, 3, 4, init=wrong)
    bank = ctl.MemoryBank(6, 4, generator=seeded(0))
    for index, n in ((3, 1), (1, 3), (3, 2)):
        refused("z must", bank.update, torch.arange(index), sphere(n, 4))


# ------------------------------------------------------------------------------------------------------------ 4 Network
@pytest.mark.parametrize("training", [False, True])
def test_network_is_torchvisions(training):
    torch.manual_seed(0)
    mine, theirs = ctl.ResNet18(), torchvision.models.resnet18(num_classes=128)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    pairs = zip(*([m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))] for net in (mine, theirs)),
                strict=True)
    for layer, other in pairs:
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.momentum, layer.eps) == (other.momentum, other.eps)
            assert all(map(torch.equal, layer.state_dict().values(), other.state_dict().values()))
            continue
        # He-normal, fan-out: standard deviation, mean and kurtosis
        x = layer.weight.detach() * math.sqrt(layer.out_channels * layer.kernel_size[0] ** 2 / 2)
        assert abs(x.std() - 1) < 5 / math.sqrt(2 * x.numel()) + 0.005 and abs(x.mean()) < 5 / math.sqrt(x.numel())
        assert abs((x ** 4).mean() - 3) < 5 * math.sqrt(96 / x.numel())
    bound = math.sqrt(6 / (512 + 128))  # Xavier-uniform
    assert 0.99 * bound < mine.head.weight.abs().max() <= bound and (mine.head.bias == 0).all()
    assert abs(mine.head.weight.std().item() / bound * math.sqrt(3) - 1) < 0.02
    theirs.load_state_dict(dict(zip(theirs.state_dict(), mine.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 32, 32, generator=seeded(1))
    mine.train(training), theirs.train(training)
    with torch.no_grad():
        same(mine(x), F.normalize(theirs(x), dim=1), atol=1e-4, rtol=1e-4)
    for moved, other in zip(mine.state_dict().values(), theirs.state_dict().values()):  # running means, variances
        same(moved, other, atol=1e-4, rtol=1e-4)


def test_the_networks_precision_and_layout():
    # float32 in a caller's autocast; bfloat16 for convolutions and head where it is asked for, and float32 comes out
    torch.manual_seed(0)
    layout, seen = dict(memory_format=torch.channels_last), []  # of what each convolution is given
    model, x = ctl.ResNet18(4, 6).eval().to(**layout), torch.randn(2, 3, 16, 16, generator=seeded(1)).to(**layout)
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(lambda _, i, o: seen.append((o.dtype, o.ndim < 4 or i[0].is_contiguous(**layout))))
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        same(model(x), plain)
    model.in_bfloat16 = True
    low = model(x)
    assert seen == 42 * [(torch.float32, True)] + 21 * [(torch.bfloat16, True)]
    assert low.dtype == model.features(x).dtype == torch.float32 and 1e-5 < (low - plain).abs().max() < 0.1
    assert ctl.ResNet18(1, 2, True).in_bfloat16 is True and ctl.ResNet18(1, 2).in_bfloat16 is False


GRADIENTS = """
import torch, ctl
from torch.nn.grad import conv2d_weight
print(ctl.load_waves(24, 60, 40).sha256(), ctl.generator(0, "views", 1, 2).initial_seed())
seen = []
def watch(m, i, o):
    o.register_hook(lambda g: seen.append((m, i[0].detach().double(), g.double())))
for threads, width in ((1, 1), (1, 4), (1, 16), (2, 4), (2, 8)):
    torch.set_num_threads(threads)
    model, _ = ctl.make_model(ctl.make_config("smoke", width=width, dim=8), torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(watch)
    x = ctl.normalise(torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    (model(x) * torch.linspace(-1, 1, 16 * 8).reshape(16, 8)).sum().backward()
    assert len(seen) == 20
    while seen:
        m, x, g = seen.pop()
        exact = conv2d_weight(x, m.weight.shape, g, m.stride, m.padding)
        terms = conv2d_weight(x.abs(), m.weight.shape, g.abs(), m.stride, m.padding)
        assert ((m.weight.grad - exact).abs() / terms).max() < 1e-5, (threads, width, m)
"""


@pytest.mark.parametrize("instructions, others", [("DEFAULT", {}), ("AVX2", {"ATEN_CPU_CAPABILITY": "default"})])
def test_on_another_cpu(instructions, others):
    """The gradient of every convolution; and waves and random numbers, which are the same everywhere."""
    # In a process of its own: where a kernel writes past its workspace, the process crashes, hangs, or goes on with a
    # wrong gradient (uxlfoundation/oneDNN#6035).
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "OMP_WAIT_POLICY": "PASSIVE", **others,
                   "PYTHONHASHSEED": "1", "PYTHONPATH": str(HOME)}
    child = subprocess.run([sys.executable, "-c", GRADIENTS], env=environment, capture_output=True, text=True,
                           timeout=300)
    assert child.returncode == 0, (child.returncode, child.stderr[-2000:])
    here = waves.__wrapped__(24, 60, 40).sha256(), str(ctl.generator(0, "views", 1, 2).initial_seed())
    assert tuple(child.stdout.split()) == here


# --------------------------------------------------------------------------------------------------------------- 5 Data
def test_what_waves_are():
    data, small = waves(), waves.__wrapped__(16, 40, 20)
    assert data.name == "waves" and [x.dtype for x in data[1:]] == 2 * [torch.uint8, torch.int64]
    assert [x.shape for x in data[1:]] == [(4000, 3, 32, 32), (4000,), (2000, 3, 32, 32), (2000,)]
    # A sum is of every tensor's shape and values, not of the name.
    tensors = list(small[1:])
    others = [tensors[:i] + [y] + tensors[i + 1:] for i, x in enumerate(tensors) for y in (x.flip(0), x[:, None])]
    assert len({small.sha256(), *(ctl.Data("another", *other).sha256() for other in (tensors, *others))}) == 9


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 100))
@fewer
def test_balanced_order_and_what_is_held_out(labels, seed):
    # "Every prefix has as many of each class, to within one, until a class runs out", at random; labels far apart too
    y = torch.tensor(labels)
    order = ctl.balanced_order(y, seed)
    assert sorted(order.tolist()) == list(range(len(y))) and torch.equal(order, ctl.balanced_order(10 ** 12 * y, seed))
    for m in range(len(y) + 1):
        count, most = y[order[:m]].bincount(minlength=5), y.bincount(minlength=5)
        assert ((count == torch.minimum(most, count.max())) | (count == count.max() - 1)).all()
    shuffled = torch.randperm(len(y), generator=seeded(seed))
    place = F.one_hot(y[shuffled]).cumsum(0)[torch.arange(len(y)), y[shuffled]]  # another way: how many come before
    assert torch.equal(order, shuffled[place.argsort(stable=True)])
    # of a class of n images the first max(1, n // 5) are held out, of a class of one none; both in balanced order
    own = {label: [i for i in order.tolist() if labels[i] == label] for label in labels}
    out = sum((own[label][:max(1, len(own[label]) // 5) * (len(own[label]) > 1)] for label in own), [])
    parts = [[i for i in order.tolist() if (i in out) == held] for held in (False, True)]
    assert [part.tolist() for part in ctl.hold_out(10 ** 12 * y, seed)] == parts


def test_what_is_held_out_by_hand():
    y = torch.arange(50) % 5  # ten of each class: as ever, the first fifth of the order
    assert all(map(torch.equal, ctl.hold_out(y)[::-1], ctl.balanced_order(y, 1).split([10, 40])))
    assert torch.equal(ctl.balanced_order(y), ctl.balanced_order(y, 0))


# ---- downloads
@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder whose files are all that urlopen finds, well or in a bad way; what it was asked for, and how long it was
    to wait. For a user whose files are closed to others."""
    web = types.SimpleNamespace(folder=tmp_path / "web", bad=None, asked=[], waits=set())
    web.folder.mkdir()

    def urlopen(request, *_, **__):
        web.asked.append(request.full_url)
        web.waits.add(socket.getdefaulttimeout())
        if isinstance(web.bad, Exception):
            raise web.bad
        answer = io.BytesIO((web.bad or bytes)((web.folder / Path(request.full_url).name).read_bytes()))
        answer.url = answer.length = None
        return answer
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    umask, timeout = os.umask(0o077), socket.getdefaulttimeout()
    yield web
    os.umask(umask), socket.setdefaulttimeout(timeout)


def make_dataset(name, folder, monkeypatch):
    """A small dataset in the real format. Returns its images and labels, as load_dataset should give them."""
    cls, draws, truth = getattr(torchvision.datasets, name.upper()), np.random.default_rng(0), []
    base = folder / getattr(cls, "base_folder", "")
    base.mkdir(exist_ok=True)
    for part, n in (("train", 30), ("test", 20)):
        x, y = draws.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), np.arange(n) % 10
        truth += [x, y]
        if name == "svhn":
            url, file, _ = cls.split_list[part]
            scipy.io.savemat(folder / file, {"X": x.transpose(2, 3, 1, 0), "y": np.where(y, y, 10)[:, None]})
            monkeypatch.setitem(cls.split_list, part, [url, file, md5(folder / file)])
        else:
            file, key = getattr(cls, f"{part}_list")[0][0], "labels" if name == "cifar10" else "fine_labels"
            (base / file).write_bytes(pickle.dumps({"data": x.reshape(n, 3072), key: y.tolist()}))
            monkeypatch.setattr(cls, f"{part}_list", [[file, md5(base / file)]])
    if name != "svhn":
        (base / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: ["a class's name"]}))
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": None})
        with tarfile.open(folder / cls.filename, "w:gz") as tar:
            tar.add(base, cls.base_folder)
        monkeypatch.setattr(cls, "tgz_md5", md5(folder / cls.filename))
        shutil.rmtree(base)
    return truth


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_download(name, web, tmp_path, monkeypatch):
    truth, root = make_dataset(name, web.folder, monkeypatch), tmp_path / "data"
    data = ctl.load_dataset(name, str(root))
    assert data.name == name and [tensor.dtype for tensor in data[1:]] == [torch.uint8, torch.int64] * 2
    assert all(np.array_equal(found, right) for found, right in zip(data[1:], truth)) and web.waits == {30}
    lock = root / ".download.lock"  # another user may take it; some versions of filelock remove it
    assert not lock.exists() or lock.stat().st_mode & 0o777 == 0o666
    refused(f"{name} has images of 32x32", ctl.load_dataset, name, root, 16, error=ctl.BadInput)
    (tmp_path / "file").write_text("")
    refused(f"cannot load {name} .*file/data", ctl.load_dataset, name, tmp_path / "file/data", error=ctl.BadInput)
    # There already, in a folder that can only be read: nothing is asked for or written.
    web.asked.clear()
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(filelock.FileLock, "acquire", lambda *_, **__: pytest.fail("nothing is to be written"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ctl.load_dataset(name, "~/data").sha256() == data.sha256()
    assert not web.asked and before == sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    if name != "svhn":  # torchvision believes that what lacks this file alone is whole
        base = root / ctl.DOWNLOADS[name].base_folder
        (base / ctl.DOWNLOADS[name].meta["filename"]).unlink()
        refused(f"cannot load {name} .* remove {base}", ctl.load_dataset, name, root, error=ctl.BadInput)


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_broken_downloads(name, web, tmp_path, monkeypatch):
    make_dataset(name, web.folder, monkeypatch)
    root, forbidden = tmp_path / "data", urllib.error.HTTPError("http://", 403, "Forbidden", None, None)
    socket.setdefaulttimeout(7)  # a caller's own
    for web.bad in (forbidden, urllib.error.URLError("no route"), TimeoutError("late"), ConnectionResetError("reset"),
                    http.client.IncompleteRead(b""), lambda content: b"<html>", lambda content: content[:99]):
        with pytest.raises(ctl.BadInput) as stop:
            ctl.load_dataset(name, root)
        assert all(word in str(stop.value) for word in (name, str(root), "--data", "a folder", "waves"))
    # What lies half there is fetched again, by one of three that ask at once (torchvision asks for each file twice).
    web.bad, files, sums = None, list(web.folder.iterdir()), []
    web.asked.clear()
    threads = [threading.Thread(target=lambda: sums.append(ctl.load_dataset(name, root).sha256())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(sums) == 3 and len(set(sums)) == 1 and len(web.asked) == 2 * len(files) and web.waits == {7}


# ---- folders
def md5(path): return hashlib.md5(path.read_bytes()).hexdigest()
def picture(values, dtype=np.uint8): return Image.fromarray(np.asarray(values).astype(dtype))
def pixels(image): return torch.tensor(np.asarray(image)).permute(2, 0, 1)
def rmtrees(root, *places): list(map(shutil.rmtree, [root / place for place in places]))


def make_folder(root, train=("a", "b"), test=("a", "b"), each=2):
    draws = np.random.default_rng(1)
    for folder in [root / "train" / c for c in train] + [root / "test" / c for c in test]:
        folder.mkdir(parents=True)
        for i in range(each):
            picture(draws.integers(0, 256, (32, 32, 3))).save(folder / f"{i}.png")
    return root


def test_folder(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "pets", train=("zebra", "ant", "cat"), test=("cat", "zebra"), each=1)
    ant, wide = root / "train/ant", np.zeros((32, 96, 3))
    wide[:, 32:64] = 255  # the middle square
    picture(wide).save(ant / "1.PNG")
    Image.new("RGB", (20, 45), (10, 200, 30)).save(ant / "2.PNG")
    data = ctl.load_dataset(str(root))
    assert data.name == "pets" and data.train_images.shape == (5, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [0, 0, 0, 1, 2] and data.test_labels.tolist() == [1, 2]
    assert torch.equal(data.train_images[0], pixels(Image.open(ant / "0.png"))) and (data.train_images[1] == 255).all()
    assert (data.train_images[2] == torch.tensor((10, 200, 30))[:, None, None]).all()
    for hidden in ("train/.ipynb_checkpoints", "train/cat/.thumbnails", "train/.hidden/b"):
        shutil.copytree(root / "test/cat", root / hidden)
    for name in ("train/cat/._0.png", "train/ant/.DS_Store", "train/notes.txt", "test/cat/x.gif", "test/cat/x"):
        (root / name).write_bytes(b"not an image")
    assert ctl.load_folder(root).sha256() == data.sha256()  # what is hidden or no image is left out
    monkeypatch.setenv("HOME", str(tmp_path))
    smaller = Image.open(ant / "0.png").resize((16, 16), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    assert torch.equal(ctl.load_dataset("~/pets", size=16).train_images[0], pixels(smaller))
    (tmp_path / "link").symlink_to(root)
    assert ctl.load_folder(tmp_path / "link").name == "pets"  # the folder's own name counts
    for name, known in ((".cache", ".cache"), ("cifar10", "cifar10-folder"), ("waves", "waves-folder"),
                        ("a|b[c]\té", "a_b_c__é"), ("x" * 101, "x" * 80)):
        root = root.rename(tmp_path / name)
        assert ctl.load_folder(root).name == known


def test_every_kind_of_image(tmp_path):
    root = make_folder(tmp_path / "pets")
    rgb = Image.open(root / "train/a/0.png").convert("RGB")
    for name in ("cmyk.jpg", "l.png", "1.png", "la.png", "rgba.png", "rgb.webp", "rgb.bmp", "rgb.tiff"):
        rgb.convert(Path(name).stem.upper()).save(root / "train/b" / name)
    rgb.quantize(9).save(root / "train/b/palette.png")
    right = [pixels(Image.open(path).convert("RGB")) for path in sorted((root / "train/b").iterdir())]
    assert torch.equal(ctl.load_folder(root).train_images[2:], torch.stack(right))
    # EXIF: the sensor's rows and columns are turned as the camera was.
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        rgb.save(root / "test/a/0.png", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(root / "test/a/0.png"))
        assert torch.equal(ctl.load_folder(root).test_images[0], pixels(upright)), orientation


SPOILT = [
    (".*{}/train", shutil.rmtree), (".*{}/test", lambda root: rmtrees(root, "test")),
    (".*{}/t.*class", lambda root: shutil.copytree(root / "test/a", root / "test/yak")),
    (".*{}/t.*class", lambda root: rmtrees(root, "train/a", "train/b", "test/a", "test/b")),
    (".*{}/t.*class", lambda root: rmtrees(root, "train/b", "test/b")),
    (".*aardvark", lambda root: (root / "train/aardvark").mkdir()),
    (".*image {}/test/a/x.png", lambda root: (root / "test/a/x.png").write_bytes(b"junk")),
    (".*image {}/train/a/0.png", lambda root: os.truncate(root / "train/a/0.png", 2000)),
    (".*{}/test/a/x.png.*8 bits", lambda root: picture(np.full((9, 9), 40_000), np.uint16).save(root / "test/a/x.png")),
    (".*{}/train/a/x.tiff.*8 bits", lambda root: picture(np.ones((9, 9)), np.float32).save(root / "train/a/x.tiff"))]


@pytest.mark.parametrize("words, spoil", SPOILT)
def test_bad_folder(words, spoil, tmp_path):
    root = make_folder(tmp_path / "pets")
    spoil(root)
    refused(words.replace("{}", str(root)), ctl.load_dataset, str(root), error=ctl.BadInput)


# ---- augmentation
def reference(images, a):
    """A loop over torchvision's functions."""
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    size, out = images.shape[-1], []
    for i, image in enumerate(images):
        x = TF.resized_crop(image.float() / 255, *a.crop[i].tolist(), [size, size],
                            transforms.InterpolationMode.BILINEAR, antialias=True)
        for operation in a.order[i].tolist():
            x = adjust[operation](x, a.factor[i, operation].item())
        x = TF.hflip(x) if a.flip[i] else x
        out.append(TF.rgb_to_grayscale(x, num_output_channels=3) if a.grey[i] else x)
    return torch.stack(out)


def some_images(n, size, seed):
    x = torch.randint(256, (n, 3, size, size), generator=seeded(seed), dtype=torch.uint8)
    if n > 4:
        x[0], x[1], x[2] = 0, 255, 77  # black, white, grey: no hue
        x[3, 0] = x[3, 1]  # two channels tie
    return x


@given(seeds, st.sampled_from([32, 16]))
@few
def test_augment_is_torchvisions(seed, size):
    # "the batched application equals a loop over torchvision.transforms.functional on float images to 1e-5", with each
    # of the 24 orders of the colour operations; "bilinear taps must not reach outside the crop", nor at the edges
    x, a = some_images(24, size, seed), ctl.draw_augmentation(24, seeded(seed), size)
    end = size - 1
    crops = [(0, 0, size, size), (end, 0, 1, size), (0, end, size, 1), (end, end, 1, 1), (0, 0, 1, 1), (5, 7, 1, 9),
             (3, 0, 13, 2), (8, 8, 8, 8)]
    other = dict(order=torch.tensor(list(itertools.permutations(range(4)))), crop=torch.tensor(3 * crops), grey=~a.grey)
    for a in (a, dataclasses.replace(a, **other)):
        found = ctl.augment(x, a)
        assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
        same(found, reference(x, a), atol=1e-5, rtol=0)
        views = ctl.normalise(found)
        same(views, TF.normalize(found, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]), atol=1e-5, rtol=0)
        assert views.is_contiguous(memory_format=torch.channels_last)


@given(seeds, st.sampled_from([1, 2, 7, 20, 64, 65, 130]))
@few
def test_augment_images_are_independent(seed, n):
    # "augment(x[p], a[p]) equals augment(x, a)[p] to the bit"
    x, a = some_images(n, 16, seed), ctl.draw_augmentation(n, seeded(seed), 16)
    p, whole = torch.randperm(n, generator=seeded(1)), ctl.augment(x, a)
    for wrong in (x / 255, x.long(), x.bool()):
        refused("images must be uint8", ctl.augment, wrong, a)
        refused("images must be uint8", ctl.embed, ctl.ResNet18(1, 2), wrong)
    assert torch.equal(ctl.augment(x[p], a[p]), whole[p]) and torch.equal(ctl.augment(x[-1:], a[-1:]), whole[-1:])


def alike(a, b, what):
    p = scipy.stats.ks_2samp(np.asarray(a, dtype=float), np.asarray(b, dtype=float)).pvalue
    assert p > 1e-3, (what, p)


@pytest.mark.parametrize("size", [32, 16])
def test_crop_law(size):
    # "torchvision rejects a crop that does not fit, up to ten times (mean area 0.551 at 32x32)"
    torch.manual_seed(77)
    ours = ctl.draw_augmentation(20_000, seeded(12), size).crop.double()
    blank, law = torch.zeros(3, size, size), transforms.RandomResizedCrop
    theirs = torch.tensor([law.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)]).double()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all() and (ours[:, 2:] >= 1).all()
    for name, f in {"height": lambda c: c[:, 2], "width": lambda c: c[:, 3], "area": lambda c: c[:, 2] * c[:, 3],
                    "ratio": lambda c: c[:, 3] / c[:, 2], "top": lambda c: c[:, 0], "left": lambda c: c[:, 1]}.items():
        alike(f(ours), f(theirs), name)
    assert size == 16 or abs((ours[:, 2] * ours[:, 3] / size ** 2).mean() - 0.551) < 0.01


def test_colour_law():
    torch.manual_seed(78)
    drawn, ranges = ctl.draw_augmentation(20_000, seeded(12), 32), [(0.6, 1.4)] * 3 + [(-0.4, 0.4)]
    theirs = [transforms.ColorJitter.get_params(*ranges) for _ in range(5000)]
    for i in range(4):
        alike(drawn.factor[:, i], [draw[1 + i] for draw in theirs], f"factor {i}")
    _, counts = (drawn.order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)
    assert (drawn.order.sort(1).values == torch.arange(4)).all()
    assert len(counts) == 24 and scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    # The same but for flips, which are drawn also where they are not wanted.
    still = vars(ctl.draw_augmentation(20_000, seeded(12), 32, flip=False))
    assert not still["flip"].any()
    assert all(torch.equal(x, still[name]) for name, x in vars(drawn).items() if name != "flip")
    for flag, share in ((drawn.flip, 0.5), (drawn.grey, 0.2)):
        assert scipy.stats.binomtest(int(flag.sum()), len(flag), share).pvalue > 1e-3
    # Draws are independent: where a crop lies, as a share of the room that it has, of all else too.
    place = (drawn.crop[:, :2] + 0.5) / (33 - drawn.crop[:, 2:])
    independent = torch.cat([drawn.crop[:, 2:].T, place.T, drawn.flip[None], drawn.grey[None], drawn.factor.T,
                             drawn.order[:, :1].T])
    correlation = torch.corrcoef(independent) - torch.eye(11)
    correlation[0, 1] = correlation[1, 0] = 0  # height and width do go together
    assert correlation.abs().max() < 5 / math.sqrt(len(drawn.flip))


def test_each_key_has_its_own_random_numbers():
    # of any seed; and of keys that look alike when their parts are run together
    keys = [*itertools.product([*range(600), 2 ** 31 - 1], ("order", "views"), range(3), range(3)),
            *itertools.product((0, 1), ("order", "views"), range(12), range(12)),
            *itertools.product(range(300), ("network", "bank", "view 1", "view 2"))]
    assert len({ctl.generator(*key).initial_seed() for key in keys}) == len(set(keys))
    drawn = torch.stack([torch.rand(1000, generator=ctl.generator(*key)) for key in keys[::100]])
    assert (torch.corrcoef(drawn) - torch.eye(len(drawn))).abs().max() < 6 / math.sqrt(1000)


def test_only_cuda_copies_without_waiting(monkeypatch):
    # On MPS such a copy may read memory that was freed meanwhile (pytorch#139550).
    asked = []
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking=False: asked.append((device, non_blocking)))
    drawn = ctl.draw_augmentation(1, seeded(0))
    for device, at_once in (("cpu", False), ("cuda", True), ("cuda:1", True), ("mps", False)):
        drawn.to(device)
        assert asked[-5:] == 5 * [(device, at_once)]


# ------------------------------------------------------------------------------------------------------------ All rooms
@pytest.mark.parametrize("context", CONTEXTS)
def test_nothing_comes_out_otherwise_in_any_context(context):
    # also of tensors that were made there, and of features that carry a graph
    s, p = random_rows(5, 6, 30, torch.float32)
    images, drawn = some_images(70, 16, 0), ctl.draw_augmentation(70, seeded(0), 16)
    losses = itertools.product(ROOM_1.values(), (None, 4))
    calls = [*METRICS.values(), *((lambda x, p, f=f, k=k: f(x, p, 0.07, k), dict(x=s, p=p)) for f, k in losses),
             (lambda x: ctl.normalise(ctl.augment(x, drawn)), dict(x=images))]
    for f, arguments in calls:
        arguments = {name: x.float() if x.is_floating_point() else x for name, x in arguments.items()}
        graph = {name: x.clone().requires_grad_() * 1 if x.is_floating_point() else x for name, x in arguments.items()}
        before, outside = [x.clone() for x in arguments.values()], f(**arguments)
        with CONTEXTS[context]():
            made_there = {name: x.clone() for name, x in arguments.items()}
            inside, nested = f(**arguments), f(**made_there)
        for found in (inside, nested, f(**made_there), f(**graph)):
            same(found, outside)
        assert all(map(torch.equal, arguments.values(), before))  # no argument is changed in place
    # A bank moves alike there, and one that was made there takes part in training.
    outside, z, index = ctl.MemoryBank(40, 16, init=Z), OTHER.float().requires_grad_(), torch.arange(9)
    with CONTEXTS[context]():
        bank = ctl.MemoryBank(40, 16, init=Z.clone())
        same(bank.similarity(z), outside.similarity(z))
        bank.update(index, z[:9])
    outside.update(index, z[:9])
    same(bank.rows, outside.rows)
    bank.similarity(z).square().sum().backward()
    bank.update(index, z[:9])
    assert z.grad.abs().sum() > 0


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(ctl)
    assert failed == 0 and tried >= 2


# ------------------------------------------------------------------------------------------- helpers of rooms 6 to 8
SMOKE = ["--preset", "smoke", "--tau", "0.3", "--threads", "1"]  # 3 epochs of 7 steps
RUN = "smoke/waves/contrastive_tau0.3_seed0"
RECORD, CHECKPOINT, LOCK = (Path("runs", f"{RUN}.{kind}") for kind in ("json", "pt", "lock"))
KEYS = {"config", "protocol_version", "data_sha256", "images", "final", "history", "environment", "timing", "sha256"}
TRAIN_STEP = ctl.train_step
SOURCE = functools.cache(inspect.getsource)  # a parser asks for it, a fifth of a second each


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs a command line, which ends with that status; where it fails, its one line has these words."""
    monkeypatch.setattr(inspect, "getsource", SOURCE)

    def run(*argv, status=0, words=""):
        capsys.readouterr()
        assert ctl.main([str(a) for a in argv]) == status
        out, err = capsys.readouterr()
        assert re.fullmatch(r"ctl\.py: .+\n" if status else "", err) and words in err, err
        return out
    return run


def result(folder="."):
    """All of the smoke run's record but the clock and the machine."""
    record = ctl.read_record(Path(folder, RECORD))
    return {key: value for key, value in record.items() if key not in ("timing", "environment")}


def at_step(monkeypatch, number):
    """Interrupt before step `number` (from 1, counted over the calls)."""
    def step(*args, count=itertools.count(1)):
        if next(count) == number:
            raise KeyboardInterrupt
        return TRAIN_STEP(*args)
    monkeypatch.setattr(ctl, "train_step", step)


def named(f, *given, **options):
    """What f is called with, by name."""
    bound = inspect.signature(f).bind(*given, **options)
    bound.apply_defaults()
    return dict(bound.arguments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder in which the smoke run was made in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ctl, "load_waves", waves)
        assert ctl.main([*SMOKE, "--out", str(folder / "runs")]) == 0
    return folder


LOSSES = {  # which function of room 1 each loss is, and what it is given
    "contrastive": (ctl.contrastive_loss, ("tau",)), "hard": (ctl.contrastive_loss, ("tau", "k")),
    "simple": (ctl.simple_loss, ()), "hard-simple": (ctl.simple_loss, ("k",)), "triplet": (ctl.triplet_loss, ())}


def plain_network(c):
    torch.manual_seed(ctl.generator(c.seed, "network").initial_seed())
    return ctl.ResNet18(c.width, c.dim, c.precision == "bfloat16").to(memory_format=torch.channels_last)


def plain_views(c, images, *key, flip):
    rng, parts = ctl.generator(c.seed, *key), images.split(256)  # as many as evaluation takes at a time
    drawn = [ctl.draw_augmentation(len(part), rng, c.size, flip) for part in parts]
    return ctl.normalise(torch.cat([*map(ctl.augment, parts, drawn)]))


def plain_rate(c, at):
    rise = min(at / c.warmup, 1) if c.warmup else 1
    if c.schedule == "step":
        return c.lr * rise * math.prod(c.gamma for m in c.milestones if m <= at)
    return c.lr * rise * 0.5 * (1 + math.cos(math.pi * at / c.epochs))


def plain_run(c, data):
    """Section 5.1 once more: each draw's key, a step's rate, an epoch's mean loss."""
    model, images, N, (f, needs) = plain_network(c), data.train_images, len(data.train_images), LOSSES[c.loss]
    outputs = torch.randn(N, c.dim, generator=ctl.generator(c.seed, "bank"))
    if c.bank_init == "embeddings":
        with torch.no_grad():
            outputs = torch.cat([model.project(model.features(plain_views(c, part, "centre", i, flip=c.flip)))
                                 for i, part in enumerate(images.split(c.batch_size))])
            model.head.bias.copy_(-outputs.mean(dim=0))
            outputs -= outputs.mean(dim=0)
    bank = F.normalize(outputs, dim=1)
    untrained, history = ctl.evaluate(model, data, c), []
    optimiser = torch.optim.SGD(model.parameters(), 9.0, c.momentum, weight_decay=c.weight_decay, fused=True)
    for epoch in range(c.epochs):
        order, losses = torch.randperm(N, generator=ctl.generator(c.seed, "order", epoch)), []
        parts = order.split(c.batch_size)
        for i, index in enumerate(parts):
            z = model(plain_views(c, images[index], "views", epoch, i, flip=c.flip))
            loss = f(z @ bank.T, index, *(getattr(c, name) for name in needs)).mean()
            loss = loss * c.tau if c.match_step else loss
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = plain_rate(c, epoch + i / len(parts))
            optimiser.step()
            bank[index] = F.normalize(c.bank_momentum * bank[index] + (1 - c.bank_momentum) * z.detach(), dim=1)
        history.append({"epoch": epoch + 1, "loss": mean(losses), "lr": plain_rate(c, epoch)})
        if c.eval_every and (epoch + 1) % c.eval_every == 0 and epoch + 1 < c.epochs:
            history[-1] |= ctl.evaluate(model, data, c, in_full=False)
    return dict(history=history, untrained=untrained, model=model.state_dict(), bank=bank)


# ---------------------------------------------------------------------------------- every setting reaches what it sets
TINY = dict(preset="smoke", tau=0.3, size=16, width=2, dim=8, subset=40, test_subset=30, batch_size=20, epochs=2,
            eval_every=1, threads=1)
STEP, RANDOM = dict(schedule="step", milestones=(1, 2), epochs=3), dict(bank_init="random")
# What is changed, beside what, and which parts of the run (see `watched`) change by it: no other may.
CHANGES = [
    (dict(loss="hard", tau=0.2, k=3), {}, "trained"), (dict(loss="simple"), {}, "trained"),
    (dict(loss="hard-simple", k=3), {}, "trained"), (dict(loss="triplet"), {}, "trained"),
    (dict(k=3), dict(loss="hard"), "trained"), (dict(tau=0.1), {}, "trained"), (dict(momentum=0.1), {}, "trained"),
    (dict(match_step=True), {}, "trained"), (dict(bank_momentum=0.9), {}, "trained"), (dict(probe_lr=3.0), {}, "probe"),
    (dict(weight_decay=0.5), {}, "trained"), (dict(lr=0.1), {}, "rates trained"), (dict(eval_every=2), {}, "looks"),
    (dict(milestones=(1,)), dict(schedule="step"), "rates trained"), (dict(gamma=0.5), STEP, "rates trained"),
    (dict(schedule="step"), {}, "rates trained"), (dict(warmup=0.0), {}, "rates trained"),
    (dict(epochs=3), {}, "rates trained looks"), (dict(test_subset=20), {}, "counts untrained"),
    (dict(batch_size=13), RANDOM, "views rates trained"),  # the last batch of 40 has one image
    (dict(flip=False), RANDOM, "views trained"),  # evaluation has its flips
    (dict(flip=False), {}, "start untrained views trained"),  # the bank begins with views
    (dict(size=32), {}, "start untrained views trained"), (dict(dim=5), {}, "start untrained trained"),
    (dict(width=3), {}, "start untrained trained"), (dict(precision="bfloat16"), {}, "start untrained trained"),
    (RANDOM, dict(seed=1), "start untrained trained"), (dict(device="cpu", graph=False, force=True), {}, ""),
    (dict(subset=30), RANDOM, "start untrained counts order trained"),
    (dict(seed=1), {}, "start untrained order views probe trained")]


def tiny(**more):
    """A run of four steps; a loss without temperature takes none."""
    given = {**TINY, **more}
    if "tau" not in LOSSES[given.get("loss", "hard")][1]:
        del given["tau"]
    return ctl.make_config(**given)


def command(**given):
    """Its command line."""
    argv, config = [], tiny(**given)
    for name in {**TINY, **given}:
        value, flag = getattr(config, name), name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            argv += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return argv


@functools.cache
def watched(*given):
    """The same run, by its command line, in a folder of its own: record, checkpoint, its parts as lists."""
    steps, probes = [], []

    def step(model, bank, optimiser, images, index, drawn, config):
        tensors = [*model.state_dict().values(), bank.rows], vars(drawn).values(), [index]
        start, views, [order] = ([tensor.tolist() for tensor in part] for part in tensors)
        steps.append((start, views, order, optimiser.param_groups[0]["lr"]))
        return TRAIN_STEP(model, bank, optimiser, images, index, drawn, config)

    def probe(*given, real=ctl.linear_probe, **more):
        probes.append([more["lr"], more["seed"]])
        return real(*given, **more)
    with pytest.MonkeyPatch.context() as m, tempfile.TemporaryDirectory() as out:
        for name, stand_in in dict(load_waves=waves, train_step=step, linear_probe=probe).items():
            m.setattr(ctl, name, stand_in)
        assert ctl.main([*command(**dict(given)), "--out", out]) == 0
        path = Path(out, f"{ctl.run_path(tiny(**dict(given)), 'waves')}.json")
        record, saved = ctl.read_record(path), ctl.load_checkpoint(path.with_suffix(".pt"))
    starts, views, order, rates = zip(*steps)
    untrained = {key: value for key, value in record["final"]["untrained"].items() if "accuracy" not in key}
    return record, saved, dict(
        start=starts[0], order=sum(order, [])[:len(saved["bank"])], views=views[0], rates=rates, probe=probes,
        trained=[tensor.tolist() for tensor in (*saved["model"].values(), saved["bank"])], untrained=untrained,
        counts=record["images"], looks=["knn" in entry for entry in record["history"]])


@pytest.mark.parametrize("change,beside,parts", CHANGES, ids=["-".join(c) for c, _, _ in CHANGES])
def test_each_setting_reaches_what_it_sets(change, beside, parts):
    """Record and checkpoint hold what section 5.1 gives with that setting; nothing else changes against the run with
    the usual one; the record's name says so; nobody else's draws change."""
    changed, usual, state = tiny(**{**beside, **change}), tiny(**beside), torch.get_rng_state()
    record, saved, found = watched(*{**beside, **change}.items())
    assert torch.equal(torch.get_rng_state(), state) and torch.get_float32_matmul_precision() == "highest"
    _, _, before = watched(*beside.items())
    assert {name for name in found if found[name] != before[name]} == set(parts.split())
    model, data = plain_network(changed), ctl.take_subset(waves(changed.size), changed)
    model.load_state_dict(saved["model"])
    final = dict(record["final"])
    got = dict(history=record["history"], untrained=final.pop("untrained"), model=saved["model"], bank=saved["bank"])
    wanted = dict(plain_run(changed, data), final=ctl.evaluate(model, data, changed))
    torch.testing.assert_close(dict(got, final=final), wanted, rtol=2e-3, atol=2e-4, check_dtype=False)
    same_place = ctl.run_path(changed, "waves") == ctl.run_path(usual, "waves")
    assert same_place == (changed.recorded() == usual.recorded()) == (parts == "")


def test_presets_and_names():
    # As PAPER.md, section 2, and the authors' code have it. Of other presets the committed records hold the values.
    paper = dict(
        preset="paper", dataset="cifar10", epochs=200, batch_size=128, size=32, width=64, dim=128, lr=0.03,
        momentum=0.9, weight_decay=5e-4, schedule="step", milestones=(160, 190), gamma=0.1, warmup=0.0, seed=0,
        bank_momentum=0.5, bank_init="random", subset=None, test_subset=None, flip=True, match_step=False,
        precision="auto", probe_lr=30.0, eval_every=10, loss="hard", tau=0.3, k=4095)
    assert ctl.make_config("paper", loss="hard").recorded() == paper and ctl.make_config("paper") == ctl.Config()
    # No setting and no loss is left out above.
    tried = set().union(*(change for change, _, _ in CHANGES)) | {"dataset", "preset"}
    assert tried == paper.keys() | {"device", "graph", "force"} and ctl.LOSSES == LOSSES
    for preset, k in dict(paper=4095, narrow=4095, mini=409, quick=200, smoke=8).items():
        for loss, (_, needs) in LOSSES.items():
            c = ctl.make_config(preset, loss=loss)
            assert (c.tau, c.k) == (0.3 if "tau" in needs else None, k if "k" in needs else None)
            assert c.dataset == ("waves" if preset in ("quick", "smoke") else "cifar10")
    path = lambda **given: str(ctl.run_path(ctl.make_config("smoke", **given), "waves"))
    assert path(loss="hard", k=7, lr=0.1, seed=3) == "smoke/waves/hard_tau0.3_lr-0.1_k-7_seed3"
    assert path(device="cpu", threads=2, data="x", out="y", force=True, graph=False) == RUN
    assert path(schedule="step", milestones=(3, 5)) == f"{RUN[:-6]}_schedule-step_milestones-3-5_seed0"


def test_settings_that_are_wrong():
    """One rule for all numbers: finite, below 2^31, and above 0 or at least 0. Each dict's first is wrong."""
    may_be_0 = "seed momentum weight_decay gamma warmup bank_momentum eval_every".split()
    right = [dict(size=16), dict(size=24), dict(tau=1e-30), dict(lr=np.float64(0.5))]
    wrong = [dict(loss=None), dict(loss="new"), dict(preset="big"), dict(size=20), dict(size=8), dict(tau=1e-31),
             dict(milestones=(3,)), dict(gamma=0.5), dict(momentum=1.1), dict(bank_momentum=1.1), dict(epochs=2.0),
             dict(tau=np.float64(-1)), dict(tau="0.3"), dict(tau=True), dict(flip="no"), dict(flip=1), dict(lr=None),
             dict(device=""), *(dict(milestones=falling, schedule="step") for falling in ((3, 3), (2, 1), (0, 1)))]
    for loss, (_, needs) in LOSSES.items():
        wrong += [dict(tau=0.3, loss=loss), dict(match_step=True, loss=loss)] * ("tau" not in needs)
        wrong += [dict(k=3, loss=loss)] * ("k" not in needs)
    for name, hint in [(field.name, field.type) for field in dataclasses.fields(ctl.Config)]:
        if hint.startswith(("int", "float")):
            zero, some = name in may_be_0, dict(loss="hard", schedule="step" if name == "gamma" else "cosine")
            values = [-1, math.nan, math.inf, -math.inf, 2 ** 31] + [0.5] * (hint[0] == "i") + [0] * (not zero)
            wrong += [{name: value, **some} for value in values]
            right += [{name: value, **some} for value in (1, 0)[name == "size":1 + zero]]
    for given in right:
        c = ctl.make_config("smoke", **given)
        assert all(getattr(c, name) == value for name, value in given.items())
        assert [type(value) for value in (c.momentum, c.gamma, c.lr, c.epochs)] == [float, float, float, int]
    for given in wrong:
        refused(f".*{next(iter(given))}", ctl.make_config, **{"preset": "smoke", **given}, error=ctl.BadInput)
    assert len(wrong) > 120
    assert ctl.make_config("smoke", schedule="step", milestones=[1, 2]).milestones == (1, 2)


def test_a_row_of_losses_is_complete(monkeypatch):
    """A new loss of which something is forgotten: an error when the config is made, or what the row says."""
    for row, name in ((("k", "margin"), "margin"), (("subset",), "subset")):
        monkeypatch.setitem(ctl.LOSSES, "simple", (ctl.simple_loss, row))
        refused(f"the simple loss needs a {name}", ctl.make_config, "paper", loss="simple", error=ctl.BadInput)
    monkeypatch.setitem(ctl.LOSSES, "simple", (ctl.simple_loss, ("k",)))
    s, own = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([0])
    for given, wanted in (({}, 6 / 4), (dict(k=1), 3 / 2), (dict(k=2), 5 / 3)):
        c = ctl.make_config("smoke", loss="simple", **given)
        assert c.k == given.get("k", 8) and ctl.training_loss(c, s, own).item() == pytest.approx(wanted)
    monkeypatch.setitem(ctl.LOSSES, "new", (ctl.simple_loss, ()))
    refused("loss must be one of contrastive, ", ctl.make_config, "smoke", loss="new", error=ctl.BadInput)
    c.loss = "newer"  # past the checks
    pytest.raises(KeyError, ctl.training_loss, c, s, own)


def test_what_the_machine_decides(monkeypatch, cli):
    for name in ("cuda:99", "tpu9", "", "meta"):
        refused(f"device '{name}' can't be used: ", ctl.pick_device, name, error=ctl.BadInput)
    taken, gpu = [], torch.device("cuda")
    monkeypatch.setattr(ctl, "train", taken.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.empty(0))  # it works, whatever it is
    for wanted, cuda, mps in (("cuda", 1, 1), ("cuda", 1, 0), ("mps", 0, 1), ("cpu", 0, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or mps)
        assert ctl.pick_device("auto").type == wanted and ctl.pick_device("cpu") == CPU
        for device, preset in (("auto", "paper" if cuda else "mini"), ("cpu", "mini"), ("cuda", "paper")):
            assert f"no preset given: {preset}" in cli("--tau", "0.1", "--device", device)
            assert taken[-1] == ctl.make_config(preset, tau=0.1, device=device)
        for precision, there, here in (("auto", mps, 0), ("float32", 0, 0), ("bfloat16", 1, 1)):
            c = ctl.make_config("smoke", precision=precision)
            assert (ctl.in_bfloat16(c, gpu), ctl.in_bfloat16(c, CPU)) == (there, here)
    assert cli("--preset", "quick") == "" and taken[-1].preset == "quick"
    assert [ctl.in_graph(tiny(graph=on), device) for on in (True, False) for device in (gpu, CPU)] == [1, 0, 0, 0]


def test_take_subset():
    images, single, labels = torch.arange(90, dtype=torch.uint8), torch.arange(90), torch.arange(90) % 3
    others, pairs, mini = (single * 7 + 2) % 3, single // 2, ctl.make_config("mini", seed=1)
    data, train, test = ctl.Data("my", images, labels, images, others), *map(ctl.balanced_order, [labels, others])
    taken = ctl.take_subset(data, mini)  # 5,000 at most, and all of the test images; of each seed the same
    assert all(map(torch.equal, taken[1:], (images[train], labels[train], images[test], others[test])))
    for few in (data._replace(train_labels=labels[:9]), data._replace(test_labels=others[:9])):
        refused("my: at least 10 images", ctl.take_subset, few, mini, error=ctl.BadInput)
    c = ctl.make_config("mini", loss="hard", k=89)
    refused("--k 89 drops none of 89", ctl.take_subset, data, c, error=ctl.BadInput)
    ctl.take_subset(data, dataclasses.replace(c, k=88))
    # Every class that is tested must be trained on, and some class must have an image to hold out.
    for train_y, test_y in ((labels, labels + 1), (single, others), (pairs, pairs)):
        refused("my: .0 training images", ctl.take_subset, ctl.Data("my", images, train_y, images, test_y),
                ctl.make_config("mini", subset=20 if train_y is pairs else 90), error=ctl.BadInput)
    for train_y, test_y in ((labels, labels * 0 + 2), (single.clamp(max=88), others)):
        ctl.take_subset(ctl.Data("my", images, train_y, images, test_y), mini)


# ----------------------------------------------------------------------------------------- evaluation, and whole runs
def test_which_tensors_each_metric_is_of(monkeypatch):
    """Every metric of `evaluate` returns what it is called with; of the settings only two arrive there."""
    assert inspect.signature(ctl.linear_probe).parameters["lr"].default == 30.0  # paper, section 5.1
    data, profile = waves(16), []
    c = tiny(seed=3, probe_lr=0.7, loss="hard", tau=0.9, k=2, flip=False, precision="bfloat16", match_step=True, lr=9,
             momentum=0, weight_decay=0, bank_momentum=0.1, subset=12, test_subset=11, batch_size=7, eval_every=0)
    train_y, test_y = (torch.arange(301) * 7) % 5, torch.arange(300) % 4
    data = ctl.Data("mine", data.train_images[:301], train_y, data.test_images[:300], test_y)
    model, _ = ctl.make_model(tiny(), CPU)
    assert model.stages[0][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)  # as the views are
    model(ctl.normalise(data.train_images / 255))  # its running means are not those of the start
    state, judge = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval().requires_grad_(False)

    def of(views):
        h = judge.features(views)
        return h, F.normalize(judge.project(h), dim=1)
    (train_h, train_z), (mirror_h, _), (test_h, test_z) = (of(ctl.normalise(images / 255)) for images in (
        data.train_images, data.train_images.flip(3), data.test_images))
    view_1, view_2 = (of(plain_views(c, data.test_images, name, flip=True))[1] for name in ("view 1", "view 2"))
    for name in ("knn_accuracy", "uniformity", "tolerance", "alignment", "linear_probe"):
        monkeypatch.setattr(ctl, name, functools.partial(named, getattr(ctl, name)))
    f = functools.partial(named, ctl.similarity_profile)
    monkeypatch.setattr(ctl, "similarity_profile", lambda *given: profile.append(f(*given)) or torch.arange(11.0))
    for training in (True, False):  # in evaluation mode, and put back
        got = ctl.evaluate(model.train(training), data, c)
        assert model.training == training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    h, (kept, held) = torch.stack([train_h, mirror_h]), ctl.hold_out(train_y)
    assert len(held) == 60  # a fifth of 61, and of four times 60
    # Paper, section 5.1; momentum and batch of the probe, and all of kNN: authors' code.
    probe = dict(epochs=100, lr=0.7, momentum=0.9, milestones=(40, 60, 80), gamma=0.2, batch_size=256, seed=3)
    quick = {
        "knn": dict(train_z=train_z, train_y=train_y, test_z=test_z, test_y=test_y, k=200, temperature=0.07),
        "uniformity": dict(z=test_z, t=2.0), "tolerance": dict(z=test_z, labels=test_y)}
    torch.testing.assert_close(dict(got, profile=profile[1:]), {
        **quick, "alignment": dict(z1=view_1, z2=view_2),
        "profile": [dict(z=test_z, z2=view_1, positive=torch.arange(300), top=10)],
        "accuracy": dict(probe, train_h=h, train_y=train_y, test_h=test_h, test_y=test_y),
        "accuracy_heldout": dict(probe, train_h=h[:, kept], train_y=train_y[kept], test_h=train_h[held],
                                 test_y=train_y[held])})
    torch.testing.assert_close(ctl.evaluate(model, data, c, in_full=False), quick)
    assert got["profile"] == list(range(11)) and not got["uniformity"]["z"].requires_grad


def test_record(undisturbed, monkeypatch):
    text = (undisturbed / RECORD).read_text()
    r, data = json.loads(text), ctl.take_subset(waves(32), ctl.make_config("smoke"))
    assert text == json.dumps(r, indent=1, sort_keys=True) + "\n" and "NaN" not in text
    assert r.keys() == KEYS and r["final"].keys() - {"untrained"} == r["final"]["untrained"].keys()
    assert r["config"] == ctl.as_json(ctl.make_config("smoke", tau=0.3).recorded()) and r["protocol_version"] == 1
    assert r["data_sha256"] == data.sha256() and r["images"] == {"train": 100, "test": 100}
    assert ctl.as_json({"a": (1, math.nan, [-math.inf, 0.5])}) == {"a": [1, None, [None, 0.5]]}
    for key in r:  # the sum is of all but the clock and the machine
        assert (ctl.record_sha256({**r, key: 9}) == r["sha256"]) == (key in ("timing", "environment", "sha256"))
    here, calls, capability = r["environment"], [], torch.backends.cpu.get_cpu_capability()
    assert here == ctl.environment(CPU, False, False)
    assert {**here, "precision": "bfloat16", "graph": True} == ctl.environment(CPU, True, True)
    assert here["source_sha256"] == hashlib.sha256(Path(ctl.__file__).read_bytes()).hexdigest() and here["cpu"]
    known = dict(device=f"cpu {capability}", threads=1, precision="float32", graph=False, torch=torch.__version__,
                 ONEDNN_MAX_CPU_ISA=os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT"))
    assert known.items() <= here.items()
    monkeypatch.setattr(ctl, "environment", lambda *given: calls.append(given))
    monkeypatch.setattr(ctl, "fit", lambda *given: calls.append("fit") or sys.exit(7))
    assert ctl.main([*SMOKE, "--seed", "1", "--precision", "bfloat16"]) == 7
    assert calls == [(CPU, True, False), "fit"]  # the source may be edited while a run lasts


def test_same_command_elsewhere_gives_the_same(undisturbed, cli, monkeypatch):
    """As a script, from another folder, on a terminal without UTF-8; then it is there: nothing is trained."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONSAFEPATH": "1",
           "PYTHONWARNINGS": "error,ignore::ResourceWarning"}
    ran = subprocess.run([sys.executable, ctl.__file__, *SMOKE], capture_output=True, text=True, env=env)
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.endswith(f"\nrecord: {RECORD}\n")
    assert "\nevaluating the untrained network\n" in ran.stdout and "\ntrained; evaluating\n" in ran.stdout
    assert result() == result(undisturbed)
    before, given = RECORD.read_bytes(), []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for more in (["--threads", "7"], []):
        assert "already" in cli("--preset", "smoke", *more) and RECORD.read_bytes() == before
    assert given == [7, 5] and {path for path in Path().rglob("*.*")} - {LOCK} == {RECORD, CHECKPOINT}


def test_a_users_home(cli, tmp_path, monkeypatch):
    """A ~ that no shell has expanded; and a folder of images, whose path is no part of the record."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_folder(Path("home/pets"), each=6)
    few, loads = command(epochs=1, subset=12, test_subset=12, batch_size=4), []
    cli(*few, "--dataset", "~/pets", "--out", "~/r")
    (path,) = Path("home/r").rglob("*.json")
    assert path.parts[:4] == ("home", "r", "smoke", "pets") and path.with_suffix(".pt").exists()
    assert ctl.read_record(path)["config"]["dataset"] == "pets" and str(tmp_path) not in path.read_text()
    monkeypatch.setattr(ctl, "load_dataset", lambda *given: loads.append(given) or waves(16))
    cli(*few, "--data", "~/d", "--out", "~/r")
    assert loads == [("waves", "~/d", 16)] and os.listdir() == ["home"]  # ~/d: see test_download


# --------------------------------------------------------------------------------------- Table 1, and committed records
def test_the_papers_numbers(capsys):
    for line in """\
contrastive 0.07   79.75 3.86 0.04     51.82 3.86 0.10     92.55 3.88 0.032
contrastive 0.3    83.27 3.60 0.178    56.44 3.60 0.269    95.47 3.65 0.137
contrastive 0.7    82.69 3.17 0.333    50.99 3.18 0.331    94.17 3.27 0.186
contrastive 1.0    82.21 2.96 0.372    48.33 2.96 0.343    92.07 3.05 0.197
simple      None   74.83 1.68 0.61     39.31 2.12 0.39     70.83 1.50 0.074
hard        0.07   79.2  3.88 0.034    50.77 3.87 0.088    91.82 3.89 0.025
hard        0.3    83.63 3.89 0.0267   56.55 3.88 0.124    94.79 3.91 0.021
hard        0.7    84.19 3.87 0.030    57.54 3.87 0.158    95.02 3.90 0.021
hard        1.0    84.19 3.86 0.030    56.77 3.86 0.172    95.26 3.88 0.023
hard-simple None   84.84 3.85 0.030    55.71 3.86 0.174    94.99 3.85 0.026
""".splitlines():
        loss, tau, *numbers = line.split()
        for i, dataset in enumerate(("cifar10", "cifar100", "svhn")):
            wanted = dict(zip(("accuracy", "uniformity", "tolerance"), map(float, numbers[3 * i:3 * i + 3])))
            assert ctl.paper_values(dataset, loss, eval(tau)) == wanted
    more = {"cifar10": (76.10, 81.82, 83.78, 83.22, 82.54, 82.97, 82.67, 81.97),
            "cifar100": (49.80, 52.46, 56.05, 55.47, 54.17, 53.05, 50.08), "svhn": (), "waves": ()}
    for dataset, loss in itertools.product(more, ("contrastive", "hard")):
        for tau, accuracy in itertools.zip_longest((0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9), more[dataset]):
            wanted = (accuracy if loss == "contrastive" else None, None, None)
            assert tuple(ctl.paper_values(dataset, loss, tau).values()) == wanted
    path = HOME / "results/mini/cifar10-jpeg/contrastive_tau0.3_seed0.json"
    record = ctl.read_record(path)
    record["final"]["alignment"] = None  # NaN
    ctl.show(record, path)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    for key, paper in (("accuracy", "83.27"), ("knn", "-"), ("uniformity", "3.6"), ("tolerance", "0.178")):
        ours = [float(lines[key][1]), float(lines[key][3])]
        assert ours == pytest.approx([record["final"][key], record["final"]["untrained"][key]], abs=6e-3)
        assert lines[key][2] == paper
    assert "all images, 200 epochs" in " ".join(lines["preset"]) and lines["record:"][1] == str(path)
    assert lines["alignment"][1] == "-"
    ctl.show(record, path.with_name("contrastive_tau0.3_lr-0.03_seed0.json"))  # no cell of the table
    assert not re.search(r"83\.27|200 epochs", capsys.readouterr().out)


def test_a_committed_record_is_what_the_code_gives(undisturbed):
    """A change of results can't pass unseen: on the kind of CPU that made the record to the last digit."""
    committed, ours = map(ctl.read_record, (HOME / "results" / f"{RUN}.json", undisturbed / RECORD))
    kind = "cpu ONEDNN_MAX_CPU_ISA device threads torch".split()
    if all(ours["environment"][key] == committed["environment"][key] for key in kind):
        assert ours["sha256"] == committed["sha256"]  # of all but the clock and the machine
    # Another CPU rounds otherwise, and steps blow that up: after five, losses differ by per cents. What comes before
    # the first step does not; nor, much, the mean loss of the first epoch, whose rate rises from 0.
    for key, value in ours["final"]["untrained"].items():
        near = dict(abs=5.01) if key in ("accuracy", "accuracy_heldout", "knn") else dict(rel=1e-5)  # an image of 20
        assert value == pytest.approx(committed["final"]["untrained"][key], **near), key
    assert ours["history"][0]["loss"] == pytest.approx(committed["history"][0]["loss"], rel=0.02)
    assert [entry.keys() for entry in ours["history"]] == [entry.keys() for entry in committed["history"]]


def test_every_committed_record_is_whole_and_stands_where_it_belongs():
    paths = [p for p in sorted((HOME / "results").glob("*/*/*.json")) if p.parts[-3] in ctl.PRESETS]
    assert len(paths) > 80
    for path in paths:
        record = ctl.read_record(path)
        c, history = ctl.Config(**record["config"]), record["history"]
        assert record.keys() == KEYS and ctl.as_json(c.recorded()) == record["config"], path
        assert record["protocol_version"] == ctl.PROTOCOL_VERSION, path
        assert Path("results", f"{ctl.run_path(c, c.dataset)}.json") == path.relative_to(HOME), path
        assert c.dataset != "waves" or ctl.take_subset(waves(c.size), c).sha256() == record["data_sha256"], path
        assert all(entry["lr"] == pytest.approx(ctl.learning_rate(c, entry["epoch"] - 1)) for entry in history), path


# ------------------------------------------------------------------------------------------- interrupted, and going on
def test_seconds_pace_and_checkpoints(cli, monkeypatch):
    """By a clock that only steps (20 s, then 100) and evaluations (1000 s) move. Seconds add up over what is kept;
    pace and time left go by the epochs of this process; a checkpoint comes when a minute has passed."""
    clock, saves = [0.0], []

    def takes(name, seconds, real):
        def stand_in(*given):
            clock[0] += seconds
            return real(*given)
        monkeypatch.setattr(ctl, name, stand_in)
    monkeypatch.setattr(ctl, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(ctl, "save_checkpoint", lambda path, state, real=ctl.save_checkpoint: (
        saves.append((len(state["run"]["history"]), state["run"]["seconds"])), real(path, state)))
    takes("evaluate", 1000, lambda *_: dict.fromkeys(ctl.MEANING, 0.5))
    argv = command(epochs=6, eval_every=0)
    at_step(monkeypatch, 12)  # two steps an epoch
    takes("train_step", 20, ctl.train_step)
    assert re.findall(r"  1 images/s  (\d) min left", cli(*argv, status=130)) == list("33211")  # 40 s an epoch
    assert saves == [(2, 1080), (4, 1160)] and ctl.CHECKPOINT_SECONDS == 60
    takes("train_step", 100, TRAIN_STEP)
    assert re.findall(r"  0 images/s  (\d) min left", cli(*argv)) == list("30")
    assert saves[2:] == [(5, 1360), (6, 1560)]
    assert json.loads(next(Path().rglob("*.json")).read_text())["timing"] == {"seconds": 2560}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again():
    """SIGKILL in steps, in half-written files, before and after they are renamed, in evaluation: no more than an
    epoch of two steps is done again, and what comes out is what an undisturbed run gives."""
    driver = """
import os, signal, sys, torch, ctl
torch.set_num_threads(1)  # a child that is forked has none of its parent's threads
data = ctl.load_waves(16)
ctl.load_waves, ctl.CHECKPOINT_SECONDS = lambda size: data, 0
def die(*given):
    if how == "half written":
        os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
    if how == "renamed":
        real(*given)
    os.kill(os.getpid(), signal.SIGKILL)
half, whole, renamed = (os, "fsync", "half written"), (os, "replace", ""), (os, "replace", "renamed")
step, judge = (ctl, "train_step", ""), (ctl, "evaluate", "")
for (owner, name, how), calls in ((half, 0), (whole, 0), (step, 3), (step, 1), (half, 0), (whole, 0), (renamed, 0),
                                  (step, 1), (half, 0), (renamed, 0), (judge, 0), (half, 0), (whole, 0), (renamed, 0),
                                  (step, 0)):
    real = getattr(owner, name)
    answers = iter([real] * calls + [die] * 99)
    if not (child := os.fork()):
        setattr(owner, name, lambda *given: next(answers)(*given))
        os._exit(ctl.main(sys.argv[1:]))
    print("end", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ran = subprocess.run([sys.executable, "-u", "-c", driver, *command(epochs=3)], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(HOME)})
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.findall("end (.*)", ran.stdout) == 14 * ["-9"] + ["0"] and "already" in ran.stdout
    begun = re.findall("evaluating the untrained|: (.) of 3 epochs done", ran.stdout)
    assert begun == ["", "", "", "1", "1", "1", "1", "2", "2", "2", "3", "3", "3", "3"]
    record, _, _ = watched(("epochs", 3))
    assert ctl.read_record(next(Path("runs").rglob("*.json")))["sha256"] == record["sha256"]


def test_damaged_checkpoints_are_never_used(undisturbed):
    path, draw, harmless = Path("x.pt"), random.Random(0), 0
    whole, good = (undisturbed / CHECKPOINT).read_bytes(), ctl.load_checkpoint(undisturbed / CHECKPOINT)
    spoilt = [b"", b"junk", pickle.dumps({"run": 1})]
    # Code, a network, no zip, whole but of something else.
    for content, zipped in ((dict(good, step=print), True), (nn.Linear(1, 1), True), (good, False), ([1, 2], True),
                            ({"run": 1}, True), ({key: good[key] for key in good if key != "bank"}, True)):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        spoilt.append(path.read_bytes())
    for i in range(60):  # cut off, or a bit turned
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        spoilt.append(whole[:at] + (bytes([whole[at] ^ bit]) + whole[at + 1:] if i % 3 else b""))
    for i, content in enumerate(spoilt):
        path.write_bytes(content)
        try:
            model = ctl.load_checkpoint(path)["model"]
            assert i >= 9 and all(torch.equal(value, good["model"][name]) for name, value in model.items())
            harmless += 1
        except ctl.BadInput as error:
            assert str(error).startswith(f"cannot read the checkpoint {path} (") and path.read_bytes() == content
    assert harmless < 10  # a bit of a file's date: nothing is damaged then


def test_of_another_run(undisturbed, cli):
    """A record or checkpoint where another belongs: refused, naming the one key that differs, and it stays."""
    config = ctl.as_json(tiny(loss="simple").recorded())  # without tau and k: null is not the same as missing
    mine = {**config, "protocol_version": 1, "data_sha256": "d"}

    def run(flat):
        rest = {key: value for key, value in flat.items() if key not in config}
        return {**rest, "config": {key: value for key, value in flat.items() if key in config}}
    ctl.check_same_run(Path("x"), {**run(mine), "run": 1}, {**run(mine), "run": 2})
    for key in mine:
        other, less = {**mine, key: "other"}, {name: value for name, value in mine.items() if name != key}
        for there, here in ((other, mine), (mine, other), (less, mine), (mine, less)):
            words = f"x is of another run: {key} is .* there, .* here"
            refused(words, ctl.check_same_run, Path("x"), run(there), run(here), error=ctl.BadInput)
    refused("x is of another run: ", ctl.check_same_run, Path("x"), {}, run(mine), error=ctl.BadInput)
    for path in (RECORD, CHECKPOINT):
        shutil.copytree(undisturbed / "runs", "runs", dirs_exist_ok=True)
        other, before = path.with_name(path.name.replace("0.3", "0.7")), path.read_bytes()
        path.rename(other)
        cli(*SMOKE, "--tau", "0.7", status=2, words=f"{other} is of another run: tau is 0.3 there, 0.7 here")
        assert other.read_bytes() == before
        other.unlink()


def test_damage_force_and_interruption(undisturbed, cli, monkeypatch):
    """A file that is damaged or edited is refused, and stays; --force begins again; what is interrupted goes on."""
    shutil.copytree(undisturbed / "runs", "runs")
    whole, r = CHECKPOINT.read_bytes(), json.loads(RECORD.read_text())
    for text in (json.dumps({**r, "final": {**r["final"], "accuracy": 99.0}}), "{", "[]", "{}", "", "[" * 10 ** 5):
        RECORD.write_text(text)
        cli(*SMOKE, status=2, words=f"{RECORD} is broken or was edited (")
        assert RECORD.read_text() == text and CHECKPOINT.read_bytes() == whole
    RECORD.unlink()
    CHECKPOINT.write_bytes(whole[:-9])
    cli(*SMOKE, status=2, words=f"cannot read the checkpoint {CHECKPOINT}")
    assert CHECKPOINT.read_bytes() == whole[:-9] and not RECORD.exists()
    shutil.copytree(undisturbed / "runs", "runs", dirs_exist_ok=True)
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 0)
    at_step(monkeypatch, 20)  # 7 an epoch
    cli(*SMOKE, "--force", status=130, words="interrupted")
    assert not RECORD.exists()
    at_step(monkeypatch, None)
    torch.manual_seed(9)
    assert f"going on from {CHECKPOINT}: 2 of 3 epochs done" in cli(*SMOKE) and result() == result(undisturbed)


@pytest.mark.parametrize("spoilt", range(6))
def test_what_is_not_finite_is_not_saved(spoilt, cli, monkeypatch):
    """Not after the last step of an epoch either, which nothing else follows."""
    def step(model, bank, optimiser, *given):
        loss = TRAIN_STEP(model, bank, optimiser, *given)
        what = (model.head.weight[0], model.stem[1].running_mean, bank.rows[2], loss[None], torch.ones(1))[spoilt]
        what[-1:].detach().fill_(math.nan)
        return loss
    if spoilt < 5:
        monkeypatch.setattr(ctl, "train_step", step)
        cli(*command(epochs=1, subset=20), status=int(spoilt < 4), words="not finite in epoch 1" * (spoilt < 4))
    if spoilt == 5:
        cli(*command(tau=1e-9, epochs=1, out="elsewhere"), status=1, words="embeddings vanish or overflow")
    for loss in ("hard", "simple", "hard-simple") * (spoilt == 5):  # they diverge
        cli(*command(loss=loss, lr=1e9, warmup=0.0, eval_every=0, subset=20), status=1, words="not finite: ")
    assert {path.suffix for path in Path("runs").rglob("*.*")} - {".lock"} == {*[".pt", ".json"] * (spoilt == 4)}


# ---------------------------------------------------------------------------------------------------- what goes wrong
def test_locks_and_folders(cli, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    Path("file").touch()
    cli(*SMOKE, "--out", "file", status=1, words=": 'file")  # a folder that can't be made
    LOCK.parent.mkdir(parents=True)
    with filelock.FileLock(LOCK):
        cli(*SMOKE, status=3, words=f"another process is at work on this run (it holds {LOCK})")
    cli(*command())  # it went with its holder
    for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS):  # a file system that has none
        def flock(*_):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(fcntl, "flock", flock)
        if number != errno.ENOSYS:
            words = f"{LOCK.parent} can't lock files ([Errno {number}] {os.strerror(number)}): give an --out on"
            cli(*SMOKE, status=1, words=words)
    with pytest.warns(UserWarning, match="flock"):  # filelock does without
        cli(*command(seed=1))
    assert not CHECKPOINT.exists() and not RECORD.exists()


def test_a_full_disk(cli, monkeypatch):
    """One line that names the file; what was there stays; the same command goes on once there is room."""
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    answers = iter((full, os.fsync) * 3)
    ctl.write_whole(Path("deleted/meanwhile/record.json"), b"")
    monkeypatch.setattr(os, "fsync", lambda file: next(answers)(file))
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 0)
    base = Path("runs", ctl.run_path(tiny(), "waves"))
    for kind, epochs in (("pt", 0), ("pt", 1), ("json", 2)):
        cli(*command(), status=1, words=f"No space left on device: '{base}.{kind}'")
        assert f"{base.name}.{kind}" in next(base.parent.glob("*.tmp")).name  # no other run writes there
        assert not Path(f"{base}.json").exists() and Path(f"{base}.pt").exists() == (epochs > 0)
    assert "2 of 2 epochs done" in cli(*command()) and not list(Path().rglob("*.tmp"))
    assert ctl.read_record(Path(f"{base}.json"))["sha256"] == watched()[0]["sha256"]


def test_exit_statuses(capsys, monkeypatch):
    def work(*given):
        assert given == (1, 2)
        if error is not None:
            raise error
    for error, status, words in [
            (None, 0, ""), (SystemExit(2), 2, ""), (ctl.BadInput("a\nb"), 2, "a b"), (MemoryError(), 1, "MemoryError:"),
            (ctl.NotFinite("a"), 1, "not finite: a"), (OSError(5, "a", "file"), 1, "OSError: [Errno 5] a: 'file'"),
            (filelock.Timeout("a"), 3, "another process is at work on this run (it holds a)"),
            (torch.OutOfMemoryError("CUDA out of memory.\nTry"), 1, "OutOfMemoryError: CUDA out of memory. Try"),
            (RuntimeError("allocate memory"), 1, "RuntimeError:"), (RuntimeError("--no-graph"), 1, "RuntimeError:"),
            (KeyboardInterrupt(), 130, "interrupted; the same command goes on")]:
        assert ctl.exit_status("me", work, 1, 2) == status, error
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"me: {words}" if words else "") and err.count("\n") == bool(words)
    for error in (RuntimeError("illegal memory access"), KeyError("a"), ValueError("a")):  # faults are not hidden
        monkeypatch.setattr(ctl, "pick_device", lambda _: work(1, 2))
        pytest.raises(type(error), ctl.main, SMOKE)


def test_the_command_line(cli, capsys):
    """--help prints the opening, the presets and each field as it stands, in ASCII, as a terminal may lack τ. A
    hundred lines are wrong in one thing each; the complaint names it, and nothing is written."""
    out, source = cli("--help"), Path(ctl.__file__).read_text(encoding="utf-8").split("class Config:")[1]
    assert out.isascii() and out.startswith(ctl.__doc__[:60]) and ctl.make_parser("me", None)  # without docstrings
    assert all(f"    {name}: {values}\n" in out for name, values in ctl.PRESETS.items()) and str(ctl.NEGATIVES) in out
    lines = [line.split() for line in """--k 5|--k 0 --loss hard|--tau 0.3 --loss simple|--report|stray|--subset 10
        |--match-step --loss simple|--nonsense 1|--ta 0.3|-t 1|--alpha 0.1|--gamma 0.5|--milestones 3|--milestones 1.5
        |--size 20|--dataset|--device tpu9|--device cuda:99|--seed 99999999999999999999999|--momentum 1.1|--runs r
        |--results r|--dataset shapes|--dataset no/such/folder|--dataset ctl.py|--preset paperr""".split("|")]
    for field in dataclasses.fields(ctl.Config):
        assert re.search(rf"^    {field.name}: .*\n", source, re.M)[0] in out
        flag, kind = "--" + field.name.replace("_", "-"), re.match(r"\w+", field.type)[0]
        values = dict(int=("x", "-1", "1e3"), float=("x", "-inf", "nan", "1e999", "1,5"), Literal=("", "x"), str=("",))
        lines += [[flag, value] for value in values.get(kind, ())]
        lines += [[f"{flag}=1"], [f"--no{flag}"]] if kind == "bool" else [[flag]] if kind != "tuple" else []
    for line in lines:
        assert ctl.main([*([] if "--preset" in line else ["--preset", "smoke"]), *line]) == 2, line
        err = capsys.readouterr().err.replace("_", "-")
        word = line[-1] if line[0] == "--dataset" else line[0].removeprefix("--no").strip("-").split("=")[0]
        assert re.fullmatch(r"ctl\.py: .+\n", err) and word in err, (line, err)
    assert len(lines) > 120 and not [path for path in Path().rglob("*") if path.is_file()]


def test_the_readmes_python_runs(undisturbed):
    blocks = re.findall(r"```python\n(.*?)```", (HOME / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names, path = {}, str(undisturbed / CHECKPOINT)
    for block in blocks:
        exec(re.sub(r'"runs/[^"]*"', repr(path), block), names)
    assert blocks and names["loss"].isfinite() and names["h"].shape == (2000, 32) and names["z"].shape == (2000, 16)


# ------------------------------------------------------------------------------------------------------------- the step
# Without a GPU at hand: what a capture as a CUDA graph would not survive is looked for in each operation of a step, on
# tensors that say they are on a GPU and hold nothing; and a double of CUDA's graphs replays steps on the CPU.

# The device has to tell the host a value or a shape; and what launches nothing.
READS = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount",
         "repeat_interleave", "_assert_async"}
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "_unsafe_view", "detach", "alias"}
GRAPHED = dict(size=16, width=2, dim=8, subset=36, test_subset=20, eval_every=1, threads=1)


class Watch(TorchDispatchMode):
    """Counts kernels, and notes what a capture would not survive or a graph would keep."""

    def __init__(self):
        super().__init__()
        self.kernels, self.wrong = collections.Counter(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if function.namespace in ("prim", "profiler"):  # x.device and the like
            return function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        sgd, by_mask = name == "_fused_sgd_", any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        self.wrong |= {words for words, found in {
            "host read": name in READS, "index by a mask": name.strip("_").startswith("index") and by_mask,
            "tensor on the host": any(x.device.type == "cpu" for x in tensors),
            "to the host": str(kwargs.get("device")) == "cpu",
            "number of a first step": sgd and kwargs["is_first_step"],
            "number as the rate": sgd and not torch.is_tensor(kwargs["lr"])}.items() if found}
        self.kernels[name] += not function.is_view and name not in NO_KERNEL
        if not sgd:  # in place, and FakeTensorMode does not know it
            return function(*args, **kwargs)


def backward(root, *_, **__):
    """`Tensor.backward` node by node: autograd's engine would ask for the streams of a GPU."""
    nodes, arrived = [root.grad_fn], {root.grad_fn: {0: torch.ones_like(root)}}
    for node in nodes:
        nodes += {following for following, _ in node.next_functions if following} - set(nodes)
    # The last made comes first; accumulators have no place in that order.
    for node in sorted(nodes, key=lambda node: (hasattr(node, "variable"), -node._sequence_nr())):
        came = arrived.pop(node, {})
        if hasattr(node, "variable"):
            p = node.variable
            p.grad = came[0].as_strided(p.shape, p.stride())  # as cuDNN lays it out
            continue
        # The engine sums over what was broadcast, and casts.
        came = [came[i].sum_to_size(of.shape).to(of.dtype) if i in came else None
                for i, of in enumerate(node._input_metadata)]
        left = node(*came)
        for (following, slot), g in zip(node.next_functions, left if isinstance(left, tuple) else (left,)):
            if following is not None and g is not None:
                slots = arrived.setdefault(following, {})
                slots[slot] = slots[slot] + g if slot in slots else g


def watched_step(monkeypatch, rate=lambda: torch.empty((), device="cuda"), first=False, drawn_on="cuda", **config):
    """The second step of a run (or the first) of `paper`, on a GPU that is not there."""
    c, bank, drawn = ctl.make_config("paper", **config), ctl.MemoryBank(1, 1), ctl.draw_augmentation(128, seeded(0))
    model = ctl.ResNet18(c.width, c.dim, bfloat16=True).to(memory_format=torch.channels_last)
    with FakeTensorMode():
        for module in model.modules():
            for kept, kind in ((module._parameters, nn.Parameter), (module._buffers, Tensor.detach)):
                kept.update({name: kind(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda"))
                             for name, x in kept.items() if x is not None})
        optimiser = torch.optim.SGD(model.parameters(), lr=c.lr, momentum=c.momentum, fused=True)
        optimiser.param_groups[0]["lr"] = rate()
        if not first:
            optimiser.state.update({p: {"momentum_buffer": torch.empty_like(p)} for p in model.parameters()})
        bank.rows = torch.empty(5000, c.dim, device="cuda")
        images = torch.empty(5000, 3, 32, 32, dtype=torch.uint8, device="cuda")
        drawn = ctl.Augmentation(*(torch.empty(x.shape, dtype=x.dtype, device=drawn_on) for x in vars(drawn).values()))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else autocast turns itself off
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        monkeypatch.setattr(Tensor, "backward", torch.no_grad()(backward))
        with Watch() as seen:
            loss = ctl.train_step(model, bank, optimiser, images, torch.empty(128, device="cuda").long(), drawn, c)
    assert loss.shape == () and loss.device.type == "cuda" and not loss.requires_grad
    return seen


def can_pretend():
    with FakeTensorMode(), contextlib.suppress(Exception):  # torch 2.5 asks for the GPU
        x = torch.ones(4, device="cuda")
        return torch.backends.cuda.is_built() and x[x.long()].device.type == "cuda"


needs_cuda = pytest.mark.skipif(not can_pretend(), reason="this torch has no tensors that pretend to be on a GPU")


@needs_cuda
@pytest.mark.parametrize("config", [*(dict(loss=loss) for loss in ctl.LOSSES), dict(match_step=True)], ids=str)
def test_a_step_can_be_captured(config, monkeypatch):
    seen = watched_step(monkeypatch, **config)
    assert not seen.wrong and seen.kernels.total() <= 480 and seen.kernels["_fused_sgd_"] == 1
    assert seen.kernels["convolution"] == seen.kernels["convolution_backward"] == 20


@needs_cuda
@pytest.mark.parametrize("fault, words", [
    (dict(rate=lambda: 0.1), "number as the rate"), (dict(first=True), "number of a first step"),
    (dict(drawn_on="cpu"), "tensor on the host"), ("x.sum().item()", "host read"), ("x.nonzero()", "host read"),
    ("bool((x > 0).any())", "host read"), ("x[x > 0]", "index by a mask"), ("x.cpu()", "to the host"),
    ("x + torch.tensor([1.0], device='cuda')", "tensor on the host")])
def test_what_a_capture_would_not_survive_is_found(fault, words, monkeypatch):
    if isinstance(fault, dict):
        seen = watched_step(monkeypatch, **fault)
    else:
        with FakeTensorMode(), contextlib.suppress(Exception):
            x = torch.ones(4, device="cuda")
            with Watch() as seen:
                eval(fault)
    assert words in seen.wrong


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph, of CPU tensors. A replay does each operation again on the same memory with the same
    numbers; Python code is not run again."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made, self.replays = [], {}, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for memory in storages((args, kwargs)):
            if memory.data_ptr() not in self.made | self.before.keys():
                self.before[memory.data_ptr()] = memory, memory.clone()
        out = function(*args, **(kwargs or {}))
        self.made |= {memory.data_ptr() for memory in storages(out)} - self.before.keys()
        self.operations.append((function, args, kwargs or {}, out))  # keeps all memory of the graph alive
        return out

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if torch.is_tensor(old) and storages(old)[0].data_ptr() != storages(new)[0].data_ptr():
                    old.detach().copy_(new)


def past_torch(x): return torch.from_numpy(x.numpy().copy())  # as what comes from the host: no operation to replay
def storages(tree): return [x.untyped_storage() for x in tree_leaves(tree) if torch.is_tensor(x)]


@contextlib.contextmanager
def capture(graph, stream):
    """torch.cuda.graph: it leaves no trace in memory, and what it computes is no number yet (here NaN)."""
    with graph:
        yield
    for memory, content in graph.before.values():
        memory.copy_(content)
    for x in tree_leaves([out for *_, out in graph.operations]):
        if torch.is_tensor(x) and x.is_floating_point() and storages(x)[0].data_ptr() in graph.made:
            x.detach().fill_(torch.nan)


@pytest.fixture
def graphs(monkeypatch):
    """A CPU that takes graphs: the graphs that it took, and who waited: a stream for the other, the host for one."""
    graphs = types.SimpleNamespace(made=[], waits=[])
    for name, of in (("Stream", "side"), ("current_stream", "outer")):
        stream = types.SimpleNamespace(wait_stream=lambda _, of=of: graphs.waits.append(of),
                                       synchronize=lambda: graphs.waits.append("host"))
        monkeypatch.setattr(torch.cuda, name, lambda device, stream=stream: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.made.append(Graph()) or graphs.made[-1])
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(ctl, "in_graph", lambda config, device: config.graph)
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(ctl, "linear_probe", lambda *_, **__: 0.0)
    return graphs


def run_of(out, *ways, stop=None, **config):
    """A tiny run, 3 epochs of two batches of 16 and one of 4: all its numbers, whether the rate is a tensor.
    It may be interrupted when `stop` epochs are saved. ways: whether it is to be graphed, and whether then."""
    saved, save = [], ctl.save_checkpoint

    def saves(*arguments):
        save(*arguments)
        saved.append(arguments)
        if len(saved) == stop:
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctl, "save_checkpoint", saves)
        for graph in ways:
            with contextlib.suppress(KeyboardInterrupt):
                record = ctl.train(ctl.make_config("smoke", graph=graph, out=out, **{**GRAPHED, **config}))
    assert record["environment"]["graph"] is ways[-1] and "graph" not in record["config"]
    state = ctl.load_checkpoint(next(Path(out).rglob("*.pt")))
    del state["run"]["seconds"]
    rate = state["optimiser"]["param_groups"][0].pop("lr")
    numbers = [x.tolist() if torch.is_tensor(x) else x for x in tree_leaves(state)]
    return numbers + [record["sha256"]], getattr(rate, "dtype", None) == torch.float32  # what the fused kernel reads


# The rate rises, then falls. The runs end before the capture, at it or after it, and go on as on a GPU or as on a CPU,
# where the rate is no tensor. Of 6 steps of 16 images each run takes 2 and 2 of 3 steps in the first epoch.
@pytest.mark.parametrize("later, stop, ways, config", [
    (1, 1, (True, True), dict(loss="hard", tau=0.1, k=5)),
    (0, 1, (False, True), dict(loss="simple", momentum=0.0, weight_decay=0.0)),
    (0, 1, (True, True), dict(loss="triplet", bank_momentum=0.9)), (0, 2, (True, False), dict(loss="hard-simple")),
    (0, 2, (True, True), dict(match_step=True, bank_init="random", schedule="step", milestones=(1, 2)))], ids=str)
def test_replayed_equals_step_by_step(later, stop, ways, config, graphs, monkeypatch):
    monkeypatch.setattr(ctl.GraphedStep, "WARM_UP", ctl.GraphedStep.WARM_UP + later)
    plain, _ = run_of("plain", False, **config)
    assert not graphs.made
    assert run_of("graph", True, **config) == (plain, True)
    assert [graph.replays for graph in graphs.made] == [4 - later] and graphs.waits == 9 * ["side", "outer"]
    assert run_of("resumed", *ways, stop=stop, **config) == (plain, ways[1])


def test_the_double_finds_what_a_graph_would_get_wrong(graphs, monkeypatch):
    plain, step, call = run_of("plain", False)[0], ctl.train_step, ctl.GraphedStep.__call__

    def spoilt(model, bank, optimiser, images, index, drawn, config):
        group = optimiser.param_groups[0]
        group["lr"] = float(group["lr"]) if fault == "rate" else group["lr"]
        index = past_torch(index) if fault == "index" else index
        drawn = ctl.Augmentation(*map(past_torch, vars(drawn).values())) if fault == "drawn" else drawn
        return step(model, bank, optimiser, images, index, drawn, config)

    def called(self, model, bank, optimiser, *more):
        if fault == "not refilled":
            optimiser.param_groups[0]["lr"] = self.rate.clone()
        return call(self, model, bank, optimiser, *more)
    monkeypatch.setattr(ctl, "train_step", spoilt)
    monkeypatch.setattr(ctl.GraphedStep, "__call__", called)
    for fault in ("none", "rate", "not refilled", "index", "drawn", "first step"):
        monkeypatch.setattr(ctl.GraphedStep, "WARM_UP", 3 * (fault != "first step"))
        assert (run_of(fault, True)[0] == plain) == (fault == "none"), fault


def test_a_capture_that_fails_is_one_line(graphs, monkeypatch, capsys):
    argv = ["--preset", "smoke", "--force", *(f"--{name.replace('_', '-')}={value}" for name, value in GRAPHED.items())]
    for error, hint in ((RuntimeError("an illegal memory\naccess"), True),
                        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), False)):
        anew = RuntimeError("operation failed due to a previous error during capture")
        anew.__context__ = error
        for raised in (error, anew):
            monkeypatch.setattr(torch.cuda, "graph", mock.Mock(side_effect=raised))
            assert ctl.main(argv) == 1
            words = capsys.readouterr().err
            assert words.count("\n") == 1 and str(error).split()[-1] in words and ("--no-graph" in words) == hint
    assert ctl.main([*argv, "--no-graph"]) == 0
    monkeypatch.undo()
    for device, graph in itertools.product(("cuda", "cuda:1", "cpu", "mps"), (True, False)):
        takes = graph and device.startswith("cuda")
        assert ctl.in_graph(ctl.make_config("smoke", graph=graph), torch.device(device)) is takes


def test_what_the_graphed_steps_will_take_is_said_once(graphs, monkeypatch, capsys):
    # An epoch of 11 steps is done, 6 are left. After 3 steps comes the capture, after 50 more, of a minute, the line.
    def clock(ticks=itertools.count()): return 60.0 * (len(graphs.waits) // 2) + 1e-6 * next(ticks)
    monkeypatch.setattr(ctl, "train_step", lambda *_: torch.zeros(()))
    monkeypatch.setattr(ctl, "time", types.SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2 ** 30)
    run_of("graph", False, True, stop=1, subset=21, batch_size=2, epochs=7)
    said = [line for line in capsys.readouterr().out.splitlines() if "graph" in line and "left" in line]
    assert len(said) == graphs.waits.count("host") == 1
    assert re.search(r"\b13 steps.*\b13\.0 min.*\b3\.0 GiB", said[0])


@pytest.mark.parametrize("name", ctl.LOSSES)
def test_compiled_equal_to_eager(name):
    config, (s, p) = ctl.make_config("smoke", loss=name), random_rows(3, 4, 50)
    found = torch.compile(ctl.training_loss, fullgraph=True, backend="aot_eager")(config, s, p)
    torch.testing.assert_close(found, ctl.training_loss(config, s, p))
