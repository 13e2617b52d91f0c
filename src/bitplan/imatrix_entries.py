"""What an importance matrix holds, and what a rarely used expert borrows from the others.

Arithmetic alone: no file, no model. An entry holds sums of squares and how many tokens went into
them, so that matrices can be merged.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Entry:
    """What one weight tensor saw."""

    squares: Array
    """Sum over tokens of the squared inputs, [matrices, row]; a matrix for each expert."""
    counts: Array
    """Tokens that each matrix saw, [matrices]."""

    def mean(self) -> Array:
        """As llama.cpp takes it: of each matrix alone, ones for an expert that saw no token."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.squares / np.maximum(counts, 1), np.float32(1))

    @property
    def is_even(self) -> bool:
        """Whether all matrices saw as many tokens: of one matrix, of heads, of what is filled."""
        return bool((self.counts == self.counts[0]).all())

    def own_share(self) -> Exact:
        """How much of each matrix's mean is its own, [matrices] of 0..1; the rest is borrowed.

        Buehlmann and Straub's credibility (1970), the linear estimate of least expected squared
        error: with n tokens it is n / (n + k), k the variance of one token's x^2 within an expert
        over the variance of the experts' true means. The first is 2 m^2 for Gaussian inputs of
        mean square m, all that sums of squares can tell. The second, c^2 m^2, is estimated by
        how far the means r = (mean / m) scatter beyond what counting n tokens does by itself:
        E[sum_e n_e (r_e - 1)^2] = 2 (E - 1) + c^2 (N - sum_e n_e^2 / N). So k = 2 / c^2, one for
        the tensor. Inputs with heavier tails scatter more, which makes k too small, never too
        large: what is borrowed errs on the side of llama.cpp, which borrows nothing.
        """
        n = self.counts.astype(np.float64)
        seen = n > 0
        spread = n.sum() - (n * n).sum() / max(n.sum(), 1.0)
        pooled = self.pooled()
        used = pooled > 0
        if spread <= 0 or not used.any():  # one expert had all tokens: nothing to compare
            return np.zeros(len(n))
        means = self.squares[seen][:, used] / n[seen, None]
        gaps = (np.square(means / pooled[used] - 1).mean(1) * n[seen]).sum()
        scatter = max(0.0, gaps - 2 * (seen.sum() - 1)) / spread
        return np.asarray(n * scatter / (n * scatter + 2))

    def pooled(self) -> Exact:
        """Mean square over all tokens of all matrices, [row]; ones where there was no token."""
        total = float(self.counts.sum(dtype=np.float64))
        sums = self.squares.sum(axis=0, dtype=np.float64)
        return sums / total if total > 0 else np.ones_like(sums)

    def filled(self) -> Entry:
        """With every expert's mean moved towards that of all, the more the fewer tokens it saw.

        (sum_e + k m) / (count_e + k), see `own_share`; m itself for an expert without a token.
        Counts come out all alike (the largest), so that filling twice is filling once and
        whoever divides sums by counts, as llama-quantize does, finds these means. An entry whose
        matrices saw equally many tokens is left as it is.
        """
        if self.is_even:
            return self
        own, pooled = self.own_share()[:, None], self.pooled()
        count = np.float32(self.counts.max())
        means = own * (self.squares / np.maximum(self.counts, 1)[:, None]) + (1 - own) * pooled
        sums = np.minimum(means * count, np.finfo(np.float32).max)
        return Entry(sums.astype(np.float32), np.full_like(self.counts, count))


@dataclass(frozen=True, eq=False)
class Imatrix:
    entries: dict[str, Entry]
    """By the weight tensor's name."""
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int

    def filled(self) -> Imatrix:
        """With rarely used experts filled up (see `Entry.filled`); of dense models the same."""
        filled = {name: entry.filled() for name, entry in self.entries.items()}
        return dataclasses.replace(self, entries=filled)

    @property
    def is_filled(self) -> bool:
        """Whether `filled` would change nothing."""
        return all(entry.is_even for entry in self.entries.values())

    def importance(self) -> dict[str, Array]:
        """Mean squared input that weights are rounded with, [matrices, row]; experts filled."""
        return {name: entry.filled().mean() for name, entry in self.entries.items()}

    def hash(self) -> str:
        """sha256 of the numbers; what the datasets were called plays no part."""
        digest = hashlib.sha256(f"{self.chunks} {self.chunk_size}".encode())
        for name, entry in sorted(self.entries.items()):
            digest.update(f"\n{name} {entry.squares.shape}\n".encode())
            digest.update(entry.squares.astype("<f4").tobytes())
            digest.update(entry.counts.astype("<f4").tobytes())
        return digest.hexdigest()
