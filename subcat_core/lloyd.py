"""The compiled loops of one exact pass of k-means: the nearest centroid of each row, and sums that have one answer.

Every row is worked on by itself, and rounded to a grid on which float64 adds without error, so all results have the
same bits whatever rows stand beside it, however many threads run, and in whatever order rows and parts are added.
Legend: n rows, K clusters, D dimensions.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numba import njit

# Reassociation lets the compiler use vector registers; NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
# Without it: (x + magic) - magic must stay what it says.
_IN_ORDER = {"contract", "nsz"}
_CHUNK = 256  # dimensions that are added in float32, before float64 takes over
_LANES = 4  # of the narrowest vector registers (SSE, NEON): what the bound on rounding errors counts with


@dataclasses.dataclass(frozen=True)
class Grid:
    """The step that rows are rounded to before they are added: so fine that only float64's last bits are lost.

    A sum of num_rows values of at most max_norm, all multiples of the step, has no rounding error in float64: it is the
    same in any order, and rows that leave a cluster can be taken out again. The mean of a cluster is off by at most
    max_norm * num_rows / 2**50: 1e-8 of the longest row for 10 million rows in one class, and less where errors cancel.
    """

    max_norm: float
    num_rows: int

    @property
    def magic(self) -> float:
        """(x + magic) - magic is x (|x| <= max_norm) rounded to the grid."""
        return _magic(self.max_norm, self.num_rows)

    def magic_of_squares(self, centroids: np.ndarray) -> float:
        """The same for the squared distances of the rows to centroids (K, D)."""
        longest = math.sqrt(float(np.einsum("kd,kd->k", centroids, centroids, dtype=np.float64).max()))
        return _magic((self.max_norm + longest) ** 2 * 1.001, self.num_rows)


def _magic(largest: float, num_rows: int) -> float:
    if largest == 0:
        return 1.0
    return 1.5 * 2.0 ** (math.frexp(largest * max(num_rows, 2))[1] + 1)


@dataclasses.dataclass
class Targets:
    """The K centroids of a class, as the search wants them.

    Scores are x . shifted - offset: the centroids' mean is taken off, so few digits cancel. shifted: (K, D) float32;
    offsets: (K,) float64; bound times the norm of a row, and slack: the largest rounding error of two of its scores.
    """

    centroids: np.ndarray
    shifted: np.ndarray
    offsets: np.ndarray
    bound: float
    slack: float

    @classmethod
    def of(cls, centroids: np.ndarray) -> Targets:
        """centroids: (K, D) float32, all of them finite."""
        centroids = np.ascontiguousarray(centroids)
        mean = centroids.mean(axis=0, dtype=np.float64)
        shifted = centroids - mean
        squares = np.einsum("kd,kd->k", shifted, shifted)
        gamma = (centroids.shape[1] / _LANES + 16) * 2.0**-24
        bound = 2 * gamma * math.sqrt(squares.max())
        slack = 2.0**-44 * float(np.square(centroids, dtype=np.float64).sum(axis=1).max())
        return cls(centroids, shifted.astype(np.float32), shifted @ mean + squares / 2, bound, slack)


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def _four_dots(
    x0: np.ndarray, x1: np.ndarray, x2: np.ndarray, x3: np.ndarray, shifted: np.ndarray, dots: np.ndarray
) -> None:
    """dots (4, K) float32 := four rows times shifted (K, D): twenty sums in registers, few loads for each."""
    num_clusters, dimension = shifted.shape
    last = num_clusters - 1
    for k in range(0, num_clusters, 5):
        k1, k2, k3, k4 = min(k + 1, last), min(k + 2, last), min(k + 3, last), min(k + 4, last)
        c0, c1, c2, c3, c4 = shifted[k], shifted[k1], shifted[k2], shifted[k3], shifted[k4]
        a0 = a1 = a2 = a3 = a4 = np.float32(0)
        b0 = b1 = b2 = b3 = b4 = np.float32(0)
        e0 = e1 = e2 = e3 = e4 = np.float32(0)
        f0 = f1 = f2 = f3 = f4 = np.float32(0)
        for d in range(dimension):
            v0, v1, v2, v3 = x0[d], x1[d], x2[d], x3[d]
            w0, w1, w2, w3, w4 = c0[d], c1[d], c2[d], c3[d], c4[d]
            a0 += v0 * w0
            a1 += v0 * w1
            a2 += v0 * w2
            a3 += v0 * w3
            a4 += v0 * w4
            b0 += v1 * w0
            b1 += v1 * w1
            b2 += v1 * w2
            b3 += v1 * w3
            b4 += v1 * w4
            e0 += v2 * w0
            e1 += v2 * w1
            e2 += v2 * w2
            e3 += v2 * w3
            e4 += v2 * w4
            f0 += v3 * w0
            f1 += v3 * w1
            f2 += v3 * w2
            f3 += v3 * w3
            f4 += v3 * w4
        dots[0, k], dots[0, k1], dots[0, k2], dots[0, k3], dots[0, k4] = a0, a1, a2, a3, a4
        dots[1, k], dots[1, k1], dots[1, k2], dots[1, k3], dots[1, k4] = b0, b1, b2, b3, b4
        dots[2, k], dots[2, k1], dots[2, k2], dots[2, k3], dots[2, k4] = e0, e1, e2, e3, e4
        dots[3, k], dots[3, k1], dots[3, k2], dots[3, k3], dots[3, k4] = f0, f1, f2, f3, f4


@njit(nogil=True, cache=True, fastmath=_FASTMATH)
def short_square_distance(x: np.ndarray, y: np.ndarray) -> float:
    """|x - y|**2 of x, y (d,) float32, added in float32: for few dimensions."""
    total = np.float32(0)
    for d in range(len(x)):
        difference = x[d] - y[d]
        total += difference * difference
    return np.float64(total)


@njit(nogil=True, cache=True)
def square_distance(x: np.ndarray, y: np.ndarray) -> float:
    """|x - y|**2 of x, y (D,) float32: differences first, so no digits cancel; float64 from chunk to chunk."""
    total = 0.0
    for start in range(0, len(x), _CHUNK):
        total += short_square_distance(x[start : start + _CHUNK], y[start : start + _CHUNK])
    return total


@njit(nogil=True, cache=True)
def _exact_nearest(x: np.ndarray, centroids: np.ndarray, scores: np.ndarray, lowest_score: float) -> int:
    """The nearest centroid in float64 among those of at least lowest_score; ties go to the lower id."""
    best, closest = 0, np.inf
    for k in range(len(centroids)):
        if scores[k] >= lowest_score:
            square = 0.0
            for d in range(len(x)):
                difference = np.float64(x[d]) - np.float64(centroids[k, d])
                square += difference * difference
            if square < closest:
                best, closest = k, square
    return best


@njit(nogil=True, cache=True)
def _pick(
    x: np.ndarray,
    dots: np.ndarray,
    norm: float,
    centroids: np.ndarray,
    offsets: np.ndarray,
    bound: float,
    slack: float,
    scores: np.ndarray,
) -> int:
    """The nearest centroid of a row: by its scores, and where rounding could decide, in float64."""
    best, highest, second = 0, -np.inf, -np.inf
    for k in range(len(offsets)):
        score = np.float64(dots[k]) - offsets[k]
        scores[k] = score
        if score > highest:
            best, highest, second = k, score, highest
        elif score > second:
            second = score
    margin = bound * norm + slack
    if highest - second <= margin:
        return _exact_nearest(x, centroids, scores, highest - margin)
    return best


@njit(nogil=True, cache=True, fastmath=_IN_ORDER)
def _add_row(total: np.ndarray, x: np.ndarray, magic: float) -> None:
    for d in range(len(x)):
        total[d] += (np.float64(x[d]) + magic) - magic


@njit(nogil=True, cache=True, fastmath=_IN_ORDER)
def _move_row(source: np.ndarray, target: np.ndarray, x: np.ndarray, magic: float) -> None:
    for d in range(len(x)):
        value = (np.float64(x[d]) + magic) - magic
        source[d] -= value
        target[d] += value


@njit(nogil=True, cache=True, fastmath=_IN_ORDER)
def settle(
    features: np.ndarray,
    rows: np.ndarray,
    found: np.ndarray,
    centroids: np.ndarray,
    clusters: np.ndarray,
    distances: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
    magic: float,
    magic_of_squares: float,
) -> tuple[float, int]:
    """Bring sums (K, D) float64 and counts (K,) int64 to the clusters found (n,) int32 of the rows (n,).

    features: (m, D) float32. clusters (n,) int32, -1 for a row that is in no cluster yet, become `found`; only rows
    that change are added, and taken out where they were. distances (n,) float32: Euclidean to the own centroid.
    Returns (inertia, rows that changed).
    """
    inertia, num_changed = 0.0, 0
    for i in range(len(rows)):
        k, old, x = found[i], clusters[i], features[rows[i]]
        square = square_distance(x, centroids[k])
        distances[i] = np.sqrt(square)
        inertia += (square + magic_of_squares) - magic_of_squares
        if k != old:
            if old < 0:
                _add_row(sums[k], x, magic)
            else:
                _move_row(sums[old], sums[k], x, magic)
                counts[old] -= 1
            counts[k] += 1
            clusters[i] = k
            num_changed += 1
    return inertia, num_changed


@njit(nogil=True, cache=True)
def assign_rows(
    features: np.ndarray,
    norms: np.ndarray,
    rows: np.ndarray,
    centroids: np.ndarray,
    shifted: np.ndarray,
    offsets: np.ndarray,
    bound: float,
    slack: float,
    clusters: np.ndarray,
    distances: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
    magic: float,
    magic_of_squares: float,
) -> tuple[float, int]:
    """Give rows (n,) of features (m, D) float32, of norms (m,), their nearest centroid, and `settle` them.

    Four rows at a time, which stay in the cache from the search to the sums. Arguments 4 to 8 are those of `Targets`.
    """
    num_rows, num_clusters = len(rows), len(offsets)
    dots, scores = np.empty((4, num_clusters), np.float32), np.empty(num_clusters)
    found = np.empty(4, np.int32)
    inertia, num_changed = 0.0, 0
    for start in range(0, num_rows, 4):
        stop = min(start + 4, num_rows)
        r0, r1, r2, r3 = rows[start], rows[min(start + 1, stop - 1)], rows[min(start + 2, stop - 1)], rows[stop - 1]
        _four_dots(features[r0], features[r1], features[r2], features[r3], shifted, dots)
        for i in range(start, stop):
            found[i - start] = _pick(
                features[rows[i]], dots[i - start], norms[rows[i]], centroids, offsets, bound, slack, scores
            )
        part_inertia, part_changed = settle(
            features,
            rows[start:stop],
            found,
            centroids,
            clusters[start:stop],
            distances[start:stop],
            sums,
            counts,
            magic,
            magic_of_squares,
        )
        inertia += part_inertia
        num_changed += part_changed
    return inertia, num_changed


@njit(nogil=True, cache=True)
def project(features: np.ndarray, rows: np.ndarray, axes: np.ndarray, points: np.ndarray) -> None:
    """points (n, d) float32 := rows (n,) of features (m, D) float32 times axes (d, D) float32, each row by itself."""
    dots = np.empty((4, len(axes)), np.float32)
    last = len(rows) - 1
    for start in range(0, len(rows), 4):
        r1, r2, r3 = rows[min(start + 1, last)], rows[min(start + 2, last)], rows[min(start + 3, last)]
        _four_dots(features[rows[start]], features[r1], features[r2], features[r3], axes, dots)
        for i in range(start, min(start + 4, last + 1)):
            points[i] = dots[i - start]
