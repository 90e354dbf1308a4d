"""Maximum mean discrepancy (MMD): estimators, a permutation test, and random Fourier features.

    k(x, y) = 1/M Σ_j exp(−‖x − y‖² / 2 s_j²)             a mean of Gaussian kernels, so k(x, x) = 1
    MMD²    = E k(x, x') + E k(y, y') − 2 E k(x, y)       Gretton et al. 2012, lemma 6
    φ(x)    = [cos(xW), sin(xW)] / √(D/2)                 Rahimi & Recht 2007: ⟨φ(x), φ(y)⟩ → k(x, y), ‖φ(x)‖ = 1

The width of a kernel is a public fact: take it from public text (`bandwidths`), and fix it before any silo is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import DataError
from .seeds import generator

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
CHUNK = 16  # relabellings that share one pass over the kernel matrix


def bandwidths(x: np.ndarray) -> tuple[float, ...]:
    """s_j with s_j² = h²·{¼, ½, 1, 2, 4}, where h² is the median squared distance between two rows of `x` (n, p).

    Raises `DataError` when that median is zero.
    """
    median = float(np.median(squared_distances(x, x)[np.triu_indices(len(x), 1)])) if len(x) > 1 else 0.0
    if not median > 0:
        raise DataError(
            "rows that mostly differ, to measure a kernel's width on",
            f"{len(x)} rows whose median distance is {median}",
            "Name a public text with more, and more various, examples.",
        )
    return tuple(float(np.sqrt(median * scale)) for scale in SCALES)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """‖x_i − y_j‖² ≥ 0 for all pairs of rows: (n, m), float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.maximum((x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2.0 * (x @ y.T), 0.0)


def kernel(x: np.ndarray, y: np.ndarray, bandwidths: Sequence[float]) -> np.ndarray:
    """k(x_i, y_j) in (0, 1] for all pairs of rows: (n, m), float64."""
    distances = squared_distances(x, y)
    out = np.zeros_like(distances)
    for s in bandwidths:
        out += np.exp(distances * (-0.5 / s**2))
    return out / len(bandwidths)


# Estimators of MMD²


def mmd_biased(x: np.ndarray, y: np.ndarray, bandwidths: Sequence[float]) -> float:
    """‖mean k(x, ·) − mean k(y, ·)‖² ≥ 0 of rows (n, p) and (m, p), diagonals included (Gretton et al. 2012, eq. 5)."""
    within = kernel(x, x, bandwidths).mean() + kernel(y, y, bandwidths).mean()
    return float(within - 2.0 * kernel(x, y, bandwidths).mean())


def mmd_unbiased(x: np.ndarray, y: np.ndarray, bandwidths: Sequence[float]) -> float:
    """MMD² without the diagonals (Gretton et al. 2012, eq. 3); its expectation is exact, and it may be negative.

    As k(x, x) = 1, it is the biased one − (1 − mean Kxx)/(n − 1) − (1 − mean Kyy)/(m − 1). n, m ≥ 2.
    """
    xx, yy = kernel(x, x, bandwidths).mean(), kernel(y, y, bandwidths).mean()
    biased = xx + yy - 2.0 * kernel(x, y, bandwidths).mean()
    return float(biased - (1.0 - xx) / (len(x) - 1) - (1.0 - yy) / (len(y) - 1))


def debiased(mean_x: np.ndarray, mean_y: np.ndarray, std_x: float, std_y: float) -> float:
    """‖mean_x − mean_y‖² − D·(std_x² + std_y²) of two noised mean embeddings (D,), exact in expectation.

    `std_x`, `std_y`: standard deviation of the noise in a coordinate; 0 where there is none.
    """
    gap = np.asarray(mean_x, np.float64) - np.asarray(mean_y, np.float64)
    return float(gap @ gap - gap.size * (std_x**2 + std_y**2))


# Permutation test


def permutation_test(
    x: np.ndarray, y: np.ndarray, bandwidths: Sequence[float], permutations: int, random: np.random.Generator
) -> float:
    """p in (0, 1] of "x and y have one distribution": exact when they may be exchanged, whatever the bandwidths."""
    observed, null = relabelled([x, y], bandwidths, permutations, random)
    return p_value(float(observed[0, 1]), null[:, 0, 1])


def p_value(observed: float, null: np.ndarray) -> float:
    """(1 + #{null ≥ observed}) / (1 + N) (Phipson & Smyth 2010); ties count, up to rounding."""
    return float((1 + np.count_nonzero(null >= observed - 1e-9)) / (1 + len(null)))


def relabelled(
    groups: Sequence[np.ndarray], bandwidths: Sequence[float], permutations: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased MMD² between groups of rows (n_i ≥ 2, p): as they are (k, k), and as if dealt anew (permutations, k, k).

    One kernel matrix serves all: 4·(Σ n_i)² bytes. Its mean is taken off first, which cancels in MMD² and keeps single
    precision to some 1e-7. The diagonals of what comes back are zero.
    """
    rows = np.concatenate(groups)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    matrix = _centred(rows, bandwidths)
    dealt = [labels, *(random.permutation(labels) for _ in range(permutations))]
    found = [_between(matrix, np.stack(dealt[i : i + CHUNK]), len(groups)) for i in range(0, len(dealt), CHUNK)]
    together = np.concatenate(found)
    return together[0], together[1:]


def _centred(rows: np.ndarray, bandwidths: Sequence[float], block: int = 1024) -> np.ndarray:
    matrix = np.concatenate(
        [kernel(rows[i : i + block], rows, bandwidths).astype(np.float32) for i in range(0, len(rows), block)]
    )
    matrix -= np.float32(matrix.mean(dtype=np.float64))
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _between(matrix: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Unbiased MMD² (c, k, k) for each of c labellings (c, N), from a kernel matrix without its diagonal."""
    members = np.eye(k, dtype=np.float32)[labels]  # (c, N, k)
    c, n, _ = members.shape
    seen = (matrix @ members.transpose(1, 0, 2).reshape(n, c * k)).reshape(n, c, k)
    sums = np.einsum("cni,ncj->cij", members, seen, dtype=np.float64)
    sizes = members.sum(1, dtype=np.float64)  # (c, k)
    within = np.einsum("cii->ci", sums) / (sizes * (sizes - 1.0))
    means = sums / (sizes[:, :, None] * sizes[:, None, :])
    out = within[:, :, None] + within[:, None, :] - 2.0 * means
    out[:, np.arange(k), np.arange(k)] = 0.0
    return out


# Random Fourier features


@dataclass(frozen=True, eq=False)
class FourierMap:
    """φ(x) = [cos(xPW), sin(xPW)] / √(D/2): rows of norm one whose dot products approximate a kernel.

    `projection`: P (p, d'), or None for none. `frequencies`: W (d' or p, D/2), in units of 1/distance.
    """

    projection: np.ndarray | None
    frequencies: np.ndarray

    def __post_init__(self) -> None:
        if self.frequencies.ndim != 2 or not self.frequencies.size:
            raise ValueError(f"Expected frequencies of shape (width, D/2), got {self.frequencies.shape}.")
        if self.projection is not None and self.projection.shape[1:] != self.frequencies.shape[:1]:
            raise ValueError(f"Expected a projection onto {len(self.frequencies)}, got {self.projection.shape}.")

    @property
    def width(self) -> int:
        """p, what a row that comes in has."""
        return len(self.frequencies if self.projection is None else self.projection)

    @property
    def features(self) -> int:
        """D, what a row that goes out has."""
        return 2 * self.frequencies.shape[1]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """φ of each row of `x` (n, p): (n, D), float64."""
        x = np.asarray(x, np.float64)
        angles = (x if self.projection is None else x @ self.projection) @ self.frequencies
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.sqrt(self.frequencies.shape[1])


def fourier_map(
    width: int, features: int, bandwidths: Sequence[float], seed: int, project: int | None = None
) -> FourierMap:
    """The map that everyone who knows `seed` draws alike: `features` (D) even, rows of W from N(0, I/s_j²).

    The bandwidths take turns, so their shares differ by one row of W at most: D ≥ 2·len(bandwidths). `project`: first
    through a random matrix onto that many dimensions, entries N(0, 1/project), which keeps distances on average
    (Johnson & Lindenstrauss).
    """
    half, odd = divmod(features, 2)
    if odd or half < len(bandwidths):
        raise ValueError(f"Expected an even features={features} >= {2 * len(bandwidths)}, two a bandwidth.")
    inner = width if project is None else project
    scales = np.resize(np.asarray(bandwidths, np.float64), half)
    frequencies = generator(seed, "fourier", "frequencies").standard_normal((inner, half)) / scales
    if project is None:
        return FourierMap(None, frequencies)
    projection = generator(seed, "fourier", "projection").standard_normal((width, project)) / np.sqrt(project)
    return FourierMap(projection, frequencies)
