"""Short patterns give exactly a variant's types: by regex search, and by llama.cpp itself."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import pytest
from llama_cpp import llama_cpp as capi

from bitplan import formats, gguf_file, presets, units
from bitplan.runtimes import log
from bitplan.writers import gguf_child, patterns
from bitplan.writers.patterns import Pattern


def dry_run(path: Path, preset: str, overrides: Sequence[Pattern]) -> dict[str, str]:
    """Tensor -> format that llama_model_quantize says it would store, with these raw patterns."""
    job = gguf_child.Job(str(path), str(path) + ".dry", presets.FTYPES[preset], dry_run=True)
    params, keep = gguf_child.parameters(job)
    slots = (capi.llama_model_tensor_override * (len(overrides) + 1))()
    for slot, (pattern, fmt) in zip(slots, overrides, strict=False):
        slot.pattern, slot.type = pattern.encode(), formats.get(fmt).type_id
    params.tt_overrides = slots
    files = job.source.encode(), job.target.encode()
    with log.captured() as lines:
        assert capi.llama_model_quantize(*files, ctypes.byref(params)) == 0, lines
    del keep
    found = (presets._LINE.search(line) for line in "".join(lines).splitlines())
    return {m[1]: formats.get(m[3] or m[2]).name for m in found if m}


def of_model(path: Path) -> dict[str, str]:
    found = units.find(gguf_file.read(path))
    return {t.name: "q4_k" for u in found for t in u.tensors}


def layer(number: int, types: dict[str, str]) -> dict[str, str]:
    return {t: "q8_0" for t in types if units.layer_and_role(t)[0] == number}


def test_one_layer_takes_one_pattern_and_leaves_layers_10_and_11_alone(twelve_layers: Path) -> None:
    types = of_model(twelve_layers)
    wanted = types | layer(1, types)
    found = patterns.of({t: f for t, f in wanted.items() if t != "token_embd.weight"})
    assert found == [(r"^blk\.1\.", "q8_0"), (r"^blk\.", "q4_k")]
    assert patterns.resolved(found, wanted) == {
        t: f for t, f in wanted.items() if t != "token_embd.weight"
    }


def test_a_role_in_every_layer_takes_one_pattern(twelve_layers: Path) -> None:
    types = of_model(twelve_layers)
    types |= {t: "q6_k" for t in types if "attn_v" in t or "attn_k" in t}
    types["token_embd.weight"] = "q5_k"
    assert patterns.of(types) == [
        (r"^token_embd\.weight$", "q5_k"),
        (r"^blk\.[0-9]+\.(attn_k|attn_v)\.weight$", "q6_k"),
        (r"^blk\.", "q4_k"),
    ]


@pytest.mark.parametrize("rest", ["", "q4_k", "q2_k"])
def test_any_mixture_resolves_to_itself(twelve_layers: Path, rest: str) -> None:
    types = of_model(twelve_layers)
    names = ["q4_k", "q6_k", "q2_k"]
    types = {t: names[i * i % 3] for i, t in enumerate(types)} | layer(1, types) | layer(11, types)
    found = patterns.of(types, rest)
    assert patterns.resolved(found, types) == types
    assert dry_run(twelve_layers, "Q4_0", found).items() >= types.items()


def test_published_pattern_is_found_inside_other_names(twelve_layers: Path) -> None:
    """What the placement study did, asked of llama.cpp itself."""
    found = dry_run(twelve_layers, "Q4_0", [("blk.1", "q8_0")])
    hit = {units.layer_and_role(t)[0] for t, f in found.items() if f == "q8_0"}
    assert hit == {1, 10, 11}


def test_protecting_layers_alone_changes_a_mixture_elsewhere(twelve_layers: Path) -> None:
    """Q4_K_M counts only the tensors that no pattern names; so mixtures are pinned whole."""
    plain = dry_run(twelve_layers, "Q4_K_M", [])
    naive = dry_run(twelve_layers, "Q4_K_M", [(r"^blk\.(0|1)\.", "q8_0")])
    moved = {t for t in plain if naive[t] not in (plain[t], "q8_0")}
    assert moved, "then patterns.needed could be shorter"
    inside = {t: f for t, f in plain.items() if t.startswith("blk.") and f.startswith("q")}
    wanted = inside | layer(0, inside) | layer(1, inside)
    assert dry_run(twelve_layers, "Q4_K_M", patterns.of(wanted)).items() >= wanted.items()
