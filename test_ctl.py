"""The proof that ctl.py does what the paper and the mathematics say.

    bash reproduce.sh test

Room by room, in the order of ctl.py. Loss, metrics and memory bank are held to properties: each test quotes the
statement that it checks. P = softmax(s/tau) over a row of similarities, r the same over its negatives,
R = max s - min s, g the gap below the maximum. The references are plain Python loops with math.exp and math.fsum.
Network, data and augmentation are compared with torchvision. The tests make all the data that they need.
"""
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
import zlib
from pathlib import Path

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
import torchvision
import torchvision.transforms.functional as TF
from torchvision import transforms

import ctl

torch.set_num_threads(1)

# What is drawn depends on the constants in the code too, so how many draws a test filters out may change with any edit.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=100,
                          suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
settings.load_profile("ci")
fewer, few = settings(max_examples=40), settings(max_examples=10)

EPS, EPS32 = 2.0 ** -52, 2.0 ** -23
HOME = Path(ctl.__file__).parent
CPU = torch.device("cpu")
shapes = functools.cache(ctl.load_shapes)  # made once for the whole file; nothing writes into it

@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ctl, "load_shapes", shapes)
def seeded(seed): return torch.Generator().manual_seed(seed)

@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)

# A caller's context, in which nothing may come out otherwise.
CONTEXTS = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "no_grad": torch.no_grad,
            "inference_mode": torch.inference_mode, "float64": lambda: default_dtype(torch.float64)}

def refused(word, f, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=f"^{word}") as raised:
        f(*arguments, **options)
    assert "\n" not in str(raised.value)

# ---------------------------------------------------------------------------------------------------------------------
# 1 Loss

taus = st.floats(-3, 4).map(lambda e: 10.0 ** e)
ties = st.integers(-64, 64).map(lambda i: i / 64)
free = st.floats(-1, 1)
ks = st.none() | st.integers(1, 12)
seeds = st.integers(0, 2 ** 32 - 1)

def values(least=1, most=10):
    two = st.tuples(ties, ties).flatmap(lambda p: st.lists(st.sampled_from(p), min_size=least, max_size=most))
    return st.one_of(st.lists(ties, min_size=least, max_size=most), st.lists(free, min_size=least, max_size=most), two)
def at_a_column(s): return st.tuples(st.just(s), st.integers(0, len(s) - 1))

def rows(least=1, most=10):
    """(row, column of the positive)"""
    return values(least, most).flatmap(at_a_column)

def random_rows(seed, B, N, dtype=torch.float64):
    g = seeded(seed)
    return (torch.rand(B, N, generator=g, dtype=torch.float64) * 2 - 1).to(dtype), torch.randint(N, (B,), generator=g)
def t(s, dtype=torch.float64): return torch.tensor([s], dtype=dtype)
def p_(p): return torch.tensor([p])
def loss(s, p, tau, k=None): return ctl.contrastive_loss(t(s), p_(p), tau, k).item()
def simple(s, p, k=None): return ctl.simple_loss(t(s), p_(p), k).item()
def triplet(s, p): return ctl.triplet_loss(t(s), p_(p)).item()
def push(s, p, tau, k=None): return [tau * g for g in ctl.loss_gradient(t(s), p_(p), tau, k)[0].tolist()]
def penalty(s, p, tau, k=None): return ctl.relative_penalty(t(s), p_(p), tau, k)[0].tolist()
def slack(tau): return 4 * EPS * (10 + 2 / tau)  # "float64: 4 eps (10 + 2/tau) on L"

def kept(s, p, k=None):
    """Columns of the positive and of the k largest negatives."""
    return [p] + sorted((j for j in range(len(s)) if j != p), key=lambda j: -s[j])[:k]

def ref_softmax(s, columns, tau):
    """Each column's share of the sum over the columns given, 0 for the others."""
    top = max((s[j] for j in columns), default=0)
    e = [math.exp((v - top) / tau) if j in columns else 0.0 for j, v in enumerate(s)]
    return [v / (math.fsum(e) or 1) for v in e]
def ref_P(s, p, tau, k=None): return ref_softmax(s, kept(s, p, k), tau)

def ref_loss(s, p, tau, k=None):
    d = [(s[j] - s[p]) / tau for j in kept(s, p, k)]
    return max(d) + math.log(math.fsum(math.exp(v - max(d)) for v in d))

def ref_push(s, p, tau, k=None):
    P = ref_P(s, p, tau, k)
    return P[:p] + [-math.fsum(P[:p] + P[p + 1:])] + P[p + 1:]
def entropy(P): return -math.fsum(v * math.log(v) for v in P if v > 0)
def mean(x): return math.fsum(x) / len(x)

def within(a, b, tol):
    assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) <= tol, (a, b)

def no_ties(s, k):
    """Where k cuts through a tie, which column is dropped is not said."""
    assume(k is None or len(set(s)) == len(s))

# ---- values and gradients: Eqs. 1 to 9

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

ROOM_1 = {
    "contrastive": ctl.contrastive_loss, "gradient": ctl.loss_gradient, "penalty": ctl.relative_penalty,
    "simple": lambda s, p, tau=1.0, k=None: ctl.simple_loss(s, p, k),
    "triplet": lambda s, p, tau=1.0, k=None: ctl.triplet_loss(s, p)}
WITH_TAU = ("contrastive", "gradient", "penalty")

@given(st.integers(1, 4), st.integers(1, 40), taus, ks, seeds)
@fewer
def test_rows_of_a_batch_do_not_mix(B, N, tau, k, seed):
    s, p = random_rows(seed, B, N)
    for name, f in ROOM_1.items():
        whole = f(s, p, tau, k)
        alone = torch.cat([f(s[i:i + 1], p[i:i + 1], tau, k) for i in range(B)])
        assert ((alone - whole).abs() * (tau if name == "gradient" else 1)).max() <= slack(tau), name

@given(rows(1, 7), taus)
@fewer
def test_hessian(row, tau):
    # "Hessian (diag P - P P^T)/tau²: eigenvalues in [0, 1/(2 tau²)], null vector 1; so L is convex in s"
    s, p = row
    H = torch.autograd.functional.hessian(lambda x: ctl.contrastive_loss(x[None], p_(p), tau).sum(), t(s)[0]) * tau ** 2
    P = torch.tensor(ref_P(s, p, tau), dtype=torch.float64)
    assert (H - (P.diag() - P[:, None] * P)).abs().max() <= 2e-12
    e = torch.linalg.eigvalsh((H + H.T) / 2)
    assert e.min() >= -4e-12 and e.max() <= 0.5 + 4e-12 and H.sum(dim=1).abs().max() <= 4e-12

# ---- tau -> 0 and tau -> infinity

def shape_of(s):
    """m, g, R"""
    top = max(s)
    below = [v for v in s if v < top]
    return s.count(top), (top - max(below) if below else 0.0), top - min(s)

@given(rows(2), taus)
def test_small_tau_bounds(row, tau):
    # "0 <= log(m + (N-m)e^{-R/tau}) <= L - max(0, s_max - s_pos)/tau <= log(m + (N-m)e^{-g/tau}) <= log N,
    #  with equality on two-valued rows" (s_max: the hardest negative)
    s, p = row
    (m, g, R), N = shape_of(s), len(s)
    rest = loss(s, p, tau) - triplet(s, p) / tau
    low, high = math.log(m + (N - m) * math.exp(-R / tau)), math.log(m + (N - m) * math.exp(-g / tau))
    assert 0 <= low and high <= math.log(N) + 4 * EPS
    assert low - slack(tau) <= rest <= high + slack(tau)
    assert len(set(s)) > 2 or abs(rest - low) <= slack(tau) >= abs(rest - high)
    # "r tends to one-hot", at the rate that the same bound gives over the negatives
    (m, g, R), n = shape_of(s[:p] + s[p + 1:]), N - 1
    hardest = max(penalty(s, p, tau))
    assert 1 / (m + (n - m) * math.exp(-g / tau)) - 1e-12 <= hardest
    assert hardest <= 1 / (m + (n - m) * math.exp(-R / tau)) + 1e-12

@given(st.lists(ties, min_size=2, max_size=10).flatmap(at_a_column))
def test_limit_tau_to_0(row):
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
def test_rate_of_one_minus_p_max(s, tau):
    # "Rate for m = 1, q = e^{-g/tau}: q/(1+q) <= 1 - P_max <= (N-1)q/(1+(N-1)q)"; relatively, to the last digits
    m, g, _ = shape_of(s)
    assume(m == 1 and g / tau < 600)
    q, N, tol = math.exp(-g / tau), len(s), 1e-12 * (1 + 1 / tau)
    low, high = q / (1 + q), (N - 1) * q / (1 + (N - 1) * q)
    p = s.index(max(s))
    assert low * (1 - tol) <= -push(s, p, tau)[p] <= high * (1 + tol)
    assert low - 1e-12 <= 1 - push(s, (p + 1) % N, tau)[p] <= high + 1e-12  # P_max as a negative's

@given(rows(), taus)
def test_large_tau_bounds(row, tau):
    # "0 <= L - log N - (mean s - s_pos)/tau <= R²/(8 tau²)" and
    # "|L - log N - (mean s - s_pos)/tau - Var(s)/(2 tau²)| <= R³/(36 sqrt3 tau³)"
    s, p = row
    N, R = len(s), max(s) - min(s)
    rest = loss(s, p, tau) - math.log(N) - simple(s, p) / tau  # Eq. 7
    assert abs(simple(s, p) - (mean(s) - s[p])) <= 8 * EPS
    assert -slack(tau) <= rest <= R ** 2 / (8 * tau ** 2) + slack(tau)
    last = rest - mean([(v - mean(s)) ** 2 for v in s]) / (2 * tau ** 2)
    assert abs(last) <= R ** 3 / (36 * math.sqrt(3) * tau ** 3) + slack(tau) + 8 * EPS / tau ** 2
    # "|log(N P_j)| <= R/tau" (the loss with j as positive is -log P_j);
    # "|N P_j - 1 - (s_j - mean s)/tau| <= 1.5 R²/tau² for tau >= R"
    every, own = t(s).expand(N, N), torch.arange(N)
    assert (math.log(N) - ctl.contrastive_loss(every, own, tau)).abs().max() <= R / tau + slack(tau)
    if tau >= R:
        P = ctl.loss_gradient(every, own, tau) * tau + torch.eye(N)
        assert (N * P - 1 - (t(s) - mean(s)) / tau).abs().max() <= 1.5 * (R / tau) ** 2 + N * 1e-14

# ---- always

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

@given(rows(), taus, taus)
def test_convexity_in_tau(row, a, b):
    # "so tau L is nondecreasing and convex in tau; L itself is convex in 1/tau"
    a, b = sorted((a, b))
    middle = (a + b) / 2
    La, Lb, room = loss(*row, a), loss(*row, b), a * slack(a) + b * slack(b)
    assert a * La <= b * Lb + room
    assert middle * loss(*row, middle) <= (a * La + b * Lb) / 2 + 2 * room
    assert loss(*row, 2 / (1 / a + 1 / b)) <= (La + Lb) / 2 + 2 * slack(a)

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
    # "(Hoeffding; sharp)": half of the columns at each end
    assert loss([1.0, -1.0], 0, 30.0) - math.log(2) + 1 / 30 == pytest.approx(4 / (8 * 900), rel=1e-3)
    # "but not monotone"
    assert loss([0.0, 0.1, -1.0], 0, 0.01) > loss([0.0, 0.1, -1.0], 0, 0.3) < loss([0.0, 0.1, -1.0], 0, 1e4)
    tied = t([0.0, 0.5, 0.5, 0.1]).requires_grad_()
    ctl.triplet_loss(tied, p_(0)).sum().backward()
    assert tied.grad[0].tolist() == [-1.0, 0.5, 0.5, 0.0]

# ---- arguments of every kind

@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("k", [None, 7])
def test_16_bits_are_summed_in_32(dtype, k):
    s, p = random_rows(3, 4, 3000)
    for name, f in ROOM_1.items():
        low, full = s.to(dtype).requires_grad_(), s.to(dtype).float().requires_grad_()
        found, right = f(low, p, 0.07, k), f(full, p, 0.07, k)
        assert found.dtype == torch.float32 and torch.equal(found, right), name
        assert torch.equal(*(torch.autograd.grad(x.sum(), y)[0].to(dtype) for x, y in ((found, low), (right, full))))

@given(st.lists(st.integers(-9000, 9000), min_size=2, max_size=10), taus, ks)
@fewer
def test_similarities_of_any_size(s, tau, k):
    # "s_ij in [-1, 1] (any finite values will do)"; the lowest number takes a column out
    no_ties(s, k)
    p = len(s) - 1
    expected = ref_loss(s, p, tau, k)
    assert abs(loss(s, p, tau, k) - expected) <= 8 * EPS * (10 + abs(expected) + 18000 / tau)
    assert abs(ctl.contrastive_loss(t(s, torch.float32), p_(p), tau, k) - expected) <= 4 * EPS32 * (3 + 18000 / tau)
    within(push(s, p, tau, k), ref_push(s, p, tau, k), 1e-11 * (1 + 1 / tau))
    masked = s + 3 * [torch.finfo(torch.float64).min]
    assert abs(loss(masked, p, 0.5) - loss(s, p, 0.5)) <= 8 * EPS * (10 + 36000)
    for f in (push, penalty):
        within(f(masked, p, 0.5), f(s, p, 0.5) + [0, 0, 0], 1e-12)

S, POS = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]), torch.tensor([0, 2])
BAD_TAU = [0, 0.0, -1, -0.1, math.nan, math.inf, -math.inf, 1e-50, "0.1", None, 1j, [0.1], torch.tensor([0.1]),
           torch.tensor(0.0), torch.tensor(math.nan), torch.tensor(-1.0)]
BAD_K = [0, -1, 1.5, 1.0, False, "1"]
BAD_POSITIVE = [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0, 2], dtype=torch.int32), [0, 2], None,
                torch.tensor([0.0, 2.0]), torch.tensor([0]), torch.tensor([[0], [2]]), torch.tensor(0),
                torch.tensor([True, False])]
BAD_SIMILARITY = [S.long(), S[0], S[None], S[:, :0], S.tolist(), None, S.bool(), S + 0j]

@pytest.mark.parametrize("name", ROOM_1)
def test_wrong_arguments_of_a_loss(name):
    f = ROOM_1[name]
    for tau in BAD_TAU if name in WITH_TAU else ():
        refused("tau must", f, S, POS, tau)
    for k in BAD_K if name != "triplet" else ():
        refused("k must", f, S, POS, 0.1, k)
    for positive in BAD_POSITIVE:
        refused("positive must", f, S, positive, 0.1)
    for s in BAD_SIMILARITY:
        refused("(similarity|positive) must", f, s, POS, 0.1)
    for value in (math.nan, math.inf, -math.inf):
        spoilt = torch.where(S == S[0, 0], value, S)
        refused("similarity holds NaN or infinity", f, spoilt, POS, 0.1, error=ctl.NotFinite)

@pytest.mark.filterwarnings("error")
def test_tau_is_any_real_number():
    for tau in (np.float32(0.5), np.float64(0.5), nn.Parameter(torch.tensor(0.5)), torch.tensor(0.5).half()):
        for f in map(ROOM_1.get, WITH_TAU):
            assert torch.equal(f(S, POS, tau), f(S, POS, 0.5))
    for one in (1, np.int64(1), torch.tensor(1)):
        assert torch.equal(ctl.contrastive_loss(S, POS, one, np.int64(1)), ctl.contrastive_loss(S, POS, 1.0, 1))

# ---------------------------------------------------------------------------------------------------------------------
# 2 Metrics

def sphere(n, d, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(n, d, generator=seeded(seed), dtype=torch.float64), dim=1).to(dtype)
def simplex(M): return F.normalize(torch.eye(M, dtype=torch.float64) - 1 / M, dim=1)

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
    assert math.isnan(ctl.uniformity(one, t_)) and math.isnan(ctl.uniformity(one[:0], t_))
    assert ctl.uniformity(pair, 200.0) == math.inf and math.isnan(ctl.tolerance(pair, torch.tensor([0, 1])))

def test_uniformity_of_the_sphere():
    # "uniform on the sphere: -2t + log 0F1(; d/2; t²) = -3.93753001 for d = 128, t = 2", within 5 standard deviations
    # of "about sqrt(0.2653/(M(M-1)))"
    M, expected = 2000, -4 + math.log(scipy.special.hyp0f1(64, 4.0))
    assert expected == pytest.approx(-3.93753001, abs=1e-8)
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

# ---- kNN

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
def test_knn_is_the_slow_loop(n, m, k, temperature, block, seed):
    train, test = (sphere(n, 4, seed), torch.arange(n) % 4), (sphere(m, 4, seed // 2 + 1), torch.arange(m) * 3 % 4)
    expected = ref_knn(*train, *test, k, temperature)
    assert in_blocks(block, ctl.knn_accuracy, *train, *test, k, temperature) == pytest.approx(expected, abs=1e-9)

# ---- linear probe

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

# ---- arguments of every kind

Z, OTHER, Y = sphere(40, 16, 7), sphere(40, 16, 8), torch.arange(40) % 4
PROBE = functools.partial(ctl.linear_probe, epochs=5, lr=1.0, batch_size=8)
METRICS = {
    "uniformity": (ctl.uniformity, dict(z=Z)),
    "tolerance": (ctl.tolerance, dict(z=Z, labels=Y)),
    "alignment": (ctl.alignment, dict(z1=Z, z2=OTHER)),
    "profile": (ctl.similarity_profile, dict(z=Z, z2=OTHER, positive=torch.arange(40))),
    "knn": (ctl.knn_accuracy, dict(train_z=Z[:25], train_y=Y[:25], test_z=Z[25:], test_y=Y[25:])),
    "probe": (PROBE, dict(train_h=Z[:25], train_y=Y[:25], test_h=Z[25:], test_y=Y[25:]))}

def metric(name, **given):
    f, arguments = METRICS[name]
    first, *rest = {**arguments, **given}.items()
    return f(first[1], **dict(rest))

def converted(arguments, change):
    """The arguments, those that are vectors changed."""
    return {name: change(x) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()}

def same(found, right, **tolerance):
    found, right = torch.as_tensor(found).detach(), torch.as_tensor(right).detach()
    torch.testing.assert_close(found, right, **(tolerance or dict(rtol=0, atol=0)))

@pytest.mark.parametrize("name", METRICS)
def test_labels_and_vectors_that_do_not_fit(name):
    vectors = [argument for argument, x in METRICS[name][1].items() if x.is_floating_point()]
    for argument, x in METRICS[name][1].items():
        wrong = [x[0], x[None, None] if argument == "train_h" else x[None], x.tolist(), None]
        if argument not in vectors:
            wrong += [x.double(), x.int(), x[:-1], torch.cat([x, x[:1]]), x[:, None], x - 9, x[:0]]
        else:
            wrong += [(9 * x).long(), x.half(), *([x * 1.01, x * 0.99, x * 0] if name != "probe" else [])]
            for value in (math.nan, math.inf):
                refused(f"{argument} must", metric, name, error=ctl.NotFinite, **{argument: x * value})
        for bad in wrong:
            refused(f"{argument} must", metric, name, **{argument: bad})
        for bad in (F.normalize(x[:, :5], dim=1), x.float()) if argument in vectors[:len(vectors) - 1] else ():
            refused(f"{' and '.join(vectors)} must have one dim", metric, name, **{argument: bad})

def test_options_that_do_not_fit():
    refused("positive must", metric, "profile", positive=torch.arange(1, 41))
    refused("z1 and z2 must have one shape", metric, "alignment", z2=Z[:3])
    for wrong in (dict(k=0), dict(k=-1), dict(temperature=0), dict(temperature=-0.07), dict(temperature=math.nan)):
        refused("k must be at least 1, temperature above 0", metric, "knn", **wrong)
    refused(".*probe", ctl.linear_probe, 1e6 * Z.float(), Y, Z.float(), Y, 3, 1e35, error=ctl.NotFinite)

# ---------------------------------------------------------------------------------------------------------------------
# 3 Memory bank

@given(st.integers(1, 9), st.integers(2, 6), st.sampled_from([0.0, 0.25, 0.9, 1.0, None]), st.integers(1, 5), seeds)
@fewer
def test_bank_updates(N, d, momentum, steps, seed):
    # rows stay unit; exactly the given rows move, to normalise(m·row + (1 - m)·z); m = 0.5 if not given
    g = seeded(seed)
    bank = ctl.MemoryBank(N, d, generator=g, **({} if momentum is None else {"momentum": momentum}))
    m = 0.5 if momentum is None else momentum
    assert bank.rows.shape == (N, d) and bank.rows.dtype == torch.float32
    for _ in range(steps):
        index = torch.randperm(N, generator=g)[:int(torch.randint(1, N + 1, (1,), generator=g))]
        z = sphere(len(index), d, seed, torch.float32).requires_grad_()
        expected, mixed = bank.rows.clone(), m * bank.rows[index] + (1 - m) * z.detach()
        assume(mixed.norm(dim=1).min() > 0.05)
        expected[index] = mixed / mixed.norm(dim=1, keepdim=True)
        still = torch.ones(N).index_fill(0, index, 0).bool()
        bank.update(index, z)
        assert torch.equal(bank.rows[still], expected[still]) and not bank.rows.requires_grad
        assert (bank.rows - expected).abs().max() <= 1e-5
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
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    bank = ctl.MemoryBank(2, 2, init=poles)
    bank.update(torch.tensor([0, 1]), -poles)  # mixes to zero: the rows stay
    assert torch.equal(bank.rows, poles)

def test_what_does_not_fit_the_bank():
    for momentum in (-0.1, 1.1, math.nan, math.inf, "0.5", None):
        refused("momentum must", ctl.MemoryBank, 3, 4, momentum)
    for wrong in ("zeros", None, torch.ones(3, 5), torch.ones(12), [[1.0] * 4] * 3, torch.zeros(3, 4),
                  torch.full((3, 4), math.nan), torch.full((3, 4), math.inf)):
        refused("init must", ctl.MemoryBank, 3, 4, init=wrong)
    bank = ctl.MemoryBank(6, 4, generator=seeded(0))
    for index, n in ((3, 1), (1, 3), (3, 2)):
        refused("z must", bank.update, torch.arange(index), sphere(n, 4))
    refused("z must", bank.similarity, sphere(3, 5))

# ---------------------------------------------------------------------------------------------------------------------
# 4 Network

@pytest.mark.parametrize("training", [False, True])
def test_network_is_torchvisions(training):
    torch.manual_seed(0)
    mine, theirs = ctl.ResNet18(), torchvision.models.resnet18(num_classes=128)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    for c in (m for m in mine.modules() if isinstance(m, nn.Conv2d)):  # He-normal, fan-out
        std = math.sqrt(2 / (c.out_channels * c.kernel_size[0] ** 2))
        assert abs(c.weight.std().item() / std - 1) < 5 / math.sqrt(2 * c.weight.numel()) + 0.005
        assert abs(c.weight.mean().item()) < 5 * std / math.sqrt(c.weight.numel())
    bound = math.sqrt(6 / (512 + 128))  # Xavier-uniform
    assert 0.99 * bound < mine.head.weight.abs().max() <= bound and (mine.head.bias == 0).all()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), mine.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 32, 32, generator=seeded(1))
    mine.train(training), theirs.train(training)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), F.normalize(theirs(x), dim=1), atol=1e-4, rtol=1e-4)

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
import itertools, torch, ctl
from torch.nn.grad import conv2d_weight
kept = []
def watch(m, i, o):
    o.register_hook(lambda g: kept.append((m, i[0].detach().double(), g.double())))
for threads, width in itertools.product((1, 2), (1, 4, 7, 8, 16)):
    torch.set_num_threads(threads)
    model, _ = ctl.make_model(ctl.make_config("smoke", width=width, dim=8), torch.device("cpu"))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(watch)
    x = ctl.normalise(torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    (model(x) * torch.linspace(-1, 1, 16 * 8).reshape(16, 8)).sum().backward()
    assert len(kept) == 20
    while kept:
        m, x, g = kept.pop()
        exact = conv2d_weight(x, m.weight.shape, g, m.stride, m.padding)
        terms = conv2d_weight(x.abs(), m.weight.shape, g.abs(), m.stride, m.padding)
        assert ((m.weight.grad - exact).abs() / terms).max() < 1e-5, (threads, width, m)
print("right")
"""

@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX2"])
def test_the_gradient_of_every_convolution(instructions):
    # in a process of its own: where a kernel writes past its workspace, the process crashes, hangs, or goes on with a
    # wrong gradient (uxlfoundation/oneDNN#6035)
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "PYTHONPATH": str(HOME)}
    child = subprocess.run([sys.executable, "-c", GRADIENTS], env=environment, capture_output=True, timeout=300)
    assert child.returncode == 0 and child.stdout == b"right\n", (child.returncode, child.stderr[-2000:])

# ---------------------------------------------------------------------------------------------------------------------
# 5 Data

def test_shapes_are_always_the_same():
    data, small = shapes(), shapes.__wrapped__(16, 40, 20)
    with default_dtype(torch.float64):
        assert shapes.__wrapped__(16, 40, 20).sha256() == small.sha256()
    assert data.name == "shapes" and [x.dtype for x in data[1:]] == 2 * [torch.uint8, torch.int64]
    assert [x.shape for x in data[1:]] == [(4000, 3, 32, 32), (4000,), (2000, 3, 32, 32), (2000,)]
    assert [y.bincount().tolist() for y in (data.train_labels, data.test_labels)] == [[400] * 10, [200] * 10]
    # A sum is of every tensor's shape and values, not of the name.
    tensors = list(small[1:])
    others = [tensors[:i] + [y] + tensors[i + 1:] for i, x in enumerate(tensors) for y in (x.flip(0), x[:, None])]
    assert len({small.sha256(), *(ctl.Data("shapes", *other).sha256() for other in others)}) == 9
    assert ctl.Data("another", *tensors).to("cpu").sha256() == small.sha256()

@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 100))
@fewer
def test_balanced_order(labels, seed):
    # "any first part holds the same number of each class, to within one, as long as there are any"
    y = torch.tensor(labels)
    order = ctl.balanced_order(y, seed)
    assert sorted(order.tolist()) == list(range(len(y))) and torch.equal(order, ctl.balanced_order(y, seed))
    for m in range(len(y) + 1):
        count, most = y[order[:m]].bincount(minlength=5), y.bincount(minlength=5)
        assert ((count == torch.minimum(most, count.max())) | (count == count.max() - 1)).all()
    alike = torch.zeros(50, dtype=torch.int64)
    drawn = [ctl.balanced_order(alike, *more).tolist() for more in ((), (0,), (seed + 1,))]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != sorted(drawn[0])

# ---- downloads

@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder whose files are all that urlopen finds, well or in a bad way; and what it was asked for."""
    web = types.SimpleNamespace(folder=tmp_path / "web", bad=None, asked=[])
    web.folder.mkdir()

    def urlopen(request, *_, **__):
        web.asked.append(request.full_url)
        if isinstance(web.bad, Exception):
            raise web.bad
        answer = io.BytesIO((web.bad or bytes)((web.folder / Path(request.full_url).name).read_bytes()))
        answer.url = answer.length = None
        return answer
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return web
def md5(path): return hashlib.md5(path.read_bytes()).hexdigest()

def make_dataset(name, folder, monkeypatch):
    """A small dataset in the real format. Returns its images and labels, as load_dataset should give them."""
    cls, draws, truth = ctl.DOWNLOADS[name], np.random.default_rng(0), []
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

@pytest.mark.parametrize("name", ctl.DOWNLOADS)
def test_download(name, web, tmp_path, monkeypatch, capsys):
    truth, root = make_dataset(name, web.folder, monkeypatch), tmp_path / "data"
    data = ctl.load_dataset(name, str(root))
    assert capsys.readouterr().out == f"downloading {name} into {root}\n"
    assert data.name == name and [tensor.dtype for tensor in data[1:]] == [torch.uint8, torch.int64] * 2
    assert all(np.array_equal(found, right) for found, right in zip(data[1:], truth))
    refused(f"{name} has images of 32x32", ctl.load_dataset, name, root, 16)
    (tmp_path / "file").write_text("")
    refused("cannot write into ", ctl.load_dataset, name, tmp_path / "file/data", error=ctl.BadInput)
    # There already, in a folder that can only be read: nothing is asked for, written or said.
    web.asked.clear()
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    for owner, function in ((ctl.filelock, "FileLock"), (tempfile, "TemporaryFile")):
        monkeypatch.setattr(owner, function, lambda *_, **__: pytest.fail("nothing is to be written"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ctl.load_dataset(name, "~/data").sha256() == data.sha256()
    assert not web.asked and not capsys.readouterr().out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))

@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_broken_downloads(name, web, tmp_path, monkeypatch, capsys):
    make_dataset(name, web.folder, monkeypatch)
    root, forbidden = tmp_path / "data", urllib.error.HTTPError("http://", 403, "Forbidden", None, None)
    socket.setdefaulttimeout(7)
    for web.bad, status in ((forbidden, 2), (urllib.error.URLError("no route"), 2), (TimeoutError("late"), 1),
                            (ConnectionResetError("reset"), 1), (http.client.IncompleteRead(b""), 1),
                            (lambda content: b"<html>Log in</html>", 1), (lambda content: content[:99], 1)):
        with pytest.raises(ctl.Stop) as stop:
            ctl.load_dataset(name, root)
        message = str(stop.value)
        assert stop.value.status == status and "\n" not in message and name in message and str(root) in message
        assert all(way in message for way in ("--data", "a folder", "--dataset shapes"))
        assert capsys.readouterr().out == f"downloading {name} into {root}\n" and socket.getdefaulttimeout() == 7
    socket.setdefaulttimeout(None)
    # What lies half there is fetched again, by one of three that ask at once (torchvision asks for each file twice).
    web.bad, files, sums = None, list(web.folder.iterdir()), []
    web.asked.clear()
    threads = [threading.Thread(target=lambda: sums.append(ctl.load_dataset(name, root).sha256())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(sums) == 3 and len(set(sums)) == 1 and len(web.asked) == 2 * len(files)

# ---- folders
def picture(values, dtype=np.uint8): return Image.fromarray(np.asarray(values).astype(dtype))
def pixels(image): return torch.tensor(np.asarray(image)).permute(2, 0, 1)

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
    monkeypatch.setenv("HOME", str(tmp_path))
    smaller = Image.open(ant / "0.png").resize((16, 16), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    assert torch.equal(ctl.load_folder("~/pets", 16).train_images[0], pixels(smaller))
    (tmp_path / "link").symlink_to(root)
    assert ctl.load_folder(tmp_path / "link").name == "pets"  # the folder's own name counts
    for name, known in (("cifar10", "cifar10-folder"), ("shapes", "shapes-folder"), ("a|b[c]\té", "a_b_c__é"),
                        ("x" * 101, "x" * 80)):
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

def test_what_is_hidden_or_no_image_is_left_out(tmp_path, capsys):
    root = make_folder(tmp_path / "pets")
    usual = ctl.load_folder(root).sha256()
    for hidden in (".ipynb_checkpoints", "a/.thumbnails", ".hidden/b"):
        shutil.copytree(root / "test/b", root / "train" / hidden)
    (root / "train/a/b").symlink_to(root / "train/b")  # it would put images into two classes
    (root / "train/a/up").symlink_to(root / "train")  # and this one lead round for ever
    (root / "train/a/lost.png").symlink_to(root / "nothing")
    for name in ("a/._0.png", "a/.DS_Store", "notes.txt"):
        (root / "train" / name).write_bytes(b"not an image")
    assert ctl.load_folder(root).sha256() == usual and not capsys.readouterr().out
    for name in ("x.jfif", "x.gif", "x.avif", "x", "x.txt"):
        (root / "test/b" / name).write_bytes(b"")
    (root / "train/a").rename(tmp_path / "elsewhere")
    (root / "train/a").symlink_to(tmp_path / "elsewhere")  # a class may be a link
    assert ctl.load_folder(root).sha256() == usual
    out = capsys.readouterr().out
    assert out.startswith("5 files are left out") and out.count("\n") == 1 and str(root / "test/b") in out

def rmtrees(root, *places):
    for place in places:
        shutil.rmtree(root / place)

SPOILT = {
    "no class in {}/train.*shapes, or a folder": shutil.rmtree,
    "no class in {}/test": lambda root: rmtrees(root, "test"),
    "{}/test/yak.* no class of that name": lambda root: shutil.copytree(root / "test/a", root / "test/yak"),
    "{}/train/aardvark holds no image": lambda root: (root / "train/aardvark").mkdir(),
    "{}/train has one class alone": lambda root: rmtrees(root, "train/b", "test/b"),
    ".*{}/test/a/x.png.*8 bits": lambda root: picture(np.full((32, 32), 40_000), np.uint16).save(root / "test/a/x.png"),
    ".*{}/train/a/x.tiff.*8 bits": lambda root: picture(np.ones((32, 32)), np.float32).save(root / "train/a/x.tiff"),
    "{}/train/up links to a folder above": lambda root: (root / "train/up").symlink_to(root / "train"),
    "{}/test/up links to a folder above": lambda root: (root / "test/up").symlink_to(root.parent)}

@pytest.mark.parametrize("word", SPOILT)
def test_bad_folder(word, tmp_path):
    root = make_folder(tmp_path / "pets")
    SPOILT[word](root)
    refused(word.replace("{}", str(root)), ctl.load_dataset, str(root), error=ctl.BadInput)

def test_broken_images(tmp_path):
    # cut off, the head changed, of another kind, of absurd size
    path = tmp_path / "x.png"
    for image in some_images(9, 32, 0):
        picture(image.permute(1, 2, 0)).save(path)
        whole = path.read_bytes()
        absurd = whole[12:16] + 2 * b"\x40\0\0\0" + whole[24:29]
        for content in (*(whole[:size] for size in (0, 1, 8, 16, 33, 40, len(whole) // 2)),
                        *(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:] for at in (0, 3, 12, 20)),
                        b"\xff\xd8\xff\xe0" + whole[4:],
                        whole[:12] + absurd + zlib.crc32(absurd).to_bytes(4, "big") + whole[33:]):
            path.write_bytes(content)
            refused(f"cannot read the image {path} ", ctl.read_image, path, error=ctl.BadInput)

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
        torch.testing.assert_close(found, reference(x, a), atol=1e-5, rtol=0)
        views = ctl.normalise(found)
        right = TF.normalize(found, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
        torch.testing.assert_close(views, right, atol=1e-5, rtol=0)
        assert views.is_contiguous(memory_format=torch.channels_last)

@given(seeds, st.sampled_from([1, 2, 7, 20, 64, 65, 130]))
@few
def test_augment_images_are_independent(seed, n):
    # "augment(x[p], a[p]) equals augment(x, a)[p] to the bit"
    x, a = some_images(n, 16, seed), ctl.draw_augmentation(n, seeded(seed), 16)
    p, whole = torch.randperm(n, generator=seeded(1)), ctl.augment(x, a)
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
    for flag, share in ((drawn.flip, 0.5), (drawn.grey, 0.2)):
        assert scipy.stats.binomtest(int(flag.sum()), len(flag), share).pvalue > 1e-3
    independent = torch.cat([drawn.flip[None], drawn.grey[None], drawn.factor.T, drawn.crop[:, 2:].T])
    correlation = torch.corrcoef(independent) - torch.eye(8)
    correlation[6, 7] = correlation[7, 6] = 0  # height and width do go together
    assert correlation.abs().max() < 5 / math.sqrt(len(drawn.flip))

def test_draws_follow_the_generator_alone():
    def draw(seed, **more): return vars(ctl.draw_augmentation(50, seeded(seed), **more))
    assert not torch.equal(draw(1)["factor"], draw(2)["factor"])
    assert draw(1)["flip"].any() and not draw(1, flip=False)["flip"].any()
    with default_dtype(torch.float64):
        again = draw(1)
    for key, value in draw(1).items():
        same(value, again[key])
        assert key == "flip" or torch.equal(value, draw(1, flip=False)[key])

def test_only_uint8_images_are_taken():
    x, a, model = some_images(5, 16, 0), ctl.draw_augmentation(5, seeded(0), 16), ctl.ResNet18(1, 2)
    for wrong in (x / 255, x.float(), x.long(), x.bool(), x[0], x[:, :1], x.permute(0, 2, 3, 1), None):
        refused("images must be uint8", ctl.augment, wrong, a)
        refused("images must be uint8", ctl.embed, model, wrong)

def test_only_cuda_copies_without_waiting(monkeypatch):
    # On MPS such a copy may read memory that was freed meanwhile (pytorch#139550).
    asked = []
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking=False: asked.append((device, non_blocking)))
    drawn = ctl.draw_augmentation(1, seeded(0))
    for device, at_once in (("cpu", False), ("cuda", True), ("cuda:1", True), ("mps", False)):
        drawn.to(device)
        assert asked[-5:] == 5 * [(device, at_once)]

# ---------------------------------------------------------------------------------------------------------------------
# All rooms

def life_of_a_bank(init, z):
    bank, index = ctl.MemoryBank(40, 16, init=init), torch.arange(9)
    before = bank.similarity(z)
    bank.update(index, z[:9])
    return torch.cat([before, bank.similarity(z), bank.similarity(bank.rows)])

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", CONTEXTS)
def test_nothing_comes_out_otherwise_in_any_context(context, dtype):
    # also of tensors that were made there, and of features that carry a graph
    s, p = random_rows(5, 6, 30)
    images, drawn = some_images(70, 16, 0), ctl.draw_augmentation(70, seeded(0), 16)
    losses = itertools.product(ROOM_1.values(), (None, 4))
    calls = [*METRICS.values(), *((lambda x, p, f=f, k=k: f(x, p, 0.07, k), dict(x=s, p=p)) for f, k in losses),
             (life_of_a_bank, dict(init=Z, z=OTHER)), (lambda x: ctl.normalise(ctl.augment(x, drawn)), dict(x=images))]
    for f, arguments in calls:
        arguments = converted(arguments, lambda x: x.to(dtype)).values()
        before, outside = [x.clone() for x in arguments], f(*arguments)
        with CONTEXTS[context]():
            inside, made_there = f(*arguments), [x.clone() for x in arguments]
            nested = f(*made_there)
        graph = [x.clone().requires_grad_() * 1 if x.is_floating_point() else x for x in arguments]
        for found in (inside, nested, f(*made_there), f(*graph), f(*graph)):
            same(found, outside)
        assert all(map(torch.equal, arguments, before))  # no argument is changed in place
    assert not metric("profile", z=(Z * 1).requires_grad_()).requires_grad
    # A bank that was made there takes part in training.
    with CONTEXTS[context]():
        banks = ctl.MemoryBank(40, 16, generator=seeded(4)), ctl.MemoryBank(40, 16, init=Z.clone())
    same(banks[0].rows, ctl.MemoryBank(40, 16, generator=seeded(4)).rows)
    for bank in banks:
        z = OTHER.float().requires_grad_()
        bank.similarity(z).square().sum().backward()
        bank.update(torch.arange(40), z)
        assert z.grad.abs().sum() > 0

def test_examples_in_docstrings():
    failed, tried = doctest.testmod(ctl)
    assert failed == 0 and tried >= 2


# ------------------------------------------------------------------------------------------- helpers of rooms 6 and 7

SMOKE = ["--preset", "smoke", "--tau", "0.3", "--threads", "1"]  # 3 epochs of 7 steps
SHORT = ["--preset", "smoke", "--epochs", "1", "--threads", "1"]
CELL = "smoke/shapes/contrastive_tau0.3_seed0"
CHECKPOINT = Path("runs", f"{CELL}.pt")
TRAIN_STEP = ctl.train_step


@pytest.fixture
def cli(capsys):
    """Runs a command line that ends with that status: what it prints. Where it fails, its one line has these words."""
    def run(*argv, status=0, words=""):
        capsys.readouterr()
        assert ctl.main([str(a) for a in argv]) == status
        out, err = capsys.readouterr()
        assert re.fullmatch(r"ctl\.py: .+\n" if status else "", err) and words in err, err
        return out
    return run


def records(folder="."): return list(Path(folder, "results").rglob("*.json"))


def result(folder="."):
    """All of the record but the clock and the machine."""
    (path,) = records(folder)
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("timing", "environment")}


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
        m.setattr(ctl, "load_shapes", shapes)
        assert ctl.main([*SMOKE, "--results", str(folder / "results"), "--runs", str(folder / "runs")]) == 0
    return folder


# ------------------------------------------------------------------------------- the protocol once more, step by step

LOSSES = {  # which function of room 1 each loss is, and what it is given
    "contrastive": lambda s, p, c: ctl.contrastive_loss(s, p, c.tau),
    "hard": lambda s, p, c: ctl.contrastive_loss(s, p, c.tau, c.k),
    "simple": lambda s, p, c: ctl.simple_loss(s, p),
    "hard-simple": lambda s, p, c: ctl.simple_loss(s, p, c.k),
    "triplet": lambda s, p, c: ctl.triplet_loss(s, p)}
HAVE_TAU, HAVE_K = ("contrastive", "hard"), ("hard", "hard-simple")


def plain_network(c):
    torch.manual_seed(ctl.generator(c.seed, "network").initial_seed())
    return ctl.ResNet18(c.width, c.dim, c.precision == "bfloat16").to(memory_format=torch.channels_last)


def plain_views(c, images, *key, flip):
    drawn = ctl.draw_augmentation(len(images), ctl.generator(c.seed, *key), c.size, flip)
    return ctl.normalise(ctl.augment(images, drawn))


def plain_rate(c, at):
    rise = min(at / c.warmup, 1) if c.warmup else 1
    if c.schedule == "step":
        return c.lr * rise * math.prod(c.gamma for m in c.milestones if m <= at)
    return c.lr * rise * 0.5 * (1 + math.cos(math.pi * at / c.epochs))


def plain_run(c):
    """Section 5.1 once more: each draw's key, a step's rate, an epoch's mean loss. Returns what `trained` reads."""
    data, model, N = shapes(c.size), plain_network(c), c.subset
    n, m = ctl.balanced_order(data.train_labels)[:N], ctl.balanced_order(data.test_labels)[:c.test_subset]
    data = ctl.Data("shapes", data.train_images[n], data.train_labels[n], data.test_images[m], data.test_labels[m])
    outputs = torch.randn(N, c.dim, generator=ctl.generator(c.seed, "bank"))
    if c.bank_init == "embeddings":
        with torch.no_grad():
            outputs = torch.cat([model.project(model.features(plain_views(c, part, "centre", i, flip=c.flip)))
                                 for i, part in enumerate(data.train_images.split(c.batch_size))])
            model.head.bias.copy_(-outputs.mean(dim=0))
            outputs -= outputs.mean(dim=0)
    bank = F.normalize(outputs, dim=1)
    untrained, history = ctl.evaluate(model, data, c), []
    optimiser = torch.optim.SGD(model.parameters(), 9.0, c.momentum, weight_decay=c.weight_decay, fused=True)
    for epoch in range(c.epochs):
        order, losses = torch.randperm(N, generator=ctl.generator(c.seed, "order", epoch)), []
        parts = order.split(c.batch_size)
        for i, index in enumerate(parts):
            z = model(plain_views(c, data.train_images[index], "views", epoch, i, flip=c.flip))
            loss = (c.tau if c.match_step else 1.0) * LOSSES[c.loss](z @ bank.T, index, c).mean()
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = plain_rate(c, epoch + i / len(parts))
            optimiser.step()
            bank[index] = F.normalize(c.bank_momentum * bank[index] + (1 - c.bank_momentum) * z.detach(), dim=1)
        history.append({"epoch": epoch + 1, "loss": sum(losses) / len(losses), "lr": plain_rate(c, epoch)})
        if c.eval_every and (epoch + 1) % c.eval_every == 0 and epoch + 1 < c.epochs:
            (_, train_z), (_, test_z) = ctl.embed(model, data.train_images), ctl.embed(model, data.test_images)
            history[-1] |= dict(knn=ctl.knn_accuracy(train_z, data.train_labels, test_z, data.test_labels),
                                uniformity=ctl.uniformity(test_z), tolerance=ctl.tolerance(test_z, data.test_labels))
    return dict(history=history, untrained=untrained, weights=model.state_dict(), bank=bank, counts=[len(n), len(m)],
                final=lambda saved: ctl.evaluate(saved, data, c))


def trained(c):
    """The same, of a run of ctl.py that is done; and its network."""
    record, saved, model = ctl.train(c), ctl.load_checkpoint(next(Path("runs").rglob("*.pt"))), plain_network(c)
    model.load_state_dict(saved["model"])
    untrained = record["final"].pop("untrained")
    return dict(history=record["history"], untrained=untrained, weights=saved["model"], bank=saved["bank"],
                final=record["final"], counts=[record["data"]["train"], record["data"]["test"]]), model


# ---------------------------------------------------------------------------------- every setting reaches what it sets

TINY = dict(preset="smoke", tau=0.3, size=16, width=2, dim=8, subset=40, test_subset=30, batch_size=20, epochs=2,
            eval_every=1, threads=1)
STEP = dict(schedule="step", milestones=(1, 2), epochs=3)
CHANGES = [  # what is changed, and beside what; batches of 13: the last has one image
    (dict(loss="hard", tau=0.2, k=3), {}), (dict(loss="simple"), {}), (dict(loss="hard-simple", k=3), {}),
    (dict(loss="triplet"), {}), (dict(tau=0.1), {}), (dict(seed=1), {}), (dict(epochs=3), {}),
    (dict(batch_size=13), {}), (dict(size=32), {}), (dict(width=3), {}), (dict(dim=5), {}), (dict(lr=0.1), {}),
    (dict(momentum=0.1), {}), (dict(weight_decay=0.5), {}), (dict(schedule="step"), {}),
    (dict(milestones=(1,)), dict(schedule="step")), (dict(gamma=0.5), STEP), (dict(warmup=0.0), {}),
    (dict(bank_momentum=0.9), {}), (dict(bank_init="random"), dict(seed=1)), (dict(k=3), dict(loss="hard")),
    (dict(subset=30), {}), (dict(test_subset=20), {}), (dict(flip=False), {}), (dict(match_step=True), {}),
    (dict(precision="bfloat16"), {}), (dict(probe_lr=30.0), {}), (dict(eval_every=2), {})]


def tiny(**more):
    """A run of four steps; a loss without temperature takes none."""
    given = {**TINY, **more}
    if given.get("loss", "hard") not in HAVE_TAU:
        del given["tau"]
    return ctl.make_config(**given)


@pytest.mark.parametrize("change,beside", CHANGES, ids=["-".join(map(str, sum(c.items(), ()))) for c, _ in CHANGES])
def test_each_setting_reaches_what_it_sets(change, beside, cli):
    """From the command line: record and checkpoint hold what section 5.1 gives with that setting, and not what it gives
    with the usual one; the record's name says so; nobody else's draws change."""
    changed, usual, state = tiny(**{**beside, **change}), tiny(**beside), torch.get_rng_state()
    argv = []
    for name, value in {**TINY, **beside, **change}.items():
        flag, values = name.replace("_", "-"), value if isinstance(value, tuple) else [value]
        if isinstance(value, bool):
            argv += [f"--{flag}" if value else f"--no-{flag}"]
        elif getattr(changed, name) is not None:
            argv += [f"--{flag}", *map(str, values)]
    cli(*argv)
    assert torch.equal(torch.get_rng_state(), state)
    got, model = trained(changed)
    wanted, other = ({**run, "final": run["final"](model)} for run in map(plain_run, (changed, usual)))
    close = functools.partial(torch.testing.assert_close, got, rtol=2e-3, atol=2e-4, check_dtype=False)
    close(wanted)
    with pytest.raises(AssertionError):
        close(other)
    path = str(ctl.cell_path(changed, "shapes"))
    assert Path("results", f"{path}.json").exists() and path != str(ctl.cell_path(usual, "shapes"))
    assert path.endswith(f"_seed{changed.seed}") and path.startswith(f"smoke/shapes/{changed.loss}_")


# What `paper` gives to each setting, as PAPER.md, section 2, and the authors' code have it. What the other presets give
# is in the committed records: each stands under a name that holds all that departs from its preset.
PAPER = dict(
    preset="paper", dataset="cifar10", epochs=200, batch_size=128, size=32, width=64, dim=128, lr=0.03, momentum=0.9,
    weight_decay=5e-4, schedule="step", milestones=(160, 190), gamma=0.1, warmup=0.0, bank_momentum=0.5, seed=0,
    bank_init="random", subset=None, test_subset=None, flip=True, match_step=False, precision="auto", probe_lr=30.0,
    eval_every=10, loss="hard", tau=0.3, k=4095)


def test_what_the_presets_are():
    assert ctl.make_config() == ctl.Config() and ctl.make_config(loss="hard").study() == PAPER
    datasets = dict(paper="cifar10", narrow="cifar10", mini="cifar10", quick="shapes", smoke="shapes")
    assert {preset: ctl.make_config(preset).dataset for preset in ctl.PRESETS} == datasets
    ks = dict(paper=4095, narrow=4095, mini=409, quick=200, smoke=8)
    for preset, loss in itertools.product(ctl.PRESETS, ctl.LOSSES):
        c = ctl.make_config(preset, loss=loss)
        assert (c.tau, c.k) == (0.3 if loss in HAVE_TAU else None, ks[preset] if loss in HAVE_K else None)


def test_make_config():
    study = {field.name for field in dataclasses.fields(ctl.Config) if field.metadata["study"]}
    # No setting and no loss is left out above.
    assert {next(iter(change)) for change, _ in CHANGES} == study - {"dataset", "preset"}
    assert tuple(ctl.LOSSES) == tuple(LOSSES)
    assert ctl.make_config("smoke", schedule="step", milestones=[1, 2]).milestones == (1, 2)
    assert ctl.make_config("mini", loss="hard", k=7).k == 7 and type(ctl.make_config("smoke", tau=1).tau) is float
    for wrong in (dict(tau="0.3"), dict(tau=True), dict(epochs=2.0), dict(flip=1), dict(loss=None), dict(loss="new"),
                  dict(milestones=(3, 3), schedule="step"), dict(milestones=("3",), schedule="step"), dict(lr=None),
                  dict(preset="big")):
        refused(f".*{next(iter(wrong))}", ctl.make_config, **{"preset": "smoke", **wrong}, error=ctl.BadInput)
    c = ctl.make_config("smoke")
    c.loss = "new"  # past the checks: an error too, not the ordinary loss
    with pytest.raises(KeyError):
        ctl.training_loss(c, torch.zeros(1, 2), torch.tensor([0]))


def test_what_the_machine_decides(monkeypatch, capsys):
    for name in ("cuda:99", "tpu9", "", "meta"):
        refused(f"device '{name}' can't be used: ", ctl.pick_device, name, error=ctl.BadInput)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.empty(0))  # it works, whatever it is
    for cuda, mps, wanted in ((True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or mps)
        assert ctl.pick_device("auto").type == wanted and ctl.pick_device("cpu") == CPU
        preset = "paper" if cuda else "mini"
        assert ctl.settle(dict(tau=0.1)) == ctl.make_config(preset, tau=0.1)
        assert f"no preset given: {preset}" in capsys.readouterr().out
        for precision, gpu, cpu in (("auto", mps, False), ("float32", False, False), ("bfloat16", True, True)):
            c = ctl.make_config("smoke", precision=precision)
            assert (ctl.in_bfloat16(c, torch.device("cuda")), ctl.in_bfloat16(c, CPU)) == (gpu, cpu)
    assert ctl.settle(dict(preset="quick")).preset == "quick" and capsys.readouterr().out == ""


def test_take_subset():
    images, labels, others = torch.arange(90, dtype=torch.uint8), torch.arange(90) % 3, (torch.arange(90) * 7 + 2) % 3
    data = ctl.Data("mine", images, labels, images, others)
    train, test = ctl.balanced_order(labels), ctl.balanced_order(others)
    taken = ctl.take_subset(data, ctl.make_config("mini"))  # 5,000 at most, and all of the test images
    assert all(map(torch.equal, taken[1:], (images[train], labels[train], images[test], others[test])))
    for few in (data._replace(train_images=images[:9], train_labels=labels[:9]), data._replace(test_labels=others[:9])):
        refused("mine has too few images", ctl.take_subset, few, ctl.make_config("mini"), error=ctl.BadInput)


# ----------------------------------------------------------------------------------------- evaluation, and whole runs


@pytest.mark.parametrize("training", [True, False])
def test_which_tensors_each_metric_is_of(training, monkeypatch):
    """Every metric of `evaluate` returns what it is called with."""
    assert inspect.signature(ctl.linear_probe).parameters["lr"].default == 30.0  # paper, section 5.1
    data, c, profile = shapes(16), tiny(seed=3, probe_lr=0.7), []
    train_y, test_y = (torch.arange(301) * 7) % 5, torch.arange(250) % 4
    data = ctl.Data("mine", data.train_images[:301], train_y, data.test_images[:250], test_y)
    model, _ = ctl.make_model(c, CPU)
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
    got = ctl.evaluate(model.train(training), data, c)
    assert model.training == training  # in evaluation mode, and put back
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    order, h = ctl.balanced_order(train_y, 1), torch.stack([train_h, mirror_h])
    held, kept = order[:60], order[60:]  # a fifth of 301
    # Paper, section 5.1; momentum and batch of the probe, and all of kNN: authors' code.
    probe = dict(epochs=100, lr=0.7, momentum=0.9, milestones=(40, 60, 80), gamma=0.2, batch_size=256, seed=3)
    torch.testing.assert_close(dict(got, profile=profile), {
        "knn": dict(train_z=train_z, train_y=train_y, test_z=test_z, test_y=test_y, k=200, temperature=0.07),
        "uniformity": dict(z=test_z, t=2.0), "tolerance": dict(z=test_z, labels=test_y),
        "alignment": dict(z1=view_1, z2=view_2),
        "profile": [dict(z=test_z, z2=view_1, positive=torch.arange(250), top=10)],
        "accuracy": dict(probe, train_h=h, train_y=train_y, test_h=test_h, test_y=test_y),
        "accuracy_heldout": dict(probe, train_h=h[:, kept], train_y=train_y[kept], test_h=train_h[held],
                                 test_y=train_y[held])})
    assert got["profile"] == list(range(11)) and not got["uniformity"]["z"].requires_grad


def test_record(undisturbed, monkeypatch):
    text = records(undisturbed)[0].read_text()
    r, data = json.loads(text), ctl.take_subset(shapes(32), ctl.make_config("smoke"))
    assert {"config", "protocol_version", "environment", "history", "final", "timing", "sha256", "data"} == r.keys()
    assert text == json.dumps(r, indent=1, sort_keys=True) + "\n" and "NaN" not in text
    assert r["config"] == ctl.plain(ctl.make_config("smoke", tau=0.3).study()) and r["protocol_version"] == 1
    assert r["data"] == {"sha256": data.sha256(), "train": 100, "test": 100}
    here, saved = dict(r["environment"]), ctl.load_checkpoint(undisturbed / "runs" / f"{CELL}.pt")
    monkeypatch.setattr(ctl, "__file__", os.devnull)  # edited while a run lasts
    assert here == ctl.environment(CPU, False) != ctl.environment(CPU, True)
    monkeypatch.undo()
    assert here["source_sha256"] == hashlib.sha256(Path(ctl.__file__).read_bytes()).hexdigest()
    assert here["device"] == f"cpu {torch.backends.cpu.get_cpu_capability()}" and here["threads"] == 1
    assert here["ONEDNN_MAX_CPU_ISA"] == os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT") and all(here.values())
    assert here["precision"] == "float32" and here["torch"] == torch.__version__
    for key in (*r, "tsne"):  # the sum is of all but the clock, the machine and an old record's picture
        assert (ctl.record_sha256({**r, key: 9}) == r["sha256"]) == (key in ("timing", "environment", "tsne", "sha256"))
    assert ctl.plain({"a": (1, math.nan, [math.inf, 0.5])}) == {"a": [1, None, [None, 0.5]]}
    assert 0 < saved["seconds"] < r["timing"]["seconds"] and r["timing"].keys() == {"seconds"}


def test_same_command_elsewhere_gives_the_same(undisturbed, cli, monkeypatch):
    monkeypatch.setattr(ctl, "evaluate", lambda *given, real=ctl.evaluate: print("<evaluates>") or real(*given))
    torch.manual_seed(99)  # nothing depends on the global generator
    with default_dtype(torch.float64):  # nor on the caller's own dtype
        out = cli(*SMOKE)
        assert torch.get_default_dtype() == torch.float64
    assert "evaluating the untrained network\n<evaluates>\n" in out and "record: results/" in out
    assert re.search(r"\ntrained; evaluating, about [0-9]+ s\n<evaluates>\n", out)
    assert result() == result(undisturbed)
    before = records()[0].read_bytes()
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    for more in (["--threads", "7"], []):  # the record is there: nothing is trained
        assert "already" in cli("--preset", "smoke", *more) and records()[0].read_bytes() == before
    assert given == [7, 5]
    assert sorted(os.listdir()) == ["results", "runs"] and not list(Path().rglob("*.tmp"))


def test_a_users_home(cli, tmp_path, monkeypatch):
    """A ~ that no shell has expanded; and a folder of images, whose path is no part of the record."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make_folder(Path("home/pets"), each=6)
    cli(*SHORT, "--dataset", "~/pets", "--subset", "12", "--test-subset", "12", "--batch-size", "4",
        "--results", "~/r", "--runs", "~/u")
    (path,) = Path("home/r").rglob("*.json")
    assert path.parts[:4] == ("home", "r", "smoke", "pets") and list(Path("home/u").rglob("*.pt"))
    assert json.loads(path.read_text())["config"]["dataset"] == "pets" and str(tmp_path) not in path.read_text()
    loads = []
    monkeypatch.setattr(ctl, "load_dataset", lambda *given: loads.append(given) or shapes(32))
    cli(*SHORT, "--data", "~/d", "--results", "~/r", "--runs", "~/u")
    assert loads == [("shapes", "~/d", 32)] and os.listdir() == ["home"]  # ~/d: see test_download


def test_cell_paths():
    path = lambda **given: str(ctl.cell_path(ctl.make_config("smoke", **given), "shapes"))
    assert path(loss="hard", k=7, lr=0.1) == "smoke/shapes/hard_tau0.3_lr-0.1_k-7_seed0"
    assert path(device="cpu", threads=2, data="x", results="y", runs="z", force=True) == CELL
    long = dict.fromkeys(("lr", "momentum", "weight_decay", "warmup", "bank_momentum", "probe_lr"), 1 / 7 ** 9)
    refused("too many settings", path, **long, error=ctl.BadInput)


# --------------------------------------------------------------------------------------- Table 1, and committed records

TABLE_1 = """
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
"""
MORE = {"cifar10": (76.10, 81.82, 83.78, 83.22, 82.54, 82.97, 82.67, 81.97),
        "cifar100": (49.80, 52.46, 56.05, 55.47, 54.17, 53.05, 50.08), "svhn": (), "shapes": ()}


def test_the_papers_numbers(capsys):
    for loss, tau, *numbers in map(str.split, TABLE_1.strip().splitlines()):
        for i, dataset in enumerate(("cifar10", "cifar100", "svhn")):
            wanted = dict(zip(("accuracy", "uniformity", "tolerance"), map(float, numbers[3 * i:3 * i + 3])))
            assert ctl.paper_values(dataset, loss, eval(tau)) == wanted
    for dataset, loss in itertools.product(MORE, ("contrastive", "hard")):
        for tau, accuracy in itertools.zip_longest((0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9), MORE[dataset]):
            wanted = (accuracy if loss == "contrastive" else None, None, None)
            assert tuple(ctl.paper_values(dataset, loss, tau).values()) == wanted
    path = HOME / "results/mini/cifar10-jpeg/contrastive_tau0.3_seed0.json"
    record = ctl.read_record(path)
    ctl.show(record, path)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    for key, paper in (("accuracy", "83.27"), ("knn", "-"), ("uniformity", "3.6"), ("tolerance", "0.178")):
        ours = [float(lines[key][1]), float(lines[key][3])]
        assert ours == pytest.approx([record["final"][key], record["final"]["untrained"][key]], abs=6e-3)
        assert lines[key][2] == paper
    assert "all images, 200 epochs" in " ".join(lines["preset"]) and lines["record:"][1] == str(path)


def test_a_committed_record_is_what_the_code_gives(undisturbed):
    """A change of results can't pass unseen: on the kind of CPU that made the record to the last digit."""
    committed, ours = (ctl.read_record(folder / "results" / f"{CELL}.json") for folder in (HOME, undisturbed))
    assert ours["config"] == committed["config"] and ours["protocol_version"] == committed["protocol_version"]
    kind = ("cpu", "ONEDNN_MAX_CPU_ISA", "device", "threads", "torch")
    if all(ours["environment"][key] == committed["environment"][key] for key in kind):
        for key in ("history", "final", "data"):
            assert ours[key] == committed[key]
    # Another CPU rounds otherwise, and steps blow that up: after five, losses differ by per cents. What comes before
    # the first step does not; nor, much, the mean loss of the first epoch, whose rate rises from 0.
    for key, value in ours["final"]["untrained"].items():
        near = dict(abs=5.01) if key in ("accuracy", "accuracy_heldout", "knn") else dict(rel=1e-5)  # an image of 20
        assert value == pytest.approx(committed["final"]["untrained"][key], **near), key
    assert ours["history"][0]["loss"] == pytest.approx(committed["history"][0]["loss"], rel=0.02)
    assert [entry.keys() for entry in ours["history"]] == [entry.keys() for entry in committed["history"]]
    assert [entry["lr"] for entry in ours["history"]] == pytest.approx([entry["lr"] for entry in committed["history"]])


def test_every_committed_record_is_whole_and_stands_where_it_belongs():
    paths = [p for p in sorted((HOME / "results").glob("*/*/*.json")) if p.parts[-3] in ctl.PRESETS]
    assert len(paths) > 80
    for path in paths:
        record = ctl.read_record(path)
        config = ctl.Config(**record["config"])
        assert ctl.plain(config.study()) == record["config"], path
        assert record["protocol_version"] == ctl.PROTOCOL_VERSION, path
        assert Path("results", f"{ctl.cell_path(config, config.dataset)}.json") == path.relative_to(HOME), path


# ------------------------------------------------------------------------------------------- interrupted, and going on


@pytest.mark.parametrize("at,seconds", [(1, 0), (7, 0), (8, 0), (20, 0), (8, 60)])  # 7 steps an epoch
def test_interrupted_run_goes_on_exactly(at, seconds, undisturbed, cli, monkeypatch):
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", seconds)
    at_step(monkeypatch, at)
    cli(*SMOKE, status=130, words="interrupted")
    saved = at > 1 and seconds == 0
    assert CHECKPOINT.exists() == saved and not records()
    at_step(monkeypatch, None)
    torch.manual_seed(at)
    assert (f"going on from {CHECKPOINT}: {at - 1} steps done" in cli(*SMOKE)) == saved
    assert result() == result(undisturbed)


def test_how_often_a_checkpoint_is_saved(cli, monkeypatch):
    saves, ticks, save = [], itertools.count(), ctl.save_checkpoint
    monkeypatch.setattr(ctl, "save_checkpoint", lambda *given: saves.append(save(*given)))
    monkeypatch.setattr(ctl, "time", types.SimpleNamespace(perf_counter=lambda: 25.0 * next(ticks)))
    assert re.search(r"[0-9] images/s +[0-9.]+ (s|min|h) left", cli(*SMOKE))
    assert 6 <= len(saves) <= 12 and ctl.CHECKPOINT_SECONDS == 60  # every second or third of 21 steps


DRIVER = """
import os, signal, sys, torch, ctl
torch.set_num_threads(1)  # a child that is forked has none of its parent's threads
data = ctl.load_shapes(32)
ctl.load_shapes, ctl.CHECKPOINT_SECONDS = lambda size: data, 0
def die(*given):
    if how == "half written":
        os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
    if how == "done":
        real(*given)
    os.kill(os.getpid(), signal.SIGKILL)
moments = [(os, "fsync", "half written"), (os, "replace", ""), (os, "replace", "done"), (ctl, "train_step", "")]
plan = [(*moment, calls) for calls in (2, 0) for moment in moments]
for owner, name, how, calls in [*plan, (ctl, "evaluate", "", 0), *((*moment, 0) for moment in moments)]:
    real = getattr(owner, name)
    answers = iter([real] * calls + [die] * 99)
    if not (child := os.fork()):
        setattr(owner, name, lambda *given: next(answers)(*given))
        os._exit(ctl.main(sys.argv[1:]))
    print("end", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again(undisturbed):
    """SIGKILL at steps, in half-written files, before and after they are renamed, and in evaluation."""
    done = subprocess.run([sys.executable, "-u", "-c", DRIVER, *SMOKE], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HOME)})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    # The last four find a trained network: three die of writing the record, no step is left to die of.
    assert re.findall("end (.*)", done.stdout) == 12 * ["-9"] + ["0"] and result() == result(undisturbed)


def test_damaged_checkpoints_are_never_used(undisturbed, cli, capsys):
    whole, path = (undisturbed / "runs" / f"{CELL}.pt").read_bytes(), Path("x.pt")
    path.write_bytes(whole)
    good, others, flipped = ctl.load_checkpoint(path), [b"", b"junk", pickle.dumps({"step": 1})], []
    # Code, a network, no zip, whole but of something else.
    for content, zipped in ((dict(good, step=print), True), (nn.Linear(1, 1), True), (good, False), ([1, 2], True),
                            ({"step": 1}, True), ({"config": 1, "protocol_version": 1, "data": "0"}, True)):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        others.append(path.read_bytes())
    draw = random.Random(0)
    for i in range(60):  # cut off, or a bit turned
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        flipped.append(whole[:at] + (bytes([whole[at] ^ bit]) + whole[at + 1:] if i % 3 else b""))
    for content in others + flipped:
        path.write_bytes(content)
        saved, out = ctl.load_checkpoint(path), capsys.readouterr().out
        assert (saved is None) == (out == f"the checkpoint {path} is damaged: it is not used\n")
        if saved:  # a bit of a file's date: nothing is damaged then
            assert content in flipped
            flipped.remove(content)
            assert all(torch.equal(saved["model"][name], value) for name, value in good["model"].items())
    assert len(flipped) > 50
    CHECKPOINT.parent.mkdir(parents=True)
    CHECKPOINT.write_bytes(whole[:-9])
    out = cli(*SMOKE)
    assert f"the checkpoint {CHECKPOINT} is damaged" in out and "going on" not in out
    assert result() == result(undisturbed) and ctl.load_checkpoint(CHECKPOINT)["step"] == 21
    assert CHECKPOINT.with_suffix(".damaged").read_bytes() == whole[:-9]


def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(undisturbed, cli, monkeypatch):
    shutil.copytree(undisturbed / "runs", "runs")
    real = io.open

    def stale(file, *given, **more):
        if str(file).endswith(".pt"):
            raise OSError(errno.ESTALE, "Stale file handle", str(file))
        return real(file, *given, **more)
    with monkeypatch.context() as m:
        m.setattr(io, "open", stale)
        cli(*SMOKE, status=1, words=f"Stale file handle: {CHECKPOINT}")
    assert "going on from" in cli(*SMOKE) and result() == result(undisturbed)
    assert not CHECKPOINT.with_suffix(".damaged").exists()


@pytest.mark.parametrize("kind", ["runs", "results"])
def test_of_another_run(kind, undisturbed, cli, monkeypatch):
    """A checkpoint or record where another belongs: refused, naming what differs, and it stays."""
    shutil.copytree(undisturbed / kind, kind)
    (path,) = (path for path in Path(kind).rglob("*seed0*") if path.suffix != ".lock")
    before, other = path.read_bytes(), path.with_name(path.name.replace("0.3", "0.7"))
    path.rename(other)
    cli(*SMOKE, "--tau", "0.7", status=2, words=f"{other} is of another run: tau is 0.3 there, 0.7 here")
    assert other.read_bytes() == before
    other.rename(path)
    with monkeypatch.context() as m:
        m.setattr(ctl, "PROTOCOL_VERSION", 2)
        cli(*SMOKE, status=2, words="version is 1 there, 2 here")
    mine = {"name": "mine"}
    monkeypatch.setattr(ctl, "load_dataset", lambda *_: shapes(32)._replace(**mine))
    cli(*SHORT)
    if kind == "runs":
        shutil.rmtree("results")
    mine["train_images"] = shapes(32).train_images + 1  # other images under one name
    cli(*SHORT, status=2, words="data is")
    mine["name"] = "shapes"  # which another kind of CPU may have rounded otherwise
    assert "already" in cli(*SMOKE, "--results", undisturbed / "results")


def test_edited_record_is_refused_until_force_begins_again(undisturbed, cli, monkeypatch):
    for kind in ("runs", "results"):
        shutil.copytree(undisturbed / kind, kind)
    (path,) = records()
    r = json.loads(path.read_text())
    for spoilt in (json.dumps({**r, "final": {**r["final"], "accuracy": 99.0}}), "{", "[]", "{}", "", "[" * 10 ** 5):
        path.write_text(spoilt)
        cli(*SMOKE, status=2, words="sha256")
        assert path.read_text() == spoilt
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 0)
    at_step(monkeypatch, 10)
    cli(*SMOKE, "--force", status=130)
    assert ctl.load_checkpoint(CHECKPOINT)["step"] == 9 and not records()  # not the finished one
    at_step(monkeypatch, None)
    assert "9 steps done" in cli(*SMOKE) and result() == result(undisturbed)


# The last: the only step breaks the weights.
@pytest.mark.parametrize("more", [[], ["--loss", "simple"], ["--loss", "hard-simple"],
                                  ["--epochs", "1", "--batch-size", "100"]])
def test_what_is_not_finite_is_not_saved(more, cli, monkeypatch):
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 0)
    cli("--preset", "smoke", "--threads", "1", "--lr", "1e30", "--warmup", "0", *more, status=1, words="not finite")
    assert not records()
    for path in Path("runs").rglob("*.pt"):
        saved = ctl.load_checkpoint(path)
        assert all(value.isfinite().all() for value in (*saved["model"].values(), saved["bank"], *saved["losses"]))


@pytest.mark.parametrize("spoilt", range(5))
def test_what_finite_looks_at(spoilt):
    model, optimiser = ctl.make_model(tiny(), CPU)
    run = ctl.Run(model=model, optimiser=optimiser, bank=ctl.MemoryBank(3, 2), losses=torch.ones(2), untrained={})
    for who in range(2):
        ctl.save_checkpoint(Path("a.pt"), run, {"config": who, "data": "", "protocol_version": 1})
        (model.head.weight[0], model.stem[1].running_mean, run.bank.rows[2], run.losses, torch.ones(1))[spoilt][
            -1:].detach().fill_(math.nan)
    assert ctl.load_checkpoint("a.pt")["config"] == run.finite() == (spoilt == 4)
    with contextlib.nullcontext() if spoilt == 4 else pytest.raises(ctl.NotFinite, match="epoch 1"):
        ctl.end_epoch(run, tiny(eval_every=0), None)


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_the_second_of_two_runs(cli):
    lock = CHECKPOINT.with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with filelock.FileLock(lock):
        cli(*SMOKE, status=3, words=str(lock))
    assert not records()
    cli(*SMOKE, "--device", "cpu")  # it went with its holder


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody may write")
@pytest.mark.parametrize("folder", ["runs", "results"])
def test_a_folder_that_can_only_be_read(folder, cli):
    Path(folder, "smoke").mkdir(parents=True)
    Path(folder, "smoke/shapes").symlink_to("/proc/self")
    cli(*SMOKE, status=2, words=f"cannot write into {folder}")
    assert not list(Path("runs").rglob("*.pt"))


def test_a_file_is_written_whole_or_not_at_all(monkeypatch):
    path = Path("deleted/meanwhile/record.json")
    ctl.write_whole(path, b"old")

    def full(file):
        raise OSError("broken off")

    def look(source, target):  # at the one moment when it changes: the new file is whole, the old one still there
        assert Path(source).read_bytes() == b"new" and path.read_bytes() == b"old"
        assert Path(source).parent == path.parent and path.name in Path(source).name  # two runs do not share it
        raise OSError("broken off")
    for name, stand_in in (("replace", look), ("fsync", full)):
        monkeypatch.setattr(os, name, stand_in)
        with pytest.raises(OSError, match="broken off"):
            ctl.write_whole(path, b"new")
        assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["record.json"]


@pytest.mark.parametrize("error,status,words", [
    (MemoryError("no more"), 1, "MemoryError: no more"), (ctl.Stop("a\nb"), 1, "a b"), (ctl.BadInput("c"), 2, "c"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTry"), 1, "OutOfMemoryError: CUDA out of memory. Try"),
    (ctl.Busy("d"), 3, "d"),
    (RuntimeError("CPUAllocator: can't allocate memory"), 1, "RuntimeError: CPU"),
    (KeyboardInterrupt(), 130, "interrupted"), (OSError(errno.EIO, "broken", "file"), 1, "broken: file"),
    (ctl.NotFinite("e"), 1, "NotFinite: e"), (SystemExit(0), 0, "")])
def test_exit_statuses(error, status, words, cli, monkeypatch):
    def fail(*_):
        raise error
    monkeypatch.setattr(ctl, "pick_device", fail)
    assert cli(*SMOKE, status=status, words=f"ctl.py: {words}" if words else "") == ""
    error = RuntimeError("a fault of the program")  # not hidden
    with pytest.raises(RuntimeError, match="a fault"):
        ctl.main(SMOKE)


def test_standard_output_that_is_not_there(undisturbed, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", None)
        assert ctl.main(SMOKE) == 0
    assert result() == result(undisturbed)
    # A reader that leaves, a terminal without τ, no docstrings: the run goes on and leaves its record.
    rmtrees(Path(), "runs", "results")
    line = f'set -o pipefail; "{sys.executable}" -OO "{ctl.__file__}" {" ".join(SMOKE)} | head -n 1'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert result() == result(undisturbed)


BAD = """--tau 0.3 --loss simple|--tau 0.3 --loss triplet|--tau 1 --loss hard-simple|--match-step --loss simple|--k 5
--k 5 --loss simple|--k 5 --loss triplet|--k 0 --loss hard|--k 1.5 --loss hard|--nonsense 1|--ta 0.3|-t 1|--alpha 0.1
--report|--profile|--json|--gamma 0.5|--milestones 3|--milestones 2 1 --schedule step|--milestones 1.5|--batch-size 1
--size 20|--size 8|--size 72|--size 1000000|--subset 5|--test-subset 9|--dataset|--device tpu9|--device hpu
--device cuda:99|--seed 99999999999999999999999|stray|--tau 1e-40|--probe-lr 1e40|--threads 99999999999|--momentum 1.1
--force=yes|--preset paperr|--loss softmax|--dataset no/such/folder|--dataset ctl.py"""


def test_two_hundred_bad_command_lines(capsys):
    """Each is wrong in one thing; the complaint names it."""
    lines = [line.split() for line in re.split(r"[|\n]", BAD)]
    for field in dataclasses.fields(ctl.Config):
        flag, kind, choices = "--" + field.name.replace("_", "-"), field.metadata["kind"], field.metadata["choices"]
        values = ["", "x", choices[0].upper() + "!"] if choices else []
        if kind in (int, float) and field.name != "milestones":
            values += ["x", "", "-1", "nan", "-inf", "1e999", "0x10", "1,5"]
        lines += [[f"{flag}=1"], [f"--no{flag}"]] if kind is bool else [[flag], *([flag, value] for value in values)]
    for line in lines:
        assert ctl.main([*([] if "--preset" in line else ["--preset", "smoke"]), *line]) == 2, line
        err = capsys.readouterr().err.replace("_", "-")
        word = line[-1] if line[0] == "--dataset" else line[0].removeprefix("--no").strip("-").split("=")[0]
        assert re.fullmatch(r"ctl\.py: .+\n", err) and word in err, (line, err)
        assert not [p for p in Path().rglob("*") if p.is_file() and p.suffix != ".lock"], line


def test_help(cli):
    out = cli("--help")
    assert all(preset in out for preset in ctl.PRESETS)
    for field in dataclasses.fields(ctl.Config):
        assert f"--{field.name.replace('_', '-')}" in out and field.metadata["words"][:20] in out


def test_pasted_and_zipped(monkeypatch):
    """A notebook's cell has no file, nor has a zip one of its own."""
    source = Path(ctl.__file__).read_text(encoding="utf-8")
    Path("code.zip").touch()
    for place in ({}, {"__file__": "code.zip/ctl.py"}):
        module = types.ModuleType("pasted")
        vars(module).update(place)
        monkeypatch.setitem(sys.modules, "pasted", module)
        exec(compile(source, "<cell>", "exec"), vars(module))
        assert module.SOURCE_SHA256 is None


def test_the_readmes_python_runs(undisturbed):
    blocks = re.findall(r"```python\n(.*?)```", (HOME / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names, path = {}, str(undisturbed / "runs" / f"{CELL}.pt")
    for block in blocks:
        exec(re.sub(r'"runs/[^"]*"', repr(path), block), names)
    assert blocks and names["loss"].isfinite() and names["h"].shape == (2000, 32) and names["z"].shape == (2000, 16)


# ------------------------------------------------------------------------------------------------------------- the step
# Without a GPU at hand, what can be proven of a step there: nothing in it waits for the device (device="meta" has no
# values to wait for), no tensor is left on another device, and the number of its operations is bounded.

BANK = ctl.MemoryBank(2, 2, init=torch.eye(2))  # its check of the rows looks at values: made outside


def step_parts(loss, device="cpu", N=60, B=12, size=16, dim=8):
    """The arguments of train_step, with everything on that device but what is drawn."""
    torch.manual_seed(0)
    with torch.device(device):
        model = ctl.ResNet18(4, dim)
    if device == "cpu":
        model = model.to(memory_format=torch.channels_last)
    bank, draws = copy.copy(BANK), seeded(1)
    bank.rows = F.normalize(torch.randn(N, dim, generator=draws), dim=1).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    images = torch.randint(256, (N, 3, size, size), generator=draws, dtype=torch.uint8).to(device)
    return dict(model=model, bank=bank, optimiser=optimiser, images=images, index=torch.arange(B),
                drawn=ctl.draw_augmentation(B, draws, size), config=tiny(loss=loss))


class Count(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        vars(self).setdefault("names", []).append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ctl.LOSSES)
def test_a_step_on_a_device(loss):
    with Count() as count:
        value = ctl.train_step(**step_parts(loss, "meta"))
    assert value.device.type == "meta" and value.shape == () and not value.requires_grad
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "unique2"} & set(count.names)
    with FakeTensorMode():
        parts = step_parts(loss, "cuda")
        index = parts["index"].to("cuda")
        views = ctl.normalise(ctl.augment(parts["images"][index], parts["drawn"].to("cuda")))
        z = parts["model"](views)
        values = ctl.training_loss(parts["config"], parts["bank"].similarity(z), index)
        parts["bank"].update(index, z.detach())
    assert {x.device.type for x in (views, z, values, parts["bank"].rows)} == {"cuda"}
    parts = step_parts(loss)
    ctl.train_step(**parts)
    with Count() as count:
        ctl.train_step(**parts)  # its backward and SGD, one parameter at a time, included
    # Forward and backward, once each.
    assert len([name for name in count.names if name.startswith("convolution")]) == 2 * 20
    assert len(count.names) <= 880, len(count.names)
    with Count() as count:
        ctl.normalise(ctl.augment(parts["images"][:12], parts["drawn"]))
    assert len(count.names) <= 310, len(count.names)


def test_compiled_whole_equal_to_eager():
    parts, index, gradients = step_parts("hard"), torch.arange(12), []
    model, rows, config = parts["model"], parts["bank"].rows, parts["config"]

    def forward(images, drawn):
        return ctl.training_loss(config, model(ctl.normalise(ctl.augment(images, drawn))) @ rows.T, index).mean()
    for f in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        loss = f(parts["images"][index], parts["drawn"])
        gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
