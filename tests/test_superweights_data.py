"""Super weights without a trained model: the rule, the top share, floors, bytes, the command."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import synthetic
from bitplan import cli, plan, superweights
from bitplan.artifacts import Origin, Sensitivity, TextFacts, load, schema_of
from bitplan.errors import ArtifactError, ModelFileError, RuntimeFailure, UsageError
from bitplan.rules import Rules
from bitplan.runtimes.llamacpp import LlamaModel
from bitplan.runtimes.statistics import Peaks, is_down
from bitplan.superweights import Important, Spike, SuperWeights, important, spikes

Array = npt.NDArray[np.float32]


def spike(tensor: str = "blk.1.ffn_down.weight", row: int = 3, column: int = 5) -> Spike:
    return Spike(
        tensor=tensor, row=row, column=column, value=2.0, input=100.0, output=200.0,
        input_ratio=50.0, output_ratio=80.0, share=1.0,
    )  # fmt: skip


def listed(*found: Spike, entries: list[Important] | None = None) -> SuperWeights:
    return SuperWeights(
        schema=schema_of(SuperWeights), origin=Origin(), model=synthetic.model(),
        text=TextFacts(source="t", sha256="t", ctx=512, windows=1), spikes=list(found),
        complete=True, share=1e-4, important=entries or [], threshold=1.0, carried=0.0, counted=1,
        unseen=[],
    )  # fmt: skip


# --- the rule for spikes ----------------------------------------------------------------------


def peaks(row: int = 3, column: int = 5, high_in: float = 100.0, high_out: float = 200.0) -> Peaks:
    """One matrix of 16 x 32 whose channels reach 1 to 2, and one of each that spikes."""
    rng = np.random.default_rng(0)
    inputs, outputs = rng.uniform(1, 2, (1, 32)), rng.uniform(1, 2, (1, 16))
    inputs[0, column], outputs[0, row] = high_in, high_out
    return Peaks(inputs, outputs)


def weights(value: float) -> Array:
    return np.full((16, 32), value, np.float32)


def test_a_spike_is_one_of_input_and_output_that_one_weight_explains() -> None:
    found = spikes.spikes({"a": peaks()}, lambda _: weights(2.0))
    assert [(s.tensor, s.row, s.column, s.value, s.share) for s in found] == [("a", 3, 5, 2.0, 1.0)]
    assert spikes.spikes({"a": peaks(high_in=5)}, lambda _: weights(40.0)) == []
    assert spikes.spikes({"a": peaks(high_out=5)}, lambda _: weights(0.05)) == []
    assert spikes.spikes({"a": peaks()}, lambda _: weights(0.5)) == []  # a quarter of the output


def test_the_rule_does_not_depend_on_the_scale_of_activations() -> None:
    small = peaks(high_in=100, high_out=200)
    for factor in (1e-4, 1e4):
        scaled = Peaks(small.inputs * factor, small.outputs * factor)
        assert len(spikes.spikes({"a": scaled}, lambda _: weights(2.0))) == 1


def test_dead_channels_do_not_make_others_spike() -> None:
    """Half of them never driven: the median of all would be 0, and everything a spike."""
    quiet = peaks(high_in=2, high_out=2)
    quiet.inputs[0, ::2], quiet.outputs[0, ::2] = 0, 0
    assert spikes.spikes({"a": quiet}, lambda _: weights(1.0)) == []
    nothing = Peaks(np.zeros((1, 4)), np.zeros((1, 4)))
    assert spikes.spikes({"a": nothing}, lambda _: weights(1.0)) == []


def test_an_expert_s_rows_are_those_of_all_experts() -> None:
    one, other = peaks(high_in=2, high_out=2), peaks(row=7)
    both = Peaks(np.vstack([one.inputs, other.inputs]), np.vstack([one.outputs, other.outputs]))
    values = np.vstack([weights(0), weights(2.0)])
    found = spikes.spikes({"a": both}, lambda _: values)
    assert [(s.row, s.column) for s in found] == [(16 + 7, 5)]


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(RuntimeFailure, match="float32"):
        spikes.spikes({"a": peaks(high_out=math.nan)}, lambda _: weights(2.0))


# --- the top share ----------------------------------------------------------------------------


@dataclass
class Held:
    """As much of a runtime as the search by importance asks for."""

    values: Mapping[str, Array]
    path: Path = Path("held")

    @property
    def tensors(self) -> list[Any]:
        return [_Tensor(n, v.shape) for n, v in self.values.items()]

    def units(self) -> list[Any]:
        return [_Unit((t,)) for t in self.tensors]

    def original(self, name: str) -> tuple[Array, int]:
        values = self.values[name]
        return values.reshape(-1, values.shape[-1]), math.prod(values.shape[:-2])


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Unit:
    tensors: tuple[_Tensor, ...]


def brute_force(
    model: Held, moments: Mapping[str, Array], count: int
) -> list[tuple[str, int, int]]:
    """All weights in a list, sorted: the highest score first, of equal ones the first."""
    every = []
    for name in model.values:
        rows, matrices = model.original(name)
        for r, row in enumerate(rows):
            squares = moments[name].reshape(matrices, -1)[r // (len(rows) // matrices)]
            every += [
                (float(w * w * x), (name, r, c))
                for c, (w, x) in enumerate(zip(row, squares, strict=True))
            ]
    every.sort(key=lambda e: -e[0])  # stable
    return sorted(place for score, place in every[:count] if score > 0)


@given(st.integers(0, 10_000), st.integers(1, 200), st.booleans())
def test_the_top_share_is_that_of_a_full_sort(seed: int, count: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    shapes = {"a": (5, 8), "b": (2, 3, 8), "c": (7, 4)}
    draw = (lambda s: rng.integers(-2, 3, s)) if ties else (lambda s: rng.normal(0, 1, s))
    model = Held({n: np.asarray(draw(s), np.float32) for n, s in shapes.items()})
    drawn = {"a": rng.integers(1, 3, 8), "b": rng.integers(1, 3, (2, 8)), "c": np.ones(4)}
    moments = {n: np.asarray(m, np.float32) for n, m in drawn.items()}
    total = 40 + 48 + 28
    found = important.find(model, moments, share=min(count / total, 1))  # type: ignore[arg-type]
    places = [
        (e.tensor, r, c) for e in found.entries for r, c in zip(e.rows, e.columns, strict=True)
    ]
    assert sorted(places) == brute_force(model, moments, min(count, total))
    for entry in found.entries:
        rows, _ = model.original(entry.tensor)
        assert entry.values == rows[entry.rows, entry.columns].tolist()
        assert min(entry.scores) >= found.threshold
    assert found.counted == total
    assert 0 < found.carried <= 1 + 1e-6  # sums of float32


def test_at_least_one_at_most_the_cap_and_the_unseen_are_named() -> None:
    model = Held({n: np.arange(1, 65, dtype=np.float32).reshape(8, 8) for n in ("a", "b", "c")})
    moments = {"a": np.ones(8, np.float32), "b": np.zeros(8, np.float32)}
    one = important.find(model, moments, share=1e-6)  # type: ignore[arg-type]
    assert [(e.tensor, e.rows, e.columns) for e in one.entries] == [("a", [7], [7])]
    assert one.counted == 64
    assert one.unseen == ["b", "c"]
    capped = important.find(model, moments, share=1.0, most=5)  # type: ignore[arg-type]
    assert sum(len(e.rows) for e in capped.entries) == 5
    with pytest.raises(UsageError, match="share of 0"):
        important.find(model, moments, share=0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no weight's inputs"):
        important.find(model, {})  # type: ignore[arg-type]
    model.values["a"][0, 0] = np.inf
    with pytest.raises(ModelFileError, match="a: holds NaN"):
        important.find(model, moments)  # type: ignore[arg-type]


# --- protection -------------------------------------------------------------------------------


def test_floors_are_for_the_tensor_that_holds_one_and_no_other() -> None:
    table = synthetic.sensitivity()
    found = listed(spike(), spike(row=9), spike("blk.10.ffn_down.weight"))
    chosen = superweights.floors(found, table.units)
    assert chosen == {"blk.1.ffn_down": "q6_k", "blk.10.ffn_down": "q6_k"}
    made = plan.make(table, synthetic.budget(), Rules(floors=chosen))
    held = {made.formats[u] for u in chosen}
    assert held <= {"q6_k", "q8_0"}


def test_units_of_many_tensors_and_other_models() -> None:
    units = [u.model_copy(update={"name": "blk.1", "tensors": [f"{u.name}.weight", "x"]})
             for u in synthetic.sensitivity().units if u.name == "blk.1.ffn_down"]  # fmt: skip
    assert superweights.floors(listed(spike()), units, "q8_0") == {"blk.1": "q8_0"}
    own = [
        u.model_copy(update={"name": "a[0].down", "tensors": ["a[0].down.weight"]}) for u in units
    ]
    assert superweights.floors(listed(spike("a[0].down.weight")), own) == {
        "a[[]0].down": "int8-channel"
    }
    with pytest.raises(ArtifactError, match=r"blk\.1\.ffn_down\.weight"):
        superweights.floors(listed(spike()), own)


def test_kept_weights_are_exact_and_their_groups_rounded_without_them() -> None:
    from bitplan import formats
    from bitplan.runtimes import ggml

    rng = np.random.default_rng(0)
    own = rng.normal(0, 1, (4, 64)).astype(np.float32)
    own[2, 40] = 1000
    at = np.array([2]), np.array([40])
    fmt = formats.get("q4_0")
    plain = ggml.rounded(own, fmt, None, 1)
    kept = superweights.protect(
        ggml.rounded(superweights.held_out(own, *at), fmt, None, 1), own, *at
    )
    assert own[2, 40] == 1000 == kept[2, 40]
    others = np.ones_like(own, bool)
    others[2, 40] = False
    block = (slice(2, 3), slice(32, 64))
    assert not plain[block][others[block]].any()  # its block of 32 lost everything
    # 4 bits leave steps of an eighth of the largest of about 3: errors of at most 0.2
    assert np.abs(kept - own)[others].max() < 0.25
    assert np.array_equal(np.delete(kept, 2, 0), np.delete(plain, 2, 0))


@pytest.mark.parametrize(
    ("rows", "row", "kept", "value", "expected"),
    [
        (10, 100, 0, 2, 0),
        (11008, 4096, 1, 2, 4 + 2 + 2),  # a list of one
        (10, 100, 1000, 2, 1000 * 4 + 4 * 11),  # a pointer for each row and one more
        (10, 1 << 17, 1, 4, 4 + 4 + 4),  # columns beyond 65,536
    ],
)
def test_bytes_of_weights_kept_apart(
    rows: int, row: int, kept: int, value: int, expected: int
) -> None:
    assert superweights.apart_bytes(rows, row, kept, value) == expected


def test_the_artefact_is_read_back_and_joins_both_lists(tmp_path: Path) -> None:
    entries = [
        Important(tensor="a", rows=[0, 3], columns=[1, 5], values=[1.0, 2.0], scores=[9.0, 8.0])
    ]
    found = listed(spike("a"), entries=entries)
    found.save(tmp_path / "s.json")
    assert load(tmp_path / "s.json", SuperWeights) == found
    rows, columns = found.places(important=True)["a"]
    assert (rows.tolist(), columns.tolist()) == ([0, 3], [1, 5])  # (3, 5) is in both
    assert found.places()["a"][0].tolist() == [3]
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ArtifactError, match="bitplan super-weights"):
        load(tmp_path / "s.json", SuperWeights)


# --- activations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.3.ffn_down.weight", True), ("blk.3.ffn_down_exps.weight", True),
        ("blk.3.ffn_up.weight", False), ("blk.3.attn_output.weight", False),
        ("model.layers.3.mlp.down_proj.weight", True), ("layers.3.mlp.experts.down_proj", True),
        ("transformer.h.0.mlp.c_proj.weight", True), ("transformer.h.0.attn.c_proj.weight", False),
        ("gpt_neox.layers.1.mlp.dense_4h_to_h.weight", True), ("model.layers.2.fc2.weight", True),
        ("bert.encoder.layer.0.output.dense.weight", True),
        ("bert.encoder.layer.0.attention.output.dense.weight", False),
        ("bert.encoder.layer.0.intermediate.dense.weight", False),
        ("distilbert.transformer.layer.0.ffn.lin2.weight", True), ("lm_head.weight", False),
    ],
)  # fmt: skip
def test_down_projections_go_by_their_names(name: str, expected: bool) -> None:
    assert is_down(name) == expected


def test_peaks_of_experts_lie_between_their_root_mean_square_and_their_norm(
    tiny_moe_gguf: Path, text: str
) -> None:
    with LlamaModel(tiny_moe_gguf, ctx=64, threads=1, swap=True) as model:
        rows = model.tokenize(text)[:128].reshape(2, 64).copy()
        assert model.bos is not None
        rows[:, 0] = model.bos
        seen = model.capture(rows, ["peaks", "second_moments"])
        assert list(seen.peaks) == [f"blk.{i}.ffn_down_exps.weight" for i in range(2)]
        for name, found in seen.peaks.items():
            squares, counts = seen.squares[name], seen.counts[name]
            # float32 sums against maxima
            assert (found.inputs**2 <= squares * 1.001).all()
            assert (found.inputs**2 >= squares / counts[:, None] * 0.999).all()
            values, matrices = model.original(name)
            reach = np.abs(values.reshape(matrices, -1, values.shape[1])) @ found.inputs[:, :, None]
            assert found.outputs.shape == reach.shape[:2]
            assert (found.outputs <= reach[:, :, 0] * 1.01).all()
            assert (found.outputs > 0).all()


def test_put_holds_until_hold_says_otherwise(tiny: LlamaModel, text: str) -> None:
    from bitplan import formats

    rows = tiny.tokenize(text)[:64].reshape(1, 64)
    name = "blk.0.ffn_down.weight"
    before = [x.copy() for x in tiny.logits(rows)]
    tiny.put(name, np.zeros_like(tiny.original(name)[0]))
    put = [x.copy() for x in tiny.logits(rows)]
    tiny.hold({name: None})
    assert np.array_equal(put[0], next(iter(tiny.logits(rows))))
    tiny.put(name, 2 * tiny.original(name)[0])
    tiny.hold({name: formats.get("q8_0")})
    rounded = [x.copy() for x in tiny.logits(rows)]
    assert 0 < np.abs(rounded[0] - before[0]).max() < np.abs(put[0] - before[0]).max()
    tiny.put(name, 2 * tiny.original(name)[0])
    tiny.hold({})
    assert np.array_equal(before[0], next(iter(tiny.logits(rows))))


# --- the command ------------------------------------------------------------------------------


def test_the_command_writes_its_list_and_plan_takes_it(
    tiny_gguf: Path, text: str, tmp_path: Path
) -> None:
    story = tmp_path / "words.txt"
    story.write_text(text)
    run = CliRunner().invoke
    common = [
        "--text",
        str(story),
        "--ctx",
        "64",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
        "--quiet",
    ]
    few = ["--windows", "2"]
    command = ["super-weights", str(tiny_gguf), *common, *few, "--measure", "q4_0", "--no-imatrix",
               "--eval-windows", "2"]  # fmt: skip
    done = run(cli.app, command)
    assert done.exit_code == 0, done.output
    found = load(tmp_path / "superweights.json", SuperWeights)
    assert found.spikes == []
    assert found.complete
    assert found.protection is not None
    assert len(found.protection.variants) == 2
    measured = run(cli.app, ["measure", str(tiny_gguf), *common, *few, "--no-imatrix", "--scorer",
                             "weight_error", "--formats", "q8_0,q4_k,q2_k"])  # fmt: skip
    assert measured.exit_code == 0, measured.output
    table = load(tmp_path / "sensitivity.json", Sensitivity)
    name = "blk.1.ffn_down.weight"
    planted = found.model_copy(update={"spikes": [spike(name)], "protection": None})
    planted.save(tmp_path / "superweights.json")
    least = ["--bpw", "3.9", "--quiet"]
    ask = ["plan", str(tmp_path / "sensitivity.json"), *least]
    run(cli.app, [*ask, "--keep", "blk.1.ffn_down=q2_k"])
    assert json.loads((tmp_path / "plan.json").read_text())["tensors"][name] == "q2_k"
    done = run(cli.app, [*ask, "--protect-super-weights"])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "plan.json").read_text())["tensors"][name] == "q8_0"
    assert table.model == found.model
    other = planted.model_copy(update={"model": found.model.model_copy(update={"sha256": "other"})})
    other.save(tmp_path / "other.json")
    refused = run(cli.app, [*ask, "--super-weights", str(tmp_path / "other.json")])
    assert isinstance(refused.exception, ArtifactError)
    assert "another model" in str(refused.exception)
