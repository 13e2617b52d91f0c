"""Units against what llama.cpp's own quantizer changes, and their names, order and bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bitplan import formats, gguf_file, units
from bitplan.errors import UsageError
from bitplan.formats import FORMATS
from bitplan.gguf_file import Header
from bitplan.tensors import Tensor
from conftest import quantize


def tensor(name: str, *shape: int, fmt: str = "f16") -> Tensor:
    return Tensor(name, shape, FORMATS[fmt], 0, 0, Path("m.gguf"))


def header(*tensors: Tensor) -> Header:
    return Header(Path("m.gguf"), {}, {}, tensors, ())


@pytest.mark.parametrize("model", ["tiny_gguf", "tiny_moe_gguf", "stories"])
def test_units_are_what_llama_quantize_changes(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source, out = Path(request.getfixturevalue(model)), tmp_path / "out.gguf"
    quantize(source, out, FORMATS["q4_0"])
    before = {t.name: t.fmt for t in gguf_file.read(source).tensors}
    after = {t.name: t.fmt for t in gguf_file.read(out).tensors}
    found = units.find(gguf_file.read(source))
    changed = {name for name in before if before[name] != after[name]}
    could = {t.name for u in found for t in u.tensors}
    same = {n for u in found for n, f in u.types(FORMATS["q4_0"]).items() if f == before[n]}
    assert changed == could - same
    assert len(changed) > 10


def test_bytes_of_units_are_those_of_the_written_file(tiny_moe_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize(tiny_moe_gguf, out, FORMATS["q6_k"])
    written = gguf_file.read(out)
    stored = {t.name: units.padded(t.nbytes) for t in written.tensors}
    found = units.find(gguf_file.read(tiny_moe_gguf))
    assert {u.tensors[0].name: u.nbytes(FORMATS["q6_k"]) for u in found} == {
        u.tensors[0].name: stored[u.tensors[0].name] for u in found
    }
    assert sum(stored.values()) == written.size - min(t.start for t in written.tensors)


def test_order_and_names(tiny_gguf: Path, tiny_moe_gguf: Path) -> None:
    names = [u.name for u in units.find(gguf_file.read(tiny_gguf))]
    block = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert names == ["token_embd"] + [f"blk.{i}.{role}" for i in (0, 1) for role in block]
    experts = {u.role: u for u in units.find(gguf_file.read(tiny_moe_gguf)) if u.layer == 1}
    assert experts["ffn_up_exps"].weights == 4 * 256 * 256
    assert "ffn_gate_inp" not in experts


def test_embedding_is_first_and_output_last() -> None:
    blocks = [tensor(f"blk.{i}.attn_q.weight", 8, 32) for i in (10, 2)]
    ends = [tensor("output.weight", 8, 32), tensor("token_embd.weight", 8, 32)]
    found = [u.name for u in units.find(header(*ends, *blocks))]
    assert found == ["token_embd", "blk.2.attn_q", "blk.10.attn_q", "output"]
    assert not units.tied(header(*ends))
    assert units.tied(header(ends[1]))


def test_groups(tiny_gguf: Path) -> None:
    head = gguf_file.read(tiny_gguf)
    modules, layers = units.find(head, "module"), units.find(head, "layer")
    assert [u.name for u in modules] == [
        "token_embd", "blk.0.attention", "blk.0.ffn", "blk.1.attention", "blk.1.ffn"
    ]  # fmt: skip
    assert [u.role for u in modules[1:3]] == ["attention", "ffn"]
    assert [(u.name, u.layer) for u in layers] == [
        ("token_embd", None),
        ("blk.0", 0),
        ("blk.1", 1),
    ]
    singles = units.find(head)
    for grouped in (modules, layers):
        assert sum(u.nbytes(FORMATS["q4_k"]) for u in grouped) == sum(
            u.nbytes(FORMATS["q4_k"]) for u in singles
        )
        assert {t.name for u in grouped for t in u.tensors} == {u.tensors[0].name for u in singles}


def test_what_is_never_quantized() -> None:
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "blk.0.attn_q.bias"):
        assert not units.quantizable(tensor(name, 32, 32))
    assert not units.quantizable(tensor("blk.0.attn_q.weight", 32))
    assert not units.quantizable(tensor("blk.0.attn_q.weight", 1, 32))
    assert units.quantizable(tensor("blk.0.attn_q.weight", 32, 32))
    with pytest.raises(UsageError, match="no weight matrix"):
        units.find(header(tensor("output_norm.weight", 32)))


def test_each_tensor_of_a_unit_falls_back_for_itself() -> None:
    parts = tensor("blk.0.ffn_up.weight", 4, 256), tensor("blk.0.ffn_down.weight", 4, 96)
    unit = units.find(header(*parts), "module")[0]
    types = {n: f.name for n, f in unit.types(FORMATS["q4_k"]).items()}
    assert types == {"blk.0.ffn_up.weight": "q4_k", "blk.0.ffn_down.weight": "q5_0"}
    assert unit.nbytes(FORMATS["q4_k"]) == 4 * 144 + units.padded(4 * 3 * 22)


def test_candidates_hold_no_double_and_nothing_larger_than_the_source() -> None:
    wanted = formats.parse("f16,q8_0,q6_k,q4_k,q2_k,q4_0")
    wide = units.find(header(tensor("blk.0.attn_q.weight", 4, 256)))[0]
    assert [f.name for f in units.candidates(wide, wanted)] == [
        "f16", "q8_0", "q6_k", "q4_0", "q4_k", "q2_k"
    ]  # fmt: skip
    narrow = units.find(header(tensor("blk.0.attn_q.weight", 4, 64)))[0]
    assert [f.name for f in units.candidates(narrow, wanted)] == ["f16", "q8_0", "q5_0", "q4_0"]
    small = replace(wide, tensors=(tensor("blk.0.attn_q.weight", 4, 256, fmt="q6_k"),))
    assert [f.name for f in units.candidates(small, wanted)] == ["q6_k", "q4_0", "q4_k", "q2_k"]
