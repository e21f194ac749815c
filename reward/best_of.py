"""Best-of-n: the expected reward for every n from one set of samples, and which n spends as much KL as a policy.

P prompts, N scored samples a prompt. The KL that best-of-n spends is `baton.sampling.best_of_kl`, an upper bound.
"""

from __future__ import annotations

import math

import numpy as np

from baton.sampling import best_of_kl


def best_of_rewards(proxy: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(P, N): in column n - 1, the expected value of the best of n replies, where `proxy` says which is best.

    proxy, values: (P, N), the scores that choose and those that are asked for (the same, or a gold reward's). Unbiased
    for each n: the mean over all subsets of n of the N samples, sum over i of C(i-1, n-1) / C(N, n) times the value of
    the i-th worst (Nakano et al. 2021; used so by Gao et al. 2022). Of replies with the same proxy any is the best
    equally often.
    """
    assert proxy.shape == values.shape and proxy.ndim == 2, (proxy.shape, values.shape)
    order = np.argsort(proxy, axis=1, kind="stable")
    ordered = np.take_along_axis(values.astype(np.float64), order, axis=1)
    scores = np.take_along_axis(proxy, order, axis=1)
    for row, tied in zip(ordered, scores, strict=True):
        starts = np.flatnonzero(np.r_[True, tied[1:] != tied[:-1]])
        sizes = np.diff(np.r_[starts, len(tied)])
        row[:] = np.repeat(np.add.reduceat(row, starts) / sizes, sizes)
    return ordered @ best_of_weights(proxy.shape[1]).T


def best_of_weights(count: int) -> np.ndarray:
    """(N, N): row n - 1, column i - 1 is C(i-1, n-1) / C(N, n), how often the i-th worst of N is the best of n."""
    weights = np.zeros((count, count))
    for n in range(1, count + 1):
        weight = n / count  # of the best of all; each worse one has (i - n) / (i - 1) of the next better one's
        for i in range(count, n - 1, -1):
            weights[n - 1, i - 1] = weight
            weight *= (i - n) / (i - 1) if i > 1 else 0.0
    return weights


def n_at_kl(kl_nats: float) -> float:
    """The n (1 and more, a fraction too) of which best-of-n spends `kl_nats` at most; 1 for none or less."""
    if kl_nats <= 0:
        return 1.0
    # log n - 1 < KL <= log n, so n lies between e^KL and e^(KL + 1); the KL rises with n
    low, high = kl_nats, kl_nats + 1  # in log n
    for _ in range(80):
        middle = (low + high) / 2
        if middle - 1 + math.exp(-middle) < kl_nats:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2) if high < 700 else math.inf


def at_kl(curve: np.ndarray, kl_nats: float) -> np.ndarray:
    """(P,): the rewards of a curve (P, N) where best-of-n spends `kl_nats`, in a straight line between two n.

    Between n and n + 1 lies a mixture of both, whose KL is no more than the straight line's (KL is convex).
    """
    count = curve.shape[1]
    nats = np.array([best_of_kl(n) for n in range(1, count + 1)])
    assert kl_nats <= nats[-1], "more KL than the best of all samples spends"
    if count == 1 or kl_nats <= 0:
        return np.asarray(curve[:, 0])
    above = min(max(int(np.searchsorted(nats, kl_nats)), 1), count - 1)
    share = (kl_nats - nats[above - 1]) / (nats[above] - nats[above - 1])
    return np.asarray((1 - share) * curve[:, above - 1] + share * curve[:, above])
