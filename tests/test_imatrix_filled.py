"""Rarely used experts: what they borrow, that it lowers the damage, and that it is what is written.

The damage is a weighted error with inputs that were never calibrated on, and real KL.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from bitplan import divergence, formats, gguf_file, imatrix
from bitplan.imatrix import Array, Entry, Imatrix
from bitplan.runtimes import ggml
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.writers import gguf
from conftest import EXPERTS, LAYERS, imatrix_entry

RARE, TOKENS = 2, 2
"""The expert that is planted as rare, and how many calibration tokens it sees."""


def drawn(rng: np.random.Generator, means: npt.NDArray[np.float64], tokens: list[int]) -> Entry:
    """Sums of squares of so many Gaussian inputs of each expert; means [experts, row]."""
    each = [np.square(rng.normal(0, np.sqrt(m), (n, len(m)))).sum(0) for m, n in zip(means, tokens)]  # noqa: B905
    return imatrix_entry(np.stack(each).tolist(), [float(n) for n in tokens])


def test_the_own_share_is_credibility_theory_written_out() -> None:
    rng = np.random.default_rng(0)
    tokens = [5, 80, 300, 40]
    entry = drawn(rng, rng.gamma(4, 0.25, (4, 64)), tokens)
    total = sum(tokens)
    gaps = []
    for j in range(64):
        m = sum(float(entry.squares[e, j]) for e in range(4)) / total
        means = [float(entry.squares[e, j]) / n for e, n in enumerate(tokens)]
        gaps.append(sum(n * (r / m - 1) ** 2 for n, r in zip(tokens, means, strict=True)))
    spread = total - sum(n * n for n in tokens) / total
    k = 2 / ((sum(gaps) / 64 - 2 * 3) / spread)
    pooled = entry.squares.sum(0, dtype=np.float64) / total
    expected = [(entry.squares[e] + k * pooled) / (n + k) for e, n in enumerate(tokens)]
    # float32 sums and their product with the count against float64
    np.testing.assert_allclose(entry.filled().mean(), expected, rtol=1e-5)
    np.testing.assert_allclose(entry.own_share(), np.array(tokens) / (np.array(tokens) + k))


@pytest.mark.parametrize("scatter", [0.25, 1.0, 4.0])
def test_the_estimate_finds_how_much_experts_differ(scatter: float) -> None:
    """Means drawn with a known relative variance c^2: k = 2 / c^2 within a quarter."""
    rng = np.random.default_rng(1)
    means = rng.gamma(1 / scatter, scatter, (64, 512))
    entry = drawn(rng, means, [int(n) for n in rng.integers(20, 60, 64)])
    share, n = entry.own_share(), entry.counts.astype(np.float64)
    assert (n / share - n) == pytest.approx(2 / scatter, rel=0.25)


def test_experts_that_do_not_differ_share_one_mean() -> None:
    rng = np.random.default_rng(2)
    entry = drawn(rng, np.ones((8, 256)), [3, 10, 50, 50, 50, 50, 50, 50])
    errors = np.abs(entry.mean() - 1).mean(1), np.abs(entry.filled().mean() - 1).mean(1)
    assert errors[1][0] < 0.3 * errors[0][0]  # 3 tokens alone are off by 60 %, all by 9 %


def test_what_was_never_seen_takes_the_mean_of_all_and_ones_where_there_is_none() -> None:
    entry = imatrix_entry([[2, 4], [0, 0]], [2, 0])
    assert entry.filled().mean().tolist() == [[1, 2], [1, 2]]
    assert imatrix_entry([[0, 0], [0, 0]], [0, 0]).filled().mean().tolist() == [[1, 1], [1, 1]]


def test_heads_and_dense_weights_stay_as_they_are(small: Imatrix) -> None:
    heads = imatrix_entry([[1, 2], [30, 4]], [7, 7])
    assert heads.filled() is heads
    dense = small.entries["blk.0.attn_q.weight"]
    assert small.filled().entries["blk.0.attn_q.weight"] is dense
    assert not small.is_filled
    assert small.filled().is_filled


@given(
    counts=st.lists(st.integers(0, 1 << 24), min_size=1, max_size=6),
    values=st.lists(st.floats(0, 2.0**127, width=32), min_size=12, max_size=12),
)
def test_filling_twice_is_filling_once_and_gives_finite_means(
    counts: list[int], values: list[float]
) -> None:
    squares = np.array(values, np.float32)[: 2 * len(counts)].reshape(len(counts), 2)
    n = np.array(counts, np.float32)
    once = Entry(np.where(n[:, None] > 0, squares, np.float32(0)), n).filled()
    assert np.isfinite(once.mean()).all()
    assert (once.mean() >= 0).all()
    assert once.filled() is once


PLANTS = 2


@dataclass(frozen=True)
class Planted:
    """The tiny mixture of experts, of which one saw two tokens; all else 1,280."""

    model: LlamaModel
    truth: Imatrix
    """Of 40 other windows."""
    plants: list[Imatrix]
    """Each with other two tokens, real ones."""
    held_out: npt.NDArray[np.int32]

    def damage(self, fmt: str, importance: Callable[[Imatrix], Array]) -> list[float]:
        """sum_j E[x_j^2] |w_j - w'_j|^2 over the rare expert's matrices, one for each plant."""
        found = []
        for plant in self.plants:
            total = 0.0
            for name in (n for n in plant.entries if n.startswith("blk.0.ffn") and "_exps" in n):
                own, _ = self.model.original(name)
                weights = own.reshape(EXPERTS, -1, own.shape[-1])[RARE]
                one = Imatrix({name: plant.entries[name]}, (), 1, 1)
                rounded = ggml.rounded(weights, formats.get(fmt), importance(one)[RARE], 1)
                lost = np.square(weights - rounded).sum(0) * self.truth.entries[name].mean()[RARE]
                total += float(lost.sum())
            found.append(total)
        return found


@pytest.fixture(scope="module")
def planted(tiny_moe_gguf: Path, text: str) -> Iterator[Planted]:
    with LlamaModel(tiny_moe_gguf, ctx=64, threads=1, swap=True) as model:
        tokens = model.tokenize(text)
        windows = tokens[: len(tokens) // 64 * 64].reshape(-1, 64).copy()
        windows[:, 0] = model.bos or 0

        def collected(rows: npt.NDArray[np.int32]) -> Imatrix:
            captured = model.capture(rows, ["second_moments"])
            return imatrix.from_captured(captured, "words", len(rows), 64)

        many = collected(windows[:20])
        layers: list[list[Imatrix]] = [[] for _ in range(LAYERS)]
        for window in windows[:100]:
            short = collected(window[None, :6])
            for layer, found in enumerate(layers):
                if _tokens(short, layer) == TOKENS:
                    found.append(short)
            if min(map(len, layers)) == PLANTS:
                break
        pairs = [[found[i] for found in layers] for i in range(PLANTS)]
        plants = [_with_rare(many, pair) for pair in pairs]
        yield Planted(model, collected(windows[100:140]), plants, windows[-8:])


def _tokens(matrix: Imatrix, layer: int) -> float:
    """That the rare expert saw in one layer."""
    return float(matrix.entries[f"blk.{layer}.ffn_up_exps.weight"].counts[RARE])


def _with_rare(many: Imatrix, few: Sequence[Imatrix]) -> Imatrix:
    """`many`, with the rare expert's sums and counts from `few`, one for each layer."""
    entries = dict(many.entries)
    for name, entry in many.entries.items():
        if "_exps" in name:
            other = few[int(name.split(".")[1])].entries[name]
            squares, counts = entry.squares.copy(), entry.counts.copy()
            squares[RARE], counts[RARE] = other.squares[RARE], other.counts[RARE]
            entries[name] = Entry(squares, counts)
    return dataclasses.replace(many, entries=entries)


@pytest.mark.parametrize(("fmt", "most"), [("q2_k", 0.9), ("iq2_xxs", 0.8), ("q4_k", 0.95)])
def test_filling_lowers_the_damage_of_a_rare_expert(
    planted: Planted, fmt: str, most: float
) -> None:
    """Over six plants it came to 0.853, 0.716 and 0.898 of the damage, none above 0.91."""
    raw = planted.damage(fmt, lambda m: next(iter(m.entries.values())).mean())
    filled = planted.damage(fmt, lambda m: next(iter(m.importance().values())))
    assert all(b < most * a for a, b in zip(raw, filled, strict=True))


def test_filling_does_not_raise_kl(planted: Planted) -> None:
    """Of all experts in Q2_K, of which one in four is rare: 0.1017 nats against 0.1024."""
    model = planted.model
    references = [divergence.reference(x) for x in model.logits(planted.held_out)]

    def kl(importance: dict[str, Array]) -> npt.NDArray[np.float64]:
        experts = {n: formats.get("q2_k") for n in importance if "_exps" in n}
        with model.rounded(experts, importance):
            pairs = zip(references, model.logits(planted.held_out), strict=True)
            return np.concatenate([divergence.kl(r, x) for r, x in pairs])

    plant = planted.plants[0]
    raw = {name: entry.mean() for name, entry in plant.entries.items()}
    gained = kl(raw) - kl(plant.importance())  # token by token: paired
    assert gained.mean() > -2 * gained.std() / len(gained) ** 0.5


def written(path: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """The raw bytes of every tensor of a file."""
    return {t.name: np.asarray(t.data).view(np.uint8).ravel() for t in GGUFReader(path).tensors}


def test_what_is_written_is_what_was_planned(
    planted: Planted, tiny_moe_gguf: Path, tmp_path: Path
) -> None:
    """Rounding in process with a raw matrix, bitplan's writer with the raw file, and the filled
    file that its command line names: the same bytes."""
    raw, out = tmp_path / "raw.gguf", tmp_path / "out.gguf"
    plant, header = planted.plants[0], gguf_file.read(tiny_moe_gguf)
    imatrix.write(plant, raw)
    types = {n: "q2_k" for n in plant.entries if "_exps" in n and n.startswith("blk.1")}
    line = gguf.write(header, types, out, plan_hash="0" * 64, matrix=raw, threads=1)
    importance, found = plant.importance(), written(out)
    for name in types:
        own, _ = planted.model.original(name)
        planned = ggml.quantize(own, formats.get("q2_k"), importance[name], 1)
        assert (found[name] == planned.ravel()).all()
    filled = tmp_path / "raw-filled.gguf"
    assert shlex.quote(str(filled)) in line
    assert imatrix.read(filled).hash() == plant.filled().hash()
    if shutil.which("llama-quantize"):
        command = line.replace(str(out), str(tmp_path / "theirs.gguf"))
        subprocess.run(shlex.split(command), check=True, capture_output=True)
        theirs = written(tmp_path / "theirs.gguf")
        assert all((theirs[name] == found[name]).all() for name in types)


def test_a_dense_model_gets_no_second_file(tiny_gguf: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    ones = Imatrix({name: imatrix_entry([[1.0] * 256], [1])}, ("t",), 1, 1)
    imatrix.write(ones, tmp_path / "m.gguf")
    out, header = tmp_path / "out.gguf", gguf_file.read(tiny_gguf)
    gguf.write(
        header, {name: "q4_0"}, out, plan_hash="0" * 64, matrix=tmp_path / "m.gguf", threads=1
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out.gguf"]
