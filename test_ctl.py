"""The proof that ctl.py does what the paper and the mathematics say.

    bash reproduce.sh test

First the rooms 1 to 3 (loss, metrics, memory bank), as properties: each test quotes the statement it holds the code to.
P = softmax(s/tau) over a row of similarities, r the same over its negatives, R = max s - min s. The references are plain
Python loops with math.exp and math.fsum. Then the rooms 4 to 8 (network, data, augmentation, training, results, command
line): against torchvision, and through `ctl.main` in folders of their own. No network, no data but what the tests make.
"""
import contextlib
import copy
import dataclasses
import doctest
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

import ctl

torch.set_num_threads(1)

# What is drawn depends on the constants in the code too, so how many draws a test filters out may change with any edit.
settings.register_profile("ci", derandomize=True, deadline=None, database=None, max_examples=100,
                          suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
settings.load_profile("ci")

EPS, EPS32 = 2.0 ** -52, 2.0 ** -23
taus = st.floats(-3, 4).map(lambda e: 10.0 ** e)
ties = st.integers(-64, 64).map(lambda i: i / 64)
free = st.floats(-1, 1)


def values(least=1, most=10):
    two = st.tuples(ties, ties).flatmap(lambda p: st.lists(st.sampled_from(p), min_size=least, max_size=most))
    return st.one_of(st.lists(ties, min_size=least, max_size=most), st.lists(free, min_size=least, max_size=most), two)


def rows(least=1, most=10):
    """(row, column of the positive)"""
    return values(least, most).flatmap(lambda s: st.tuples(st.just(s), st.integers(0, len(s) - 1)))


def random_rows(seed, B, N, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(B, N, generator=g, dtype=torch.float64) * 2 - 1).to(dtype), torch.randint(N, (B,), generator=g)


seeds = st.integers(0, 2 ** 32 - 1)


def t(s, dtype=torch.float64):
    return torch.tensor([s], dtype=dtype)


def p_(p):
    return torch.tensor([p])


def loss(s, p, tau, k=None):
    return ctl.contrastive_loss(t(s), p_(p), tau, k).item()


def push(s, p, tau, k=None):
    """tau times the gradient of one row."""
    return [tau * g for g in ctl.loss_gradient(t(s), p_(p), tau, k)[0].tolist()]


def penalty(s, p, tau, k=None):
    return ctl.relative_penalty(t(s), p_(p), tau, k)[0].tolist()


def slack(tau):
    return 4 * EPS * (10 + 2 / tau)  # "float64: 4 eps (10 + 2/tau) on L"


# ---- the slow reference ---------------------------------------------------------------------------------------

def ref_kept(s, p, k=None):
    """Columns of the k largest negatives."""
    others = sorted((j for j in range(len(s)) if j != p), key=lambda j: -s[j])
    return others if k is None else others[:k]


def ref_softmax(x):
    top = max(x)
    e = [math.exp(v - top) for v in x]
    total = math.fsum(e)
    return [v / total for v in e]


def ref_loss(s, p, tau, k=None):
    x = [0.0] + [(s[j] - s[p]) / tau for j in ref_kept(s, p, k)]
    top = max(x)
    return top + math.log(math.fsum(math.exp(v - top) for v in x))


def ref_push(s, p, tau, k=None):
    columns = [p] + ref_kept(s, p, k)
    P = ref_softmax([(s[j] - s[p]) / tau for j in columns])
    g = [0.0] * len(s)
    for j, v in zip(columns[1:], P[1:]):
        g[j] = v
    g[p] = -math.fsum(P[1:])
    return g


def ref_penalty(s, p, tau, k=None):
    columns, r = ref_kept(s, p, k), [0.0] * len(s)
    if columns:
        for j, v in zip(columns, ref_softmax([(s[j] - s[columns[0]]) / tau for j in columns])):
            r[j] = v
    return r


def entropy(P):
    return -math.fsum(v * math.log(v) for v in P if v > 0)


def mean(x):
    return math.fsum(x) / len(x)


def central(s, n):
    m = mean(s)
    return math.fsum((v - m) ** n for v in s) / len(s)


def near(a, b, tol):
    assert len(a) == len(b)
    assert max(abs(x - y) for x, y in zip(a, b)) <= tol, (a, b)


ks = st.none() | st.integers(1, 12)


# ---- values: Eqs. 1, 5, 6, 7, 9 -------------------------------------------------------------------------------

@given(rows(), taus, ks)
@example(([1.0, -1.0], 1), 1e-3, None)  # exp without the max subtracted overflows
@example(([0.0, -1.0], 0), 1e-2, None)  # log(p + 1e-7) goes below 0
def test_contrastive_is_the_slow_loop_float64(row, tau, k):
    # Eqs. 1 and 9; "float64: 4 eps (10 + 2/tau) on L"
    assert abs(loss(*row, tau, k) - ref_loss(*row, tau, k)) <= slack(tau)


@given(rows(), taus, ks)
@example(([1.0, -1.0], 1), 1 / 89, None)
def test_contrastive_float32(row, tau, k):
    # "float32: about 0.84 eps (1 + R/tau + log N) on L: allow 4"
    s = t(row[0], torch.float32)
    exact = s[0].tolist()
    L = ctl.contrastive_loss(s, p_(row[1]), tau, k)
    assert L.dtype == torch.float32 and L.shape == (1,)
    bound = 4 * EPS32 * (1 + (max(exact) - min(exact)) / tau + math.log(len(exact)))
    assert abs(L.item() - ref_loss(exact, row[1], tau, k)) <= bound


@given(rows(), taus, ks)
def test_gradient_float32(row, tau, k):
    # "float32: 7.2 eps (1 + R/tau) on tau grad L: allow 32"; autograd's too
    if k is not None:
        assume(len(set(torch.tensor(row[0]).tolist())) == len(row[0]))
    s = t(row[0], torch.float32).requires_grad_()
    exact = s[0].tolist()
    bound = 32 * EPS32 * (1 + (max(exact) - min(exact)) / tau)
    expected = ref_push(exact, row[1], tau, k)
    ctl.contrastive_loss(s, p_(row[1]), tau, k).sum().backward()
    near((ctl.loss_gradient(s.detach(), p_(row[1]), tau, k)[0].double() * tau).tolist(), expected, bound)
    near((s.grad[0].double() * tau).tolist(), expected, bound)


@pytest.mark.parametrize("tau", [1e-3, 0.07, 1.0, 1e4])
def test_large_n_float32(tau):
    # N = 50,000; "at tau = 1e4, float32 logsumexp((s - s_pos)/tau) errs by 4e-7 where cross_entropy errs by 3e-5";
    # P compared relatively, as N·P ("assert_close's default tolerance is half of a uniform P")
    N = 50_000
    s, p = random_rows(7, 2, N, torch.float32)
    exact, R = s.double(), (s.max() - s.min()).item()
    P = torch.log_softmax(exact / tau, dim=1).exp()
    L = torch.logsumexp((exact - exact.gather(1, p[:, None])) / tau, dim=1)
    error = (ctl.contrastive_loss(s, p, tau).double() - L).abs().max().item()
    assert error <= 4 * EPS32 * (1 + R / tau + math.log(N))
    g = ctl.loss_gradient(s, p, tau).double() * tau
    negative = torch.ones_like(g).scatter(1, p[:, None], 0).bool()
    assert ((g - P).abs() <= 32 * EPS32 * (1 + R / tau) * P + 1e-37)[negative].all()
    assert (g.gather(1, p[:, None]) + 1 - P.gather(1, p[:, None])).abs().max() <= 32 * EPS32 * (1 + R / tau)
    if tau == 1e4:
        assert error <= 1e-6


@given(rows(), ks)
def test_simple_is_the_slow_loop(row, k):
    # Eq. 7 (Eq. 9 with k): the mean is over N, not N - 1
    s, p = row
    kept = ref_kept(s, p, k)
    expected = math.fsum(s[j] - s[p] for j in kept) / (1 + len(kept))
    assert abs(ctl.simple_loss(t(s), p_(p), k).item() - expected) <= 10 * EPS


@given(rows())
def test_triplet_is_the_slow_loop(row):
    # Eq. 6 times tau
    s, p = row
    assert ctl.triplet_loss(t(s), p_(p)).item() == max([0.0] + [s[j] - s[p] for j in range(len(s)) if j != p])


@given(rows(), taus, ks)
def test_relative_penalty_is_the_slow_loop(row, tau, k):
    # Eqs. 5 and 8
    if k is not None:
        assume(len(set(row[0])) == len(row[0]))
    near(penalty(*row, tau, k), ref_penalty(*row, tau, k), 1e-12)


@given(st.integers(1, 4), st.integers(1, 40), taus, ks, seeds)
@settings(max_examples=50)
def test_rows_of_a_batch_do_not_mix(B, N, tau, k, seed):
    s, p = random_rows(seed, B, N)
    for f in (ctl.contrastive_loss, ctl.loss_gradient, ctl.relative_penalty):
        whole = f(s, p, tau, k)
        for i in range(B):
            scale = tau if f is ctl.loss_gradient else 1
            assert ((f(s[i:i + 1], p[i:i + 1], tau, k)[0] - whole[i]).abs() * scale).max() <= slack(tau)


# ---- Gradients ------------------------------------------------------------------------------------------------

@given(rows(), taus, ks)
def test_gradient_closed_form_autograd_and_loop(row, tau, k):
    # "tau dL/ds_j = P_j; tau dL/ds_pos = P_pos - 1"; "1e-12 on tau grad L"
    if k is not None:
        assume(len(set(row[0])) == len(row[0]))
    s = t(row[0]).requires_grad_()
    ctl.contrastive_loss(s, p_(row[1]), tau, k).sum().backward()
    closed = push(*row, tau, k)
    near(closed, (tau * s.grad[0]).tolist(), 1e-12)
    near(closed, ref_push(*row, tau, k), 1e-12)


@given(rows(), taus)
def test_gradient_sums_and_norms(row, tau):
    # "they sum to 0; ||tau grad L||_1 = 2(1 - P_pos); ||grad L||_2 <= sqrt(2)/tau"
    s, p = row
    g = push(s, p, tau)
    P = ref_softmax([(v - s[p]) / tau for v in s])
    assert abs(math.fsum(g)) <= 1e-12
    assert abs(math.fsum(map(abs, g)) - 2 * (1 - P[p])) <= 1e-12
    assert math.sqrt(math.fsum(v * v for v in g)) <= math.sqrt(2) + 1e-12
    assert g[p] <= 0 and all(v >= 0 for j, v in enumerate(g) if j != p)


@given(rows(2, 6), st.floats(-1, 3).map(lambda e: 10.0 ** e), ks)
@settings(max_examples=15)
def test_gradcheck_of_tau_times_loss(row, tau, k):
    # gradcheck of tau L, not of L
    s, p = row
    gaps = sorted(s)
    assume(k is None or min(b - a for a, b in zip(gaps, gaps[1:])) > 1e-3)  # top-k stays as it is
    assert torch.autograd.gradcheck(lambda x: tau * ctl.contrastive_loss(x, p_(p), tau, k), t(s).requires_grad_())


def test_gradcheck_sees_the_negatives_at_n_256_tau_1000():
    # "A backward pass that drops every negative passes gradcheck(L) at N = 256, tau = 1000; gradcheck(tau L) catches it."
    s, p = random_rows(0, 1, 256)
    assert torch.autograd.gradcheck(lambda x: 1000 * ctl.contrastive_loss(x, p, 1000.0), s.requires_grad_())


@given(rows(1, 7), taus)
@settings(max_examples=40)
def test_hessian(row, tau):
    # "Hessian (diag P - P P^T)/tau²: eigenvalues in [0, 1/(2 tau²)], null vector 1"
    s, p = row
    H = torch.autograd.functional.hessian(lambda x: ctl.contrastive_loss(x[None], p_(p), tau).sum(), t(s)[0]) * tau ** 2
    P = torch.tensor(ref_softmax([(v - s[p]) / tau for v in s]), dtype=torch.float64)
    assert (H - (P.diag() - P[:, None] * P)).abs().max() <= 2e-12
    e = torch.linalg.eigvalsh((H + H.T) / 2)
    assert e.min() >= -4e-12 and e.max() <= 0.5 + 4e-12
    assert H.sum(dim=1).abs().max() <= 4e-12


@given(rows(2), taus, st.lists(free, min_size=10, max_size=10))
def test_convex_in_s(row, tau, other):
    # "so L is convex in s"
    a, p = row
    b = other[:len(a)]
    middle = [(x + y) / 2 for x, y in zip(a, b)]
    assert loss(middle, p, tau) <= (loss(a, p, tau) + loss(b, p, tau)) / 2 + 2 * slack(tau)


# ---- Relative penalty -----------------------------------------------------------------------------------------

@given(rows(2), taus, ks, free)
def test_penalty_is_share_of_push_and_blind_to_the_positive(row, tau, k, moved):
    # "r_j = d_jL/|d_posL|, independent of s_pos; sums to 1"
    s, p = row
    r = penalty(s, p, tau, k)
    assert abs(math.fsum(r) - 1) <= 1e-12 and r[p] == 0 and min(r) >= 0
    g = push(s, p, tau, k)
    if -g[p] > 1e-200:
        near([g[j] / -g[p] for j in range(len(s)) if j != p], r[:p] + r[p + 1:], 1e-11)
    assert penalty(s[:p] + [moved] + s[p + 1:], p, tau, k) == r


@given(rows(3), taus)
def test_penalty_entropy_grows_with_tau(row, tau):
    # "dH(r)/dtau = Var_r(s)/tau³ >= 0", as tau dH/dtau by central differences
    s, p = row
    h = 1e-4
    slope = (entropy(penalty(s, p, tau * (1 + h))) - entropy(penalty(s, p, tau * (1 - h)))) / (2 * h)
    r = penalty(s, p, tau)
    m = math.fsum(a * b for a, b in zip(r, s))
    expected = math.fsum(a * (b - m) ** 2 for a, b in zip(r, s)) / tau ** 2
    assert abs(slope - expected) <= 1e-4 * expected + 1e-8
    assert entropy(penalty(s, p, 2 * tau)) >= entropy(r) - 1e-12


# ---- tau -> 0 -------------------------------------------------------------------------------------------------

def shape_of(s):
    top = max(s)
    m = s.count(top)
    below = [v for v in s if v < top]
    return m, (top - max(below) if below else 0.0), top - min(s)


@given(rows(2), taus)
def test_small_tau_bounds_on_loss(row, tau):
    # "0 <= log(m + (N-m)e^{-R/tau}) <= L - max(0, s_max - s_pos)/tau <= log(m + (N-m)e^{-g/tau}) <= log N,
    #  with equality on two-valued rows" (s_max: the hardest negative)
    s, p = row
    m, g, R = shape_of(s)
    N = len(s)
    rest = loss(s, p, tau) - ctl.triplet_loss(t(s), p_(p)).item() / tau
    low, high = math.log(m + (N - m) * math.exp(-R / tau)), math.log(m + (N - m) * math.exp(-g / tau))
    assert 0 <= low and high <= math.log(N) + 4 * EPS
    assert low - slack(tau) <= rest <= high + slack(tau)
    if len(set(s)) <= 2:
        assert abs(rest - low) <= slack(tau) and abs(rest - high) <= slack(tau)


@given(rows(2), taus)
def test_small_tau_bounds_on_penalty(row, tau):
    # r tends to one-hot, at the rate that the same bound gives over the negatives
    s, p = row
    others = s[:p] + s[p + 1:]
    m, g, R = shape_of(others)
    n = len(others)
    hardest = max(penalty(s, p, tau))
    low, high = 1 / (m + (n - m) * math.exp(-g / tau)), 1 / (m + (n - m) * math.exp(-R / tau))
    assert low - 1e-12 <= hardest <= high + 1e-12


@given(st.lists(ties, min_size=2, max_size=10).flatmap(lambda s: st.tuples(st.just(s), st.integers(0, len(s) - 1))))
def test_limit_tau_to_0(row):
    # "r always tends to one-hot on the hardest negative (ties share equally). tau grad L does so only if
    #  s_max > s_pos; if the positive is largest, tau grad L -> 0." Gaps are >= 1/64, so e^{-g/tau} < 1e-67 here.
    s, p = row
    tau = 1e-4
    hardest = max(s[:p] + s[p + 1:])
    at = [j for j in range(len(s)) if j != p and s[j] == hardest]
    one_hot = [1 / len(at) if j in at else 0.0 for j in range(len(s))]
    near(penalty(s, p, tau), one_hot, 1e-12)
    g = push(s, p, tau)
    if hardest > s[p]:
        near(g, [-1.0 if j == p else v for j, v in enumerate(one_hot)], 1e-12)
    elif hardest < s[p]:
        near(g, [0.0] * len(s), 1e-60)
    else:  # the positive takes its share of the tie
        near(g, [-len(at) / (1 + len(at)) if j == p else v * len(at) / (1 + len(at)) for j, v in enumerate(one_hot)], 1e-12)


@given(values(2), taus)
def test_rate_of_one_minus_p_max(s, tau):
    # "Rate for m = 1, q = e^{-g/tau}: q/(1+q) <= 1 - P_max <= (N-1)q/(1+(N-1)q)"; relatively, to the last digits
    m, g, _ = shape_of(s)
    assume(m == 1 and g / tau < 600)
    q, N, tol = math.exp(-g / tau), len(s), 1e-12 * (1 + 1 / tau)
    p = s.index(max(s))
    missing = -push(s, p, tau)[p]
    assert q / (1 + q) * (1 - tol) <= missing <= (N - 1) * q / (1 + (N - 1) * q) * (1 + tol)
    P_max = push(s, (p + 1) % N, tau)[p]  # as a negative
    assert q / (1 + q) - 1e-12 <= 1 - P_max <= (N - 1) * q / (1 + (N - 1) * q) + 1e-12


@given(rows(), taus)
def test_triplet_is_the_limit(row, tau):
    # Eq. 6: 0 <= tau L - triplet <= tau log N
    s, p = row
    rest = loss(s, p, tau) - ctl.triplet_loss(t(s), p_(p)).item() / tau
    assert -slack(tau) <= rest <= math.log(len(s)) + slack(tau)


# ---- tau -> infinity ------------------------------------------------------------------------------------------

@given(rows(), taus)
def test_large_tau_bounds_on_loss(row, tau):
    # "0 <= L - log N - (mean s - s_pos)/tau <= R²/(8 tau²)" and
    # "|L - log N - (mean s - s_pos)/tau - Var(s)/(2 tau²)| <= R³/(36 sqrt3 tau³)"
    s, p = row
    R = max(s) - min(s)
    rest = loss(s, p, tau) - math.log(len(s)) - ctl.simple_loss(t(s), p_(p)).item() / tau  # Eq. 7
    assert abs(ctl.simple_loss(t(s), p_(p)).item() - (mean(s) - s[p])) <= 8 * EPS
    assert -slack(tau) <= rest <= R ** 2 / (8 * tau ** 2) + slack(tau)
    last = rest - central(s, 2) / (2 * tau ** 2)
    assert abs(last) <= R ** 3 / (36 * math.sqrt(3) * tau ** 3) + slack(tau) + 8 * EPS / tau ** 2


def test_hoeffding_is_sharp():
    # "(Hoeffding; sharp)": half of the columns at each end
    rest = loss([1.0, -1.0], 0, 30.0) - math.log(2) + 1 / 30
    assert rest == pytest.approx(4 / (8 * 900), rel=1e-3)


@given(rows(3))
def test_rates_2_4_8(row):
    # "Doubling tau divides the successive residuals by 2, 4, 8 in the limit (skewness not 0)"
    s, p = row
    d, var, skew = mean(s) - s[p], central(s, 2), central(s, 3)
    assume(abs(d) > 0.2 and var > 0.1 and abs(skew) > 0.1)

    def residuals(tau):
        a = loss(s, p, tau) - math.log(len(s))
        return a, a - d / tau, a - d / tau - var / (2 * tau ** 2)

    for a, b, rate in zip(residuals(200.0), residuals(400.0), (2, 4, 8)):
        assert a / b == pytest.approx(rate, rel=0.02)


@given(values(), taus)
def test_large_tau_bounds_on_p(s, tau):
    # "|log(N P_j)| <= R/tau" (the loss with j as positive is -log P_j);
    # "|N P_j - 1 - (s_j - mean s)/tau| <= 1.5 R²/tau² for tau >= R"
    N, R = len(s), max(s) - min(s)
    every = t(s).expand(N, N).contiguous()
    L = ctl.contrastive_loss(every, torch.arange(N), tau).tolist()
    assert all(abs(math.log(N) - v) <= R / tau + slack(tau) for v in L)
    if tau >= R:
        g = (ctl.loss_gradient(every, torch.arange(N), tau) * tau).tolist()
        for p in range(N):
            for j in range(N):
                P_j = g[p][j] + (j == p)
                assert abs(N * P_j - 1 - (s[j] - mean(s)) / tau) <= 1.5 * (R / tau) ** 2 + N * 1e-14


# ---- always ---------------------------------------------------------------------------------------------------

@given(rows(), taus)
def test_derivative_of_tau_loss_is_entropy(row, tau):
    # "d(tau L)/dtau = H(P) in [0, log N]": by L = l(s/tau) it is L - sum s_j dL/ds_j; and by central differences
    s, p = row
    H = entropy(ref_softmax([(v - s[p]) / tau for v in s]))
    assert -1e-12 <= H <= math.log(len(s)) + 1e-12
    exact = loss(s, p, tau) - math.fsum((v - s[p]) * g for v, g in zip(s, push(s, p, tau))) / tau
    assert abs(exact - H) <= slack(tau) + 2e-12 / tau + 1e-12
    h = 1e-4
    slope = (loss(s, p, tau * (1 + h)) * (1 + h) - loss(s, p, tau * (1 - h)) * (1 - h)) / (2 * h)
    assert abs(slope - H) <= 1e-6 + slack(tau) / h


@given(rows(), taus, taus)
def test_convexity_in_tau_and_in_its_inverse(row, a, b):
    # "tau L is nondecreasing and convex in tau; L itself is convex in 1/tau"
    s, p = row
    a, b = sorted((a, b))
    La, Lb = loss(s, p, a), loss(s, p, b)
    room = a * slack(a) + b * slack(b)
    assert a * La <= b * Lb + room
    middle = (a + b) / 2
    assert middle * loss(s, p, middle) <= (a * La + b * Lb) / 2 + 2 * room
    assert loss(s, p, 2 / (1 / a + 1 / b)) <= (La + Lb) / 2 + 2 * slack(a)


def test_loss_is_not_monotone_in_tau():
    # "but not monotone"
    L = [loss([0.0, 0.1, -1.0], 0, tau) for tau in (0.01, 0.3, 1e4)]
    assert L[0] > L[1] < L[2]


@given(rows(), taus)
def test_bounds_for_similarities(row, tau):
    # "For |s| <= 1: log(1+(N-1)e^{-2/tau}) <= L <= log(1+(N-1)e^{2/tau})"
    s, p = row
    n = len(s) - 1
    low = math.log1p(n * math.exp(-2 / tau))
    high = 2 / tau + math.log(math.exp(-2 / tau) + n) if n else 0.0
    assert low - slack(tau) <= loss(s, p, tau) <= high + slack(tau)
    assert loss(s, p, tau) >= 0
    if n:  # both are reached
        assert abs(loss([1.0] + n * [-1.0], 0, tau) - low) <= slack(tau)
        assert abs(loss([-1.0] + n * [1.0], 0, tau) - high) <= slack(tau)


@given(rows(2), taus, st.integers(1, 12))
def test_hard_loss_is_below_by_at_most_log(row, tau, k):
    # "0 <= L - L_hard(k) <= log((N-1)/k), zero at k = N-1"; beyond N-1 too
    s, p = row
    n = len(s) - 1
    missing = loss(s, p, tau) - loss(s, p, tau, k)
    assert -slack(tau) <= missing <= max(0.0, math.log(n / k)) + slack(tau)


@given(rows(), taus, st.integers(0, 3))
def test_k_beyond_n_is_the_ordinary_loss(row, tau, more):
    s, p = row
    k = max(1, len(s) - 1 + more)
    assert abs(loss(s, p, tau, k) - loss(s, p, tau)) <= slack(tau)
    assert push(s, p, tau, k) == push(s, p, tau) and penalty(s, p, tau, k) == penalty(s, p, tau)
    assert abs(ctl.simple_loss(t(s), p_(p), k) - ctl.simple_loss(t(s), p_(p))) <= 10 * EPS


@given(rows(2), taus, st.randoms(use_true_random=False), st.integers(-8, 8).map(float), st.sampled_from([0.25, 2.0, 3.0]))
def test_invariances(row, tau, random, shift, c):
    # "Invariant to a shift of all s, to a permutation of the negatives, and to (s, tau) -> (cs, c tau), c > 0"
    s, p = row
    assume(all(v * 64 == int(v * 64) for v in s))  # so that the shift is exact
    L, g = loss(s, p, tau), push(s, p, tau)
    shifted = [v + shift for v in s]
    assert loss(shifted, p, tau) == L
    near(push(shifted, p, tau), g, 4 * EPS * (10 + 20 / tau))
    assert abs(loss([c * v for v in s], p, c * tau) - L) <= slack(tau)
    near(push([c * v for v in s], p, c * tau), g, 1e-12)
    order = list(range(len(s)))
    random.shuffle(order)
    assert abs(loss([s[j] for j in order], order.index(p), tau) - L) <= slack(tau)
    near(push([s[j] for j in order], order.index(p), tau), [g[j] for j in order], 1e-12)


@given(rows(2), st.integers(1, 12))
def test_nearest_negatives(row, k):
    # the positive is never among the k, wherever it ranks and whatever ties with it
    s, p = row
    found, columns = ctl.nearest_negatives(t(s), p_(p), k)
    assert found.shape == columns.shape == (1, min(k, len(s) - 1))
    c = columns[0].tolist()
    assert p not in c and len(set(c)) == len(c) and found[0].tolist() == [s[j] for j in c]
    assert sorted(found[0].tolist(), reverse=True) == [s[j] for j in ref_kept(s, p, k)]


@given(rows(2), taus, st.integers(1, 3))
def test_positive_always_in_the_denominator(row, tau, k):
    # even where it is the farthest of all: with it L > (s_k-th - s_pos)/tau + log, never below 0
    s, p = row
    s = s[:p] + [-1.0] + s[p + 1:]
    kept = ref_kept(s, p, k)
    assert abs(loss(s, p, tau, k) - ref_loss([s[p]] + [s[j] for j in kept], 0, tau)) <= slack(tau)
    assert loss(s, p, tau, k) >= 0
    g = push(s, p, tau, k)
    assert abs(math.fsum(g)) <= 1e-12 and sum(v != 0 for j, v in enumerate(g) if j != p) <= k


@given(free, taus, ks)
def test_n_1(s, tau, k):
    # the positive alone: nothing to push
    assert loss([s], 0, tau, k) == 0 and penalty([s], 0, tau, k) == [0] and push([s], 0, tau, k) == [0]
    assert ctl.simple_loss(t([s]), p_(0), k).item() == 0 and ctl.triplet_loss(t([s]), p_(0)).item() == 0


@pytest.mark.parametrize("N", [2, 3, 64])
@pytest.mark.parametrize("tau", [1e-3, 0.07, 1e4])
def test_all_equal(N, tau):
    # ties throughout: L = log N, r and P uniform, whatever tau
    s = [0.5] * N
    assert abs(loss(s, 0, tau) - math.log(N)) <= slack(tau)
    near(push(s, 0, tau), [1 / N - 1] + [1 / N] * (N - 1), 1e-12)
    near(penalty(s, 0, tau), [0] + [1 / (N - 1)] * (N - 1), 1e-12)
    assert abs(loss(s, 0, tau, 1) - math.log(2)) <= slack(tau)  # tied with the positive, one negative is kept


def test_triplet_ties_share_the_gradient():
    s = t([0.0, 0.5, 0.5, 0.1]).requires_grad_()
    ctl.triplet_loss(s, p_(0)).sum().backward()
    assert s.grad[0].tolist() == [-1.0, 0.5, 0.5, 0.0]


# ---- errors ---------------------------------------------------------------------------------------------------

S, POS = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]), torch.tensor([0, 2])
WITH_TAU = [ctl.contrastive_loss, ctl.loss_gradient, ctl.relative_penalty]


@pytest.mark.parametrize("f", WITH_TAU)
@pytest.mark.parametrize("tau", [0, 0.0, -1, -0.1, math.nan, math.inf, -math.inf, True, "0.1", None, 1j])
def test_bad_tau(f, tau):
    with pytest.raises(ValueError, match="^tau "):
        f(S, POS, tau)


@pytest.mark.parametrize("f", WITH_TAU + [lambda s, p, tau, k: ctl.simple_loss(s, p, k)])
@pytest.mark.parametrize("k", [0, -1, 1.5, 1.0, True, False, "1"])
def test_bad_k(f, k):
    with pytest.raises(ValueError, match="^k "):
        f(S, POS, 0.1, k)


ALL = WITH_TAU + [lambda s, p, tau: ctl.simple_loss(s, p), lambda s, p, tau: ctl.triplet_loss(s, p)]


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize("positive", [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0, 2], dtype=torch.int32),
                                      torch.tensor([0.0, 2.0]), torch.tensor([0]), torch.tensor([[0], [2]]),
                                      torch.tensor(0), torch.tensor([True, False])])
def test_bad_positive(f, positive):
    with pytest.raises(ValueError, match="^positive "):
        f(S, positive, 0.1)


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize("s", [S.long(), S[0], S[None], S[:, :0], torch.where(S == S[0, 0], math.nan, S),
                               torch.where(S == S[0, 0], math.inf, S), torch.where(S == S[0, 0], -math.inf, S)])
def test_bad_similarity(f, s):
    with pytest.raises(ValueError, match="^similarity "):
        f(s, POS, 0.1)


def test_not_finite_is_its_own_error():
    with pytest.raises(ctl.NotFinite, match="NaN or infinity"):
        ctl.contrastive_loss(S * math.nan, POS, 0.1)


# ---- metrics --------------------------------------------------------------------------------------------------

def sphere(n, d, seed=0, dtype=torch.float64):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(z, dim=1).to(dtype)


def simplex(M):
    z = torch.eye(M, dtype=torch.float64) - 1 / M
    return z / z.norm(dim=1, keepdim=True)


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b))


def hyp0f1(b, x):
    term, total = 1.0, 0.0
    for n in range(200):
        total += term
        term *= x / ((b + n) * (n + 1))
    return total


@pytest.mark.parametrize("t_", [0.5, 2.0, 5.0])
def test_uniformity_closed_cases(t_):
    # "Orthonormal set -2t; antipodal pair -4t; all equal 0; regular simplex of M points -2tM/(M-1)" (sign turned)
    one = sphere(1, 5)
    assert ctl.uniformity(torch.eye(6, dtype=torch.float64), t_) == pytest.approx(2 * t_, abs=1e-12)
    assert ctl.uniformity(torch.cat([one, -one]), t_) == pytest.approx(4 * t_, abs=1e-12)
    assert ctl.uniformity(one.expand(7, 5), t_) == pytest.approx(0, abs=1e-12)
    for M in (2, 3, 9):
        assert ctl.uniformity(simplex(M), t_) == pytest.approx(2 * t_ * M / (M - 1), abs=1e-12)
    assert math.isnan(ctl.uniformity(one, t_)) and math.isnan(ctl.uniformity(one[:0], t_))


def test_uniformity_of_the_sphere():
    # "uniform on the sphere: -2t + log 0F1(; d/2; t²) = -3.93753001 for d = 128, t = 2; d = 3: log((1-e^{-4t})/(4t))",
    # within 5 of "about sqrt(0.2653/(M(M-1)))"
    M = 2000
    expected = -4 + math.log(hyp0f1(64, 4.0))
    assert expected == pytest.approx(-3.93753001, abs=1e-8)
    assert abs(ctl.uniformity(sphere(M, 128, 1, torch.float32)) + expected) <= 5 * math.sqrt(0.2653 / (M * (M - 1)))
    for t_ in (0.5, 2.0):
        E, E2 = ((1 - math.exp(-4 * u)) / (4 * u) for u in (t_, 2 * t_))
        assert -2 * t_ + math.log(hyp0f1(1.5, t_ ** 2)) == pytest.approx(math.log(E), abs=1e-12)
        sd = math.sqrt(2 * (E2 / E ** 2 - 1) / (M * (M - 1)))
        assert abs(ctl.uniformity(sphere(M, 3, 2), t_) + math.log(E)) <= 5 * sd


@given(st.integers(2, 12), st.integers(1, 6), seeds, st.floats(0.1, 5), st.integers(1, 13))
@settings(max_examples=40)
def test_uniformity_is_the_slow_loop_across_blocks(n, d, seed, t_, block):
    # "mean over i<j of exp(-t||.||²), then log"; never above the simplex's 2tM/(M-1); blocks do not matter
    z = sphere(n, d, seed)
    x = z.tolist()
    pairs = [math.exp(-t_ * math.fsum((a - b) ** 2 for a, b in zip(x[i], x[j]))) for i in range(n) for j in range(i)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctl, "ROWS", block)
        found = ctl.uniformity(z, t_)
    assert abs(found + math.log(mean(pairs))) <= 1e-11
    assert found <= 2 * t_ * n / (n - 1) + 1e-11


def test_uniformity_across_the_real_block():
    z = sphere(ctl.ROWS + 3, 4)
    s = (z @ z.T)[tuple(torch.triu_indices(len(z), len(z), 1))]
    assert abs(ctl.uniformity(z) + math.log(torch.exp(4 * (s - 1)).mean())) <= 1e-12


def test_tolerance_closed_cases():
    # "One-point classes add nothing; all points equal: 1; the two-dimensional antipodal pair in one class: -1"
    pair = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert ctl.tolerance(pair, torch.tensor([5, 5])) == -1
    assert math.isnan(ctl.tolerance(pair, torch.tensor([0, 1])))
    z = sphere(1, 7).expand(6, 7)
    assert ctl.tolerance(z, torch.zeros(6, dtype=torch.int64)) == pytest.approx(1, abs=1e-12)
    assert ctl.tolerance(z, torch.tensor([0, 0, 3, 3, 3, 9])) == pytest.approx(1, abs=1e-12)
    assert ctl.tolerance(torch.eye(4), torch.tensor([1, 1, 0, 0])) == pytest.approx(0, abs=1e-12)
    for M in (2, 3, 8):
        assert ctl.tolerance(simplex(M), torch.zeros(M, dtype=torch.int64)) == pytest.approx(-1 / (M - 1), abs=1e-12)


@given(st.integers(2, 14), st.integers(1, 6), st.integers(1, 6), seeds)
@settings(max_examples=60)
def test_tolerance_is_the_slow_loop(n, d, classes, seed):
    # mean over pairs i < j of one class, all such pairs weighing alike; labels need not be 0, 1, 2, ...
    z = sphere(n, d, seed)
    y = (torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed)) * 7 - 3).tolist()
    x = z.tolist()
    pairs = [dot(x[i], x[j]) for i in range(n) for j in range(i) if y[i] == y[j]]
    found = ctl.tolerance(z, torch.tensor(y))
    assert (math.isnan(found) if not pairs else abs(found - mean(pairs)) <= 1e-12)
    alone = torch.cat([z, sphere(1, d, seed // 2)])  # a class of one point adds nothing
    if pairs:
        assert abs(ctl.tolerance(alone, torch.tensor(y + [99])) - found) <= 1e-12


@given(st.integers(1, 9), st.integers(1, 6), seeds)
@settings(max_examples=30)
def test_alignment_is_the_slow_loop(n, d, seed):
    a, b = sphere(n, d, seed), sphere(n, d, seed // 2 + 1)
    expected = mean([math.fsum((u - v) ** 2 for u, v in zip(x, y)) for x, y in zip(a.tolist(), b.tolist())])
    assert abs(ctl.alignment(a, b) - expected) <= 1e-12
    assert ctl.alignment(a, a) == 0 and ctl.alignment(a, -a) == pytest.approx(4, abs=1e-12)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 10), st.integers(1, 10), seeds)
@settings(max_examples=40)
def test_similarity_profile_is_the_slow_loop(n, m, top, block, seed):
    # the positive's similarity, then the sorted negatives', averaged over anchors; nan where negatives run out
    z, bank = sphere(n, 5, seed), sphere(m, 5, seed // 2 + 1)
    own = torch.randint(m, (n,), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctl, "ROWS", block)
        found = ctl.similarity_profile(z, bank, own, top)
    assert found.shape == (1 + top,) and found.dtype == torch.float64
    lines = []
    for x, p in zip(z.tolist(), own.tolist()):
        s = [dot(x, b) for b in bank.tolist()]
        lines.append([s[p]] + sorted(s[:p] + s[p + 1:], reverse=True))
    for j, v in enumerate(found.tolist()):
        assert math.isnan(v) if j >= m else abs(v - mean([line[j] for line in lines])) <= 1e-12


@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 25), st.sampled_from([0.07, 0.5]), st.integers(1, 10), seeds)
@settings(max_examples=40)
def test_knn_is_the_slow_loop(n, m, k, temperature, block, seed):
    g = torch.Generator().manual_seed(seed)
    train, test = sphere(n, 4, seed), sphere(m, 4, seed // 2 + 1)
    train_y, test_y = torch.randint(4, (n,), generator=g), torch.randint(4, (m,), generator=g)
    right = 0
    for x, y in zip(test.tolist(), test_y.tolist()):
        s = [dot(x, b) for b in train.tolist()]
        votes = [0.0] * 4
        for j in sorted(range(n), key=lambda j: -s[j])[:k]:
            votes[train_y[j]] += math.exp(s[j] / temperature)
        right += votes.index(max(votes)) == y
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctl, "ROWS", block)
        assert ctl.knn_accuracy(train, train_y, test, test_y, k, temperature) == pytest.approx(100 * right / m, abs=1e-9)


def test_knn_small_temperature_does_not_overflow():
    z, y = sphere(30, 8, 0, torch.float32), torch.arange(30) % 3
    assert ctl.knn_accuracy(z, y, z, y, temperature=0.01) == 100


def test_unit_vectors_are_asked_for():
    z, y = sphere(4, 3), torch.tensor([0, 0, 1, 1])
    for bad in (z * 1.01, z * 0, z * math.nan, torch.eye(4).long(), z[0]):
        for name, call in {"z": lambda: ctl.uniformity(bad), "z ": lambda: ctl.tolerance(bad, y),
                           "z1": lambda: ctl.alignment(bad, z), "z2": lambda: ctl.alignment(z, bad),
                           "z  ": lambda: ctl.similarity_profile(bad, z, torch.arange(4)),
                           "bank_or_z2": lambda: ctl.similarity_profile(z, bad, torch.arange(4)),
                           "train_z": lambda: ctl.knn_accuracy(bad, y, z, y),
                           "test_z": lambda: ctl.knn_accuracy(z, y, bad, y)}.items():
            with pytest.raises(ValueError, match=f"^{name.strip()} must"):
                call()
    for labels in (y.double(), y[:3], y[:, None]):
        with pytest.raises(ValueError, match="^labels must"):
            ctl.tolerance(z, labels)
    with pytest.raises(ValueError, match="^z1 and z2 must"):
        ctl.alignment(z, z[:3])


# ---- linear probe ---------------------------------------------------------------------------------------------

def probe_loop(views, y, test, test_y, epochs, lr, momentum, milestones, gamma, batch, seed):
    """SGD by hand on W and b from 0, with the draws that linear_probe documents. Accuracy after every epoch."""
    V, n, d = views.shape
    classes = 1 + int(max(y.max(), test_y.max()))
    W, b = torch.zeros(classes, d, dtype=views.dtype), torch.zeros(classes, dtype=views.dtype)
    mW, mb = torch.zeros_like(W), torch.zeros_like(b)
    g, curve = torch.Generator().manual_seed(seed), []
    for epoch in range(epochs):
        rate = lr * gamma ** sum(epoch >= m for m in milestones)
        order, view = torch.randperm(n, generator=g), torch.randint(V, (n,), generator=g)
        for start in range(0, n, batch):
            at = order[start:start + batch]
            h = views[view[start:start + batch], at]
            e = torch.softmax(h @ W.T + b, dim=1)
            e[torch.arange(len(at)), y[at]] -= 1
            e = e / len(at)
            mW, mb = momentum * mW + e.T @ h, momentum * mb + e.sum(dim=0)
            W, b = W - rate * mW, b - rate * mb
        curve.append(100 * ((test @ W.T + b).argmax(dim=1) == test_y).double().mean().item())
    return curve


def features(n, d, seed, noise):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=g)
    return torch.eye(4, d, dtype=torch.float64)[y] + noise * torch.randn(n, d, generator=g, dtype=torch.float64), y


@pytest.mark.parametrize("V", [1, 2, 3])
def test_linear_probe_is_sgd_by_hand_and_takes_the_last_epoch(V):
    y = features(150, 6, 0, 0)[1]
    views = torch.stack([features(150, 6, 0, 0.5)[0].roll(v, dims=1) for v in range(V)])
    test, test_y = features(211, 6, 9, 0.5)
    past_best = 0
    for seed in range(4):
        options = dict(epochs=6, lr=3.0, momentum=0.9, milestones=(2, 4), gamma=0.2, batch_size=32, seed=seed)
        curve = probe_loop(views, y, test, test_y, *list(options.values())[:5], 32, seed)
        found = ctl.linear_probe(views if V > 1 else views[0], y, test, test_y, **options)
        assert found == pytest.approx(curve[-1], abs=1e-9)
        assert ctl.linear_probe(views if V > 1 else views[0], y, test, test_y, **options) == found  # same seed, same result
        past_best += curve[-1] < max(curve)
    assert past_best  # so that reporting the best epoch would have failed


def test_a_diverging_probe_is_no_result():
    with pytest.raises(ctl.NotFinite, match="probe"):
        ctl.linear_probe(torch.randn(20, 3) * 1e6, torch.arange(20) % 2, torch.randn(4, 3), torch.arange(4) % 2, epochs=3, lr=1e35)


def test_linear_probe_separable():
    h, y = features(120, 8, 1, 0.02)
    assert ctl.linear_probe(h.float(), y, h.float(), y, epochs=10) == 100
    assert ctl.linear_probe(torch.stack([h, h]).float(), y, h.float(), y, epochs=10) == 100


def test_linear_probe_uses_all_views():
    # the second view alone shows class 1's place: from the first alone the test images can't be told apart
    h, y = torch.zeros(60, 2), torch.arange(60) % 2
    shown = torch.nn.functional.one_hot(y, 2).float()
    assert ctl.linear_probe(torch.stack([h, shown]), y, shown, y, epochs=5) == 100
    assert ctl.linear_probe(torch.stack([shown, h]), y, shown, y, epochs=5) == 100


def test_linear_probe_leaves_the_global_generator_and_inputs_alone():
    h, y = features(40, 4, 1, 0.3)
    before = h.clone()
    a = ctl.linear_probe(h, y, h, y, epochs=3)
    torch.rand(1)
    assert ctl.linear_probe(h, y, h, y, epochs=3) == a and torch.equal(h, before)


# ---- memory bank ----------------------------------------------------------------------------------------------

@given(st.integers(1, 9), st.integers(2, 6), st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), st.integers(1, 5), seeds)
@settings(max_examples=40)
def test_bank_updates(N, d, momentum, steps, seed):
    # rows stay unit; exactly the given rows move, to normalise(m·row + (1 - m)·z)
    g = torch.Generator().manual_seed(seed)
    bank = ctl.MemoryBank(N, d, momentum, generator=g)
    assert bank.rows.shape == (N, d) and bank.rows.dtype == torch.float32
    assert (bank.rows.norm(dim=1) - 1).abs().max() <= 4 * EPS32
    for _ in range(steps):
        index = torch.randperm(N, generator=g)[:int(torch.randint(1, N + 1, (1,), generator=g))]
        z = torch.nn.functional.normalize(torch.randn(len(index), d, generator=g), dim=1).requires_grad_()
        old, expected = bank.rows.clone(), bank.rows.tolist()
        for i, x in zip(index.tolist(), z.tolist()):
            mixed = [momentum * a + (1 - momentum) * b for a, b in zip(expected[i], x)]
            length = math.sqrt(dot(mixed, mixed))
            assume(length > 0.05)
            expected[i] = [v / length for v in mixed]
        bank.update(index, z)
        assert not bank.rows.requires_grad
        assert (bank.rows - torch.tensor(expected)).abs().max() <= 1e-5
        still = torch.ones(N, dtype=torch.bool)
        still[index] = False
        assert torch.equal(bank.rows[still], old[still])
        assert (bank.rows.norm(dim=1) - 1).abs().max() <= 4 * EPS32


def test_bank_similarity_and_init():
    init = 3 * sphere(7, 5, 3, torch.float32)
    before = init.clone()
    bank = ctl.MemoryBank(7, 5, init=init)
    assert (bank.rows - init / 3).abs().max() <= 4 * EPS32
    z = sphere(4, 5, 4, torch.float32).requires_grad_()
    s = bank.similarity(z)
    assert s.dtype == torch.float32 and torch.equal(s, z @ bank.rows.T)
    s.sum().backward()
    assert (z.grad - bank.rows.sum(dim=0)).abs().max() <= 1e-6  # the gradient reaches z
    low = bank.similarity(z.detach().bfloat16())
    assert low.dtype == torch.float32 and torch.equal(low, z.detach().bfloat16().float() @ bank.rows.T)
    bank.update(torch.tensor([0]), z[:1])
    assert torch.equal(init, before)  # the caller's tensor is not written to


def test_bank_random_init_is_uniform_and_from_the_generator():
    a, b, c = (ctl.MemoryBank(2000, 128, generator=torch.Generator().manual_seed(s)).rows for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert abs(ctl.uniformity(a) - 3.93753001) <= 5 * math.sqrt(0.2653 / (2000 * 1999))


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan, math.inf])
def test_bank_bad_momentum(momentum):
    with pytest.raises(ValueError, match="^momentum "):
        ctl.MemoryBank(3, 4, momentum)


@pytest.mark.parametrize("init", ["zeros", None, torch.zeros(3, 5), torch.zeros(12), [[1.0] * 4] * 3])
def test_bank_bad_init(init):
    with pytest.raises(ValueError, match="^init "):
        ctl.MemoryBank(3, 4, init=init)


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(ctl)
    assert failed == 0 and tried >= 2


quick = settings(max_examples=10, deadline=None, derandomize=True, database=None)
shapes = functools.cache(ctl.load_shapes)  # made once for the whole file; nothing writes into it


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ctl, "load_shapes", shapes)


@pytest.fixture
def cli(capsys):
    def run(*argv):
        capsys.readouterr()
        status = ctl.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return status, out, err
    return run


def test_edges_found_by_trying_to_break_it():
    with pytest.raises(ValueError, match="tau"):  # 0 in float32
        ctl.contrastive_loss(torch.zeros(1, 2), torch.tensor([0]), 1e-50)
    poles = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert ctl.uniformity(poles, t=200.0) == math.inf
    with pytest.raises(ValueError, match="positive"):
        ctl.similarity_profile(poles, poles, torch.tensor([0]))
    for init in (torch.zeros(2, 2), torch.full((2, 2), math.nan)):
        with pytest.raises(ValueError, match="init"):
            ctl.MemoryBank(2, 2, init=init)
    with pytest.raises(ValueError, match="momentum"):
        ctl.MemoryBank(2, 2, momentum="0.5")
    bank = ctl.MemoryBank(2, 2, momentum=0.5, init=poles)
    bank.update(torch.tensor([0, 1]), -poles)  # mixes to zero: the rows stay
    assert torch.equal(bank.rows, poles)


# ------------------------------------------------------------------------------------------------ network


@pytest.fixture(scope="module")
def full():
    torch.manual_seed(0)
    return ctl.ResNet18()


def test_network_shape(full):
    assert sum(p.numel() for p in full.parameters()) == 11_234_496
    convolutions = [m for m in full.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20 and sum(c.kernel_size == (1, 1) for c in convolutions) == 3
    assert convolutions[0].kernel_size == (3, 3) and convolutions[0].stride == (1, 1) and convolutions[0].in_channels == 3
    assert all(c.bias is None for c in convolutions)
    assert not any(isinstance(m, nn.MaxPool2d) or isinstance(m, nn.AvgPool2d) and m.kernel_size != 1 for m in full.modules())


@pytest.mark.parametrize("width,dim", [(4, 16), (8, 5)])
def test_network_sizes(width, dim):
    model, seen = ctl.ResNet18(width, dim), []
    for stage in model.stages:
        stage.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape[1:])))
    x = torch.randn(3, 3, 32, 32)
    assert model.features(x).shape == (3, 8 * width)
    assert seen == [(width, 32, 32), (2 * width, 16, 16), (4 * width, 8, 8), (8 * width, 4, 4)]
    z = model(x)
    assert z.shape == (3, dim) and z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(z, F.normalize(model.head(model.features(x)), dim=1))


def test_network_init(full):
    for m in full.modules():
        if isinstance(m, nn.Conv2d):
            std = math.sqrt(2 / (m.out_channels * m.kernel_size[0] ** 2))
            assert abs(m.weight.std().item() / std - 1) < 5 / math.sqrt(2 * m.weight.numel()) + 0.005
            assert abs(m.weight.mean().item()) < 5 * std / math.sqrt(m.weight.numel())
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all()
    bound = math.sqrt(6 / (512 + 128))
    assert 0.99 * bound < full.head.weight.abs().max() <= bound and (full.head.bias == 0).all()


@pytest.mark.parametrize("training", [False, True])
def test_network_is_torchvisions(full, training):
    theirs = torchvision.models.resnet18(num_classes=128)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    mine = copy.deepcopy(full)
    state, own = theirs.state_dict(), mine.state_dict()
    assert len(state) == len(own)
    theirs.load_state_dict({name: value for name, value in zip(state, own.values())})
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mine.train(training), theirs.train(training)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), F.normalize(theirs(x), dim=1), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- augmentation


def reference(images, a, start=lambda image: image.float() / 255, end=lambda x: x):
    adjust = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    size, out = images.shape[-1], []
    for i, image in enumerate(images):
        top, left, height, width = a.crop[i].tolist()
        x = TF.resized_crop(start(image), top, left, height, width, [size, size],
                            transforms.InterpolationMode.BILINEAR, antialias=True)
        for operation in a.order[i].tolist():
            x = adjust[operation](x, a.factor[i, operation].item())
        x = TF.hflip(x) if a.flip[i] else x
        out.append(end(TF.rgb_to_grayscale(x, num_output_channels=3) if a.grey[i] else x))
    return torch.stack(out)


def some_images(n, size, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, size, size), generator=g, dtype=torch.uint8)
    if n > 4:
        x[0], x[1], x[2] = 0, 255, 77  # black, white, grey: no hue
        x[3, 0] = x[3, 1]  # two channels tie
    return x


@quick
@given(seed=st.integers(0, 2**31), size=st.sampled_from([32, 16]))
def test_augment_is_torchvisions(seed, size):
    x = some_images(16, size, seed)
    a = ctl.draw_augmentation(16, torch.Generator().manual_seed(seed), size)
    got = ctl.augment(x, a)
    assert got.shape == x.shape and got.dtype == torch.float32 and got.min() >= 0 and got.max() <= 1
    torch.testing.assert_close(got, reference(x, a), atol=1e-5, rtol=0)


def test_augment_is_near_the_pil_pipeline():
    """Which rounds to 256 levels after every step, the hue to 256 too: README says, less than 2 levels in the mean."""
    x = shapes().train_images[:300]
    a = ctl.draw_augmentation(len(x), torch.Generator().manual_seed(0))
    levels = 255 * (ctl.augment(x, a) - reference(x, a, TF.to_pil_image, TF.to_tensor)).abs()
    assert 0.5 < levels.mean() < 2 and levels.max() < 40


def test_augment_every_order():
    x = some_images(24, 16, 5)
    a = ctl.draw_augmentation(24, torch.Generator().manual_seed(3), 16)
    a = dataclasses.replace(a, order=torch.tensor(list(itertools.permutations(range(4)))), grey=torch.zeros(24, dtype=torch.bool))
    torch.testing.assert_close(ctl.augment(x, a), reference(x, a), atol=1e-5, rtol=0)


CROPS = [(0, 0, 32, 32), (31, 0, 1, 32), (0, 31, 32, 1), (31, 31, 1, 1), (0, 0, 1, 1), (5, 7, 1, 20), (3, 0, 29, 2), (16, 16, 16, 16)]


def test_augment_extreme_crops():
    n = len(CROPS)
    x = some_images(n + 5, 32, 9)[5:]
    a = ctl.Augmentation(torch.tensor(CROPS), torch.arange(n) % 2 == 1, torch.arange(4).repeat(n, 1),
                         torch.tensor([[1.0, 1, 1, 0]]).repeat(n, 1), torch.zeros(n, dtype=torch.bool))
    got = ctl.augment(x, a)
    torch.testing.assert_close(got, reference(x, a), atol=1e-5, rtol=0)
    torch.testing.assert_close(got[0], x[0].float() / 255, atol=1e-5, rtol=0)  # nothing done: the image as it is


@quick
@given(seed=st.integers(0, 2**31))
def test_taps_stay_inside_the_crop(seed):
    a = ctl.draw_augmentation(8, torch.Generator().manual_seed(seed), 32)
    a = dataclasses.replace(a, factor=torch.tensor([[1.0, 1, 1, 0]]).repeat(8, 1), grey=torch.zeros(8, dtype=torch.bool))
    a.crop[:len(CROPS)] = torch.where(torch.rand(8, 1, generator=torch.Generator().manual_seed(seed)) < 0.5, torch.tensor(CROPS), a.crop)
    x = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
    for i, (top, left, height, width) in enumerate(a.crop.tolist()):
        x[i, :, top:top + height, left:left + width] = 0
    assert (ctl.augment(x, a) == 0).all()
    weights = ctl._resize_weights(a.crop[:, 0].float(), a.crop[:, 2].float(), 32)
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, 32), atol=1e-5, rtol=0)


@quick
@given(seed=st.integers(0, 2**31), n=st.integers(1, 20))
def test_augment_images_are_independent(seed, n):
    x = some_images(n, 32, seed)
    a = ctl.draw_augmentation(n, torch.Generator().manual_seed(seed), 32)
    p = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(ctl.augment(x[p], a[p]), ctl.augment(x, a)[p])


@pytest.fixture(scope="module")
def draws():
    return ctl.draw_augmentation(20_000, torch.Generator().manual_seed(12), 32)


def alike(a, b, what):
    p = scipy.stats.ks_2samp(np.asarray(a, dtype=float), np.asarray(b, dtype=float)).pvalue
    assert p > 1e-3, (what, p)


@pytest.mark.parametrize("size", [32, 16])
def test_crop_law(size):
    torch.manual_seed(77)
    ours = ctl.draw_augmentation(20_000, torch.Generator().manual_seed(12), size).crop.double()
    blank = torch.zeros(3, size, size)
    theirs = torch.tensor([transforms.RandomResizedCrop.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)]).double()
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all() and (ours[:, 2:] >= 1).all()
    for name, f in {"height": lambda c: c[:, 2], "width": lambda c: c[:, 3], "area": lambda c: c[:, 2] * c[:, 3],
                    "ratio": lambda c: c[:, 3] / c[:, 2], "top": lambda c: c[:, 0], "left": lambda c: c[:, 1],
                    "relative top": lambda c: c[c[:, 2] < size, 0] / (size - c[c[:, 2] < size, 2]),
                    "relative left": lambda c: c[c[:, 3] < size, 1] / (size - c[c[:, 3] < size, 3])}.items():
        alike(f(ours), f(theirs), name)
    if size == 32:
        area = (ours[:, 2] * ours[:, 3] / size**2).mean().item()
        assert abs(area - 0.551) < 0.01, area


def test_colour_law(draws):
    torch.manual_seed(78)
    theirs = [transforms.ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.4, 0.4)) for _ in range(5000)]
    for i in range(4):
        alike(draws.factor[:, i], [t[1 + i] for t in theirs], f"factor {i}")
    codes = (draws.order * torch.tensor([64, 16, 4, 1])).sum(1)
    assert (draws.order.sort(1).values == torch.arange(4)).all()
    _, counts = codes.unique(return_counts=True)
    assert len(counts) == 24 and scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    for flag, share in ((draws.flip, 0.5), (draws.grey, 0.2)):
        assert scipy.stats.binomtest(int(flag.sum()), len(flag), share).pvalue > 1e-3
    independent = torch.stack([draws.flip.double(), draws.grey.double(), *draws.factor.double().T, *draws.crop[:, 2:].double().T])
    correlation = torch.corrcoef(independent) - torch.eye(8)
    correlation[6, 7] = correlation[7, 6] = 0  # height and width do go together
    assert correlation.abs().max() < 5 / math.sqrt(len(draws.flip))


def test_draw_follows_the_generator():
    draw = lambda seed, **more: vars(ctl.draw_augmentation(50, torch.Generator().manual_seed(seed), **more))
    assert all(torch.equal(a, b) for a, b in zip(draw(1).values(), draw(1).values()))
    assert not torch.equal(draw(1)["factor"], draw(2)["factor"])
    assert not draw(1, flip=False)["flip"].any() and draw(1)["flip"].any()
    assert all(torch.equal(draw(1)[key], draw(1, flip=False)[key]) for key in ("crop", "order", "factor", "grey"))


def test_normalise():
    x = torch.rand(2, 3, 8, 8)
    want = TF.normalize(x, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    torch.testing.assert_close(ctl.normalise(x), want)


# --------------------------------------------------------------------------------------------------- data


def test_shapes_are_always_the_same():
    first, second = shapes(), ctl.load_shapes.__wrapped__()
    assert first.sha256() == second.sha256() and first.name == "shapes"
    assert first.train_images.shape == (4000, 3, 32, 32) and first.test_images.shape == (2000, 3, 32, 32)
    assert first.train_images.dtype == torch.uint8 and first.train_labels.dtype == torch.int64
    assert first.train_labels.bincount().tolist() == [400] * 10 and first.test_labels.bincount().tolist() == [200] * 10
    hashes = [hashlib.sha256(i.numpy().tobytes()).digest() for i in torch.cat([first.train_images, first.test_images])]
    assert len(set(hashes)) == 6000


@pytest.mark.parametrize("what", ["pixels", "colour", "brightness", "spread"])
def test_shapes_do_not_give_the_class_away(what):
    d = shapes()
    def h(x):
        x = x.float() / 255 - 0.5
        return {"pixels": x.flatten(1), "colour": x.mean((2, 3)) * 4, "brightness": x.mean((1, 2, 3))[:, None] * 4,
                "spread": torch.cat([x.mean((2, 3)), x.std((2, 3))], 1) * 4}[what]
    limit = {"pixels": 25, "colour": 16, "brightness": 16, "spread": 25}[what]
    n = 2000
    accuracy = ctl.linear_probe(h(d.train_images[:n]), d.train_labels[:n], h(d.test_images[:1000]), d.test_labels[:1000],
                                epochs=12, lr=0.01 if what == "pixels" else 1.0, milestones=(8, 10))
    assert 5 < accuracy < limit, accuracy


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=40), seed=st.integers(0, 100))
def test_balanced_order(labels, seed):
    y = torch.tensor(labels)
    order = ctl.balanced_order(y, seed)
    assert sorted(order.tolist()) == list(range(len(y)))
    there = y.bincount(minlength=5)
    for m in range(len(y) + 1):
        count = y[order[:m]].bincount(minlength=5)
        assert all(count[c] == min(there[c], count.max()) or count[c] == count.max() - 1 for c in range(5))


def test_balanced_order_is_random_and_takes_subsets():
    y = torch.arange(100) % 10
    a, b = ctl.balanced_order(y), ctl.balanced_order(y, 1)
    assert torch.equal(a, ctl.balanced_order(y)) and not torch.equal(a, b)
    config = ctl.make_config("smoke", subset=50, test_subset=30)
    data, available = ctl.take_subset(shapes(), config)
    assert available == 4000 and data.train_labels.bincount().tolist() == [5] * 10 and data.test_labels.bincount().tolist() == [3] * 10
    other, _ = ctl.take_subset(shapes(), ctl.make_config("smoke", subset=50, test_subset=30, seed=1))
    assert data.sha256() == other.sha256()
    with pytest.raises(ctl.BadInput, match="subset 4001"):
        ctl.take_subset(shapes(), ctl.make_config("smoke", subset=4001))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def make_download(name, where, monkeypatch):
    """The files of a small dataset in the real format, torchvision's sums and addresses turned to them, and the images."""
    rng, where = np.random.default_rng(0), Path(where)
    where.mkdir(parents=True)
    real = torchvision.datasets.utils._urlretrieve  # asks a reply for its length, which a file's has not

    def retrieve(url, filename, *rest):
        return shutil.copy(url.removeprefix("file://"), filename) if url.startswith("file://") else real(url, filename, *rest)
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", retrieve)
    if name == "svhn":
        truth, split = [], {}
        for part, n in (("train", 30), ("test", 20)):
            x = rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
            y = (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]
            scipy.io.savemat(where / f"{part}_32x32.mat", {"X": x, "y": y})
            split[part] = [(where / f"{part}_32x32.mat").as_uri(), f"{part}_32x32.mat", md5(where / f"{part}_32x32.mat")]
            truth += [x.transpose(3, 2, 0, 1), y[:, 0] % 10]
        monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split)
        return truth
    ten = name == "cifar10"
    cls, key = (torchvision.datasets.CIFAR10, "labels") if ten else (torchvision.datasets.CIFAR100, "fine_labels")
    base = where / cls.base_folder
    base.mkdir()
    names = [[f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]] if ten else [["train"], ["test"]]
    truth, lists = [], []
    for files in names:
        xs, ys, entries = [], [], []
        for file in files:
            x = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
            y = rng.integers(0, 10 if ten else 100, 10).tolist()
            (base / file).write_bytes(pickle.dumps({"data": x, key: y}))
            xs.append(x.reshape(-1, 3, 32, 32)), ys.extend(y), entries.append([file, md5(base / file)])
        truth += [np.concatenate(xs), np.array(ys)]
        lists.append(entries)
    meta = dict(cls.meta)
    (base / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [str(i) for i in range(10 if ten else 100)]}))
    meta["md5"] = md5(base / meta["filename"])
    with tarfile.open(where / cls.filename, "w:gz") as tar:
        tar.add(base, cls.base_folder)
    shutil.rmtree(base)
    for attribute, value in dict(url=(where / cls.filename).as_uri(), tgz_md5=md5(where / cls.filename), train_list=lists[0],
                                 test_list=lists[1], meta=meta).items():
        monkeypatch.setattr(cls, attribute, value)
    return truth


def break_address(name, monkeypatch, url):
    if name == "svhn":
        split = torchvision.datasets.SVHN.split_list
        monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", {k: [f"{url}/{v[1]}", *v[1:]] for k, v in split.items()})
    else:
        cls = ctl.DOWNLOADS[name]
        monkeypatch.setattr(cls, "url", f"{url}/{cls.filename}")


NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_download(name, tmp_path, monkeypatch):
    truth = make_download(name, tmp_path / "server", monkeypatch)
    data = ctl.load_dataset(name, tmp_path / "data")
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    assert data.name == name and [t.dtype for t in tensors] == [torch.uint8, torch.int64] * 2
    for got, want in zip(tensors, truth):
        assert np.array_equal(got.numpy(), want)
    if name == "svhn":
        assert data.train_labels.min() == 0 and data.train_labels[9] == 0
    break_address(name, monkeypatch, NOWHERE)  # there already: no network
    assert ctl.load_dataset(name, tmp_path / "data").sha256() == data.sha256()
    with pytest.raises(ctl.BadInput, match=f"(?s)cannot download {name}.*--dataset"):
        ctl.load_dataset(name, tmp_path / "empty")
    with pytest.raises(ctl.BadInput, match="size"):
        ctl.load_dataset(name, tmp_path / "data", size=16)


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
def test_download_with_wrong_sum(name, tmp_path, monkeypatch):
    make_download(name, tmp_path / "server", monkeypatch)
    for file in (tmp_path / "server").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(ctl.Stop) as stop:
        ctl.load_dataset(name, tmp_path / "data")
    assert stop.value.status == 1 and name in str(stop.value)


def make_folder(root, train=("a", "b"), test=("a", "b"), each=6):
    g = np.random.default_rng(1)
    for part, classes in (("train", train), ("test", test)):
        for c in classes:
            (root / part / c).mkdir(parents=True)
            for i in range(each):
                Image.fromarray(g.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / part / c / f"{i}.png")
    return root


def test_folder(tmp_path):
    root = make_folder(tmp_path / "pets", train=("zebra", "ant", "cat"), test=("cat", "zebra"), each=1)
    Image.new("RGB", (100, 50), (10, 200, 30)).save(root / "train/ant/1.png")
    Image.new("L", (20, 45), 99).save(root / "train/ant/2.png")
    Image.new("RGBA", (32, 32), (1, 2, 3, 128)).save(root / "train/ant/3.png")
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255  # the middle square
    Image.fromarray(wide).save(root / "train/ant/4.png")
    data = ctl.load_dataset(str(root))
    assert data.name == "pets" and data.train_images.shape == (7, 3, 32, 32) and data.train_images.dtype == torch.uint8
    assert data.train_labels.tolist() == [0, 0, 0, 0, 0, 1, 2] and data.test_labels.tolist() == [1, 2]
    plain = np.asarray(Image.open(root / "train/ant/0.png")).transpose(2, 0, 1)
    assert np.array_equal(data.train_images[0].numpy(), plain)
    for row, colour in ((1, (10, 200, 30)), (2, (99, 99, 99)), (3, (1, 2, 3)), (4, (255, 255, 255))):
        assert (data.train_images[row] == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(), row
    assert ctl.load_folder(root, 16).train_images.shape == (7, 3, 16, 16)
    (root / "train/ant/notes.txt").write_text("no image")
    assert len(ctl.load_folder(root).train_images) == 7
    assert ctl.load_folder(root.rename(tmp_path / "cifar10")).name == "cifar10-folder"


def spoil_missing(root):
    shutil.rmtree(root)
    return "train"


def spoil_no_test(root):
    shutil.rmtree(root / "test")
    return "test"


def spoil_extra(root):
    shutil.copytree(root / "test/a", root / "test/yak")
    return "yak"


def spoil_broken(root):
    (root / "train/b/3.png").write_bytes((root / "train/b/3.png").read_bytes()[:200])
    return "3.png"


def spoil_nonsense(root):
    (root / "test/b/3.png").write_bytes(b"no png\n")
    return "3.png"


def spoil_empty_class(root):
    (root / "train/aardvark").mkdir()
    return "aardvark"


def spoil_empty_train(root):
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return "train"


def spoil_is_a_file(root):
    shutil.rmtree(root)
    root.write_text("")
    return "train"


def spoil_16_bit(root):
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(root / "test/a/deep.png")
    return "8 bits"


def spoil_float(root):
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(root / "train/a/deep.tiff")
    return "8 bits"


@pytest.mark.parametrize("name", ["a|b", "tab\tle", "\udcff", "x" * 101, "[link]"])
def test_names_of_folders_that_tables_cannot_hold(name, tmp_path, cli):
    root = make_folder(tmp_path / name, each=1)
    status, out, err = cli("--preset", "smoke", "--dataset", root)
    assert status == 2 and err.count("\n") == 1 and "rename it" in err and not Path("results").exists()
    (tmp_path / "fine name").symlink_to(root)
    assert cli("--preset", "smoke", "--dataset", tmp_path / "fine name")[0] == 2  # the folder's own name counts


def test_a_presets_own_number_of_images_means_at_most(tmp_path):
    data = ctl.load_folder(make_folder(tmp_path / "few"))
    config = ctl.make_config("quick", dataset="few", size=32)
    kept, available = ctl.take_subset(data, config)
    assert len(kept.train_labels) == 12 == available and len(kept.test_labels) == 12
    assert str(ctl.cell_path(config, "few")).endswith("few/contrastive_tau0.3_size-32_seed0")
    with pytest.raises(ctl.BadInput, match="12 images"):
        ctl.take_subset(data, ctl.make_config("quick", dataset="few", size=32, subset=13))


@pytest.mark.parametrize("spoil", [v for k, v in list(globals().items()) if k.startswith("spoil_")])
def test_bad_folder(spoil, tmp_path, cli):
    root = make_folder(tmp_path / "pets")
    named = spoil(root)
    with pytest.raises(ctl.BadInput) as error:
        ctl.load_folder(root)
    assert named in str(error.value) and "\n" not in str(error.value)
    status, _, err = cli("--preset", "smoke", "--dataset", root)
    assert status == 2 and err.count("\n") == 1 and not (tmp_path / "results").exists() and not (tmp_path / "runs").exists()


def broken_images(root):
    """(the image, its content), broken in one way each: cut off, its head changed, of another kind, of absurd size."""
    for path in sorted(root.glob("*/*/*.png")):
        whole = path.read_bytes()
        for size in (0, 1, 8, 16, 33, 40, len(whole) // 2):
            yield path, whole[:size]
        for place in (0, 3, 12, 20):  # the signature, the first chunk's name, its width
            yield path, whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:]
        yield path, b"\xff\xd8\xff\xe0" + whole[4:]  # says that it is a JPEG
        yield path, b"<svg xmlns='http://www.w3.org/2000/svg'/>"
        yield path, whole[:16] + struct.pack(">II", 2 ** 30, 2 ** 30) + whole[24:]


def test_hundreds_of_broken_images(tmp_path, cli):
    root = make_folder(tmp_path / "pets", each=4)
    cases = list(broken_images(root))
    assert len(cases) >= 200
    for path, content in cases:
        whole = path.read_bytes()
        path.write_bytes(content)
        status, out, err = cli("--preset", "smoke", "--dataset", root)
        assert status == 2 and out == "" and err.count("\n") == 1 and str(path) in err, (path, content[:40], err)
        path.write_bytes(whole)
    assert len(ctl.load_folder(root).train_images) == 8 and not Path("results").exists() and not Path("runs").exists()


# ------------------------------------------------------------------------------- settings and command line

BAD = """
--tau 0.3 --loss simple | tau
--tau 0.3 --loss triplet | tau
--tau 0.3 --loss hard-simple | tau
--tau 0 | tau
--tau -1 | tau
--tau nan | tau
--tau inf | tau
--tau abc | tau
--tau | tau
--k 5 | k
--k 5 --loss simple | k
--alpha 0.1 --loss triplet | alpha
--k 5 --alpha 0.1 --loss hard | k and alpha
--k 0 --loss hard | k
--k 1.5 --loss hard | k
--alpha 0 --loss hard | alpha
--alpha 1.5 --loss hard | alpha
--nonsense 1 | nonsense
--ta 0.3 | --ta
--preset nonsense | preset
--loss nonsense | loss
--milestones 1 2 --schedule cosine | milestones
--milestones 1 2 | milestones
--gamma 0.5 | gamma
--milestones 2 1 --schedule step | milestones
--milestones 1.5 --schedule step | milestones
--batch-size 1 | batch_size
--batch-size 0 | batch_size
--size 20 | size
--size 8 | size
--epochs 0 | epochs
--epochs 1.5 | epochs
--lr 0 | lr
--lr nan | lr
--momentum 1.5 | momentum
--bank-momentum -0.1 | bank_momentum
--bank-init zeros | bank-init
--seed -1 | seed
--subset 4001 | subset 4001
--test-subset 2001 | test_subset 2001
--subset 5 | at least 10
--dataset no/such/folder | no/such/folder
--match-step --loss simple | match_step
--precision float16 | precision
stray | stray
--device nonsense | device
--device cuda:99 | device
--threads 0 | threads
--report --tau 0.3 | tau
--report | no records
--force=yes | force
""".strip().splitlines()


@pytest.mark.parametrize("line", BAD)
def test_bad_command_line(line, cli, tmp_path):
    line, names = line.split(" | ")
    argv = line.split()
    status, out, err = cli(*([] if "--preset" in argv or "--report" in argv else ["--preset", "smoke"]), *argv)
    assert status == 2
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("ctl.py: ") and names in err
    assert list(tmp_path.iterdir()) == []


def test_help(cli):
    status, out, err = cli("--help")
    assert status == 0 and err == ""
    for field in dataclasses.fields(ctl.Config):
        assert f"--{field.name.replace('_', '-')}" in out and field.metadata["help"].split("\n")[0][:20] in out
    for preset in ctl.PRESETS:
        assert preset in out
    assert "--report" in out


def test_presets():
    paper = ctl.make_config()
    assert (paper.loss, paper.tau, paper.dataset, paper.epochs, paper.batch_size, paper.width, paper.dim) == (
        "contrastive", 0.3, "cifar10", 200, 128, 64, 128)
    assert (paper.lr, paper.momentum, paper.weight_decay, paper.milestones, paper.bank_momentum, paper.bank_init, paper.flip) == (
        0.03, 0.9, 5e-4, (160, 190), 0.5, "random", True)
    mini = ctl.make_config("mini", loss="hard")
    assert (mini.subset, mini.width, mini.batch_size, mini.epochs, mini.schedule, mini.lr, mini.warmup, mini.alpha, mini.bank_init,
            mini.k) == (5000, 16, 64, 60, "cosine", 0.1, 3.0, 0.0819, "embeddings", None)
    assert ctl.make_config("mini").alpha is None and ctl.make_config("mini", loss="hard", k=7).alpha is None
    assert ctl.make_config("paper", loss="hard").k == 4095 and ctl.make_config("paper", loss="simple").tau is None
    assert ctl.make_config("smoke", epochs=9).epochs == 9 and ctl.make_config("smoke").dataset == "shapes"
    assert ctl.make_config("smoke", schedule="step", milestones=(1, 2)).milestones == (1, 2)
    for preset in ctl.PRESETS:
        for loss in ctl.LOSSES:
            assert ctl.make_config(preset, loss=loss).preset == preset
    for wrong in (dict(tau="0.3"), dict(tau=True), dict(epochs=2.0), dict(flip=1), dict(loss=None), dict(milestones=(3, 3), schedule="step")):
        with pytest.raises(ctl.BadInput):
            ctl.make_config("smoke", **wrong)
    assert ctl.make_config("smoke", tau=1).tau == 1.0 and type(ctl.make_config("smoke", tau=1).tau) is float


def test_learning_rate():
    paper = ctl.make_config()
    for at, lr in ((0, 0.03), (159.99, 0.03), (160, 0.003), (189.9, 0.003), (190, 0.0003), (199.9, 0.0003)):
        assert ctl.learning_rate(paper, at) == pytest.approx(lr)
    mini = ctl.make_config("mini")
    assert ctl.learning_rate(mini, 0) == 0 and ctl.learning_rate(mini, 60) == pytest.approx(0)
    assert ctl.learning_rate(mini, 30) == pytest.approx(0.05)
    assert ctl.learning_rate(mini, 1.5) == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 1.5 / 60)) / 2)
    assert ctl.learning_rate(mini, 3) == pytest.approx(0.1 * (1 + math.cos(math.pi * 3 / 60)) / 2)
    assert ctl.learning_rate(ctl.make_config("mini", warmup=0.0), 0) == 0.1
    rates = [ctl.learning_rate(mini, 3 + i / 10) for i in range(570)]
    assert rates == sorted(rates, reverse=True)


def test_cell_paths_differ():
    path = lambda **given: str(ctl.cell_path(ctl.make_config("smoke", **given), "shapes"))
    assert path(tau=0.3) == "smoke/shapes/contrastive_tau0.3_seed0" == path()
    assert path(tau=1) == "smoke/shapes/contrastive_tau1.0_seed0"
    assert path(loss="simple", seed=3) == "smoke/shapes/simple_seed3"
    assert "_k-7" in path(loss="hard", k=7)
    assert "_milestones-1-2" in path(schedule="step", milestones=(1, 2))
    given = [dict(), dict(tau=0.07), dict(seed=1), dict(loss="hard"), dict(loss="hard", tau=0.07), dict(loss="simple"), dict(loss="triplet"),
             dict(loss="hard-simple"), dict(loss="hard", k=3), dict(loss="hard", alpha=0.5), dict(epochs=4), dict(width=8), dict(flip=False),
             dict(match_step=True), dict(bank_init="random"), dict(subset=90), dict(test_subset=90), dict(lr=0.1), dict(dim=8),
             dict(batch_size=8), dict(momentum=0.5), dict(weight_decay=0.0), dict(bank_momentum=0.1), dict(warmup=0.0), dict(size=16),
             dict(precision="bfloat16"), dict(eval_every=0), dict(schedule="step"), dict(schedule="step", milestones=(1,)), dict(schedule="step", gamma=0.5)]
    assert len({path(**g) for g in given}) == len(given)
    assert path(device="cpu", threads=2, data="x", results="y", runs="z", force=True) == path()


# ---------------------------------------------------------------------------------------------- whole runs

SMOKE = ["--preset", "smoke", "--tau", "0.3", "--threads", "1"]
CELL = "smoke/shapes/contrastive_tau0.3_seed0"


def record_of(folder="."):
    found = list(Path(folder, "results").rglob("*.json"))
    assert len(found) == 1, found
    return json.loads(found[0].read_text())


def outside(record):
    return {k: v for k, v in record.items() if k not in ("timing", "environment")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("undisturbed"), ctl.load_shapes
    ctl.load_shapes = shapes
    try:
        assert ctl.main([*SMOKE, "--results", str(folder / "results"), "--runs", str(folder / "runs")]) == 0
    finally:
        ctl.load_shapes = before
    return folder


def test_record(undisturbed, monkeypatch):
    text = (undisturbed / "results" / f"{CELL}.json").read_text()
    r = json.loads(text)
    assert {"config", "protocol_version", "environment", "history", "final", "timing", "sha256", "data"} == r.keys()
    assert text == json.dumps(r, indent=1, sort_keys=True) + "\n" and "NaN" not in text
    assert r["config"]["tau"] == 0.3 and r["config"]["dataset"] == "shapes" and r["config"]["preset"] == "smoke"
    assert not r["config"].keys() & {"device", "threads", "data", "results", "runs", "force"}
    assert r["data"]["train"] == 100 and r["data"]["test"] == 100 and r["protocol_version"] == ctl.PROTOCOL_VERSION
    assert r["timing"].keys() == {"seconds"} and r["timing"]["seconds"] > 0
    assert {"device", "threads", "torch", "torchvision", "python", "source_sha256"} <= r["environment"].keys()
    monkeypatch.setattr(ctl, "__file__", os.devnull)  # edited while a run lasts
    assert ctl.environment(torch.device("cpu"), False)["source_sha256"] == r["environment"]["source_sha256"]
    monkeypatch.undo()
    assert r["environment"]["source_sha256"] == hashlib.sha256(Path(ctl.__file__).read_bytes()).hexdigest()
    metrics = {"accuracy", "accuracy_heldout", "knn", "uniformity", "tolerance", "alignment", "profile"}
    assert r["final"].keys() == metrics | {"untrained"} and r["final"]["untrained"].keys() == metrics
    assert len(r["final"]["profile"]) == 11 and 0 <= r["final"]["accuracy"] <= 100
    assert [e["epoch"] for e in r["history"]] == [1, 2, 3] and "knn" in r["history"][1] and "knn" not in r["history"][0]
    assert all(math.isfinite(e["loss"]) for e in r["history"]) and r["history"][0]["lr"] == 0
    rest = {k: v for k, v in r.items() if k not in ("sha256", "timing", "environment")}
    assert r["sha256"] == hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    assert ctl.read_record(undisturbed / "results" / f"{CELL}.json") == r
    assert r["final"]["uniformity"] != r["final"]["untrained"]["uniformity"]


def test_same_command_elsewhere_gives_the_same(undisturbed, cli, tmp_path):
    torch.manual_seed(99)  # nothing depends on the global generator
    status, out, err = cli(*SMOKE)
    assert status == 0 and err == "" and "record: results/" in out
    assert outside(record_of(tmp_path)) == outside(record_of(undisturbed))
    before = (tmp_path / "results" / f"{CELL}.json").read_bytes()
    status, out, _ = cli(*SMOKE)
    assert status == 0 and "already" in out and (tmp_path / "results" / f"{CELL}.json").read_bytes() == before
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")} == {"results", "runs"}
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_other_tau_and_seed_give_others(undisturbed, cli, tmp_path):
    reference_record = record_of(undisturbed)
    for more in (["--tau", "0.7"], ["--seed", "1"]):
        assert cli(*SMOKE, *more)[0] == 0
    found = sorted(str(p.relative_to("results")) for p in Path("results").rglob("*.json"))
    assert found == ["smoke/shapes/contrastive_tau0.3_seed1.json", "smoke/shapes/contrastive_tau0.7_seed0.json"]
    seed1, tau7 = (json.loads(Path("results", f).read_text()) for f in found)
    losses = [[e["loss"] for e in r["history"]] for r in (reference_record, seed1, tau7)]
    assert len({tuple(l) for l in losses}) == 3 and len({r["sha256"] for r in (reference_record, seed1, tau7)}) == 3
    assert tau7["final"]["untrained"] == reference_record["final"]["untrained"] != seed1["final"]["untrained"]
    assert tau7["data"] == reference_record["data"] == seed1["data"]
    status, out, _ = cli("--report")
    assert status == 0 and "contrastive" in out and "0.3" in out and "0.7" in out and "preset smoke, dataset shapes" in out
    assert cli("--report", "--preset", "mini")[0] == 2


def test_edited_record_is_refused(undisturbed, cli):
    shutil.copytree(undisturbed / "results", "results")
    path = Path("results", f"{CELL}.json")
    r = json.loads(path.read_text())
    for spoilt in (json.dumps({**r, "final": {**r["final"], "accuracy": 99.0}}), "{", "[]", "{}", ""):
        path.write_text(spoilt)
        status, _, err = cli(*SMOKE)
        assert status == 2 and "sha256" in err and err.count("\n") == 1
        assert path.read_text() == spoilt
    assert cli("--report")[0] == 2


def test_record_of_another_run_is_refused(undisturbed, cli):
    path = Path("results", CELL.replace("0.3", "0.7") + ".json")
    path.parent.mkdir(parents=True)
    shutil.copy(undisturbed / "results" / f"{CELL}.json", path)
    status, _, err = cli("--preset", "smoke", "--tau", "0.7")
    assert status == 2 and "tau is 0.3 there, 0.7 here" in err


SHORT = ["--preset", "smoke", "--epochs", "1", "--threads", "1"]


@pytest.mark.parametrize("more,name", [
    (["--loss", "contrastive"], "contrastive_tau0.3_epochs-1"), (["--loss", "hard"], "hard_tau0.3_epochs-1"),
    (["--loss", "simple"], "simple_epochs-1"), (["--loss", "hard-simple"], "hard-simple_epochs-1"),
    (["--loss", "triplet"], "triplet_epochs-1"), (["--loss", "hard", "--k", "5"], "hard_tau0.3_epochs-1_k-5"),
    (["--match-step", "--tau", "0.07"], "contrastive_tau0.07_epochs-1_match_step-True"),
    (["--bank-init", "random"], "contrastive_tau0.3_epochs-1_bank_init-random"),
    (["--no-flip", "--precision", "bfloat16"], "contrastive_tau0.3_epochs-1_flip-False_precision-bfloat16"),
    (["--size", "16", "--batch-size", "33"], "contrastive_tau0.3_epochs-1_batch_size-33_size-16")])
def test_each_kind_of_run(more, name, cli):
    status, out, err = cli(*SHORT, *more)
    assert status == 0, err
    (path,) = Path("results").rglob("*.json")
    assert path.name.startswith(name.split("_epochs")[0]) and path.stem.endswith("_seed0")
    for part in name.split("_epochs-1")[1].split("_"):
        assert part in path.stem
    assert "_epochs-1" in path.stem


def test_match_step_scales_the_loss():
    s, p = torch.rand(4, 9), torch.arange(4)
    plain, matched = (ctl.make_config("smoke", tau=0.07, match_step=m) for m in (False, True))
    torch.testing.assert_close(0.07 * ctl.training_loss(plain, s, p, None), ctl.training_loss(matched, s, p, None))


def test_folder_run(cli, tmp_path):
    make_folder(tmp_path / "pets")
    status, _, err = cli(*SHORT, "--dataset", "pets", "--subset", "12", "--test-subset", "12", "--batch-size", "4")
    assert status == 0, err
    (path,) = Path("results").rglob("*.json")
    r = json.loads(path.read_text())
    assert path.parts[:3] == ("results", "smoke", "pets") and r["config"]["dataset"] == "pets" and str(tmp_path) not in path.read_text()


def test_fallback(cli, monkeypatch):
    def unreachable(*_):
        raise ctl.BadInput("cannot download cifar10 (no route)")
    monkeypatch.setattr(ctl, "load_download", unreachable)
    small = ["--preset", "mini", "--epochs", "1", "--width", "4", "--dim", "8", "--subset", "60", "--test-subset", "60", "--threads", "1"]
    status, out, err = cli(*small)
    assert status == 0 and err == "" and "NOTICE" in out and "shapes" in out and "NOT CIFAR-10" in out
    (path,) = Path("results").rglob("*.json")
    assert json.loads(path.read_text())["config"]["dataset"] == "shapes" and path.parts[:3] == ("results", "mini", "shapes")
    status, out, err = cli(*small, "--dataset", "cifar10")  # named outright: never replaced
    assert status == 2 and "NOTICE" not in out and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------- resume


def kill_at(monkeypatch, *when, number=signal.SIGTERM):
    """SIGTERM while step number `when` (from 1, counted over the calls) is at work."""
    count, step = itertools.count(1), TRAIN_STEP

    def killing(*args, **kwargs):
        if next(count) in when:
            os.kill(os.getpid(), number)
        return step(*args, **kwargs)
    monkeypatch.setattr(ctl, "train_step", killing)


TRAIN_STEP = ctl.train_step
CHECKPOINT = Path("runs", f"{CELL}.pt")


@pytest.mark.parametrize("at", [1, 4, 8, 20, 7, 14, 21])  # 7 steps an epoch: 7, 14 and 21 are the last of theirs
def test_interrupted_run_goes_on_exactly(at, undisturbed, cli, monkeypatch):
    kill_at(monkeypatch, at)
    status, _, err = cli(*SMOKE)
    assert status == 143 and "SIGTERM" in err and err.count("\n") == 1 and CHECKPOINT.exists()
    assert not list(Path("results").rglob("*.json"))
    kill_at(monkeypatch)
    torch.manual_seed(at)
    status, out, err = cli(*SMOKE)
    assert status == 0, err
    assert "going on from" in out
    assert outside(record_of()) == outside(record_of(undisturbed))


def test_hung_up(undisturbed, cli, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
        kill_at(m, 4, number=signal.SIGHUP)
        status, _, err = cli(*SMOKE)
    assert status == 129 and "SIGHUP" in err and err.count("\n") == 1
    kill_at(monkeypatch)
    assert "going on from" in cli(*SMOKE)[1] and outside(record_of()) == outside(record_of(undisturbed))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        shutil.rmtree("results"), shutil.rmtree("runs")
        kill_at(monkeypatch, 4, number=signal.SIGHUP)
        assert cli(*SMOKE)[0] == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path):
    path = tmp_path / "x.pt"
    ctl.save_checkpoint(path, {"step": 1})
    ctl.save_checkpoint(path, {"step": 2})
    path.write_bytes(path.read_bytes()[:-1])
    ctl.save_checkpoint(path, {"step": 3})
    assert ctl.load_checkpoint(path) == {"step": 3}
    path.unlink()
    assert ctl.load_checkpoint(path) == {"step": 1}


def test_interrupted_many_times(undisturbed, cli, monkeypatch):
    for _ in range(4):
        kill_at(monkeypatch, 4, number=signal.SIGINT)
        assert cli(*SMOKE)[0] == 130
    kill_at(monkeypatch)
    assert cli(*SMOKE)[0] == 0
    assert record_of()["sha256"] == record_of(undisturbed)["sha256"]


def test_handlers_are_put_back(cli, monkeypatch):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    kill_at(monkeypatch, 1)
    assert cli(*SHORT)[0] == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damaged_checkpoint(undisturbed, cli, monkeypatch):
    for at in (3, 2):
        kill_at(monkeypatch, at)
        assert cli(*SMOKE)[0] == 143
    previous = CHECKPOINT.with_suffix(".previous")
    assert previous.exists()
    flip_bit(CHECKPOINT)
    kill_at(monkeypatch, 1)
    status, out, _ = cli(*SMOKE)
    assert status == 143 and "damaged" in out and "epoch 1, step 4" in out  # the previous: three steps done
    for path in (CHECKPOINT, previous):
        path.write_bytes(path.read_bytes()[:20])
    kill_at(monkeypatch)
    status, out, _ = cli(*SMOKE)
    assert status == 0 and out.count("damaged") == 2 and "going on" not in out
    assert record_of()["sha256"] == record_of(undisturbed)["sha256"]


def test_checkpoint_of_another_tau(cli, monkeypatch):
    kill_at(monkeypatch, 2)
    assert cli(*SMOKE)[0] == 143
    other = Path("runs", CELL.replace("0.3", "0.7") + ".pt")
    shutil.copy(CHECKPOINT, other)
    kill_at(monkeypatch)
    status, _, err = cli(*SMOKE, "--tau", "0.7")
    assert status == 2 and "tau is 0.3 there, 0.7 here" in err and err.count("\n") == 1
    assert other.read_bytes() == CHECKPOINT.read_bytes() and not list(Path("results").rglob("*.json"))
    assert cli(*SMOKE, "--tau", "0.7", "--force")[0] == 0


def test_force_goes_on_from_its_own_checkpoint(undisturbed, cli, monkeypatch):
    assert cli(*SMOKE)[0] == 0
    record = Path("results", f"{CELL}.json").read_bytes()
    kill_at(monkeypatch, 10)
    assert cli(*SMOKE, "--force")[0] == 143  # from the beginning, though there is a finished checkpoint
    kill_at(monkeypatch)
    status, out, _ = cli(*SMOKE, "--force")
    assert status == 0 and "going on from" in out and "step 4" in out
    assert outside(record_of()) == outside(json.loads(record))
    assert "going on from" not in cli(*SMOKE, "--force")[1]
    shutil.rmtree("results"), shutil.rmtree("runs")
    kill_at(monkeypatch, 10)
    assert cli(*SMOKE)[0] == 143
    kill_at(monkeypatch)
    assert "going on from" not in cli(*SMOKE, "--force")[1]  # a checkpoint of a run that was not forced is not what is asked for


def test_force_that_is_broken_off_while_it_evaluates(undisturbed, cli, monkeypatch):
    assert cli(*SMOKE)[0] == 0
    evaluate = ctl.evaluate
    monkeypatch.setattr(ctl, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM) if CHECKPOINT.with_suffix(".previous").exists() else evaluate(*args))
    assert cli(*SMOKE, "--force")[0] == 143
    monkeypatch.setattr(ctl, "evaluate", evaluate)
    monkeypatch.setattr(ctl, "seconds_per_step", lambda *_: 10.0)
    status, out, _ = cli(*SMOKE, "--force")
    assert status == 0 and "trained, to be evaluated" in out and "epoch    1" not in out and "about 0 s of training" in out
    for path in Path("results").rglob("*.json"):
        path.unlink()
    assert "going on from" not in cli(*SMOKE, "--force")[1]  # that one has left its record: asked again, it is run again


def test_images_per_second_are_of_the_images(cli, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(ctl.time, "perf_counter", lambda: float(next(ticks)))
    status, out, _ = cli(*SHORT, "--batch-size", "3000")
    ticks_of_an_epoch = 100 / float(re.search(r"([0-9]+) images/s", out)[1])
    assert status == 0 and 1 <= ticks_of_an_epoch <= 10


@pytest.mark.parametrize("line,word", [(["--profile", "--lr", "1e30", "--warmup", "0"], "finite"),
                                       (["--dim", "2000000000"], "memory")])
def test_failures_are_one_line(line, word, cli, monkeypatch):
    monkeypatch.setattr(ctl, "profile", functools.partial(ctl.profile, seconds=0))
    status, out, err = cli(*SHORT, *line)
    assert status == 1 and err.count("\n") == 1 and word in err and not list(Path("results").rglob("*.json"))


def test_fallback_is_no_way_around_bad_input(cli, monkeypatch):
    assert cli("--preset", "mini", "--size", "24")[0] == 2
    Path("afile").write_text("")
    monkeypatch.setattr(ctl, "train", lambda config: None)
    status, out, err = cli("--preset", "mini", "--data", "afile", "--subset", "70")
    assert status == 0 and "NOTICE" in out and "afile" in out
    status, out, err = cli("--preset", "mini", "--data", "afile", "--dataset", "cifar10")
    assert status == 0  # train is not run here: the data set is named outright


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory. Tried\nto"), RuntimeError("MPS backend out of memory")])
@pytest.mark.parametrize("where", [(ctl, "pick_device"), (ctl.Image, "open")])
def test_out_of_memory(error, where, cli, monkeypatch, tmp_path):
    def fail(*_):
        raise error
    if where[0] is ctl.Image:
        make_folder(tmp_path / "images")
    monkeypatch.setattr(*where, fail)
    status, _, err = cli("--preset", "smoke", "--threads", "1", "--dataset", "images" if where[0] is ctl.Image else "shapes")
    if where[0] is ctl.Image and not isinstance(error, MemoryError):  # then it's the file's fault
        assert status == 2
    else:
        assert status == 1 and err.startswith("ctl.py: out of memory") and err.count("\n") == 1


def test_a_file_system_without_locks(cli, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(ctl.fcntl, "flock", flock)
    status, _, err = cli(*SMOKE)
    assert status == 1 and "No locks available" in err and err.count("\n") == 1


def test_two_writers_of_one_file_with_one_process_number(tmp_path, monkeypatch):
    replace, path = os.replace, tmp_path / "file"

    def meanwhile(*args):
        monkeypatch.setattr(ctl.os, "replace", replace)
        ctl.write_whole(path, b"theirs")  # as from another machine
        replace(*args)

    monkeypatch.setattr(ctl.os, "replace", meanwhile)
    ctl.write_whole(path, b"ours")
    assert path.read_bytes() == b"ours" and os.listdir(tmp_path) == ["file"]


def test_only_cuda_copies_without_waiting():
    class Spy:
        def to(self, device, non_blocking):
            return device, non_blocking
    assert [ctl.to_device(Spy(), device) for device in ("cpu", "mps", "cuda:1")] == [("cpu", False), ("mps", False), ("cuda:1", True)]


def test_auto_is_no_emulated_bfloat16(monkeypatch):
    for has in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has)
        assert ctl.in_bfloat16(ctl.make_config("smoke"), torch.device("cuda")) == has


def test_lock(cli):
    path = CHECKPOINT.with_suffix(".lock")
    path.parent.mkdir(parents=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = cli(*SMOKE)
        assert status == 3 and err.count("\n") == 1 and str(path) in err
    assert not list(Path("results").rglob("*.json"))


@pytest.mark.parametrize("more", [[], ["--loss", "simple"], ["--loss", "hard-simple"],
                                  ["--epochs", "1", "--batch-size", "100"]])  # the last: the only step breaks the weights
def test_loss_not_finite(more, cli):
    status, _, err = cli("--preset", "smoke", "--threads", "1", "--lr", "1e30", "--warmup", "0", *more)
    assert status == 1 and "finite" in err and err.count("\n") == 1
    assert not list(Path("results").rglob("*.json"))


def test_no_room_to_write(cli):
    Path("results").write_text("a file")
    status, _, err = cli(*SMOKE)
    assert status == 2 and "results" in err and err.count("\n") == 1


# --------------------------------------------------------------------------------------------- train_step


@pytest.mark.parametrize("bfloat16", [False, True])
def test_train_step(bfloat16, monkeypatch):
    config = ctl.make_config("smoke", tau=0.2)
    torch.manual_seed(0)
    model = ctl.ResNet18(4, 16)
    bank = ctl.MemoryBank(30, 16, 0.25, generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    images = shapes().train_images[:30]
    index = torch.tensor([17, 3, 29, 8, 11])
    drawn = ctl.draw_augmentation(5, torch.Generator().manual_seed(4))
    seen, old, weights = {}, bank.rows.clone(), [p.detach().clone() for p in model.parameters()]
    model.stem[0].register_forward_hook(lambda m, i, o: seen.update(dtype=o.dtype))
    model.register_forward_hook(lambda m, i, o: seen.update(z=o.detach().clone(), views=i[0].clone()))
    step = optimiser.step

    def spy():
        seen["bank at the step"] = bank.rows.clone()
        seen["gradient"] = [p.grad.clone() for p in model.parameters()]
        return step()
    optimiser.step = spy
    copies, copy = [], ctl.to_device
    monkeypatch.setattr(ctl, "to_device", lambda *args: copies.append(args) or copy(*args))
    loss = ctl.train_step(model, bank, optimiser, images, index, drawn, config, None, bfloat16)
    assert len(copies) == 6  # the index, and the five parts of what is drawn
    assert loss.shape == () and loss.dtype == torch.float32 and not loss.requires_grad
    assert seen["dtype"] == (torch.bfloat16 if bfloat16 else torch.float32) and seen["z"].dtype == torch.float32
    assert torch.equal(seen["views"], ctl.normalise(ctl.augment(images[index], drawn)))
    assert torch.equal(seen["bank at the step"], old)  # the bank moves after the weights
    for p, before, gradient in zip(model.parameters(), weights, seen["gradient"]):
        torch.testing.assert_close(p.detach(), before - 0.1 * gradient)
    want = ctl.contrastive_loss(seen["z"] @ old.T, index, 0.2).mean()
    torch.testing.assert_close(loss, want)
    rows = old.clone()
    rows[index] = F.normalize(0.25 * old[index] + 0.75 * seen["z"], dim=1)
    torch.testing.assert_close(bank.rows, rows)
    untouched = torch.ones(30, dtype=torch.bool)
    untouched[index] = False
    assert torch.equal(bank.rows[untouched], old[untouched])


def test_centre_head():
    config = ctl.make_config("smoke")
    torch.manual_seed(0)
    model, images = ctl.ResNet18(4, 16), shapes().train_images[:64]
    out = ctl.centre_head(model, images, config, torch.device("cpu"), False)
    assert out.shape == (64, 16)
    torch.testing.assert_close(out.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    again = torch.cat([model.head(model.train().features(ctl.normalise(ctl.augment(batch, ctl.draw_augmentation(
        16, ctl.generator(0, "centre", step), 32))))) for step, batch in enumerate(images.split(16))])
    torch.testing.assert_close(again.detach(), out, atol=1e-4, rtol=1e-4)


def test_generator_depends_on_the_whole_key():
    keys = [(0, "views", 0, 0), (0, "views", 0, 1), (0, "views", 1, 0), (1, "views", 0, 0), (0, "order", 0), (0, "network")]
    assert len({ctl.generator(*k).initial_seed() for k in keys}) == len(keys)
    assert ctl.generator(*keys[0]).initial_seed() == ctl.generator(*keys[0]).initial_seed()


# -------------------------------------------------------------------------------------- what a step costs
# Without a GPU at hand, what can be proven of a step there: nothing in it waits for the device (device="meta" has no
# values to wait for), no tensor is left on another device, and the number of its operations is bounded.


BANK = ctl.MemoryBank(2, 2, init=torch.eye(2))  # its check of the rows looks at values: made outside


def step_parts(loss, device="cpu", N=60, B=12, size=16, width=4, dim=8):
    """The arguments of train_step, with everything on that device but what is drawn."""
    more = {} if loss not in ("contrastive", "hard") else {"tau": 0.2}
    config = ctl.make_config("smoke", loss=loss, **more)
    torch.manual_seed(0)
    with torch.device(device):
        model = ctl.ResNet18(width, dim)
    if device == "cpu":
        model = model.to(memory_format=torch.channels_last)
    bank = copy.copy(BANK)
    bank.rows = F.normalize(torch.randn(N, dim, generator=torch.Generator().manual_seed(1)), dim=1).to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    images = torch.randint(256, (N, 3, size, size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8).to(device)
    drawn = ctl.draw_augmentation(B, torch.Generator().manual_seed(3), size)
    return dict(model=model, bank=bank, optimiser=optimiser, images=images, index=torch.arange(B), drawn=drawn, config=config,
                k=7 if loss.startswith("hard") else None, bfloat16=False)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ctl.LOSSES)
def test_a_step_waits_for_no_device(loss):
    parts = step_parts(loss, "meta")
    with Count() as count:
        loss = ctl.train_step(**parts)
    assert loss.device.type == "meta" and loss.shape == ()
    assert not {"_local_scalar_dense", "nonzero", "masked_select", "unique2"} & set(count.names)


@pytest.mark.parametrize("loss", ctl.LOSSES)
def test_the_forward_side_stays_on_its_device(loss):
    with FakeTensorMode():
        parts = step_parts(loss, "cuda")
        views = ctl.normalise(ctl.augment(parts["images"][parts["index"].to("cuda")], parts["drawn"].to("cuda")))
        z = parts["model"](views)
        values = ctl.training_loss(parts["config"], parts["bank"].similarity(z), parts["index"].to("cuda"), parts["k"])
        parts["bank"].update(parts["index"].to("cuda"), z.detach())
    assert views.device.type == z.device.type == values.device.type == parts["bank"].rows.device.type == "cuda"


@pytest.mark.parametrize("loss", ctl.LOSSES)
def test_the_operations_of_a_step_are_bounded(loss):
    parts = step_parts(loss)
    ctl.train_step(**parts)
    with Count() as count:
        ctl.train_step(**parts)  # its backward and SGD, one parameter at a time, included
    convolutions = [name for name in count.names if name.startswith("convolution")]
    assert len(convolutions) == 2 * 20  # forward and backward, once each
    assert len(count.names) <= 880, len(count.names)
    with Count() as count:
        ctl.normalise(ctl.augment(parts["images"][:12], parts["drawn"]))
    assert len(count.names) <= 310, len(count.names)


@pytest.mark.parametrize("loss", ["contrastive", "hard", "simple"])
def test_compiled_whole_equal_to_eager(loss):
    parts = step_parts(loss)
    index, k = parts["index"], parts["k"]

    def forward(images, drawn, rows):
        z = parts["model"](ctl.normalise(ctl.augment(images, drawn)))
        return ctl.training_loss(parts["config"], z @ rows.T, index, k).mean()

    gradients = []
    for f in (forward, torch.compile(forward, fullgraph=True, backend="aot_eager")):
        parts["model"].load_state_dict(step_parts(loss)["model"].state_dict())
        parts["model"].zero_grad()
        value = f(parts["images"][index], parts["drawn"], parts["bank"].rows)
        value.backward()
        gradients.append([value.detach()] + [p.grad.clone() for p in parts["model"].parameters()])
    for eager, compiled in zip(*gradients):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_bfloat16_leaves_the_loss_in_float32():
    losses = {}
    for bfloat16 in (False, True):
        parts = {**step_parts("contrastive"), "bfloat16": bfloat16}
        seen = []
        similarity = parts["bank"].similarity
        parts["bank"].similarity = lambda z: seen.append((z.dtype, similarity(z))) or seen[-1][1]
        losses[bfloat16] = ctl.train_step(**parts)
        assert seen[0][0] == seen[0][1].dtype == losses[bfloat16].dtype == torch.float32
    assert losses[True] != losses[False]
    torch.testing.assert_close(losses[True], losses[False], rtol=0.02, atol=0)


def test_every_convolution_sees_channels_last():
    parts, seen = step_parts("contrastive", width=8), []
    for module in parts["model"].modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(lambda m, i, o: seen.extend(
                x.is_contiguous(memory_format=torch.channels_last) for x in (i[0], o)))
    ctl.train_step(**parts)
    assert len(seen) == 40 and all(seen)


def test_marks_come_when_it_is_done():
    parts, seen = step_parts("contrastive"), []
    weight, rows = parts["model"].head.weight, parts["bank"].rows.clone()
    before = weight.detach().clone()
    ctl.train_step(**parts, mark=lambda part: seen.append(
        (part, weight.grad is not None, not torch.equal(weight, before), not torch.equal(parts["bank"].rows, rows))))
    assert seen == [("augmentation", False, False, False), ("forward", False, False, False), ("similarities and loss", False, False, False),
                    ("backward", True, False, False), ("optimiser", True, True, False), ("bank update", True, True, True)]


def test_augment_in_parts_is_augment():
    images = torch.randint(256, (130, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    drawn = ctl.draw_augmentation(130, torch.Generator().manual_seed(1), 16)
    one_by_one = torch.cat([ctl.augment(images[i:i + 1], drawn[i:i + 1]) for i in range(130)])
    assert torch.equal(ctl.augment(images, drawn), one_by_one)


def test_the_last_batch_of_an_epoch_is_the_rest(monkeypatch, cli):
    sizes, step = [], ctl.train_step
    monkeypatch.setattr(ctl, "train_step", lambda *a: sizes.append(len(a[4])) or step(*a))
    assert cli(*SHORT, "--batch-size", "33")[0] == 0
    assert sizes == [33, 33, 33, 1]  # all images, each once


@pytest.mark.parametrize("loss", [["--tau", "0.3"], ["--loss", "hard-simple"]])
def test_profile(loss, cli, monkeypatch):
    monkeypatch.setattr(ctl, "profile", functools.partial(ctl.profile, seconds=0))
    status, out, err = cli("--profile", "--json", "--preset", "smoke", "--threads", "1", *loss)
    assert status == 0 and err == ""
    p = json.loads(out)
    assert list(p["parts_ms"]) == ["augmentation", "forward", "similarities and loss", "backward", "optimiser", "bank update"]
    assert all(took > 0 for took in p["parts_ms"].values())
    assert sum(p["parts_ms"].values()) == pytest.approx(p["step_ms"], rel=0.3)
    assert p["step_over_network"] == p["step_ms"] / p["network_ms"] and p["rounds"] == 5
    assert p["images_per_second"] == pytest.approx(1000 * 16 / p["step_ms"])
    assert p["training_hours"] == pytest.approx(p["step_ms"] * 7 * 3 / 3.6e6)
    assert p["pil_over_batched"] == pytest.approx(p["batched_images_per_second"] / p["pil_images_per_second"])
    # By hand, 2 operations a multiply-add: the stem; of each stage four 3x3 convolutions, the first from half as many
    # channels, and the 1x1 one around it; the head. Backward is twice forward, but for the gradient of the images.
    macs = 3 * 4 * 9 * 32 * 32 + sum(c * c * 9 * s * s * 4 - (c * c // 2 * 9 * s * s if c > 4 else 0) + (c * c // 2 * s * s if c > 4 else 0)
                                     for c, s in ((4, 32), (8, 16), (16, 8), (32, 4))) + 32 * 16
    assert p["network_gflop"] == pytest.approx(2 * 16 * (3 * macs - 3 * 4 * 9 * 32 * 32) / 1e9, rel=1e-6)  # no gradient of the images
    assert 10 < p["peak_memory_mib"] < 24_000 and p["matrix_product_gflops"] > p["network_gflops"] / 100
    assert not list(Path(".").rglob("*.json")) and not Path("runs").exists()


def test_profile_table_and_its_bad_uses(cli, monkeypatch):
    monkeypatch.setattr(ctl, "profile", functools.partial(ctl.profile, seconds=0))
    status, out, err = cli("--profile", "--preset", "smoke", "--threads", "1")
    assert status == 0 and err == "" and "step / network" in out and "PIL" in out and "peak memory" in out
    ignored = [["--profile", *more] for more in (["--report"], ["--force"], ["--eval-every", "3"], ["--results", "x"], ["--runs", "x"])]
    for line in (["--json"], ["--json", "--report"], *ignored):
        status, out, err = cli(*line)
        assert status == 2 and err.count("\n") == 1 and out == ""


def test_profile_json_alone_on_standard_output(cli, monkeypatch):
    def unreachable(*_):
        raise ctl.BadInput("cannot download cifar10 (no route)")
    monkeypatch.setattr(ctl, "load_download", unreachable)
    monkeypatch.setattr(ctl, "profile", lambda config: {"dataset": config.dataset})
    status, out, err = cli("--profile", "--json")
    assert status == 0 and json.loads(out) == {"dataset": "shapes"} and "NOTICE" in err and "no preset given" in err


def test_network_alone_is_the_network_forward_and_backward():
    parts = step_parts("contrastive")
    views = torch.randn(4, 3, 16, 16)
    parts["model"].zero_grad()
    parts["model"](views).sum().backward()
    want = [p.grad.clone() for p in parts["model"].parameters()]
    ctl.network_alone(parts["model"], views, False)
    for p, g in zip(parts["model"].parameters(), want):
        torch.testing.assert_close(p.grad, g)


# ------------------------------------------------------------------------------------- the committed record


def test_a_committed_record_is_what_the_code_gives():
    """A change of results can't pass unseen: on the machine and versions that made the record to the last digit, on
    others as far as rounding lets it."""
    path = Path(ctl.__file__).parent / "results" / f"{CELL}.json"
    committed = ctl.read_record(path)
    assert ctl.main([*SMOKE]) == 0
    ours = json.loads(Path("results", f"{CELL}.json").read_text())
    assert ours["config"] == committed["config"] and ours["protocol_version"] == committed["protocol_version"]
    same = all(ours["environment"][key] == committed["environment"][key] for key in (
        "cpu", "ONEDNN_MAX_CPU_ISA", "device", "platform", "torch", "torchvision", "threads", "precision"))
    if same:
        assert outside(ours) == outside(committed)
    # The network is chaotic: elsewhere only what no step has touched, and the first epoch, in which the rate is small, agree.
    assert ours["history"][0]["loss"] == pytest.approx(committed["history"][0]["loss"], rel=0.05)
    for key in ("uniformity", "tolerance", "alignment"):
        assert ours["final"]["untrained"][key] == pytest.approx(committed["final"]["untrained"][key], abs=1e-4), key


def test_every_committed_record_is_whole_and_of_this_protocol():
    paths = sorted((Path(ctl.__file__).parent / "results").glob("*/*/*.json"))
    assert paths
    for path in paths:
        record = ctl.read_record(path)
        config = ctl.make_config(**{k: v for k, v in record["config"].items() if k not in ("milestones", "gamma")})
        assert record["protocol_version"] == ctl.PROTOCOL_VERSION
        assert f"{ctl.cell_path(config, record['config']['dataset'])}.json" == str(path.relative_to(Path(ctl.__file__).parent / "results"))


# ------------------------------------------------------------------------------------------------ report


def put_record(loss, tau, seed, final, folder="results", version=ctl.PROTOCOL_VERSION, dataset="cifar10", **departs):
    """A record as a run would leave it, but for the numbers, which are given."""
    given = {"loss": loss, "seed": seed, "dataset": dataset, **departs} | ({"tau": tau} if tau else {})
    config = ctl.make_config("mini", **given)
    record = ctl.plain({"config": config.study(), "protocol_version": version, "history": [], "timing": {}, "final": final,
                        "data": {"sha256": "0", "train": 5000, "test": 10}, "environment": {"torch": "2", "precision": "float32", "device": "cpu"}})
    record["sha256"] = ctl.record_sha256(record)
    path = Path(folder, f"{ctl.cell_path(config, dataset)}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def as_the_paper_has_it(seed):
    """(loss, tau) -> final metrics: Table 1 of CIFAR-10, with what it lacks made up to fit the claims."""
    cells = {}
    for place, ((loss, tau), (accuracy, uniform, tolerant)) in enumerate(ctl.PAPER["cifar10"].items()):
        wobble = 1e-3 * ((seed * 7 + place * 3) % 5)
        nearest = 0.9 - 0.1 / (tau or 9)
        cells[loss, tau] = dict(accuracy=accuracy + wobble, accuracy_heldout=accuracy + wobble / 2, uniformity=uniform + wobble, tolerance=tolerant + wobble,
                                knn=50.0, alignment=0.1, profile=[0.8 + 0.1 * (tau or 1)] + [nearest - 0.6] * 10, untrained={"accuracy": 25.0, "knn": 20.0})
    cells["triplet", None] = {**cells["simple", None], "accuracy": 26.0 + seed / 10}
    return cells | {(ctl.MATCHED, tau): dict(cells["contrastive", tau]) for tau in ctl.TAUS}


def decided(seeds):
    """claim -> verdict, from (loss, tau) -> final of each seed."""
    rows = {}
    for seed, cells in enumerate(seeds):
        for (loss, tau), final in cells.items():
            loss, _, departs = loss.partition(", ")
            rows.setdefault((loss, tau, departs), []).append((Path("x"), {"config": {"seed": seed}, "final": final}))
    return {line.split("|")[1].strip(): re.search(r"\*\*(.+?)\*\*", line)[1] for line in ctl.claims_table(rows).splitlines()[2:]}


def test_claims_on_the_papers_own_numbers():
    assert decided([as_the_paper_has_it(seed) for seed in range(3)]) == {name: "confirmed" for name, *_ in ctl.CLAIMS}
    assert [name for name, *_ in ctl.CLAIMS] == [f"C{i}" for i in range(1, 10)] + ["M"]
    assert set(decided([as_the_paper_has_it(0)]).values()) == {"undecided"}  # one seed never confirms


def turned(cells, claim):
    """The same with that claim turned round."""
    c, o, h = copy.deepcopy(cells), lambda tau: ("contrastive", tau), lambda tau: ("hard", tau)
    if claim in ("C1", "C2"):
        key = {"C1": "uniformity", "C2": "tolerance"}[claim]
        for tau, value in zip(ctl.TAUS, [c[o(tau)][key] for tau in ctl.TAUS][::-1]):
            c[o(tau)][key] = value
    elif claim == "C3":
        c[o(1.0)]["accuracy"] += 3
    elif claim == "C4":
        c["simple", None]["accuracy"] = c[o(0.3)]["accuracy"] - 1
    elif claim == "C5":
        c["hard-simple", None]["accuracy"] = c[o(0.3)]["accuracy"] - 2
    elif claim == "C6":
        for tau in ctl.TAUS:
            c[h(tau)]["uniformity"] = c[o(tau)]["uniformity"] - 0.1 - tau / 100
    elif claim == "C7":
        c[h(0.7)]["uniformity"] -= 1
    elif claim == "C8":
        for tau in ctl.TAUS:
            c[o(tau)]["profile"][0] = 0.9 - 0.1 * tau
    elif claim == "C9":
        c["triplet", None]["accuracy"] = 70.0
    elif claim == "M":
        c[ctl.MATCHED, 1.0]["accuracy"] += 3
    return c


@pytest.mark.parametrize("claim", [name for name, *_ in ctl.CLAIMS])
def test_a_claim_turned_round_is_refuted(claim):
    verdicts = decided([turned(as_the_paper_has_it(seed), claim) for seed in range(3)])
    assert verdicts[claim] == "refuted"
    assert claim not in ("C3", "M") or verdicts[{"C3": "M", "M": "C3"}[claim]] == "confirmed"  # neither looks at the other's runs
    both = [as_the_paper_has_it(0), turned(as_the_paper_has_it(1), claim)]
    assert decided(both)[claim] == "undecided"


def test_claims_choose_tau_on_held_out_labels():
    seeds = [as_the_paper_has_it(seed) for seed in range(3)]
    for cells in seeds:
        cells["contrastive", 0.07]["accuracy_heldout"] = 99.0  # so the best tau is 0.07, though the test set has 0.3
        cells["simple", None]["accuracy"] = 78.5  # 1.25 below 0.07, 4.8 below 0.3
        cells["hard", 0.07]["accuracy_heldout"] = 99.5  # and the hard loss's best is no larger
    assert decided(seeds)["C4"] == "refuted" and decided(seeds)["C7"] != "confirmed"


def test_missing_cells_leave_a_claim_undecided():
    seeds = [as_the_paper_has_it(seed) for seed in range(3)]
    for cells in seeds[1:]:
        del cells["simple", None], cells["contrastive", 1.0], cells[ctl.MATCHED, 0.3]
    assert "confirmed" not in decided(seeds).values()
    assert decided([{}, {}])["C1"] == "undecided"


@given(st.lists(ties, min_size=2, max_size=8))
def test_verdict_is_students_t(effects):
    mean_, low, high = ctl.mean_interval(effects)
    want = scipy.stats.t.interval(0.95, len(effects) - 1, np.mean(effects), scipy.stats.sem(effects)) if len(set(effects)) > 1 else (mean_,) * 2
    assert mean_ == pytest.approx(np.mean(effects), abs=1e-12) and (low, high) == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert ctl.verdict(effects) == ("confirmed" if low > 0 else "refuted" if high < 0 else "undecided")
    assert ctl.verdict(effects[:1]) == ctl.verdict([]) == "undecided"


def test_trend_is_pages_test_and_names_a_step_in_the_wrong_place():
    rising = [[1.0, 2.0, 3.0, 4.0 + seed / 10] for seed in range(3)]
    assert ctl.trend(rising)[0] == "confirmed" and ctl.trend([row[::-1] for row in rising])[0] == "refuted"
    assert ctl.trend(rising[:1])[0] == "undecided" and ctl.trend([[1.0, 4.0, 2.0, 3.0], [3.0, 2.0, 4.0, 1.0]])[0] == "undecided"
    assert f"p = {scipy.stats.page_trend_test(rising).pvalue:.2g}" in ctl.trend(rising)[1]
    wrong = [[1.0, 2.0, 4.0 + seed / 10, 3.5] for seed in range(3)]
    assert ctl.trend(wrong)[0] == "confirmed, except τ 0.7 → 1.0"


def test_report(cli):
    for seed in range(3):
        for (loss, tau), final in as_the_paper_has_it(seed).items():
            if (loss, tau) != ("hard", 1.0) and loss != ctl.MATCHED:
                put_record(loss, tau, seed, {**final, "accuracy": 80.0 + seed})
    put_record("contrastive", 0.3, 9, {**as_the_paper_has_it(0)["contrastive", 0.3], "accuracy": 12.34}, match_step=True)
    put_record("contrastive", 0.2, 0, {**as_the_paper_has_it(0)["contrastive", 0.3], "accuracy": 56.78})
    status, out, err = cli("--report")
    assert status == 0 and err == ""
    text = Path("results/mini/TABLE.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    row = next(line for line in lines if line.startswith("| contrastive | 0.3 |"))
    assert "| 81.00 ± 1.00 (3) | 83.27 | 50.00 ± 0.00 (3) |" in row and "| 3.6 |" in row and "| 0.178 |" in row and row in out
    for target in re.findall(r"\]\((\S+)\)", text):
        assert Path("results/mini", target).is_file()
    assert "| hard | 1.0 | – | 84.19 | – | – | 3.86 | – | 0.03 | missing |" in text
    assert any("match_step-True" in line and "12.34 (1) | –" in line for line in lines)
    assert any(line.startswith("| contrastive | 0.2 | 56.78 (1) | 83.78 |") and line.count("| – |") == 2 for line in lines)
    assert lines[-1] == "| untrained |  | 25.00 ± 0.00 (3) | – | 20.00 ± 0.00 (3) | – | – | – | – |  |"  # of each seed once, no departing run's
    assert lines.index(row) < [line.startswith("| simple") for line in lines].index(True) and "5,000 training images, 60 epochs" in text
    claims = Path("results/mini/CLAIMS.md").read_text()
    assert "C9" in claims and "confirmed" in claims and "95 % interval" in claims
    figures = sorted(p.name for p in Path("results/mini").glob("*.*g"))
    assert figures == [f"cifar10-v{ctl.PROTOCOL_VERSION}-{f}.{k}" for f in ("dilemma", "profile") for k in ("png", "svg")] + ["penalty.png", "penalty.svg"]
    before = {p: p.read_bytes() for p in Path("results").rglob("*") if p.is_file()}
    assert cli("--report")[0] == 0 and {p: p.read_bytes() for p in Path("results").rglob("*") if p.is_file()} == before
    with Image.open("results/mini/cifar10-v1-dilemma.png") as image:
        assert image.width >= 1200 and len(image.convert("L").getcolors()) > 10


def test_claims_take_no_run_that_departs_from_the_preset():
    rows = {}
    for seed in range(3):
        for (loss, tau), final in as_the_paper_has_it(seed).items():
            loss, _, departs = loss.partition(", ")
            rows.setdefault((loss, tau, departs), []).append((Path("x"), {"config": {"seed": seed}, "final": final}))
    before = ctl.claims_table(rows)
    spoilt = {**rows["contrastive", 0.3, ""][0][1]["final"], "uniformity": 0.0, "tolerance": 1.0, "accuracy": 10.0}
    rows["contrastive", 0.3, "lr-0.1"] = [(Path("x"), {"config": {"seed": seed}, "final": spoilt}) for seed in range(3)]
    assert ctl.claims_table(rows) == before


def test_claims_show_each_seed():
    line = ctl.claims_table({(loss, tau, ""): [(Path("x"), {"config": {"seed": seed}, "final": {"uniformity": (4 - seed) * (2 - tau) + (loss == "hard") * (1 + seed)}})
                                               for seed in (0, 1)] for tau in ctl.TAUS for loss in ("contrastive", "hard")}).splitlines()[7]
    assert "| C6 |" in line and "| 1.500 (-4.853 to 7.853) | 0: 1.000, 1: 2.000 |" in line  # 12.706 · 0.7071 / sqrt 2


def test_figures_show_the_records(cli, monkeypatch):
    import matplotlib.axes
    drawn = {}
    for name in ("errorbar", "bar", "plot", "scatter"):
        def keep(self, *args, name=name, do=getattr(matplotlib.axes.Axes, name), **kwargs):
            drawn.setdefault(name, []).append((args, self))
            return do(self, *args, **kwargs)
        monkeypatch.setattr(matplotlib.axes.Axes, name, keep)
    cells = as_the_paper_has_it(0)
    for loss in ("contrastive", "hard"):
        for tau in ctl.TAUS:
            for seed in (0, 1):
                put_record(loss, tau, seed, {**cells[loss, tau], "uniformity": tau + seed, "tolerance": 2 * tau + seed, "accuracy": 3 * tau + seed,
                                             "profile": [tau + seed] + [n / 100 for n in range(10)]})
    put_record("contrastive", 0.3, 0, {**cells["contrastive", 0.3], "uniformity": 9.0}, match_step=True)
    status, out, _ = cli("--report")
    assert status == 0 and "Fig. 2 is skipped" in out and "scatter" not in drawn
    for key, title, place in ((1, "uniformity", 1), (2, "tolerance", 2), (3, "linear accuracy, %, ours", 0)):
        ours = [args for args, axis in drawn["errorbar"] if axis.get_title() == title]
        same = [(x, y, e) for x, y, e in ours if y == pytest.approx([key * tau + 0.5 for tau in ctl.TAUS])]  # two seeds, 1 apart
        assert len(same) == 2 and all(x == list(ctl.TAUS) and e == pytest.approx([0.5 ** 0.5] * 4) for x, _, e in same)
        assert len(ours) == 3 and (title != "uniformity" or ours[2][1] == [9.0])
        theirs = [args[1] for args, axis in drawn["plot"] if axis.get_title() == title.replace("ours", "paper")]
        want = [[ctl.PAPER["cifar10"][loss, tau][place] for tau in ctl.TAUS] for loss in ("contrastive", "hard")]
        if place == 0:  # of which the authors published more
            want[0] = [76.1, 79.75, 81.82, 83.78, 83.27, 83.22, 82.54, 82.97, 82.69, 82.67, 81.97, 82.21]
        assert [list(values) for values in theirs] == want
    assert [args[1][0] for args, _ in drawn["bar"]] == pytest.approx([tau + 0.5 for tau in ctl.TAUS])
    assert drawn["bar"][0][0][0] == ["pos"] + [f"n{n}" for n in range(1, 11)] and drawn["bar"][0][0][1][10] == pytest.approx(0.09)
    penalties = [args for args, _ in drawn["plot"] if isinstance(args[0], torch.Tensor)]
    assert len(penalties) == 4
    for (s, r, *_), tau in zip(penalties, ctl.TAUS):  # Eq. 5, and it is a distribution
        torch.testing.assert_close(r, torch.softmax(s / tau, 0))


class Plane:
    """In the place of scikit-learn's TSNE."""

    def __init__(self, perplexity, init, random_state):
        assert 0 < perplexity <= 30 and init == "random" and random_state == 0

    def fit_transform(self, z):
        assert Plane.threads == 1 and np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
        return 100 * z[:, :2].astype(np.float64)


@contextlib.contextmanager
def limited(threads):
    """In the place of threadpoolctl's threadpool_limits."""
    Plane.threads = threads
    yield
    Plane.threads = None


def put_tsne(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", types.SimpleNamespace(TSNE=kind))
    monkeypatch.setitem(sys.modules, "threadpoolctl", types.SimpleNamespace(threadpool_limits=limited))


def test_fig_2(cli, monkeypatch):
    line = [*SMOKE[:-4], "--tau", "0.07", "--threads", "1"]
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert cli(*line)[0] == 0
    without = json.loads(Path("results/smoke/shapes/contrastive_tau0.07_seed0.json").read_text())
    assert without["tsne"] is None
    status, out, _ = cli("--report")
    assert status == 0 and "Fig. 2 is skipped" in out and not list(Path("results/smoke").glob("*tsne*"))
    put_tsne(monkeypatch, Plane)
    assert cli(*line, "--force")[0] == 0
    record = json.loads(Path("results/smoke/shapes/contrastive_tau0.07_seed0.json").read_text())
    assert record["sha256"] == without["sha256"] and record["final"] == without["final"]
    points = record["tsne"]
    assert len(points["x"]) == len(points["y"]) == len(points["label"]) == 100
    assert points["label"] == ctl.take_subset(shapes(), ctl.make_config("smoke"))[0].test_labels.tolist()
    assert all(round(x, 1) == x and -100 <= x <= 100 for x in points["x"] + points["y"]) and len(set(points["x"])) > 30
    import matplotlib.axes
    scatter, seen = matplotlib.axes.Axes.scatter, []
    monkeypatch.setattr(matplotlib.axes.Axes, "scatter", lambda self, x, y, **k: seen.append((x, y)) or scatter(self, x, y, **k))
    status, out, _ = cli("--report")
    assert status == 0 and "skipped" not in out and Path(f"results/smoke/shapes-v{ctl.PROTOCOL_VERSION}-tsne.svg").exists()
    assert seen[3] == tuple([v for v, label in zip(points[key], points["label"]) if label == 3] for key in "xy") and len(seen) == 10


def test_tsne_keeps_neighbours_together():
    pytest.importorskip("sklearn")
    labels = torch.arange(60) % 2
    z = F.normalize(torch.eye(16)[labels] + 0.05 * torch.randn(60, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    points = ctl.tsne(z, labels)
    assert points == ctl.tsne(z, labels) and points["label"] == labels.tolist()
    xy = torch.tensor([points["x"], points["y"]]).T
    nearest = torch.cdist(xy, xy).fill_diagonal_(math.inf).argmin(dim=1)
    assert (labels[nearest] == labels).all()
    same = ctl.tsne(F.normalize(torch.ones(40, 16), dim=1), labels[:40])  # as a collapsed network has them
    assert all(math.isfinite(v) for v in same["x"] + same["y"])


@pytest.mark.parametrize("error", [ValueError("n_components=2 must be\nless"), ImportError("numpy"), AttributeError()])
def test_a_picture_that_fails_costs_no_record(error, cli, monkeypatch):
    def fail(**_):
        raise error
    put_tsne(monkeypatch, fail)
    status, out, err = cli("--preset", "smoke", "--tau", "0.2", "--threads", "1")
    assert status == 0 and err == "" and "no t-SNE for Fig. 2" in out and record_of()["tsne"] is None
    error = ctl.Interrupted("SIGTERM")
    with pytest.raises(ctl.Interrupted):
        ctl.tsne(torch.eye(20), torch.arange(20))


def test_a_table_of_images_that_the_paper_has_not(cli):
    put_record("simple", None, 0, as_the_paper_has_it(0)["simple", None], dataset="shapes")
    assert cli("--report")[0] == 0
    text = Path("results/mini/TABLE.md").read_text()
    assert "| loss | τ | accuracy, % | kNN, % | uniformity | tolerance | records |\n" in text
    assert "| simple |  | 74.83 (1) | 50.00 (1) | 1.682 (1) | 0.612 (1) | [0](shapes/simple_seed0.json) |\n" in text


def test_report_never_averages_versions(cli):
    final = as_the_paper_has_it(0)["simple", None]
    put_record("simple", None, 0, {**final, "accuracy": 10.0})
    put_record("simple", None, 1, {**final, "accuracy": 90.0}, version=ctl.PROTOCOL_VERSION + 1)
    assert cli("--report")[0] == 0
    text = Path("results/mini/TABLE.md").read_text()
    assert "| 10.00 (1) |" in text and "| 90.00 (1) |" in text and text.count("protocol version") == 2


def test_report_refuses_an_edited_record(cli):
    path = put_record("simple", None, 0, as_the_paper_has_it(0)["simple", None])
    path.write_text(path.read_text().replace('"knn": 50.0', '"knn": 60.0'))
    status, _, err = cli("--report")
    assert status == 2 and "sha256" in err and err.count("\n") == 1 and not Path("results/mini/TABLE.md").exists()


def test_the_readme_and_the_tables_are_what_the_records_give(tmp_path):
    home = Path(ctl.__file__).parent
    readme = (home / "README.md").read_text()
    assert readme.count("<!-- report: ") >= 3 and ctl.fill_in(readme, home / "results") == readme
    assert ctl.fill_in(readme.replace("| contrastive | 0.3 |", "| contrastive | 0.4 |"), home / "results") == readme
    shutil.copytree(home / "results", tmp_path / "results")
    ctl.report(tmp_path / "results")
    for path in (tmp_path / "results").rglob("*.md"):
        assert path.read_bytes() == (home / path.relative_to(tmp_path)).read_bytes(), path


def test_costs(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(ctl, "profile", functools.partial(ctl.profile, seconds=0))
    status, out, _ = cli("--profile", "--preset", "smoke", "--threads", "1", "--json")
    Path("results/profile").mkdir(parents=True)
    Path("results/profile/tiny.json").write_text(out)
    p = json.loads(out)
    assert tuple(p["parts_ms"]) == ctl.PARTS
    text = ctl.fill_in("a\n<!-- report: costs -->\nold\n<!-- /report -->\nb\n", tmp_path / "results")
    lines = text.splitlines()
    assert lines[:2] == ["a", "<!-- report: costs -->"] and lines[-2:] == ["<!-- /report -->", "b"] and len(lines) == 7
    assert len({line.count("|") for line in lines[2:5]}) == 1
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells[0] == "[tiny](results/profile/tiny.json)" and cells[1] == "1" and cells[2] == f"{p['parts_ms']['augmentation']:.1f}"
    assert cells[8:12] == [f"{p['step_ms']:.1f}", f"{p['network_ms']:.1f}", f"{p['step_over_network']:.3f}", f"{p['images_per_second']:.0f}"]
    Path("results/profile/tiny.json").write_text(json.dumps({**p, "peak_memory_mib": None}))  # as Windows has it
    assert "| – |" in ctl.fill_in(text, tmp_path / "results")
    Path("results/profile/tiny.json").write_text(out.replace("step_ms", "steps"))
    with pytest.raises(ctl.BadInput, match="tiny.json"):
        ctl.fill_in(text, tmp_path / "results")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder that is the project's own, as far as the report knows, with one record."""
    (tmp_path / "ctl.py").write_text("# one\ndef main():\n    pass\n")
    monkeypatch.setattr(ctl, "__file__", str(tmp_path / "ctl.py"))
    put_record("simple", None, 0, as_the_paper_has_it(0)["simple", None])
    return tmp_path


README = "a\n<!-- report: mini cifar10 table -->\n<!-- /report -->\nb [`main`](ctl.py#L77) [`other`](ctl.py#L3)\n<!-- report: mini cifar10 claims -->\nstale\n<!-- /report -->\n"


def test_the_readme_is_filled_whatever_the_folder_is_called(own, cli, monkeypatch):
    (own / "README.md").write_text(README)
    assert cli("--report")[0] == 0
    filled = (own / "README.md").read_text()
    assert "(results/mini/cifar10/simple_seed0.json)" in filled and "[`main`](ctl.py#L2) [`other`](ctl.py#L3)" in filled and "stale" not in filled
    (own / "link").symlink_to(own / "results")
    for folder, name in (("results", "."), ("results/mini", ".."), (".", "link")):
        (own / "README.md").write_text(README)
        monkeypatch.chdir(own / folder)
        assert cli("--report", "--results", name)[0] == 0 and (own / "README.md").read_text() == filled


@pytest.mark.parametrize("old,new", [("<!-- /report -->\nb", "b"), ("<!-- report: mini cifar10 table -->", "<!-- report: mini table -->"),
                                     ("<!-- /report -->\nb", "<!-- / report -->\nb")])
def test_a_broken_marker_costs_no_text(old, new, own, cli):
    text = README.replace(old, new)
    (own / "README.md").write_text(text)
    status, _, err = cli("--report")
    assert status == 2 and err.count("\n") == 1 and (own / "README.md").read_text() == text and not Path("results/mini/TABLE.md").exists()


def test_a_report_is_written_whole_or_not_at_all(own, cli):
    (own / "README.md").write_text("<!-- report: costs -->\n<!-- /report -->\n")
    for broken in ("", "[" * 10_000, "{}", '{"parts_ms": 3}'):
        Path("results/profile").mkdir(exist_ok=True)
        Path("results/profile/x.json").write_text(broken)
        status, _, err = cli("--report")
        assert status == 2 and "x.json" in err and err.count("\n") == 1 and not list(Path("results").rglob("*.md")) + list(Path("results").rglob("*.svg"))


def test_records_that_stand_where_they_do_not_belong(cli):
    path = put_record("simple", None, 0, as_the_paper_has_it(0)["simple", None])
    for other in ("results/mini/backup/simple_seed0.json", "results/quick/cifar10/simple_seed0.json", "results/mini/cifar10/simple_seed1.json",
                  "results/mini/cifar10/simple_seed0 (copy).json", "results/mini/cifar10/simple_lr-0.5_seed0.json", "results/mini/cifar10/hard-simple_seed0.json"):
        Path(other).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other)
        status, _, err = cli("--report")
        assert status == 2 and err.count("\n") == 1 and other in err and not Path("results/mini/TABLE.md").exists()
        Path(other).unlink()
    assert cli("--report")[0] == 0


def change(record, keys, value):
    *path, last = keys
    for key in path:
        record = record[key]
    if value is change:
        del record[last]
    else:
        record[last] = value


WRONG = [None, change, [], "x", 3, 1e308, 10 ** 400, True, {}, {"x": [1], "y": [], "label": [1]}]
PLACES = [("config",), ("final",), ("data",), ("environment",), ("protocol_version",), ("history",), ("tsne",), ("config", "loss"), ("config", "tau"), ("config", "preset"),
          ("config", "seed"), ("config", "width"), ("config", "dataset"), ("final", "accuracy"), ("final", "uniformity"), ("final", "profile"), ("final", "untrained"),
          ("final", "accuracy_heldout"), ("data", "sha256"), ("data", "train"), ("environment", "torch"), ("environment", "precision")]


def test_records_of_nonsense_are_refused_in_one_line(cli, monkeypatch):
    """With a sum that fits, as another program or version could leave them. What makes sense nonetheless is reported."""
    import matplotlib.figure
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *args, **kwargs: None)  # takes most of the time
    path = put_record("contrastive", 0.07, 0, as_the_paper_has_it(0)["contrastive", 0.07])
    good, refused = path.read_text(), 0
    for keys, value in itertools.product(PLACES, WRONG):
        record = json.loads(good)
        try:
            change(record, keys, value)
        except KeyError:
            continue
        record["sha256"] = ctl.record_sha256(record)
        path.write_text(json.dumps(record))
        try:
            ctl.read_groups(Path("results"))
        except ctl.BadInput as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:  # then it can be reported
            status, _, err = cli("--report")
            assert status == 0 and err == "", (keys, value, err)
    assert refused > 150
    path.write_text("[" * 100_000)
    assert cli("--report")[0] == 2


def test_runs_on_other_images_are_not_averaged(cli):
    final = as_the_paper_has_it(0)["simple", None]
    put_record("simple", None, 0, final)
    path = put_record("simple", None, 1, final)
    record = json.loads(path.read_text())
    record["data"]["sha256"] = "1"
    record["sha256"] = ctl.record_sha256(record)
    path.write_text(json.dumps(record))
    status, _, err = cli("--report")
    assert status == 2 and str(path) in err and "other images" in err and err.count("\n") == 1


def test_shapes_may_be_rounded_otherwise_on_another_machine(cli):
    assert cli(*SMOKE)[0] == 0
    path = Path("results", f"{CELL}.json")
    record = json.loads(path.read_text())
    record["data"]["sha256"] = "1"
    record["sha256"] = ctl.record_sha256(record)
    path.write_text(json.dumps(record))
    status, out, _ = cli(*SMOKE)
    assert status == 0 and "is there already" in out
    assert cli(*SMOKE, "--seed", "1")[0] == 0 and cli("--report")[0] == 0
    wanted = {"config": record["config"], "protocol_version": 1, "data": "2"}
    ctl.refuse_other(path, record, wanted)
    with pytest.raises(ctl.BadInput, match="data is 1 there, 2 here"):  # a run goes on with the same pixels or not at all
        ctl.refuse_other(path, {**record, "data": "1"}, wanted)
    wanted["config"] = {**record["config"], "dataset": "cifar10"}
    with pytest.raises(ctl.BadInput, match="data is 1 there, 2 here"):
        ctl.refuse_other(path, {**record, "config": wanted["config"]}, wanted)


def test_a_record_that_cannot_be_read(cli):
    Path("results/mini/cifar10/simple_seed0.json").mkdir(parents=True)
    status, _, err = cli("--report")
    assert status == 2 and "cannot read" in err and err.count("\n") == 1


def test_a_strange_environment(house):
    """A notebook's backend, a user's matplotlibrc, a terminal without τ, no docstrings, no standard output."""
    put_record("simple", None, 0, as_the_paper_has_it(0)["simple", None])
    Path("matplotlibrc").write_text("text.usetex: True\n")
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii", "PYTHONOPTIMIZE": "2"}
    done = subprocess.run([sys.executable, "ctl.py", "--report"], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "" and "| simple |" in done.stdout
    figure = Path("results/mini/penalty.svg").read_bytes()
    shutil.rmtree("results/mini")
    put_record("simple", None, 0, as_the_paper_has_it(0)["simple", None])
    Path("matplotlibrc").unlink()
    done = subprocess.run(f'"{sys.executable}" ctl.py --report >&-', shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and Path("results/mini/penalty.svg").read_bytes() == figure


def test_a_reader_that_leaves(undisturbed, house):
    """`ctl.py … | head -1`: the run goes on, and leaves its record."""
    process = subprocess.Popen([sys.executable, "ctl.py", *SMOKE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and process.stderr.read() == "" and outside(record_of()) == outside(record_of(undisturbed))


def test_the_readme_points_at_the_right_lines():
    home = Path(ctl.__file__).parent
    code, found = (home / "ctl.py").read_text().splitlines(), re.findall(r"\[`(\w+)`\]\(ctl\.py#L(\d+)\)", (home / "README.md").read_text())
    assert len(found) > 20
    for name, line in found:
        assert re.match(rf"(def|class) {name}\b", code[int(line) - 1]), (name, line)


def test_the_readmes_python_runs(undisturbed):
    blocks = re.findall(r"```python\n(.*?)```", (Path(ctl.__file__).parent / "README.md").read_text(), re.DOTALL)
    names = {"images": shapes().test_images[:5]}
    for block in blocks:
        path = str(undisturbed / "runs" / f"{CELL}.pt")
        exec(re.sub(r'"runs/[^"]*"', repr(path), block), names)
    assert len(blocks) == 2 and names["loss"].isfinite() and names["h"].shape == (5, 32) and names["z"].shape == (5, 16)
    assert ctl.load_checkpoint(Path(path))["model"]["head.bias"].equal(names["model"].head.bias)


# ---------------------------------------------------------------------------------------------- reproduce.sh

HOME = Path(ctl.__file__).parent


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder with the project's files and a .venv that is this Python."""
    for name in ("ctl.py", "reproduce.sh", "requirements.txt"):
        shutil.copy(HOME / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copy(HOME / "requirements.txt", tmp_path / ".venv" / "installed.txt")
    for name in ("SEEDS", "JOBS", *(key for key in os.environ if key.startswith("SLURM"))):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def reproduce(*options, **env):
    done = subprocess.run(["bash", "reproduce.sh", *options], capture_output=True, text=True, env={**os.environ, **env})
    return done.returncode, done.stdout, done.stderr


def commands(out):
    return [line for line in out.splitlines() if line.startswith(".venv/bin/python ctl.py")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plan is another on a GPU")
def test_the_plan(house):
    status, out, err = reproduce("--dry-run")
    assert status == 0 and err == "" and "There is no GPU" in out and "90 cells of preset mini" in out and "estimate" in out
    whole = commands(out)
    assert len(set(whole)) == 90 and sum("--seed 0" in line for line in whole[:30]) == 30  # one seed of everything first
    for loss, tau in ctl.CELLS:
        assert sum(f"--loss {loss} " in line and (not tau or f"--tau {tau} " in line) for line in whole) == 9
    assert not (house / "results").exists()
    status, out, _ = reproduce("--dry-run", "--preset", "quick", "--datasets", "shapes", "--seeds", "1", "--losses", "contrastive", "--taus", "0.1 0.2",
                               "--", "--match-step")
    assert [line.split("--dataset ")[1] for line in commands(out)] == [
        f"shapes --loss contrastive --tau {tau} --seed 0 --match-step" for tau in (0.1, 0.2)]
    for first, count, step in ((0, 2, 1), (3, 4, 2)):  # a Slurm array: each cell in one task's share
        shares = [commands(reproduce("--dry-run", SLURM_ARRAY_TASK_ID=str(first + step * task), SLURM_ARRAY_TASK_MIN=str(first),
                                     SLURM_ARRAY_TASK_STEP=str(step), SLURM_ARRAY_TASK_COUNT=str(count))[1]) for task in range(count)]
        assert sorted(itertools.chain(*shares)) == sorted(whole) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_gpus_are_shared_out(house, monkeypatch):
    """With a Python that claims two GPUs, and notes what it is asked to run."""
    python = house / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *device_count*) echo 2 ;; *"--report"*|"-c "*|*pip*) ;; *) echo "$*" >> {house}/asked.txt ;; esac\n')
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status, out, _ = reproduce("--dry-run", "--datasets", "svhn", "--seeds", "1")
    plan = commands(out)
    assert status == 0 and "10 cells of preset paper on svhn" in out and "6 at once on 2 GPU(s)" in out and "no GPU" not in out
    assert [line.count("--device cuda:1 ") for line in plan] == [1, 0] * 5 and sum("--device cuda:0 " in line for line in plan) == 5
    assert not any("--threads" in line for line in plan) and not (house / "asked.txt").exists()
    status, out, err = reproduce("--datasets", "svhn", "--seeds", "1", "--per-gpu", "1")
    assert status == 0 and err == "" and "2 at once on 2 GPU(s)" in out
    assert sorted((house / "asked.txt").read_text().splitlines()) == sorted(line.removeprefix(".venv/bin/python ") for line in plan)


def test_extra_flags_keep_their_words(house):
    status, out, _ = reproduce("--dry-run", "--preset", "smoke", "--datasets", "shapes", "--seeds", "1", "--losses", "simple", "--results", "my res", "--",
                               "--data", "x y")
    assert status == 0 and commands(out)[0].endswith("--data x\\ y") and "--results my\\ res" in out
    status, out, err = reproduce("--preset", "smoke", "--datasets", "shapes", "--seeds", "1", "--losses", "simple", "--", "--runs", "x y")
    assert status == 0 and err == "" and Path("x y/smoke/shapes/simple_seed0.pt").exists()


def test_a_task_without_a_share(house):
    status, out, err = reproduce("--preset", "smoke", "--datasets", "shapes", "--seeds", "1", "--losses", "simple", SLURM_ARRAY_TASK_ID="5",
                                 SLURM_ARRAY_TASK_MIN="0", SLURM_ARRAY_TASK_COUNT="20")
    assert status == 0 and err == "" and "0 cells" in out


def test_a_venv_without_pip_is_made_again(house):
    (house / ".venv/bin/python").write_text('#!/bin/sh\n[ "$2" != pip ]\n')
    Path("new").write_text('#!/bin/sh\ncase "$*" in -c*) ;; *) echo "$*"; exit 7 ;; esac\n')
    Path("new").chmod(0o755)
    status, out, _ = reproduce("test", PYTHON="./new")
    assert status == 7 and out == "-m venv --clear .venv\n"


def test_slurm_runs_a_copy_of_the_script(house, tmp_path_factory):
    copy_ = tmp_path_factory.mktemp("spool") / "slurm_script"
    shutil.copy("reproduce.sh", copy_)
    done = subprocess.run(["bash", str(copy_), "--dry-run", "--preset", "smoke"], capture_output=True, text=True, cwd=copy_.parent,
                          env={**os.environ, "SLURM_SUBMIT_DIR": str(house)})
    assert done.returncode == 0 and len(commands(done.stdout)) == 90, done.stderr


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--seeds"], ["--seeds", "x"], ["--jobs", "-1"], ["--preset", "tiny"], ["--losses", "triple"],
                                     ["--foo"], ["all"], ["--per-gpu", ""], ["--datasets", ""], ["--losses", " "], ["--taus", "  "]])
def test_bad_options_of_reproduce(options, house):
    status, out, err = reproduce(*options)
    assert status == 2 and err.count("\n") == 1 and out == ""


def test_a_failing_cell_is_reported_and_stops_no_other(house):
    options = ["--preset", "smoke", "--datasets", "shapes", "--seeds", "1", "--losses", "simple contrastive", "--taus", "0.3"]
    status, out, err = reproduce(*options, "--", "--tau", "0.5")  # the simple loss has no temperature
    assert status == 1 and "done    --dataset shapes --loss contrastive" in out and "FAILED" in err and "has no temperature" in err
    assert len(list(Path("results").glob("smoke/shapes/*.json"))) == 1
    status, out, err = reproduce(*options)
    assert status == 0 and err == "" and out.count("\ndone ") == 2 and Path("results/smoke/TABLE.md").exists()
    assert "\nthere   --dataset shapes --loss contrastive" in reproduce(*options, "--losses", "contrastive")[1]


def test_a_table_that_is_killed_twenty_times_is_the_same(house, tmp_path_factory):
    undisturbed_ = tmp_path_factory.mktemp("table")
    for loss, tau in ctl.CELLS:
        more = ["--tau", str(tau)] if tau else []
        assert ctl.main(["--preset", "smoke", "--loss", loss, *more, "--threads", "1", "--results", str(undisturbed_ / "results"),
                         "--runs", str(undisturbed_ / "runs")]) == 0
    options, moments = ["bash", "reproduce.sh", "--preset", "smoke", "--datasets", "shapes", "--seeds", "1", "--jobs", "2"], random.Random(0)
    for _ in range(20):
        process = subprocess.Popen(options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(1, 7))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(options, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = ({p.relative_to(f / "results"): outside(json.loads(p.read_text())) for p in (f / "results").rglob("*.json")}
                    for f in (house, undisturbed_))
    assert len(ours) == 10 and ours == theirs
    assert not list((house / "results").rglob("*.tmp")) and "missing" not in Path("results/smoke/TABLE.md").read_text()


# -------------------------------------------------------------------------------------------- what goes wrong


def test_killed_at_random_moments(undisturbed, house):
    """SIGKILL, one run, again and again until it is done; checkpoints every step, so that kills fall on writes too."""
    driver = ("import ctl, sys, time\nstep = ctl.train_step\n"
              "def slow(*a): time.sleep(0.02); ctl.CHECKPOINT_SECONDS = 0; return step(*a)\n"
              "ctl.train_step = slow\nsys.exit(ctl.main(sys.argv[1:]))\n")
    Path("driver.py").write_text(driver)
    moments, killed, checkpoint = random.Random(1), 0, Path("runs", f"{CELL}.pt")
    for _ in range(30):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen([sys.executable, "driver.py", *SMOKE], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns != before):
            time.sleep(0.002)
        try:
            process.wait(moments.uniform(0, 0.4))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
    assert killed >= 2 and process.returncode == 0, process.stderr.read()
    assert outside(record_of()) == outside(record_of(undisturbed))


def test_disk_full(undisturbed, cli, monkeypatch):
    kill_at(monkeypatch, 3)
    assert cli(*SMOKE)[0] == 143
    before = CHECKPOINT.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        kill_at(m, 2)
        status, _, err = cli(*SMOKE)
        assert status == 1 and "No space left" in err and err.count("\n") == 1
    kept = [p for p in Path("runs").rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    assert [p.read_bytes() for p in kept] == [before] and not list(Path("results").rglob("*.json"))
    kill_at(monkeypatch)
    assert cli(*SMOKE)[0] == 0 and outside(record_of()) == outside(record_of(undisturbed))


@pytest.fixture
def mount(tmp_path):
    """mount(folder, options): a file system of its own; skips where mounting one is not allowed."""
    mounted = []

    def do(folder, options):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "ctl-test", str(folder)], capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(folder)
    yield do
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("full", ["runs", "results"])
def test_a_disk_that_is_really_full(full, undisturbed, cli, monkeypatch, mount):
    size = (undisturbed / "runs" / f"{CELL}.pt").stat().st_size
    mount(full, f"size={size + 8192 if full == 'runs' else 4096}")  # one checkpoint, but no second
    if full == "results":
        Path(full, "other").write_bytes(b"0" * 4096)  # no record either
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 0)
    status, _, err = cli(*SMOKE)
    assert status == 1 and "No space left" in err and err.count("\n") == 1
    assert not list(Path("results").rglob("*.json")) and not [p for p in Path(".").rglob("*") if p.name.endswith(".tmp")]
    subprocess.run(["mount", "-o", f"remount,size={8 * size}", full], check=True)
    monkeypatch.setattr(ctl, "CHECKPOINT_SECONDS", 60)
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
    assert status == 2 and f"cannot write into {folder}" in err and err.count("\n") == 1
    assert not [p for p in Path(".").rglob("*") if p.is_file()]


def test_a_report_that_cannot_be_written(cli, mount):
    final = as_the_paper_has_it(0)["simple", None]
    mount("results", "size=1m")
    put_record("simple", None, 0, final)
    before = sorted(Path("results").rglob("*"))
    subprocess.run(["mount", "-o", "remount,ro", "results"], check=True)
    status, _, err = cli("--report")
    assert status == 1 and "ead-only" in err and err.count("\n") == 1 and sorted(Path("results").rglob("*")) == before


def test_interrupted_while_torch_loads(house):
    Path("torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    done = subprocess.run([sys.executable, "ctl.py", *SMOKE], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == ""  # which a shell shows as 130


def test_interrupted_before_the_run(house):
    """Once torch is there SIGINT is an exception again: it cleans up and says so."""
    Path("driver.py").write_text("import argparse, runpy, signal\nargparse.ArgumentParser.parse_args = lambda *a: signal.raise_signal(signal.SIGINT)\n"
                                 "runpy.run_path('ctl.py', run_name='__main__')\n")
    done = subprocess.run([sys.executable, "driver.py"], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "ctl.py: interrupted\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    ctl.write_whole(path, b"old")

    def look(source, target):  # at the one moment when it changes: the new file is whole, the old one still there
        assert Path(source).read_bytes() == b"new" and path.read_bytes() == b"old" and Path(source).parent == path.parent
        raise OSError(errno.EIO, "broken off")
    monkeypatch.setattr(os, "replace", look)
    with pytest.raises(OSError):
        ctl.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_two_at_once(house):
    first = subprocess.Popen([sys.executable, "ctl.py", *SMOKE, "--epochs", "200"], stdout=subprocess.PIPE, text=True)
    while "epoch    1/" not in first.stdout.readline():
        assert first.poll() is None
    second = subprocess.run([sys.executable, "ctl.py", *SMOKE, "--epochs", "200"], capture_output=True, text=True)
    assert second.returncode == 3 and second.stderr.count("\n") == 1 and "another process" in second.stderr
    first.kill()  # the lock dies with its process
    first.wait()
    third = subprocess.Popen([sys.executable, "ctl.py", *SMOKE, "--epochs", "200"], stdout=subprocess.PIPE, text=True)
    while "epoch" not in third.stdout.readline():
        assert third.poll() is None
    third.send_signal(signal.SIGTERM)
    assert third.wait() == 143


def bad_lines():
    """Command lines each of which is wrong in one thing."""
    for field in dataclasses.fields(ctl.Config):
        flag, kind = "--" + field.name.replace("_", "-"), field.metadata["type"]
        if kind in (int, float) and field.name != "milestones":
            for value in ("x", "", "-1", "nan", "-inf", "1e999", "0x10", "1,5"):
                yield [flag, value]
        if field.metadata["choices"]:
            for value in ("", "x", field.metadata["choices"][0].upper() + "!"):
                yield [flag, value]
        if kind is bool:
            yield [f"{flag}=1"]
            yield [f"--no{flag}"]
        else:
            yield [flag]
    for loss in ("simple", "hard-simple", "triplet"):
        for more in (["--tau", "0.3"], ["--tau", "1"], ["--match-step"]):
            yield ["--loss", loss, *more]
    for loss in ("contrastive", "simple", "triplet"):
        for more in (["--k", "5"], ["--alpha", "0.1"]):
            yield ["--loss", loss, *more]
    for more in (["--loss", "hard", "--k", "5", "--alpha", "0.1"], ["--k"], ["--gamma", "0.5"], ["--milestones", "3"], ["--milestones", "2", "1"], ["pos"],
                 ["--milestones", "x"], ["--subset", "5"], ["--subset", "4001"], ["--size", "17"], ["--size", "1000000"], ["--size", "8"], ["--batch-size", "1"], ["--json"],
                 ["--report", "--tau", "1"], ["--report", "--profile"], ["--dataset", ""], ["--dataset", "nowhere"], ["--dataset", "ctl.py"],
                 ["--device", "tpu9"], ["--device", "hpu"], ["--seed", "9" * 23], ["--tau", "1e-40"], ["--probe-lr", "1e40"], ["--threads", "9" * 11],
                 ["--batch-size", "9" * 14],
                 "--loss hard --tau 0.312345678901 --lr 0.0312345678901234 --momentum 0.91234567890123 --weight-decay 0.000512345678901 --warmup "
                 "1.0123456789012 --bank-momentum 0.51234567890123 --alpha 0.0812345678901 --probe-lr 0.3123456789012 --width 5".split(), ["--device", "cuda:99"], ["--tau", "0"], ["--tau", "inf"], ["--momentum", "1.1"], ["--alpha", "2"], ["-t", "1"]):
        yield more


def test_two_hundred_bad_command_lines(cli, tmp_path):
    lines = list(bad_lines())
    assert len(lines) >= 200
    for line in lines:
        status, out, err = cli("--preset", "smoke", *line)
        assert status == 2 and err.count("\n") == 1 and err.startswith("ctl.py: ") and "Traceback" not in err, (line, status, err)
        assert not [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".lock")], line
