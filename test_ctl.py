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
import http.server
import importlib.util
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
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import types
import zipfile
import zipimport
from pathlib import Path

import filelock
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image, ImageOps
import pytest
import scipy.io
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

def ref_kept(s, p, k=None):
    """Columns of the k largest negatives."""
    return sorted((j for j in range(len(s)) if j != p), key=lambda j: -s[j])[:k]

def ref_softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    total = math.fsum(e)
    return [v / total for v in e]
def ref_P(s, p, tau, k=None): return ref_softmax([(s[j] - s[p]) / tau for j in [p] + ref_kept(s, p, k)])

def ref_loss(s, p, tau, k=None):
    x = [0.0] + [(s[j] - s[p]) / tau for j in ref_kept(s, p, k)]
    return max(x) + math.log(math.fsum(math.exp(v - max(x)) for v in x))

def ref_push(s, p, tau, k=None):
    P, g = ref_P(s, p, tau, k), [0.0] * len(s)
    for j, v in zip(ref_kept(s, p, k), P[1:]):
        g[j] = v
    g[p] = -math.fsum(P[1:])
    return g

def ref_penalty(s, p, tau, k=None):
    columns, r = ref_kept(s, p, k), [0.0] * len(s)
    for j, v in zip(columns, ref_softmax([s[j] / tau for j in columns]) if columns else []):
        r[j] = v
    return r
def entropy(P): return -math.fsum(v * math.log(v) for v in P if v > 0)
def mean(x): return math.fsum(x) / len(x)
def central(s, n): return mean([(v - mean(s)) ** n for v in s])

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
    ahead = [0.0] + [row[0][j] - row[0][row[1]] for j in ref_kept(*row, k)]
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
    assert abs(math.fsum(map(abs, g)) - 2 * (1 - ref_P(*row, tau)[0])) <= 1e-12
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
    by_autograd, closed = tau * learned.grad.double(), tau * ctl.loss_gradient(s, p, tau).double()
    assert ((by_autograd / P - 1).abs()[seen] <= 32 * EPS32 * spread).all()
    assert (by_autograd + 1 - P)[own].abs().max() <= 32 * EPS32 * spread
    # torch.softmax adds N terms up in float32: the worst seen is 32 eps with AVX-512, 315 with AVX2 and without.
    # The sum is a factor that all columns share; without it the closed form is as near as autograd.
    for ratio in ((closed / P)[i][seen[i]] for i in range(2)):
        assert abs(ratio.median() - 1) <= 4 * 315 * EPS32 * spread
        assert ((ratio / ratio.median() - 1).abs() <= 32 * EPS32 * spread).all()
    assert closed.sum(dim=1).abs().max() <= 32 * EPS32 * spread

@given(rows(2), taus, ks, free)
def test_relative_penalty(row, tau, k, moved):
    # Eqs. 5 and 8; "r_j = d_jL/|d_posL|, independent of s_pos; sums to 1"
    no_ties(row[0], k)
    s, p = row
    r, g = penalty(s, p, tau, k), push(s, p, tau, k)
    within(r, ref_penalty(s, p, tau, k), 1e-12)
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

@given(rows(), taus, ks)
def test_gradient_of_tau(row, tau, k):
    # dL/dtau = (s_ii - sum_k P_ik s_ik)/tau², over the columns kept; tau as a tensor gives what the number gives
    s, p = row
    ahead = [s[j] - s[p] for j in [p] + ref_kept(s, p, k)]
    expected = -math.fsum(v * d for v, d in zip(ref_P(s, p, tau, k), ahead)) / tau
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        learned = nn.Parameter(torch.tensor(tau, dtype=dtype))
        L = ctl.contrastive_loss(t(s), p_(p), learned, k)
        L.sum().backward()
        assert abs(tau * learned.grad.item() - expected) <= tolerance * (1 + 1 / tau ** 2)
        for f in map(ROOM_1.get, WITH_TAU):
            found = f(t(s), p_(p), learned, k)
            assert found.dtype == torch.float64 and torch.equal(found, f(t(s), p_(p), learned.item(), k))

@given(rows(1, 7), taus)
@fewer
def test_hessian(row, tau):
    # "Hessian (diag P - P P^T)/tau²: eigenvalues in [0, 1/(2 tau²)], null vector 1; so L is convex in s"
    s, p = row
    H = torch.autograd.functional.hessian(lambda x: ctl.contrastive_loss(x[None], p_(p), tau).sum(), t(s)[0]) * tau ** 2
    P = torch.tensor(ref_softmax([(v - s[p]) / tau for v in s]), dtype=torch.float64)
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
    last = rest - central(s, 2) / (2 * tau ** 2)
    assert abs(last) <= R ** 3 / (36 * math.sqrt(3) * tau ** 3) + slack(tau) + 8 * EPS / tau ** 2
    # "|log(N P_j)| <= R/tau" (the loss with j as positive is -log P_j);
    # "|N P_j - 1 - (s_j - mean s)/tau| <= 1.5 R²/tau² for tau >= R"
    every, own = t(s).expand(N, N), torch.arange(N)
    assert (math.log(N) - ctl.contrastive_loss(every, own, tau)).abs().max() <= R / tau + slack(tau)
    if tau >= R:
        P = ctl.loss_gradient(every, own, tau) * tau + torch.eye(N)
        assert (N * P - 1 - (t(s) - mean(s)) / tau).abs().max() <= 1.5 * (R / tau) ** 2 + N * 1e-14

# ---- always

@given(rows(), taus, taus)
def test_derivative_and_convexity_in_tau(row, tau, b):
    # "d(tau L)/dtau = H(P) in [0, log N]": by L = l(s/tau) it is L - sum s_j dL/ds_j; and by central differences
    s, p = row
    H = entropy(ref_P(s, p, tau))
    assert -1e-12 <= H <= math.log(len(s)) + 1e-12
    exact = loss(s, p, tau) - math.fsum((v - s[p]) * g for v, g in zip(s, push(s, p, tau))) / tau
    assert abs(exact - H) <= slack(tau) + 2e-12 / tau + 1e-12
    h = 1e-4
    slope = (loss(s, p, tau * (1 + h)) * (1 + h) - loss(s, p, tau * (1 - h)) * (1 - h)) / (2 * h)
    assert abs(slope - H) <= 1e-6 + slack(tau) / h
    # "so tau L is nondecreasing and convex in tau; L itself is convex in 1/tau"
    a, b = sorted((tau, b))
    La, Lb, room = loss(s, p, a), loss(s, p, b), a * slack(a) + b * slack(b)
    middle = (a + b) / 2
    assert a * La <= b * Lb + room
    assert middle * loss(s, p, middle) <= (a * La + b * Lb) / 2 + 2 * room
    assert loss(s, p, 2 / (1 / a + 1 / b)) <= (La + Lb) / 2 + 2 * slack(a)

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
        found, columns = ctl.nearest_negatives(t(s), p_(p), k)
        assert found.shape == columns.shape == (1, min(k, len(s) - 1))
        found, columns, kept = found[0].tolist(), columns[0].tolist(), [s[j] for j in ref_kept(s, p, k)]
        assert p not in columns and len(set(columns)) == len(columns) and found == [s[j] for j in columns]
        assert sorted(found, reverse=True) == kept
        assert abs(loss(s, p, tau, k) - ref_loss([s[p]] + kept, 0, tau)) <= slack(tau) and loss(s, p, tau, k) >= 0
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
def test_16_bits_are_summed_in_32(dtype):
    zeros = torch.zeros(1, 73257, dtype=dtype, requires_grad=True)
    for k, N in ((None, 73257), (4095, 4096)):
        L = ctl.contrastive_loss(zeros, p_(0), 0.1, k)
        assert L.item() == pytest.approx(math.log(N), rel=1e-6)
    L.sum().backward()
    assert zeros.grad[0, 0].item() == pytest.approx(-10 * 4095 / 4096, rel=0.01)
    s, p = random_rows(3, 4, 3000)
    for (name, f), k in itertools.product(ROOM_1.items(), (None, 7)):
        found = f(s.to(dtype), p, 0.07, k)
        assert found.dtype == torch.float32 and torch.equal(found, f(s.to(dtype).float(), p, 0.07, k)), name

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
    within(push(masked, p, 0.5), push(s, p, 0.5) + [0, 0, 0], 1e-12)
    within(penalty(masked, p, 0.5), penalty(s, p, 0.5) + [0, 0, 0], 1e-12)

S, POS = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]), torch.tensor([0, 2])
BAD_TAU = [0, 0.0, -1, -0.1, math.nan, math.inf, -math.inf, 1e-50, True, "0.1", None, 1j, [0.1], torch.tensor([0.1]),
           torch.tensor(0.0), torch.tensor(math.nan), torch.tensor(-1.0)]
BAD_K = [0, -1, 1.5, 1.0, True, False, "1"]
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
def dot(a, b): return math.fsum(x * y for x, y in zip(a, b))
def hyp0f1(b, x): return math.fsum(x ** n / math.prod((b + i) * (i + 1) for i in range(n)) for n in range(60))

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
    # "uniform on the sphere: -2t + log 0F1(; d/2; t²) = -3.93753001 for d = 128, t = 2; d = 3: log((1-e^{-4t})/(4t))",
    # within 5 of "about sqrt(0.2653/(M(M-1)))"
    M = 2000
    expected = -4 + math.log(hyp0f1(64, 4.0))
    assert expected == pytest.approx(-3.93753001, abs=1e-8)
    bank = ctl.MemoryBank(M, 128, generator=seeded(0)).rows  # a random bank is uniform too
    for z in (sphere(M, 128, 1, torch.float32), bank):
        assert abs(ctl.uniformity(z) + expected) <= 5 * math.sqrt(0.2653 / (M * (M - 1)))
    for t_ in (0.5, 2.0):
        E, E2 = ((1 - math.exp(-4 * u)) / (4 * u) for u in (t_, 2 * t_))
        assert -2 * t_ + math.log(hyp0f1(1.5, t_ ** 2)) == pytest.approx(math.log(E), abs=1e-12)
        sd = math.sqrt(2 * (E2 / E ** 2 - 1) / (M * (M - 1)))
        assert abs(ctl.uniformity(sphere(M, 3, 2), t_) + math.log(E)) <= 5 * sd

@given(st.integers(2, 12), st.integers(1, 6), seeds, st.floats(0.1, 5), st.integers(1, 13))
@fewer
@example(259, 4, 0, 2.0, 256)  # the real block, the paper's t
def test_uniformity_is_the_slow_loop_across_blocks(n, d, seed, t_, block):
    # "mean over i<j of exp(-t||.||²), then log"; "the lowest value any M points can have" is the simplex's
    z = sphere(n, d, seed)
    x = z.tolist()
    pairs = [math.exp(-t_ * math.fsum((a - b) ** 2 for a, b in zip(x[i], x[j]))) for i in range(n) for j in range(i)]
    found = ctl.uniformity(z) if n == 259 else in_blocks(block, ctl.uniformity, z, t_)
    assert abs(found + math.log(mean(pairs))) <= 1e-11 and found <= 2 * t_ * n / (n - 1) + 1e-11

@given(st.integers(2, 14), st.integers(1, 6), st.integers(1, 6), seeds)
@fewer
def test_tolerance_and_alignment_are_the_slow_loop(n, d, classes, seed):
    # mean over pairs i < j of one class, all such pairs weighing alike; labels need not be 0, 1, 2, …
    z, other = sphere(n, d, seed), sphere(n, d, seed // 2 + 1)
    y = (torch.randint(classes, (n,), generator=seeded(seed)) * 7 + 1).tolist()
    x = z.tolist()
    pairs = [dot(x[i], x[j]) for i in range(n) for j in range(i) if y[i] == y[j]]
    for found in (ctl.tolerance(z, torch.tensor(y)), ctl.tolerance(torch.cat([z, other[:1]]), torch.tensor(y + [99]))):
        assert abs(found - mean(pairs)) <= 1e-12 if pairs else math.isnan(found)
    distance = [math.fsum((u - v) ** 2 for u, v in zip(a, b)) for a, b in zip(x, other.tolist())]
    assert abs(ctl.alignment(z, other) - mean(distance)) <= 1e-12
    assert ctl.alignment(z, z) == 0 and ctl.alignment(z, -z) == pytest.approx(4, abs=1e-12)

@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 10), st.integers(1, 10), seeds)
@fewer
def test_similarity_profile_is_the_slow_loop(n, m, top, block, seed):
    # the positive's similarity, then the sorted negatives', averaged over anchors; nan where negatives run out
    z, bank = sphere(n, 5, seed), sphere(m, 5, seed // 2 + 1)
    own = torch.randint(m, (n,), generator=seeded(seed))
    found = in_blocks(block, ctl.similarity_profile, z, bank, own, top)
    assert found.shape == (1 + top,) and found.dtype == torch.float64 and found.device.type == "cpu"
    lines = []
    for x, p in zip(z.tolist(), own.tolist()):
        s = [dot(x, b) for b in bank.tolist()]
        lines.append([s[p]] + sorted(s[:p] + s[p + 1:], reverse=True))
    for j, v in enumerate(found.tolist()):
        assert math.isnan(v) if j >= m else abs(v - mean([line[j] for line in lines])) <= 1e-12
    assert len(ctl.similarity_profile(z, bank, own)) == 11  # Fig. 8: "pos", "n1" … "n10"

# ---- kNN

def ref_knn(train, train_y, test, test_y, k=200, temperature=0.07):
    """The vote with weights exp(s/temperature), summed as logarithms: no temperature is too small."""
    right = 0
    for x, y in zip(test.tolist(), test_y.tolist()):
        s, votes = [dot(x, b) for b in train.tolist()], {}
        for j in sorted(range(len(s)), key=lambda j: -s[j])[:k]:
            votes.setdefault(train_y[j].item(), []).append(s[j] / temperature)
        score = {c: max(v) + math.log(math.fsum(math.exp(u - max(v)) for u in v)) for c, v in votes.items()}
        right += max(score, key=score.get) == y
    return 100 * right / len(test)

@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 25), st.sampled_from([1e-4, 0.005, 0.07, 0.5]),
       st.integers(1, 10), seeds)
@fewer
def test_knn_is_the_slow_loop(n, m, k, temperature, block, seed):
    train, test = (sphere(n, 4, seed), torch.arange(n) % 4), (sphere(m, 4, seed // 2 + 1), torch.arange(m) * 3 % 4)
    expected = ref_knn(*train, *test, k, temperature)
    assert in_blocks(block, ctl.knn_accuracy, *train, *test, k, temperature) == pytest.approx(expected, abs=1e-9)

def blobs(n, seed, classes=5, d=16):
    """Vectors around one centre a class, and their classes."""
    y = torch.arange(n) % classes
    noise = 0.35 * torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)
    return F.normalize(sphere(classes, d, 99)[y] + noise, dim=1), y

@pytest.mark.parametrize("temperature", [0.005, 0.001, 1e-4, 1e-300])
def test_knn_at_small_temperatures_is_1_nn(temperature):
    # in float32, where exp(s/T) overflows below T = 1/88 and exp((s - 1)/T) underflows
    (train, train_y), (test, test_y) = blobs(300, 1), blobs(200, 2)
    nearest = 100 * (train_y[(test @ train.T).argmax(dim=1)] == test_y).double().mean().item()
    found = ctl.knn_accuracy(train.float(), train_y, test.float(), test_y, temperature=temperature)
    if temperature == 0.005:
        assert found == ref_knn(train, train_y, test, test_y, temperature=temperature)
    assert 30 < nearest < 95 and abs(found - nearest) <= (3 if temperature == 0.005 else 0)
    assert found < ctl.knn_accuracy(train, train_y, test, test_y) - 3

def test_knn_takes_the_200_nearest_at_temperature_007():
    # Neighbours at a distance that hardly grows: of 199 most are of class 1, of 200 class 0 outweighs, of 201 class 1.
    angle = 1e-4 * torch.arange(1, 301, dtype=torch.float64)
    train, test = torch.stack([angle.cos(), angle.sin()], dim=1), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    train_y = torch.tensor(99 * [0] + 100 * [1] + [0] + 100 * [1])

    def voted(*options):
        return [ctl.knn_accuracy(train, train_y, test, torch.tensor([c]), *options) for c in (0, 1)].index(100)

    assert [voted(), voted(199), voted(200), voted(201)] == [0, 1, 0, 1]
    # One neighbour of class 0 at 1, ten of class 1 at s: both weigh alike where exp((1 - s)/T) = 10.
    for share, winner in ((0.997, 1), (1.003, 0)):
        s = 1 - share * 0.07 * math.log(10)
        train = torch.tensor([[1.0, 0.0]] + 10 * [[s, math.sqrt(1 - s * s)]], dtype=torch.float64)
        train_y = torch.tensor([0] + 10 * [1])
        assert voted() == winner

# ---- linear probe

def probe_loop(views, y, test, test_y, epochs=100, lr=30.0, momentum=0.9, milestones=(40, 60, 80), gamma=0.2,
               batch_size=256, seed=0):
    """SGD by hand on W and b from 0, with the draws that linear_probe documents. Accuracy after every epoch."""
    V, n, d = views.shape
    classes = 1 + int(max(y.max(), test_y.max()))
    W, b = torch.zeros(classes, d, dtype=views.dtype), torch.zeros(classes, dtype=views.dtype)
    mW, mb = torch.zeros_like(W), torch.zeros_like(b)
    g, curve = seeded(seed), []
    for epoch in range(epochs):
        rate = lr * gamma ** sum(epoch >= m for m in milestones)
        order, view = torch.randperm(n, generator=g), torch.randint(V, (n,), generator=g)
        for at, of in zip(order.split(batch_size), view.split(batch_size)):
            h = views[of, at]
            e = (torch.softmax(h @ W.T + b, dim=1) - F.one_hot(y[at], classes)) / len(at)
            mW, mb = momentum * mW + e.T @ h, momentum * mb + e.sum(dim=0)
            W, b = W - rate * mW, b - rate * mb
        curve.append(100 * ((test @ W.T + b).argmax(dim=1) == test_y).double().mean().item())
    return curve

def features(n, d, seed, noise):
    y = torch.randint(4, (n,), generator=seeded(seed))
    return torch.eye(4, d).double()[y] + noise * torch.randn(n, d, generator=seeded(seed), dtype=torch.float64), y

@pytest.mark.parametrize("V", [1, 2, 3])
def test_linear_probe_is_sgd_by_hand_and_takes_the_last_epoch(V):
    (h, y), test, past_best = features(150, 6, 0, 0.5), features(211, 6, 9, 0.5), 0
    views = torch.stack([h.roll(v, dims=1) for v in range(V)])
    for seed in range(4):
        options = dict(epochs=6, lr=3.0, momentum=0.9, milestones=(2, 4), gamma=0.2, batch_size=32, seed=seed)
        curve = probe_loop(views, y, *test, **options)
        torch.rand(1)  # the global generator does not matter
        found = [ctl.linear_probe(views if V > 1 else h, y, *test, **options) for _ in range(2)]
        assert found == pytest.approx(2 * [curve[-1]], abs=1e-9)
        past_best += curve[-1] < max(curve)
    assert past_best  # so that reporting the best epoch would have failed

def test_the_probes_own_settings():
    # paper, section 5.1: 100 epochs, lr 30, times 0.2 at 40, 60, 80; authors' code: momentum 0.9, batch 256
    (h, y), test = features(300, 8, 8, 0.8), features(20_000, 8, 58, 0.8)
    found = ctl.linear_probe(h, y, *test)
    assert found == pytest.approx(probe_loop(h[None], y, *test)[-1], abs=1e-9)
    for other in (dict(epochs=99), dict(epochs=101), dict(lr=29.0), dict(momentum=0.89), dict(momentum=0.91),
                  dict(milestones=(39, 60, 80)), dict(milestones=(40, 61, 80)), dict(milestones=(40, 60, 81)),
                  dict(gamma=0.21), dict(batch_size=255), dict(batch_size=257), dict(seed=1)):
        assert probe_loop(h[None], y, *test, **other)[-1] != pytest.approx(found, abs=1e-9), other

# ---- arguments and callers of every kind

(Z, Y), OTHER = blobs(40, 3, classes=4), sphere(40, 16, 8)
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

def test_labels_that_do_not_fit():
    for name, argument in (("tolerance", "labels"), ("knn", "train_y"), ("knn", "test_y"), ("probe", "train_y"),
                           ("probe", "test_y"), ("profile", "positive")):
        y = METRICS[name][1][argument]
        for wrong in (y.double(), y.int(), y[:-1], torch.cat([y, y[:1]]), y[:, None], y[None], y.tolist(), y - 9, y[:0],
                      None):
            refused(f"{argument} must", metric, name, **{argument: wrong})
    refused("positive must", metric, "profile", positive=torch.arange(1, 41))

def test_vectors_that_do_not_fit():
    for name in ("uniformity", "tolerance", "alignment", "profile", "knn"):
        vectors = [argument for argument, x in METRICS[name][1].items() if x.is_floating_point()]
        for argument in vectors:
            z = METRICS[name][1][argument]
            for bad in (z * 1.01, z * 0.99, z * 0, (10 * z).long(), z[0], z[None]):
                refused(f"{argument} must", metric, name, **{argument: bad})
            for bad in (z * math.nan, z * math.inf):
                refused(f"{argument} must", metric, name, error=ctl.NotFinite, **{argument: bad})
            if len(vectors) == 2:
                narrow = F.normalize(z[:, :5], dim=1)
                refused(f"{' and '.join(vectors)} must have one dim", metric, name, **{argument: narrow})
    refused("z1 and z2 must have one shape", metric, "alignment", z2=Z[:3])
    for wrong in (dict(k=0), dict(k=-1), dict(temperature=0), dict(temperature=-0.07), dict(temperature=math.nan)):
        refused("k must be at least 1 and temperature above 0", metric, "knn", **wrong)
    refused(".*probe", ctl.linear_probe, 1e6 * Z.float(), Y, Z.float(), Y, 3, 1e35, error=ctl.NotFinite)

def test_features_that_do_not_fit():
    for part, h in (("train_h", Z[:25]), ("test_h", Z[25:])):
        for wrong in (h[:, :5], h[:, 0], h[None, None], (9 * h).long(), math.nan * h, h.tolist()):
            refused("", metric, "probe", **{part: wrong})
    refused("", metric, "probe", test_h=Z[None, 25:])

def test_vectors_of_other_precisions():
    close = dict(z=F.normalize(1 + 0.1 * Z, dim=1))
    cases = [(name, converted(given, Tensor.half), converted(converted(given, Tensor.half), Tensor.float), 1e-4)
             for name, given in (("uniformity", close), *((name, METRICS[name][1]) for name in METRICS))]
    for name, argument in (("profile", "z2"), ("knn", "test_z"), ("probe", "test_h"), ("alignment", "z2")):
        cases.append((name, {argument: METRICS[name][1][argument].float()}, {}, 1e-5))
    for name, given, right, rtol in cases:
        try:
            same(metric(name, **given), metric(name, **right), rtol=rtol, atol=1e-6)
        except ValueError as error:
            assert list(given)[0] in str(error)

def life_of_a_bank(init, z):
    bank, index = ctl.MemoryBank(40, 16, init=init), torch.arange(9)
    before = bank.similarity(z)
    bank.update(index, z[:9])
    return torch.cat([before, bank.similarity(z), bank.similarity(bank.rows)])

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", CONTEXTS)
def test_losses_metrics_and_bank_are_the_same_in_any_context(context, dtype):
    # also of tensors that were made there, and of features that carry a graph
    s, p = random_rows(5, 6, 30, dtype)
    calls = [*METRICS.values(), *((lambda x, p, f=f: f(x, p, 0.07, 4), dict(x=s, p=p)) for f in ROOM_1.values())]
    for f, arguments in (*calls, (life_of_a_bank, dict(init=Z, z=OTHER))):
        arguments = converted(arguments, lambda x: x.to(dtype)).values()
        outside = f(*arguments)
        with CONTEXTS[context]():
            inside, made_there = f(*arguments), [x.clone() for x in arguments]
            nested = f(*made_there)
        graph = [x.clone().requires_grad_() * 1 if x.is_floating_point() else x for x in arguments]
        for found in (inside, nested, f(*made_there), f(*graph), f(*graph)):
            same(found, outside)
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

# ---------------------------------------------------------------------------------------------------------------------
# 3 Memory bank

@given(st.integers(1, 9), st.integers(2, 6), st.sampled_from([0.0, 0.25, 0.9, 1.0, None]), st.integers(1, 5), seeds)
@fewer
def test_bank_updates(N, d, momentum, steps, seed):
    # rows stay unit; exactly the given rows move, to normalise(m·row + (1 - m)·z); m = 0.5 if not given
    g = seeded(seed)
    bank = ctl.MemoryBank(N, d, generator=g, **({} if momentum is None else {"momentum": momentum}))
    momentum = 0.5 if momentum is None else momentum
    assert bank.rows.shape == (N, d) and bank.rows.dtype == torch.float32
    for _ in range(steps):
        index = torch.randperm(N, generator=g)[:int(torch.randint(1, N + 1, (1,), generator=g))]
        z = F.normalize(torch.randn(len(index), d, generator=g), dim=1).requires_grad_()
        old, expected = bank.rows.clone(), bank.rows.tolist()
        for i, x in zip(index.tolist(), z.tolist()):
            mixed = [momentum * a + (1 - momentum) * b for a, b in zip(expected[i], x)]
            assume(math.hypot(*mixed) > 0.05)
            expected[i] = [v / math.hypot(*mixed) for v in mixed]
        bank.update(index, z)
        still = torch.ones(N).index_fill(0, index, 0).bool()
        assert torch.equal(bank.rows[still], old[still]) and not bank.rows.requires_grad
        assert (bank.rows - torch.tensor(expected)).abs().max() <= 1e-5
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
    a, b, c = (ctl.MemoryBank(20, 8, generator=seeded(s)).rows for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    for momentum in (-0.1, 1.1, math.nan, math.inf, "0.5", None):
        refused("momentum must", ctl.MemoryBank, 3, 4, momentum)
    for wrong in ("zeros", None, torch.ones(3, 5), torch.ones(12), [[1.0] * 4] * 3, torch.zeros(3, 4),
                  torch.full((3, 4), math.nan), torch.full((3, 4), math.inf)):
        refused("init must", ctl.MemoryBank, 3, 4, init=wrong)

def test_embeddings_that_do_not_fit_the_bank():
    bank = ctl.MemoryBank(6, 4, generator=seeded(0))
    for index, n in ((3, 1), (1, 3), (3, 2)):
        refused("", bank.update, torch.arange(index), sphere(n, 4))
    refused("", bank.similarity, sphere(3, 5))

# ---------------------------------------------------------------------------------------------------------------------
# 4 Network

@pytest.fixture(scope="module")
def full():
    torch.manual_seed(0)
    return ctl.ResNet18()

def test_network_shape_and_init(full):
    assert sum(p.numel() for p in full.parameters()) == 11_234_496
    convolutions = [m for m in full.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20 and sum(c.kernel_size == (1, 1) for c in convolutions) == 3
    assert convolutions[0].kernel_size == (3, 3) and convolutions[0].stride == (1, 1)
    assert not any(isinstance(m, nn.MaxPool2d) for m in full.modules()) and full.in_bfloat16 is False
    for c in convolutions:  # He-normal, fan-out
        std = math.sqrt(2 / (c.out_channels * c.kernel_size[0] ** 2))
        assert abs(c.weight.std().item() / std - 1) < 5 / math.sqrt(2 * c.weight.numel()) + 0.005
        assert abs(c.weight.mean().item()) < 5 * std / math.sqrt(c.weight.numel()) and c.bias is None
    bound = math.sqrt(6 / (512 + 128))  # Xavier-uniform
    assert 0.99 * bound < full.head.weight.abs().max() <= bound and (full.head.bias == 0).all()

@pytest.mark.parametrize("width,dim", [(1, 3), (4, 16), (8, 5)])
def test_network_sizes(width, dim):
    torch.manual_seed(1)
    model, seen = ctl.ResNet18(width, dim), []
    for stage in model.stages:
        stage.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:])))
    x = torch.randn(3, 3, 32, 32)
    h, z = model.features(x), model(x)
    assert h.shape == (3, 8 * width) and z.shape == (3, dim) and h.dtype == z.dtype == torch.float32
    assert seen[:4] == [(width, 32, 32), (2 * width, 16, 16), (4 * width, 8, 8), (8 * width, 4, 4)]
    torch.testing.assert_close(model.project(h), model.head(h))
    torch.testing.assert_close(z, F.normalize(model.head(h), dim=1))
    # A last batch of one image trains too.
    bank = ctl.MemoryBank(9, dim, generator=seeded(0))
    ctl.contrastive_loss(bank.similarity(model(x[:1])), p_(4), 0.1).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())

@pytest.mark.parametrize("training", [False, True])
def test_network_is_torchvisions(full, training):
    theirs = torchvision.models.resnet18(num_classes=128)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    mine = copy.deepcopy(full)
    state, own = theirs.state_dict(), mine.state_dict()
    assert len(state) == len(own)
    theirs.load_state_dict({name: value for name, value in zip(state, own.values())})
    x = torch.randn(2, 3, 32, 32, generator=seeded(1))
    mine.train(training), theirs.train(training)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), F.normalize(theirs(x), dim=1), atol=1e-4, rtol=1e-4)

def test_the_networks_precision_is_its_own():
    # float32 in a caller's autocast; bfloat16 for convolutions and head where it is asked for, and float32 comes out
    torch.manual_seed(0)
    model, x, seen = ctl.ResNet18(4, 6).eval(), torch.randn(2, 3, 16, 16, generator=seeded(1)), []
    for module in (model.stem[0], model.head):
        module.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    plain = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        same(model(x), plain)
    model.in_bfloat16 = True
    low = model(x)
    assert seen == 4 * [torch.float32] + 2 * [torch.bfloat16]
    assert low.dtype == model.features(x).dtype == torch.float32 and 1e-5 < (low - plain).abs().max() < 0.1
    assert ctl.ResNet18(1, 2, True).in_bfloat16 is True

GRADIENTS = """
import sys, torch, ctl
from torch.nn.grad import conv2d_weight
torch.set_num_threads(int(sys.argv[1]))
for width in (1, 2, 4, 7, 8, 12, 16):
    model, _ = ctl.make_model(ctl.make_config("smoke", width=width, dim=8), torch.device("cpu"))
    kept = []
    def watch(m, i, o):
        o.register_hook(lambda g: kept.append((m, i[0], g)))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(watch)
    images = torch.randint(256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    (model(ctl.normalise(images / 255)) * torch.linspace(-1, 1, 16 * 8).reshape(16, 8)).sum().backward()
    assert len(kept) == 20
    for m, x, g in kept:
        x, g = x.detach().double().contiguous(), g.double().contiguous()
        exact = conv2d_weight(x, m.weight.shape, g, m.stride, m.padding)
        terms = conv2d_weight(x.abs(), m.weight.shape, g.abs(), m.stride, m.padding)
        worst = ((m.weight.grad - exact).abs() / terms).max().item()
        assert worst < 1e-5, (width, m, worst)
print("right")
"""

@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX2"])
def test_the_gradient_of_every_convolution(instructions, threads):
    # in a process of its own: where a kernel writes past its workspace, the process crashes, hangs, or goes on with a
    # wrong gradient (uxlfoundation/oneDNN#6035)
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions, "PYTHONPATH": str(Path(ctl.__file__).parent)}
    child = subprocess.run([sys.executable, "-c", GRADIENTS, str(threads)], env=environment, capture_output=True,
                           text=True, timeout=300)
    assert child.returncode == 0 and child.stdout == "right\n", (child.returncode, child.stderr[-2000:])

# ---------------------------------------------------------------------------------------------------------------------
# 5 Data

def test_shapes_are_always_the_same():
    data, small = shapes(), [shapes.__wrapped__(16, 40, 20) for _ in range(2)]
    assert small[0].sha256() == small[1].sha256() and data.name == "shapes"
    assert [x.shape for x in data.tensors()] == [(4000, 3, 32, 32), (4000,), (2000, 3, 32, 32), (2000,)]
    assert [x.dtype for x in data.tensors()] == 2 * [torch.uint8, torch.int64]
    assert [y.bincount().tolist() for y in (data.train_labels, data.test_labels)] == [[400] * 10, [200] * 10]
    every = torch.cat([data.train_images, data.test_images])
    assert len({image.numpy().tobytes() for image in every}) == 6000
    # Each class's contrast, and how fast it changes from pixel to pixel: what the committed records were made on.
    x = data.train_images.view(400, 10, 3, 32, 32).float()
    contrast = [67.565, 59.071, 57.279, 66.969, 57.81, 54.261, 62.522, 61.079, 52.968, 49.776]
    change = [14.291, 21.332, 16.925, 14.904, 22.266, 14.195, 18.108, 17.739, 14.469, 14.226]
    assert x.std((0, 2, 3, 4)).tolist() == pytest.approx(contrast, abs=2e-3)
    assert x.diff().abs().mean((0, 2, 3, 4)).tolist() == pytest.approx(change, abs=2e-3)
    # A sum is of every tensor's shape and values, not of the name.
    tensors = list(small[0].tensors())
    others = [tensors[:i] + [y] + tensors[i + 1:] for i, x in enumerate(tensors) for y in (x.flip(0), x[:, None])]
    assert len({small[0].sha256(), *(ctl.Data("shapes", *other).sha256() for other in others)}) == 9
    assert ctl.Data("another", *tensors).to("cpu").sha256() == small[0].sha256()

def test_shapes_under_another_default_dtype():
    usual = shapes.__wrapped__(16, 40, 20)
    with default_dtype(torch.float64):
        other = shapes.__wrapped__(16, 40, 20)
    assert other.sha256() == usual.sha256()

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

class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, well or in a bad way, and counts what it is asked for."""
    how, asked = "well", []

    def do_GET(self):
        self.asked.append(self.path)
        if self.how == "well":
            return super().do_GET()
        if isinstance(self.how, int):
            return self.send_error(self.how)
        if self.how == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        content = b"<html>Log in</html>" if self.how == "portal" else Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if self.how == "portal" else content[:len(content) // 2])

    def log_message(self, *_):
        pass
def md5(path): return hashlib.md5(path.read_bytes()).hexdigest()

def make_svhn(cls, where, url, monkeypatch):
    """The images and labels that the files hold, as load_dataset should give them."""
    draws, truth, split = np.random.default_rng(0), [], {}
    for part, n in (("train", 30), ("test", 20)):
        x, y = draws.integers(0, 256, (32, 32, 3, n), dtype=np.uint8), (np.arange(n) % 10 + 1).astype(np.uint8)
        file = where / f"{part}_32x32.mat"
        scipy.io.savemat(file, {"X": x, "y": y[:, None]})
        split[part] = [f"{url}/{file.name}", file.name, md5(file)]
        truth += [x.transpose(3, 2, 0, 1), y % 10]
    monkeypatch.setattr(cls, "split_list", split)
    return truth

def make_cifar(cls, where, url, monkeypatch):
    classes, key = (10, "labels") if cls is torchvision.datasets.CIFAR10 else (100, "fine_labels")
    draws, base, truth, lists = np.random.default_rng(0), where / cls.base_folder, [], []
    base.mkdir()
    for files in ([name for name, _ in cls.train_list], [name for name, _ in cls.test_list]):
        x = draws.integers(0, 256, (len(files), 9, 3072), dtype=np.uint8)
        y = draws.integers(0, classes, (len(files), 9))
        for file, pixels, labels in zip(files, x, y):
            (base / file).write_bytes(pickle.dumps({"data": pixels, key: labels.tolist()}))
        lists.append([[file, md5(base / file)] for file in files])
        truth += [x.reshape(-1, 3, 32, 32), y.reshape(-1)]
    meta = base / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: [str(i) for i in range(classes)]}))
    with tarfile.open(where / cls.filename, "w:gz") as tar:
        tar.add(base, cls.base_folder)
    shutil.rmtree(base)
    for attribute, value in dict(url=f"{url}/{cls.filename}", tgz_md5=md5(where / cls.filename), train_list=lists[0],
                                 test_list=lists[1], meta={**cls.meta, "md5": None}).items():
        monkeypatch.setattr(cls, attribute, value)
    return truth

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A small dataset in the real format on a server of our own; torchvision's sums and addresses turned to it."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Server, "how", "well")
    Server.asked.clear()
    where = tmp_path / "server"
    where.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=where)) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}"
        yield lambda name: (make_svhn if name == "svhn" else make_cifar)(ctl.DOWNLOADS[name], where, url, monkeypatch)
        running.shutdown()

@pytest.mark.parametrize("name", ctl.DOWNLOADS)
def test_download(name, server, tmp_path, monkeypatch, capsys):
    truth, root = server(name), tmp_path / "data"
    data = ctl.load_dataset(name, str(root))
    assert capsys.readouterr().out == f"downloading {name} into {root}\n"
    assert data.name == name and [tensor.dtype for tensor in data.tensors()] == [torch.uint8, torch.int64] * 2
    assert all(np.array_equal(found, right) for found, right in zip(data.tensors(), truth))
    refused(f"{name} has images of 32x32", ctl.load_dataset, name, root, 16)
    (tmp_path / "file").write_text("")
    refused("cannot write into ", ctl.load_dataset, name, tmp_path / "file/data", error=ctl.BadInput)
    assert not capsys.readouterr().out
    # There already, in a folder that can only be read: nothing is asked for, written or said.
    Server.asked.clear()
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    for owner, function in ((ctl.filelock, "FileLock"), (tempfile, "TemporaryFile")):
        monkeypatch.setattr(owner, function, lambda *_, **__: pytest.fail("nothing is to be written"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ctl.load_dataset(name, "~/data").sha256() == data.sha256()
    assert not Server.asked and not capsys.readouterr().out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))

@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_broken_downloads(name, server, tmp_path, monkeypatch, capsys):
    server(name)
    root = tmp_path / "data"
    socket.setdefaulttimeout(7)
    for how in (403, 404, 503, "reset", "portal", "short"):
        Server.how = how
        with pytest.raises(ctl.Stop) as stop:
            ctl.load_dataset(name, root)
        message = str(stop.value)
        assert "\n" not in message and name in message and str(root) in message
        assert capsys.readouterr().out == f"downloading {name} into {root}\n" and socket.getdefaulttimeout() == 7
        if how != "reset":
            assert isinstance(stop.value, ctl.BadInput) == isinstance(how, int)
        if stop.value.status == 2:
            assert all(way in message for way in ("--data", "a folder", "--dataset shapes"))
    socket.setdefaulttimeout(None)
    # What lies half there is fetched again, by one of three that ask at once (torchvision asks for each file twice).
    Server.how, files, sums = "well", list((tmp_path / "server").iterdir()), []
    Server.asked.clear()
    for file in files:
        (root / file.name).write_bytes(file.read_bytes()[:99])
    threads = [threading.Thread(target=lambda: sums.append(ctl.load_dataset(name, root).sha256())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(sums) == 3 and len(set(sums)) == 1 and len(Server.asked) == 2 * len(files)

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
    for i, image in enumerate((Image.new("RGB", (100, 50), (10, 200, 30)), Image.new("L", (20, 45), 99),
                               Image.new("RGBA", (32, 32), (1, 2, 3, 128)), picture(wide))):
        image.save(ant / f"{i + 1}.PNG")
    data = ctl.load_dataset(str(root))
    assert data.name == "pets" and data.train_images.shape == (7, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [0, 0, 0, 0, 0, 1, 2] and data.test_labels.tolist() == [1, 2]
    assert torch.equal(data.train_images[0], pixels(Image.open(ant / "0.png")))
    for row, colour in ((1, (10, 200, 30)), (2, (99, 99, 99)), (3, (1, 2, 3)), (4, (255, 255, 255))):
        assert (data.train_images[row] == torch.tensor(colour)[:, None, None]).all(), row
    monkeypatch.setenv("HOME", str(tmp_path))
    smaller = Image.open(ant / "0.png").resize((16, 16), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    assert torch.equal(ctl.load_folder("~/pets", 16).train_images[0], pixels(smaller))
    for name, known in (("cifar10", "cifar10-folder"), ("shapes", "shapes-folder"), ("a|b[c]\té", "a_b_c__é"),
                        ("x" * 101, "x" * 80)):
        root = root.rename(tmp_path / name)
        assert ctl.load_folder(root).name == known
    (tmp_path / "link").symlink_to(root)
    assert ctl.load_folder(tmp_path / "link").name == "x" * 80  # the folder's own name counts

def test_every_kind_of_image(tmp_path):
    root = make_folder(tmp_path / "pets")
    rgb = Image.open(root / "train/a/0.png").convert("RGB")
    for name, image in {"cmyk.jpg": rgb.convert("CMYK"), "palette.png": rgb.quantize(9), "grey.png": rgb.convert("L"),
                        "two.png": rgb.convert("1"), "alpha.png": rgb.convert("LA"), "x.webp": rgb, "x.bmp": rgb,
                        "x.tiff": rgb}.items():
        image.save(root / "train/b" / name)
    right = [pixels(Image.open(path).convert("RGB")) for path in sorted((root / "train/b").iterdir())]
    assert torch.equal(ctl.load_folder(root).train_images[2:], torch.stack(right)) and len(right) == 10
    # EXIF: the sensor's rows and columns are turned as the camera was.
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        rgb.save(root / "test/a/0.png", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(root / "test/a/0.png"))
        assert (upright.tobytes() == rgb.tobytes()) == (orientation == 1)
        assert torch.equal(ctl.load_folder(root).test_images[0], pixels(upright)), orientation

def test_what_is_hidden_or_no_image_is_left_out(tmp_path, capsys):
    root = make_folder(tmp_path / "pets")
    usual = ctl.load_folder(root).sha256()
    for hidden in (".ipynb_checkpoints", "a/.thumbnails", ".hidden/b"):
        shutil.copytree(root / "test/b", root / "train" / hidden)
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

def link(root, *places):
    for place, to in places:
        (root / place).symlink_to(root / to)

def rmtrees(root, *places):
    for place in places:
        shutil.rmtree(root / place)

SPOILT = {
    "no folder of a class in {}/train": shutil.rmtree,
    "no folder of a class in {}/test": lambda root: rmtrees(root, "test"),
    "no folder of a class in {}/train:": lambda root: (rmtrees(root, "train"), (root / "train").mkdir()),
    "no folder of a class .*train": lambda root: (shutil.rmtree(root), root.write_text("")),
    "{}/test/yak.* no class of that name": lambda root: shutil.copytree(root / "test/a", root / "test/yak"),
    "{}/train/aardvark holds no image": lambda root: (root / "train/aardvark").mkdir(),
    "{}/train has one class alone, a": lambda root: rmtrees(root, "train/b", "test/b"),
    ".*{}/test/a/x.png.*8 bits": lambda root: picture(np.full((32, 32), 40_000), np.uint16).save(root / "test/a/x.png"),
    ".*{}/train/a/x.tiff.*8 bits": lambda root: picture(np.ones((32, 32)), np.float32).save(root / "train/a/x.tiff"),
    ".*{}/test/b/1.png": lambda root: (root / "test/b/1.png").write_bytes(b"no png\n"),
    "{}/train/a/up.* read already": lambda root: link(root, ("train/a/up", "train")),
    "{}/train/a/up/tr.* read already": lambda root: link(root, ("train/a/up", ".")),
    "{}/train/b/up.* read already": lambda root: link(root, ("train/b/up", "train/b")),
    "{}/train/c.* read already|{}/train/a .* read already": lambda root: link(root, ("train/c", "train/a")),
    "{}/test/a/up.* read already": lambda root: link(root, ("test/a/up", "test")),
    "{}/train/.*/[xy].* read already": lambda root: link(root, ("train/a/x", "train/b"), ("train/b/y", "train/a"))}

@pytest.mark.parametrize("word", SPOILT)
def test_bad_folder(word, tmp_path):
    root = make_folder(tmp_path / "pets")
    SPOILT[word](root)
    refused(word.replace("{}", str(root)), ctl.load_dataset, str(root), error=ctl.BadInput)

def test_hundreds_of_broken_images(tmp_path):
    # cut off, the head changed, of another kind, of absurd size
    root, tried = make_folder(tmp_path / "pets", each=4), 0
    for path in root.glob("*/*/*.png"):
        whole = path.read_bytes()
        broken = [whole[:size] for size in (0, 1, 8, 16, 33, 40, len(whole) // 2)]
        broken += [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:] for at in (0, 3, 12, 20)]
        broken += [b"\xff\xd8\xff\xe0" + whole[4:], whole[:16] + struct.pack(">II", 2 ** 30, 2 ** 30) + whole[24:]]
        for content in broken:
            path.write_bytes(content)
            refused(f"cannot read the image {path} ", ctl.read_image, path, error=ctl.BadInput)
            tried += 1
    assert tried == 208

# ---- augmentation

def reference(images, a, start=lambda image: image.float() / 255, end=lambda x: x):
    """A loop over torchvision's functions."""
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    size, out = images.shape[-1], []
    for i, image in enumerate(images):
        x = TF.resized_crop(start(image), *a.crop[i].tolist(), [size, size],
                            transforms.InterpolationMode.BILINEAR, antialias=True)
        for operation in a.order[i].tolist():
            x = adjust[operation](x, a.factor[i, operation].item())
        x = TF.hflip(x) if a.flip[i] else x
        out.append(end(TF.rgb_to_grayscale(x, num_output_channels=3) if a.grey[i] else x))
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
    # of the 24 orders of the colour operations
    x, a = some_images(24, size, seed), ctl.draw_augmentation(24, seeded(seed), size)
    for a in (a, dataclasses.replace(a, order=torch.tensor(list(itertools.permutations(range(4)))), grey=~a.grey)):
        found = ctl.augment(x, a)
        assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
        torch.testing.assert_close(found, reference(x, a), atol=1e-5, rtol=0)
        views = ctl.normalise(found)
        right = TF.normalize(found, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
        torch.testing.assert_close(views, right, atol=1e-5, rtol=0)
        assert views.is_contiguous(memory_format=torch.channels_last)

CROPS = torch.tensor([(0, 0, 32, 32), (31, 0, 1, 32), (0, 31, 32, 1), (31, 31, 1, 1), (0, 0, 1, 1), (5, 7, 1, 20),
                      (3, 0, 29, 2), (16, 16, 16, 16)])

@given(seeds)
@few
def test_taps_stay_inside_the_crop(seed):
    # "Clamp the sampling coordinates to the crop's pixel centres, not the image's"
    for crop in (CROPS, ctl.draw_augmentation(8, seeded(seed), 32).crop):
        x, no = some_images(8, 32, seed), torch.zeros(8, dtype=torch.bool)
        a = ctl.Augmentation(crop, no, torch.arange(4).repeat(8, 1), torch.tensor([[1.0, 1, 1, 0]]).repeat(8, 1), no)
        torch.testing.assert_close(ctl.augment(x, a), reference(x, a), atol=1e-5, rtol=0)
        x[:] = 255
        for i, (top, left, height, width) in enumerate(crop.tolist()):
            x[i, :, top:top + height, left:left + width] = 0
        assert (ctl.augment(x, a) == 0).all()

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
    def draw(seed, **more):
        return vars(ctl.draw_augmentation(50, seeded(seed), **more))
    assert not torch.equal(draw(1)["factor"], draw(2)["factor"])
    assert not draw(1, flip=False)["flip"].any() and draw(1)["flip"].any()
    with default_dtype(torch.float64):
        again = draw(1)
    for key, value in draw(1).items():
        assert torch.equal(value, again[key]) and value.dtype == again[key].dtype
        assert key == "flip" or torch.equal(value, draw(1, flip=False)[key])

def test_only_uint8_images_are_taken():
    x, a, model = some_images(5, 16, 0), ctl.draw_augmentation(5, seeded(0), 16), ctl.ResNet18(1, 2)
    for wrong in (x / 255, x.float(), x.long(), x.bool(), x[0], x[:, :1], x.permute(0, 2, 3, 1), None):
        refused("images must be uint8", ctl.augment, wrong, a)
        refused("images must be uint8", ctl.embed, model, wrong)

@pytest.mark.parametrize("context", CONTEXTS)
def test_augmentation_is_the_same_in_any_context(context):
    x, a = some_images(70, 16, 0), ctl.draw_augmentation(70, seeded(0), 16)
    outside = ctl.normalise(ctl.augment(x, a))
    with CONTEXTS[context]():
        inside = ctl.normalise(ctl.augment(x, a))
    same(inside, outside)

def test_only_cuda_copies_without_waiting(monkeypatch):
    # On MPS such a copy may read memory that was freed meanwhile (pytorch#139550).
    asked = []
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking=False: asked.append((device, non_blocking)))
    for device in ("cpu", "cuda", "cuda:1", "mps"):
        ctl.to_device(Y, device)
    assert asked == [("cpu", False), ("cuda", True), ("cuda:1", True), ("mps", False)]

# ---------------------------------------------------------------------------------------------------------------------
# All rooms

def test_no_argument_is_changed_in_place():
    images, own, s = some_images(6, 16, 0), torch.arange(6), random_rows(5, 6, 40, torch.float32)
    model, bank, drawn = ctl.ResNet18(1, 16).eval(), ctl.MemoryBank(40, 16), ctl.draw_augmentation(6, seeded(0), 16)
    z = Z.float()
    calls = [(f, (*s, 0.07, k)) for f in ROOM_1.values() for k in (None, 4)]
    calls += [(f, tuple(given.values())) for f, arguments in METRICS.values() for given in (
        arguments, converted(arguments, Tensor.float))]
    calls += [(ctl.contrastive_loss, (*s, torch.tensor(0.1))), (ctl.nearest_negatives, (*s, 4)),
              (ctl.MemoryBank, (40, 16, 0.5, z)), (ctl.MemoryBank, (40, 16, 0.5, 3 * z)), (bank.similarity, (z,)),
              (bank.update, (own, z[:6])), (ctl.augment, (images, drawn)), (ctl.normalise, (images / 255,)),
              (ctl.balanced_order, (Y,)), (model, (images / 255,)), (model.features, (images / 255,)),
              (ctl.embed, (model, images)), (ctl.embed, (model, images, lambda x: ctl.augment(x, drawn))),
              (ctl.Data("x", images, own, images, own).sha256, ())]
    for f, arguments in calls:
        tensors = [x for x in arguments if isinstance(x, Tensor)] + [images, own, *vars(drawn).values()]
        tensors += [*model.state_dict().values()] + ([] if f == bank.update else [bank.rows])
        before = [(x.clone(), x._version) for x in tensors]
        f(*arguments)
        assert all(torch.equal(x, old) and x._version == version for x, (old, version) in zip(tensors, before)), f

def test_examples_in_docstrings():
    failed, tried = doctest.testmod(ctl)
    assert failed == 0 and tried >= 2


@pytest.fixture
def cli(capsys):
    def run(*argv):
        capsys.readouterr()
        status = ctl.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return status, out, err
    return run


# ------------------------------------------------------------------------------------------- helpers of rooms 6 and 7

SMOKE = ["--preset", "smoke", "--tau", "0.3", "--threads", "1"]  # 3 epochs of 7 steps
SHORT = ["--preset", "smoke", "--epochs", "1", "--threads", "1"]
CELL = "smoke/shapes/contrastive_tau0.3_seed0"
CHECKPOINT = Path("runs", f"{CELL}.pt")
TRAIN_STEP = ctl.train_step


def record_of(folder="."):
    found = list(Path(folder, "results").rglob("*.json"))
    assert len(found) == 1, found
    return json.loads(found[0].read_text())


def outside(record):
    """All of a record but the clock and the machine."""
    return {k: v for k, v in record.items() if k not in ("timing", "environment")}


def complaint(err):
    """The one line that may stand on standard error."""
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("ctl.py: ") and "Traceback" not in err, err
    return err


def stop_at(monkeypatch, *when):
    """Interrupt step number `when` (from 1, counted over the calls)."""
    def step(*args, count=itertools.count(1)):
        if next(count) in when:
            raise KeyboardInterrupt
        return TRAIN_STEP(*args)
    monkeypatch.setattr(ctl, "train_step", step)


def spy(monkeypatch, name, instead=None):
    """Every call of ctl.<name> is kept: its arguments by name, and what it returned."""
    function, calls = getattr(ctl, name), []

    def spying(*args, **kwargs):
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(types.SimpleNamespace(**bound.arguments, returned=(instead or function)(*args, **kwargs)))
        return calls[-1].returned
    monkeypatch.setattr(ctl, name, spying)
    return calls


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder in which the smoke run was made in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ctl, "load_shapes", shapes)
        assert ctl.main([*SMOKE, "--results", str(folder / "results"), "--runs", str(folder / "runs")]) == 0
    return folder


# ------------------------------------------------------------------------------- the protocol once more, step by step

WIRED = {  # which function of room 1 each loss is, and what it is given
    "contrastive": lambda s, p, c: ctl.contrastive_loss(s, p, c.tau),
    "hard": lambda s, p, c: ctl.contrastive_loss(s, p, c.tau, c.k),
    "simple": lambda s, p, c: ctl.simple_loss(s, p),
    "hard-simple": lambda s, p, c: ctl.simple_loss(s, p, c.k),
    "triplet": lambda s, p, c: ctl.triplet_loss(s, p)}


def plain_network(c):
    torch.manual_seed(ctl.generator(c.seed, "network").initial_seed())
    return ctl.ResNet18(c.width, c.dim, c.precision == "bfloat16").to(memory_format=torch.channels_last)


def plain_views(c, images, *key, flip=None):
    drawn = ctl.draw_augmentation(len(images), ctl.generator(c.seed, *key), c.size, c.flip if flip is None else flip)
    return ctl.normalise(ctl.augment(images, drawn))


def plain_rate(c, at):
    rise = min(at / c.warmup, 1) if c.warmup else 1
    if c.schedule == "step":
        return c.lr * rise * math.prod(c.gamma for m in c.milestones if m <= at)
    return c.lr * rise * 0.5 * (1 + math.cos(math.pi * at / c.epochs))


def plain_run(c):
    """Section 5.1 once more: each draw's key, a step's rate, an epoch's mean loss. Returns what `trained` reads."""
    data, before = shapes(c.size), torch.get_rng_state()
    n, m = ctl.balanced_order(data.train_labels)[:c.subset], ctl.balanced_order(data.test_labels)[:c.test_subset]
    data = ctl.Data("shapes", data.train_images[n], data.train_labels[n], data.test_images[m], data.test_labels[m])
    model, N = plain_network(c), c.subset
    if c.bank_init == "embeddings":
        with torch.no_grad():
            outputs = torch.cat([model.project(model.features(plain_views(c, part, "centre", i)))
                                 for i, part in enumerate(data.train_images.split(c.batch_size))])
            model.head.bias.copy_(-outputs.mean(dim=0))
        bank = F.normalize(outputs - outputs.mean(dim=0), dim=1)
    else:
        bank = F.normalize(torch.randn(N, c.dim, generator=ctl.generator(c.seed, "bank")), dim=1)
    untrained, history = ctl.evaluate(model, data, c), []
    optimiser = torch.optim.SGD(model.parameters(), 9.0, c.momentum, weight_decay=c.weight_decay, fused=True)
    for epoch in range(c.epochs):
        order, losses = torch.randperm(N, generator=ctl.generator(c.seed, "order", epoch)), []
        parts = order.split(c.batch_size)
        for i, index in enumerate(parts):
            z = model(plain_views(c, data.train_images[index], "views", epoch, i))
            loss = (c.tau if c.match_step else 1.0) * WIRED[c.loss](z @ bank.T, index, c).mean()
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.param_groups[0]["lr"] = plain_rate(c, epoch + i / len(parts))
            optimiser.step()
            bank[index] = F.normalize(c.bank_momentum * bank[index] + (1 - c.bank_momentum) * z.detach(), dim=1)
        history.append({"epoch": epoch + 1, "loss": sum(losses) / len(losses), "lr": plain_rate(c, epoch)})
        if c.eval_every and (epoch + 1) % c.eval_every == 0 and epoch + 1 < c.epochs:
            history[-1] |= ctl.look(model, data)
    torch.set_rng_state(before)
    return dict(history=history, untrained=untrained, weights=model.state_dict(), bank=bank, counts=[len(n), len(m)],
                final=lambda saved: ctl.evaluate(saved, data, c))


def trained(c):
    """The same, of a run of ctl.py that is done; and its network."""
    record, saved = ctl.train(c), ctl.load_checkpoint(next(Path("runs").rglob("*.pt")))
    model = ctl.ResNet18(c.width, c.dim, c.precision == "bfloat16").to(memory_format=torch.channels_last)
    model.load_state_dict(saved["model"])
    untrained = record["final"].pop("untrained")
    return dict(history=record["history"], untrained=untrained, weights=saved["model"], bank=saved["bank"],
                final=record["final"], counts=[record["data"]["train"], record["data"]["test"]]), model


def near(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=2e-3, atol=2e-4)
    return a == pytest.approx(b, rel=2e-3, abs=2e-4)


# ------------------------------------------------------------------------------------------------ the losses, wired

TINY = dict(preset="smoke", tau=0.3, size=16, width=2, dim=8, subset=40, test_subset=30, batch_size=20, epochs=2,
            eval_every=1, threads=1)
LOSSES = {"contrastive": dict(tau=0.1), "hard": dict(tau=0.2, k=3), "simple": {}, "hard-simple": dict(k=3),
          "triplet": {}}


def tiny(**more):
    """A run of four steps; a loss without temperature takes none."""
    given = {**TINY, **more}
    if "tau" not in LOSSES[given.get("loss", "hard")]:
        del given["tau"]
    return ctl.make_config(**given)


@pytest.mark.parametrize("loss", ctl.LOSSES)
def test_training_loss_is_the_formula_that_the_config_names(loss):
    s, p = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 0])
    for tau, k, match_step in itertools.product((0.1, 0.5), (1, 2), (False, True)):
        given = dict(tau=tau, k=k) | (dict(match_step=match_step) if "tau" in LOSSES[loss] else {})
        c = tiny(loss=loss, **{name: given[name] for name in given if name in LOSSES[loss] or name == "match_step"})
        for row, own, value in zip(s.tolist(), p.tolist(), ctl.training_loss(c, s, p).tolist(), strict=True):
            others = sorted(row[:own] + row[own + 1:], reverse=True)[:k if "k" in LOSSES[loss] else None]
            d = [0.0] + [other - row[own] for other in others]
            if "tau" in LOSSES[loss]:
                wanted = math.log(sum(math.exp(x / tau) for x in d)) * (tau if match_step else 1)
            else:
                wanted = max(d) if loss == "triplet" else sum(d) / len(d)
            assert value == pytest.approx(wanted, rel=1e-9)


# ---------------------------------------------------------------------------------- every setting reaches what it sets

STEP = dict(schedule="step", milestones=(1, 2), epochs=3)
CHANGES = [  # what is changed, and beside what
    (dict(loss="hard"), {}), (dict(loss="simple"), {}), (dict(loss="hard-simple"), {}), (dict(loss="triplet"), {}),
    (dict(tau=0.1), {}), (dict(seed=1), {}), (dict(epochs=3), {}), (dict(batch_size=16), {}), (dict(size=32), {}),
    (dict(width=3), {}), (dict(dim=5), {}), (dict(lr=0.1), {}), (dict(momentum=0.1), {}), (dict(weight_decay=0.5), {}),
    (dict(schedule="step"), {}), (dict(milestones=(1,)), dict(schedule="step")), (dict(gamma=0.5), STEP),
    (dict(warmup=0.0), {}), (dict(bank_momentum=0.9), {}), (dict(bank_init="random"), {}),
    (dict(k=3), dict(loss="hard")), (dict(subset=30), {}), (dict(test_subset=20), {}), (dict(flip=False), {}),
    (dict(match_step=True), {}), (dict(precision="bfloat16"), {}), (dict(probe_lr=30.0), {}), (dict(eval_every=2), {})]


@pytest.mark.parametrize("change,beside", CHANGES, ids=["-".join(map(str, *change.items())) for change, _ in CHANGES])
def test_each_setting_reaches_what_it_sets(change, beside, cli, monkeypatch):
    """From the command line: record and checkpoint hold what section 5.1 gives with that setting, and not what it gives
    with the usual one; the record's name says so."""
    changed, usual = tiny(**{**beside, **change}), tiny(**beside)
    given, argv = spy(monkeypatch, "train"), ["--threads", "1"]
    for name, value in {**TINY, **beside, **change}.items():
        flag, values = name.replace("_", "-"), value if isinstance(value, tuple) else [value]
        if isinstance(value, bool):
            argv += [f"--{flag}" if value else f"--no-{flag}"]
        elif getattr(changed, name) is not None:
            argv += [f"--{flag}", *map(str, values)]
    status, out, err = cli(*argv)
    assert status == 0 and err == "" and given[0].config == changed
    got, model = trained(changed)
    wanted, other = ({**run, "final": run["final"](model)} for run in map(plain_run, (changed, usual)))
    assert near(wanted, got) and not near(other, got)
    path = str(ctl.cell_path(changed, "shapes"))
    assert Path("results", f"{path}.json").exists() and path != str(ctl.cell_path(usual, "shapes"))
    assert path.endswith(f"_seed{changed.seed}") and path.startswith(f"smoke/shapes/{changed.loss}_")
    for key in ("accuracy", "knn", "uniformity", "tolerance", "alignment"):
        line = next(line.split() for line in out.splitlines() if line.startswith(f"{key:12}"))
        assert [float(line[1]), float(line[3])] == pytest.approx([got["final"][key], got["untrained"][key]], abs=6e-3)


# What each preset gives to each setting: `paper` as PAPER.md, section 2, and the authors' code have it.
ALL = dict(momentum=0.9, weight_decay=5e-4, milestones=(160, 190), gamma=0.1, bank_momentum=0.5, flip=True,
           match_step=False, precision="auto", tau=0.3, seed=0, loss="hard")
VALUES = """
dataset         cifar10      cifar10     cifar10     shapes      shapes
epochs          200          40          60          160         3
batch_size      128          128         64          16          16
size            32           32          32          24          32
width           64           16          16          8           4
dim             128          128         128         128         16
lr              0.03         0.1         0.1         0.01        0.03
schedule        step         cosine      cosine      cosine      cosine
warmup          0.0          3.0         3.0         3.0         1.0
bank_init       random       embeddings  embeddings  embeddings  embeddings
k               4095         4095        409         200         8
subset          None         None        5000        500         100
test_subset     None         None        None        1000        100
probe_lr        30.0         0.3         0.3         0.3         0.3
eval_every      10           10          10          0           2
"""


def test_what_the_presets_are():
    rows = [line.split() for line in VALUES.strip().splitlines()]
    assert list(ctl.PRESETS) == ["paper", "narrow", "mini", "quick", "smoke"] and ctl.make_config() == ctl.Config()
    for column, preset in enumerate(ctl.PRESETS, 1):
        wanted = {row[0]: eval(row[column]) if row[column][0] in "0123456789N" else row[column] for row in rows}
        assert ctl.make_config(preset, loss="hard").study() == {**wanted, **ALL, "preset": preset}
        for loss in ctl.LOSSES:
            c, row = ctl.make_config(preset, loss=loss), LOSSES[loss]
            assert (c.tau, c.k) == (0.3 if "tau" in row else None, wanted["k"] if "k" in row else None)


def test_make_config():
    study = {field.name for field in dataclasses.fields(ctl.Config) if field.metadata["study"]}
    # No setting and no loss is left out above.
    assert {next(iter(change)) for change, _ in CHANGES} == study - {"dataset", "preset"}
    assert tuple(ctl.LOSSES) == tuple(LOSSES) == tuple(WIRED)
    assert ctl.make_config("smoke", schedule="step", milestones=[1, 2]).milestones == (1, 2)
    assert ctl.make_config("mini", loss="hard", k=7).k == 7 and type(ctl.make_config("smoke", tau=1).tau) is float
    for wrong in (dict(tau="0.3"), dict(tau=True), dict(epochs=2.0), dict(flip=1), dict(loss=None), dict(loss="new"),
                  dict(milestones=(3, 3), schedule="step"), dict(milestones=("3",), schedule="step"), dict(lr=None),
                  dict(preset="big")):
        with pytest.raises(ctl.BadInput, match=next(iter(wrong))):
            ctl.make_config(**{"preset": "smoke", **wrong})
    c = ctl.make_config("smoke")
    c.loss = "new"  # past the checks: an error too, not the ordinary loss
    with pytest.raises(KeyError):
        ctl.training_loss(c, torch.zeros(1, 2), torch.tensor([0]))


def test_without_a_preset_the_machine_decides(monkeypatch, capsys):
    for device, preset in (("cuda", "paper"), ("mps", "mini"), ("cpu", "mini")):
        monkeypatch.setattr(ctl, "pick_device", lambda name: torch.device(device))
        assert ctl.settle(dict(tau=0.1)) == ctl.make_config(preset, tau=0.1)
        assert f"no preset given: {preset}" in capsys.readouterr().out
    assert ctl.settle(dict(preset="quick")).preset == "quick" and capsys.readouterr().out == ""


def test_pick_device_and_precision(monkeypatch):
    for name in ("cuda:99", "tpu9", "", "meta"):
        with pytest.raises(ctl.BadInput, match=f"device '{name}' can't be used: "):
            ctl.pick_device(name)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.empty(0))  # it works, whatever it is
    for cuda, mps, wanted in ((True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or mps)
        assert ctl.pick_device("auto").type == wanted and ctl.pick_device("cpu") == CPU
        for precision, gpu, cpu in (("auto", mps, False), ("float32", False, False), ("bfloat16", True, True)):
            c = ctl.make_config("smoke", precision=precision)
            assert (ctl.in_bfloat16(c, torch.device("cuda")), ctl.in_bfloat16(c, CPU)) == (gpu, cpu)


def test_take_subset():
    images, labels, others = torch.arange(90, dtype=torch.uint8), torch.arange(90) % 3, (torch.arange(90) * 7 + 2) % 3
    data = ctl.Data("mine", images, labels, images, others)
    for more, n, m in ((dict(subset=30, test_subset=12), 30, 12), (dict(subset=30, seed=1), 30, 90), ({}, 90, 90)):
        taken = ctl.take_subset(data, ctl.make_config("mini", **more))  # a preset's own number means: at most
        train, test = ctl.balanced_order(labels)[:n], ctl.balanced_order(others)[:m]
        for got, wanted in zip(taken.tensors(), (images[train], labels[train], images[test], others[test])):
            assert torch.equal(got, wanted)
    for given in (dict(subset=91), dict(test_subset=91)):
        with pytest.raises(ctl.BadInput, match=f"^{next(iter(given))} 91 is more than the 90 images that mine has"):
            ctl.take_subset(data, ctl.make_config("mini", **given))


# ------------------------------------------------------------------------------------------------ keys of randomness


def draws_of(c, monkeypatch):
    """All that a run of two epochs of two steps draws, by name; and the keys that it asks for."""
    shutil.rmtree("runs", ignore_errors=True)
    shutil.rmtree("results", ignore_errors=True)
    with monkeypatch.context() as m:
        generators, steps, augmentations, probes = (spy(m, name) for name in (
            "generator", "train_step", "draw_augmentation", "linear_probe"))
        ctl.train(c)
    assert {call.seed for call in probes} == {c.seed} and len(probes) == 4
    names = ["centre 0", "centre 1", "view 1", "view 2", "views 0 0", "views 0 1", "views 1 0", "views 1 1", "again 1",
             "again 2"]
    draws = {name: call.returned.factor for name, call in zip(names, augmentations, strict=True)}
    for name in ("1", "2"):  # evaluation sees the same views before and after training
        assert torch.equal(draws[f"view {name}"], draws.pop(f"again {name}"))
    draws |= {f"order {epoch}": torch.cat([call.index for call in steps[2 * epoch:2 * epoch + 2]]) for epoch in (0, 1)}
    start = ctl.start(dataclasses.replace(c, bank_init="random"), ctl.take_subset(shapes(16), c), CPU, Path("none"), {})
    draws |= {"network": start.model.stages[0][0].conv1.weight, "bank": start.bank.rows}
    return draws, {call.key for call in generators}


def test_each_draw_depends_on_its_key_and_on_nothing_else(monkeypatch):
    """Network, bank, centre, order, views, evaluation's views, probe: on the seed, the epoch and the step."""
    digest = hashlib.sha256(b"(0, 'views', 0, 1)").digest()
    assert ctl.generator(0, "views", 0, 1).initial_seed() % 2 ** 64 == int.from_bytes(digest[:8], "big")
    draws, keys = draws_of(tiny(), monkeypatch)
    steps = {(epoch, batch) for epoch in (0, 1) for batch in (0, 1)}
    assert keys == {(0, "network"), (0, "bank"), (0, "centre", 0), (0, "centre", 1), (0, "order", 0), (0, "order", 1),
                    (0, "view 1"), (0, "view 2")} | {(0, "views", *step) for step in steps}
    other_seed, _ = draws_of(tiny(seed=1), monkeypatch)
    everything = [tuple(value.flatten().tolist()) for draws_ in (draws, other_seed) for value in draws_.values()]
    assert len(set(everything)) == len(everything) == 24  # no two are alike
    for name in ("order 0", "order 1"):
        assert sorted(draws[name].tolist()) == list(range(40))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for more in (dict(tau=0.07, lr=0.1, warmup=0.0), dict(loss="simple", momentum=0.0, probe_lr=1.0, flip=False)):
        same, _ = draws_of(tiny(**more), monkeypatch)
        assert all(torch.equal(draws[name], same[name]) for name in draws)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's draws change


# ------------------------------------------------------------------------------------- which tensors the metrics are of


@pytest.mark.parametrize("training", [True, False])
def test_which_tensors_each_metric_is_of(training, monkeypatch):
    """Every metric of `evaluate`, and so of `look`, is spied on, and returns a number of its own."""
    data, c, calls, numbers = shapes(16), tiny(seed=3, probe_lr=0.7), {}, itertools.count(1000)
    train_y, test_y, profile = (torch.arange(41) * 7) % 5, torch.arange(23) % 4, torch.arange(11.0, dtype=torch.float64)
    data = ctl.Data("mine", data.train_images[:41], train_y, data.test_images[:23], test_y)
    model, _ = ctl.make_model(c, CPU)
    model(ctl.normalise(data.train_images / 255))  # its running means are not those of the start
    state, judge = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval()

    def of(views):
        with torch.no_grad():
            h = judge.features(views)
            return h, F.normalize(judge.project(h), dim=1)
    (train_h, train_z), (mirror_h, _), (test_h, test_z) = (of(ctl.normalise(images / 255)) for images in (
        data.train_images, data.train_images.flip(3), data.test_images))
    view_1, view_2 = (of(plain_views(c, data.test_images, name, flip=True))[1] for name in ("view 1", "view 2"))
    order, h = ctl.balanced_order(train_y, 1), torch.stack([train_h, mirror_h])
    held, kept = order[:8], order[8:]  # a fifth of 41
    for name in ("knn_accuracy", "uniformity", "tolerance", "alignment", "similarity_profile", "linear_probe"):
        answer = lambda *_, name=name, **__: profile if "profile" in name else next(numbers)
        calls[name] = spy(monkeypatch, name, answer)
    got = ctl.evaluate(model.train(training), data, c)
    assert model.training == training  # in evaluation mode, and put back
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    probe = dict(epochs=100, lr=0.7, momentum=0.9, milestones=(40, 60, 80), gamma=0.2, batch_size=256, seed=3)
    wanted = {
        "knn": ("knn_accuracy", dict(train_z=train_z, train_y=train_y, test_z=test_z, test_y=test_y, k=200,
                                     temperature=0.07)),
        "uniformity": ("uniformity", dict(z=test_z, t=2.0)),
        "tolerance": ("tolerance", dict(z=test_z, labels=test_y)),
        "alignment": ("alignment", dict(z1=view_1, z2=view_2)),
        "profile": ("similarity_profile", dict(z=test_z, z2=view_1, positive=torch.arange(23), top=10)),
        "accuracy": ("linear_probe", dict(probe, train_h=h, train_y=train_y, test_h=test_h, test_y=test_y)),
        "accuracy_heldout": ("linear_probe", dict(probe, train_h=h[:, kept], train_y=train_y[kept],
                                                  test_h=train_h[held], test_y=train_y[held]))}
    assert got.keys() == wanted.keys() and all(len(calls[name]) == 1 + ("probe" in name) for name in calls)
    for key, (name, arguments) in wanted.items():
        call = vars(calls[name][key == "accuracy_heldout"])
        assert got[key] == (profile.tolist() if key == "profile" else call["returned"])
        assert call.keys() == {"returned", *arguments}
        for name, value in arguments.items():
            assert torch.equal(call[name], value) if torch.is_tensor(value) else call[name] == value, (key, name)


def test_embed_in_parts_of_views():
    images, parts, model = shapes(16).test_images[:300], [], ctl.make_model(tiny(), CPU)[0]
    h, z = ctl.embed(model, images, lambda x: parts.append(x) or x.float() / 510)
    with torch.no_grad():
        wanted = model.eval().features(ctl.normalise(images / 510))
        torch.testing.assert_close((h, z), (wanted, F.normalize(model.project(wanted), dim=1)))
    assert torch.equal(torch.cat(parts), images) and not z.requires_grad and z.shape == (300, 8)


# ------------------------------------------------------------------------------------------------------- whole runs


def test_record(undisturbed, monkeypatch):
    text = (undisturbed / "results" / f"{CELL}.json").read_text()
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
    assert saved.keys() == {"protocol_version", "config", "data", "model", "optimiser", "bank", "untrained", "step",
                            "losses", "history", "seconds", "evaluation"}
    assert 0 < saved["seconds"] < r["timing"]["seconds"] and r["timing"].keys() == {"seconds"}


def test_same_command_elsewhere_gives_the_same(undisturbed, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(ctl, "evaluate", lambda *given, real=ctl.evaluate: print("<evaluates>") or real(*given))
    torch.manual_seed(99)  # nothing depends on the global generator
    torch.set_default_dtype(torch.float64)  # nor on the caller's own dtype
    status, out, err = cli(*SMOKE)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert dtype == torch.float64
    assert status == 0 and err == "" and "record: results/" in out
    assert "evaluating the untrained network\n<evaluates>\n" in out
    assert re.search(r"\ntrained; evaluating, about [0-9]+ s\n<evaluates>\n", out)
    assert outside(record_of(tmp_path)) == outside(record_of(undisturbed))
    before = (tmp_path / "results" / f"{CELL}.json").read_bytes()
    status, out, _ = cli(*SMOKE)
    assert status == 0 and "already" in out and (tmp_path / "results" / f"{CELL}.json").read_bytes() == before
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")} == {"results", "runs"}
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_a_users_home(cli, tmp_path, monkeypatch):
    """A ~ that no shell has expanded; and a folder of images, whose path is no part of the record."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in itertools.starmap(Path, itertools.product(["home/pets"], ["train", "test"], ["cat", "dog"], "abcdef")):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (ord(path.name) * 9 % 256, ord(path.parts[3][0]), 99)).save(f"{path}.png")
    status, _, err = cli(*SHORT, "--dataset", "~/pets", "--subset", "12", "--test-subset", "12", "--batch-size", "4",
                         "--results", "~/r", "--runs", "~/u")
    assert status == 0, err
    (path,) = Path("home/r").rglob("*.json")
    assert path.parts[:4] == ("home", "r", "smoke", "pets") and list(Path("home/u").rglob("*.pt"))
    assert os.listdir() == ["home"]
    assert json.loads(path.read_text())["config"]["dataset"] == "pets" and str(tmp_path) not in path.read_text()
    loads = spy(monkeypatch, "load_dataset", lambda *_: shapes(32))
    assert cli(*SHORT, "--data", "~/d")[0] == 0
    assert (loads[0].dataset, loads[0].root, loads[0].size) == ("shapes", str(tmp_path / "home" / "d"), 32)


def test_cell_paths_differ():
    path = lambda **given: str(ctl.cell_path(ctl.make_config("smoke", **given), "shapes"))
    assert path(tau=0.3) == "smoke/shapes/contrastive_tau0.3_seed0" == path()
    assert path(tau=1) == "smoke/shapes/contrastive_tau1.0_seed0"
    assert path(loss="simple", seed=3) == "smoke/shapes/simple_seed3"
    assert path(loss="hard", k=7, lr=0.1) == "smoke/shapes/hard_tau0.3_lr-0.1_k-7_seed0"
    step = "smoke/shapes/contrastive_tau0.3_schedule-step_milestones-1-2_seed0"
    assert path(schedule="step", milestones=(1, 2)) == step
    assert path(device="cpu", threads=2, data="x", results="y", runs="z", force=True) == path()
    with pytest.raises(ctl.BadInput, match="too many settings"):
        path(**dict.fromkeys(("lr", "momentum", "weight_decay", "warmup", "bank_momentum", "probe_lr"), 1 / 7 ** 9))


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


def test_the_papers_numbers():
    rows = [line.split() for line in TABLE_1.strip().splitlines()]
    assert list(ctl.PAPER) == ["cifar10", "cifar100", "svhn"]
    assert ctl.TABULATED == ("accuracy", "uniformity", "tolerance")
    assert ctl.CELLS == tuple((loss, eval(tau)) for loss, tau, *_ in rows)
    for i, dataset in enumerate(ctl.PAPER):
        values = [tuple(map(float, row[2 + 3 * i:5 + 3 * i])) for row in rows]
        assert ctl.PAPER[dataset] == dict(zip(ctl.CELLS, values))
    taus = (0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9)
    assert ctl.PAPER_ACCURACY == {
        "cifar10": dict(zip(taus, (76.10, 81.82, 83.78, 83.22, 82.54, 82.97, 82.67, 81.97))),
        "cifar100": dict(zip(taus, (49.80, 52.46, 56.05, 55.47, 54.17, 53.05, 50.08)))}


def test_the_result_stands_beside_the_papers(capsys):
    none = (None, None, None)
    for cell, wanted in ((("cifar10-jpeg", "hard", 0.3), (83.63, 3.89, 0.0267)), (("cifar10", "triplet", None), none),
                         (("cifar10", "contrastive", 0.2), (83.78, None, None)), (("shapes", "simple", None), none)):
        assert tuple(ctl.paper_values(*cell).values()) == wanted
    path = HOME / "results/mini/cifar10-jpeg/contrastive_tau0.3_seed0.json"
    ctl.show(ctl.read_record(path), path)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert [lines[key][2] for key in ("accuracy", "knn", "uniformity", "tolerance")] == ["83.27", "-", "3.6", "0.178"]
    assert "all images, 200 epochs" in " ".join(lines["preset"]) and lines["record:"][1] == str(path)


def test_a_committed_record_is_what_the_code_gives(undisturbed):
    """A change of results can't pass unseen: on the kind of CPU that made the record to the last digit."""
    committed, ours = ctl.read_record(HOME / "results" / f"{CELL}.json"), record_of(undisturbed)
    assert ours["config"] == committed["config"] and ours["protocol_version"] == committed["protocol_version"]
    kind = ("cpu", "ONEDNN_MAX_CPU_ISA", "device", "threads", "torch")
    if all(ours["environment"][key] == committed["environment"][key] for key in kind):
        for key in ("history", "final", "data"):
            assert ours[key] == committed[key]
    # Another CPU rounds otherwise, and steps blow that up: after five, losses differ by per cents. What comes before
    # the first step does not; nor, much, the mean loss of the first epoch, whose rate rises from 0.
    before, other = ours["final"]["untrained"], committed["final"]["untrained"]
    for key in ("uniformity", "tolerance", "alignment", "profile"):
        assert before[key] == pytest.approx(other[key], rel=1e-5), key
    for key in ("accuracy", "accuracy_heldout", "knn"):
        assert before[key] == pytest.approx(other[key], abs=5.01), key  # an image of 20, a border case
    assert ours["history"][0]["loss"] == pytest.approx(committed["history"][0]["loss"], rel=0.02)
    assert [entry.keys() for entry in ours["history"]] == [entry.keys() for entry in committed["history"]]
    assert [entry["lr"] for entry in ours["history"]] == pytest.approx([entry["lr"] for entry in committed["history"]])


def test_every_committed_record_is_whole_and_stands_where_it_belongs():
    paths = [p for p in sorted((HOME / "results").glob("*/*/*.json")) if p.parts[-3] in ctl.PRESETS]
    assert len(paths) > 80
    for path in paths:
        record = ctl.read_record(path)
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()}
        config = ctl.Config(**given)
        assert ctl.plain(config.study()) == record["config"], path
        assert record["protocol_version"] == ctl.PROTOCOL_VERSION, path
        assert Path("results", f"{ctl.cell_path(config, config.dataset)}.json") == path.relative_to(HOME), path
        assert "alpha" not in record["config"] and (config.preset != "mini" or config.width == 16)


def test_alpha_of_old_records_is_k():
    old = json.loads((HOME / "results/mini/cifar10-jpeg/hard_tau0.3_seed0.json").read_text())
    assert old["data"]["train"] == 5000
    for alpha, k in ((0.0819, 409), (1e-9, 1), (1.0, 5000)):
        old["config"].update(alpha=alpha, k=None)
        Path("old.json").write_text(json.dumps({**old, "sha256": ctl.record_sha256(old)}))
        config = ctl.read_record(Path("old.json"))["config"]
        assert config["k"] == k and "alpha" not in config


# ------------------------------------------------------------------------------------------- interrupted, and going on


@pytest.mark.parametrize("at,seconds", [(1, 0), (7, 0), (8, 0), (20, 0), (8, 60)])  # 7 steps an epoch
def test_interrupted_run_goes_on_exactly(at, seconds, undisturbed, cli, monkeypatch):
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", seconds)
    stop_at(monkeypatch, at)
    status, _, err = cli(*SMOKE)
    assert status == 130 and "interrupted" in complaint(err) and not list(Path("results").rglob("*.json"))
    assert CHECKPOINT.exists() == (at > 1 and seconds == 0)
    stop_at(monkeypatch)
    torch.manual_seed(at)
    status, out, err = cli(*SMOKE)
    assert status == 0 and err == "" and outside(record_of()) == outside(record_of(undisturbed))
    assert (f"going on from {CHECKPOINT}: {at - 1} steps done" in out) == (at > 1 and seconds == 0)


def test_how_often_a_checkpoint_is_saved(cli, monkeypatch):
    saves, ticks = spy(monkeypatch, "save_checkpoint"), itertools.count()
    assert cli(*SMOKE)[0] == 0 and len(saves) == 1 and ctl.CHECKPOINT_SECONDS == 60  # at the end alone
    monkeypatch.setattr(ctl, "time", types.SimpleNamespace(perf_counter=lambda: 25.0 * next(ticks)))
    out = cli(*SMOKE, "--force")[1]
    assert 6 <= len(saves) - 1 <= 12  # every second or third step
    assert re.search(r"[0-9] images/s +[0-9.]+ (s|min|h) left", out)


DRIVER = """
import json, os, random, signal, sys, torch
torch.set_num_threads(1)
import ctl
data = ctl.load_shapes(32)
ctl.load_shapes, ctl.CHECKPOINT_SECONDS = lambda size: data, 0
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half_written(file):
    os.ftruncate(file, os.fstat(file).st_size // 2)
    die()
def renamed(*names, rename=os.replace):
    rename(*names)
    die()
draw, ends = random.Random(0), []
moments = [(os, "fsync", half_written), (os, "replace", die), (os, "replace", renamed), (ctl, "train_step", die)]
plan = [(*draw.choice(moments), draw.randint(0, 3)) for _ in range(9)]
for owner, name, last, calls in [*plan, (ctl, "evaluate", die, 0), *((*moment, 0) for moment in moments)]:
    calls = iter([getattr(owner, name)] * calls + [last] * 99)
    if not (child := os.fork()):
        setattr(owner, name, lambda *given: next(calls)(*given))
        os._exit(ctl.main(sys.argv[1:]))
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again(undisturbed):
    """SIGKILL at drawn steps, in half-written files, before and after they are renamed, and in evaluation."""
    done = subprocess.run([sys.executable, "-c", DRIVER, *SMOKE], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HOME)})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    # The last four find a trained network: three die of writing the record, no step is left to die of.
    assert ends == [-9] * 13 + [0] and outside(record_of()) == outside(record_of(undisturbed))


def test_damaged_checkpoints_are_never_used(undisturbed, cli, capsys):
    whole, path = (undisturbed / "runs" / f"{CELL}.pt").read_bytes(), Path("x.pt")
    draw, damaged = random.Random(0), 0
    path.write_bytes(whole)
    good = ctl.load_checkpoint(path)
    for i in range(60):
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        path.write_bytes(whole[:at] + (bytes([whole[at] ^ bit]) + whole[at + 1:] if i % 3 else b""))
        saved, out = ctl.load_checkpoint(path), capsys.readouterr().out
        assert (saved is None) == (out == f"the checkpoint {path} is damaged: it is not used\n")
        damaged += saved is None  # a bit of a file's date may change: nothing is damaged then
        assert saved is None or all(torch.equal(saved["model"][name], value) for name, value in good["model"].items())
    assert damaged > 50
    others = [b"", b"junk", pickle.dumps({"step": 1})]
    # Code, a network, no zip, whole but of something else.
    for content, zipped in ((dict(good, step=print), True), (nn.Linear(1, 1), True), (good, False), ([1, 2], True),
                            ({"step": 1}, True), ({"config": 1, "protocol_version": 1, "data": "0"}, True)):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        others.append(path.read_bytes())
    for content in others:
        path.write_bytes(content)
        assert ctl.load_checkpoint(path) is None and "damaged" in capsys.readouterr().out
    CHECKPOINT.parent.mkdir(parents=True)
    CHECKPOINT.write_bytes(whole[:-9])
    status, out, _ = cli(*SMOKE)
    assert status == 0 and f"the checkpoint {CHECKPOINT} is damaged" in out and "going on" not in out
    assert outside(record_of()) == outside(record_of(undisturbed)) and ctl.load_checkpoint(CHECKPOINT)["step"] == 21


@pytest.mark.parametrize("kind", ["runs", "results"])
def test_of_another_run(kind, undisturbed, cli, monkeypatch):
    """A checkpoint or record where another belongs: refused, naming what differs, and it stays."""
    other = Path(kind, CELL.replace("0.3", "0.7") + (".pt" if kind == "runs" else ".json"))
    other.parent.mkdir(parents=True)
    shutil.copy(undisturbed / kind / f"{CELL}{other.suffix}", other)
    before = other.read_bytes()
    status, _, err = cli(*SMOKE, "--tau", "0.7")
    assert status == 2 and f"{other} is of another run: tau is 0.3 there, 0.7 here" in complaint(err)
    assert other.read_bytes() == before
    other.rename(Path(kind, f"{CELL}{other.suffix}"))
    with monkeypatch.context() as m:
        m.setattr(ctl, "PROTOCOL_VERSION", 2)
        status, _, err = cli(*SMOKE)
        assert status == 2 and "version is 1 there, 2 here" in complaint(err)
    mine = dataclasses.replace(shapes(32), name="mine")
    monkeypatch.setattr(ctl, "load_dataset", lambda *_: mine)
    assert cli(*SHORT)[0] == 0
    if kind == "runs":
        shutil.rmtree("results")
    mine.train_images = mine.train_images + 1  # other images under one name
    status, _, err = cli(*SHORT)
    assert status == 2 and "data is" in complaint(err)
    mine.name = "shapes"  # which another kind of CPU may have rounded otherwise
    assert "already" in cli(*SMOKE, "--results", undisturbed / "results")[1]


def test_edited_record_is_refused(undisturbed, cli):
    shutil.copytree(undisturbed / "results", "results")
    path = Path("results", f"{CELL}.json")
    r = json.loads(path.read_text())
    for spoilt in (json.dumps({**r, "final": {**r["final"], "accuracy": 99.0}}), "{", "[]", "{}", "", "[" * 10 ** 5):
        path.write_text(spoilt)
        status, _, err = cli(*SMOKE)
        assert status == 2 and "sha256" in complaint(err) and path.read_text() == spoilt


def test_force_begins_again(undisturbed, cli, monkeypatch):
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 0)
    assert cli(*SMOKE)[0] == 0
    stop_at(monkeypatch, 10)
    assert cli(*SMOKE, "--force")[0] == 130 and not list(Path("results").rglob("*.json"))
    assert ctl.load_checkpoint(CHECKPOINT)["step"] == 9  # not the finished one
    stop_at(monkeypatch)
    assert "9 steps done" in cli(*SMOKE)[1] and outside(record_of()) == outside(record_of(undisturbed))


# The last: the only step breaks the weights.
@pytest.mark.parametrize("more", [[], ["--loss", "simple"], ["--loss", "hard-simple"],
                                  ["--epochs", "1", "--batch-size", "100"]])
def test_what_is_not_finite_is_not_saved(more, cli, monkeypatch):
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 0)
    status, _, err = cli("--preset", "smoke", "--threads", "1", "--lr", "1e30", "--warmup", "0", *more)
    assert status == 1 and "not finite" in complaint(err) and not list(Path("results").rglob("*.json"))
    for path in Path("runs").rglob("*.pt"):
        saved = ctl.load_checkpoint(path)
        assert all(value.isfinite().all() for value in (*saved["model"].values(), saved["bank"], *saved["losses"]))


@pytest.mark.parametrize("spoilt", range(5))
def test_what_finite_looks_at(spoilt):
    model, optimiser = ctl.make_model(tiny(), CPU)
    run = ctl.Run(model=model, optimiser=optimiser, bank=ctl.MemoryBank(3, 2), losses=torch.ones(2), untrained={})
    for who in range(2):
        ctl.save_checkpoint(Path("a.pt"), run, {"config": who})
        (model.head.weight[0], model.stem[1].running_mean, run.bank.rows[2], run.losses, torch.ones(1))[spoilt][
            -1:].detach().fill_(math.nan)
    assert ctl.load_checkpoint("a.pt")["config"] == run.finite() == (spoilt == 4)


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_the_second_of_two_runs(cli):
    lock = CHECKPOINT.with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with filelock.FileLock(lock):
        status, _, err = cli(*SHORT, "--epochs", "3")
        assert status == 3 and str(lock) in complaint(err) and not list(Path("results").rglob("*.json"))
    assert cli(*SHORT, "--epochs", "3")[0] == 0  # it went with its holder
    assert cli(*SHORT, "--epochs", "3", "--device", "cpu", "--force")[0] == 0


def test_folders_deleted_meanwhile(undisturbed, cli, monkeypatch):
    def delete(*args, count=itertools.count(1)):
        if next(count) == 9:
            shutil.rmtree("runs"), shutil.rmtree("results")
        return TRAIN_STEP(*args)
    monkeypatch.setattr(ctl, "train_step", delete)
    assert cli(*SMOKE)[0] == 0 and outside(record_of()) == outside(record_of(undisturbed)) and CHECKPOINT.exists()


@pytest.fixture
def mount():
    """mount(folder, options): a file system of its own; skips where mounting one is not allowed."""
    mounted = []

    def do(folder, options):
        mounted.append(Path(folder).absolute())
        mounted[0].mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "ctl-test", folder]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            mounted.clear()
            pytest.skip("needs the right to mount a file system")
    yield do
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("full", ["runs", "results"])
def test_a_disk_that_is_full(full, undisturbed, cli, monkeypatch, mount):
    size = (undisturbed / "runs" / f"{CELL}.pt").stat().st_size
    mount(full, f"size={size + 8192 if full == 'runs' else 4096}")  # one checkpoint, but no second
    if full == "results":
        Path(full, "other").write_bytes(b"0" * 4096)  # no record either
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 0)
    status, _, err = cli(*SMOKE)
    assert status == 1 and "No space left" in complaint(err)
    assert not list(Path("results").rglob("*.json")) and not list(Path(".").rglob(".*.tmp"))
    subprocess.run(["mount", "-o", f"remount,size={8 * size}", full], check=True)
    stop_at(monkeypatch, *([1] if full == "results" else []))  # trained already: evaluation alone is repeated
    status, out, _ = cli(*SMOKE)
    assert status == 0 and "going on from" in out and outside(record_of()) == outside(record_of(undisturbed))


@pytest.mark.parametrize("folder", ["runs", "results"])
def test_a_folder_that_can_only_be_read(folder, cli, mount):
    if not os.geteuid():  # root may write everywhere but on a file system that is read-only
        mount(folder, "size=1m")
    inner = Path(folder, CELL).parent
    inner.mkdir(parents=True)
    inner.chmod(0o555)
    if not os.geteuid():
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    status, _, err = cli(*SMOKE)
    assert status == 2 and f"cannot write into {folder}" in complaint(err)
    assert not [path for path in Path(".").rglob("*") if path.is_file()]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, cli, monkeypatch):
    path = tmp_path / "record.json"
    ctl.write_whole(path, b"old")

    def look(source, target):  # at the one moment when it changes: the new file is whole, the old one still there
        assert Path(source).read_bytes() == b"new" and path.read_bytes() == b"old"
        assert Path(source).parent == path.parent
        raise OSError(errno.EIO, "broken off", str(target))
    with monkeypatch.context() as m:
        m.setattr(os, "replace", look)
        with pytest.raises(OSError):
            ctl.write_whole(path, b"new")
        m.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            ctl.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    Path("results").write_text("a file")
    status, _, err = cli(*SMOKE)
    assert status == 2 and "cannot write into results" in complaint(err)


@pytest.mark.parametrize("error,status,words", [
    (MemoryError(), 1, "out of memory: no more to be had"), (ctl.Stop("a\nb"), 1, "a b"), (ctl.BadInput("c"), 2, "c"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), 1, "out of memory: CUDA"), (ctl.Busy("d"), 3, "d"),
    (RuntimeError("CPUAllocator: can't allocate memory"), 1, "out of memory"),
    (KeyboardInterrupt(), 130, "interrupted"), (OSError(errno.EIO, "broken", "file"), 1, "broken: file"),
    (ctl.NotFinite("e"), 1, "not finite: e"), (SystemExit(0), 0, "")])
def test_exit_statuses(error, status, words, cli, monkeypatch):
    def fail(*_):
        raise error
    monkeypatch.setattr(ctl, "pick_device", fail)
    got, out, err = cli(*SMOKE)
    assert got == status and out == "" and (complaint(err).startswith(f"ctl.py: {words}") if words else err == "")
    monkeypatch.setattr(ctl, "pick_device", lambda _: 1 / 0)  # a fault of the program: not hidden
    with pytest.raises(ZeroDivisionError):
        ctl.main(SMOKE)


def test_standard_output_that_is_not_there(undisturbed, cli, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", None)
        assert ctl.main(SMOKE) == 0
    assert outside(record_of()) == outside(record_of(undisturbed))
    # A reader that leaves, a terminal without τ, no docstrings: the run goes on and leaves its record.
    shutil.rmtree("results"), shutil.rmtree("runs")
    line = f'set -o pipefail; "{sys.executable}" -OO "{ctl.__file__}" {" ".join(SMOKE)} | head -n 1'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    assert outside(record_of()) == outside(record_of(undisturbed))


BAD = """--tau 0.3 --loss simple|--tau 0.3 --loss triplet|--tau 1 --loss hard-simple|--match-step --loss simple|--k 5
--k 5 --loss simple|--k 5 --loss triplet|--k 0 --loss hard|--k 1.5 --loss hard|--nonsense 1|--ta 0.3|-t 1|--alpha 0.1
--report|--profile|--json|--gamma 0.5|--milestones 3|--milestones 2 1 --schedule step|--milestones 1.5|--batch-size 1
--size 20|--size 8|--size 1000000|--subset 5|--subset 4001|--test-subset 2001|--dataset|--device tpu9|--device hpu
--device cuda:99|--seed 99999999999999999999999|stray|--tau 1e-40|--probe-lr 1e40|--threads 99999999999|--momentum 1.1
--force=yes|--preset paperr|--loss softmax"""


def bad_lines():
    """Command lines each of which is wrong in one thing, and the word that the complaint must hold."""
    for line in re.split(r"[|\n]", BAD):
        word, *rest = line.split()
        yield [word, *rest], word.strip("-").split("=")[0]
    yield from ((["--dataset", name], name) for name in ("no/such/folder", "ctl.py"))
    for field in dataclasses.fields(ctl.Config):
        flag, kind, choices = "--" + field.name.replace("_", "-"), field.metadata["type"], field.metadata["choices"]
        values = ["", "x", choices[0].upper() + "!"] if choices else []
        if kind in (int, float) and field.name != "milestones":
            values += ["x", "", "-1", "nan", "-inf", "1e999", "0x10", "1,5"]
        lines = [[f"{flag}=1"], [f"--no{flag}"]] if kind is bool else [[flag], *([flag, value] for value in values)]
        yield from ((line, field.name) for line in lines)


def test_two_hundred_bad_command_lines(cli, tmp_path):
    lines = list(bad_lines())
    assert len(lines) >= 200
    for line, word in lines:
        status, _, err = cli(*([] if "--preset" in line else ["--preset", "smoke"]), *line)
        assert status == 2 and word.replace("_", "-") in complaint(err).replace("_", "-"), (line, status, err)
        assert not [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".lock")], line


def test_help(cli):
    status, out, err = cli("--help")
    assert status == 0 and err == "" and all(preset in out for preset in ctl.PRESETS)
    for field in dataclasses.fields(ctl.Config):
        assert f"--{field.name.replace('_', '-')}" in out and field.metadata["help"][:20] in out


def test_pasted_and_zipped(tmp_path, monkeypatch):
    """A notebook's cell has no file; a zip has a source."""
    source = Path(ctl.__file__).read_text(encoding="utf-8")
    pasted = types.ModuleType("pasted")
    monkeypatch.setitem(sys.modules, "pasted", pasted)
    exec(compile(source, "<cell>", "exec"), vars(pasted))
    assert pasted.environment(CPU, False)["source_sha256"] is None and pasted.make_config("smoke").tau == 0.3
    with zipfile.ZipFile(tmp_path / "code.zip", "w") as file:
        file.writestr("ctl.py", source)
    spec = zipimport.zipimporter(str(tmp_path / "code.zip")).find_spec("ctl")
    zipped = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ctl", zipped)
    spec.loader.exec_module(zipped)
    assert zipped.SOURCE_SHA256 == hashlib.sha256(source.encode()).hexdigest()


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


def step_parts(loss, device="cpu", N=60, B=12, size=16, width=4, dim=8, bfloat16=False):
    """The arguments of train_step, with everything on that device but what is drawn."""
    config = tiny(loss=loss, **LOSSES[loss])
    torch.manual_seed(0)
    with torch.device(device):
        model = ctl.ResNet18(width, dim, bfloat16)
    if device == "cpu":
        model = model.to(memory_format=torch.channels_last)
    bank, draws = copy.copy(BANK), torch.Generator().manual_seed(1)
    bank.rows = F.normalize(torch.randn(N, dim, generator=draws), dim=1).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    images = torch.randint(256, (N, 3, size, size), generator=draws, dtype=torch.uint8).to(device)
    return dict(model=model, bank=bank, optimiser=optimiser, images=images, index=torch.arange(B),
                drawn=ctl.draw_augmentation(B, draws, size), config=config)


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


def test_a_step_in_bfloat16_and_channels_last(monkeypatch):
    """The network's convolutions alone run in bfloat16, and see channels last; the bank moves after the weights."""
    losses = {}
    for bfloat16 in (False, True):
        parts, seen, dtypes = step_parts("contrastive", width=8, bfloat16=bfloat16), [], []
        similarities, rows = [], parts["bank"].rows.clone()
        for module in parts["model"].modules():
            if isinstance(module, nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)
                module.register_forward_hook(lambda m, i, o: dtypes.append(o.dtype) or seen.extend(
                    x.is_contiguous(memory_format=torch.channels_last) for x in (i[0], o)))
        spied, step = parts["bank"].similarity, parts["optimiser"].step
        parts["bank"].similarity = lambda z: similarities.append((z, spied(z))) or similarities[-1][1]
        parts["optimiser"].step = lambda: step() if torch.equal(parts["bank"].rows, rows) else pytest.fail("too late")
        losses[bfloat16] = ctl.train_step(**parts)
        assert len(seen) == 40 and all(seen) and set(dtypes) == {torch.bfloat16 if bfloat16 else torch.float32}
        assert {x.dtype for x in (*similarities[0], losses[bfloat16])} == {torch.float32}
        assert not torch.equal(parts["bank"].rows[:12], rows[:12]) and torch.equal(parts["bank"].rows[12:], rows[12:])
    assert losses[True] != losses[False]
    torch.testing.assert_close(losses[True], losses[False], rtol=0.02, atol=0)
