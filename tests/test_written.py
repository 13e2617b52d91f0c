"""Models that were written quantized: read from headers, opened, run, and refused where they lie.

What is opened is compared with the libraries' own ways of opening it, and the weights with integers
that are unpacked here bit by bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch
import transformers
from safetensors.numpy import load_file, save_file

import hf_models
import written_models
from bitplan import (
    artifacts,
    checkpoint,
    cli_measure,
    divergence,
    formats,
    inspection,
    schemes,
    written,
)
from bitplan.errors import BitplanError, ModelFileError, RuntimeFailure
from bitplan.quality import Quality
from bitplan.runtimes.hf.written import WrittenModel
from bitplan.setting import Setting
from bitplan.text import windows
from written_models import TOKENWISE, int_weights

FIRST = r"re:^model\.layers\.[01]\..*_proj$"
LAST = r"re:^model\.layers\.2\..*_proj$"
ROWS = hf_models.windows("llama", 3)
DOWN = "model.layers.{}.mlp.down_proj.weight"


def opened(path: Path, **options: Any) -> WrittenModel:
    return WrittenModel(path, **{"ctx": hf_models.CTX, "threads": 1, "device": "cpu", **options})


def scored(model: Any, rows: npt.NDArray[np.int32] = ROWS) -> npt.NDArray[np.float32]:
    """What plain transformers predicts for the scored positions."""
    with torch.no_grad():
        out = model(torch.from_numpy(rows.astype(np.int64)), use_cache=False).logits
    return np.asarray(out[:, hf_models.CTX // 2 : -1].numpy(), np.float32)


def logits(model: WrittenModel) -> npt.NDArray[np.float32]:
    return np.stack([x.copy() for x in model.logits(ROWS)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.write("llama", tmp_path_factory.mktemp("written") / "source")


@pytest.fixture(scope="module")
def mixed(source: Path) -> Path:
    """Two groups, 4 and 2 bits, told apart by anchored patterns."""
    groups = {FIRST: {"weights": int_weights(4)}, LAST: {"weights": int_weights(2)}}
    return written_models.compressed(source, source.parent / "mixed", groups)


@pytest.fixture(scope="module")
def regrouped(source: Path) -> Path:
    """optimum-quanto's, with rows that it regroups."""
    pytest.importorskip("optimum.quanto")
    wide = hf_models.write("llama", source.parent / "wide", intermediate_size=256)
    types = {"*layers.0*": "qint4", "*layers.1*": "qint8", "*layers.2*": "qint2"}
    return written_models.quanto(wide, source.parent / "regrouped", types)


@pytest.fixture
def copied(mixed: Path, tmp_path: Path) -> Path:
    """The mixed folder, to be damaged."""
    return Path(shutil.copytree(mixed, tmp_path / "copied"))


def unpacked(path: Path, module: str, bits: int) -> npt.NDArray[np.float32]:
    """Scale x number of a packed matrix: numbers lie along rows, lowest bits first, from -half."""
    tensors = load_file(path / "model.safetensors")
    rows, row = tensors[f"{module}.weight_shape"]
    words = tensors[f"{module}.weight_packed"].view(np.uint8)
    stream = np.unpackbits(words, axis=1, bitorder="little")[:, : row * bits]
    places = 1 << np.arange(bits)
    numbers = (stream.reshape(rows, row, bits) * places).sum(-1) - (1 << (bits - 1))
    zero = tensors.get(f"{module}.weight_zero_point")
    scale = tensors[f"{module}.weight_scale"]
    if zero is not None:  # packed down each column
        down = np.unpackbits(zero.T.copy().view(np.uint8), axis=1, bitorder="little")
        down = down[:, : rows * bits].reshape(len(zero.T), rows, bits)
        points = (down * places).sum(-1).T - (1 << (bits - 1))
        numbers = numbers - np.repeat(points, row // points.shape[1], axis=1)
    return np.asarray(numbers * np.repeat(scale, row // scale.shape[1], axis=1), np.float32)


# --- read from headers -------------------------------------------------------------------------


def test_a_folder_is_told_tensor_by_tensor(mixed: Path) -> None:
    there = written.read(mixed)
    assert written.is_written(mixed)
    told = {t.name: (t.fmt.name, t.shape, t.nbytes) for t in there.quantized}
    assert len(told) == 21
    shape = (hf_models.DIM, hf_models.FFN)
    for layer, name in ((0, "int4-g32"), (1, "int4-g32"), (2, "int2-g32")):
        nbytes = formats.nbytes(formats.get(name), shape, 4)
        assert told[DOWN.format(layer)] == (name, shape, nbytes)
    assert there.size == (mixed / "model.safetensors").stat().st_size
    assert there.weights == checkpoint.read(mixed.parent / "source").weights
    assert not there.rounds_activations


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group", [32, 0, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_format_is_told_from_what_is_stored(
    source: Path, tmp_path: Path, bits: int, group: int, symmetric: bool
) -> None:
    weights = int_weights(bits, group, symmetric=symmetric)
    path = written_models.compressed(source, tmp_path / "q", {LAST: {"weights": weights}})
    strategy = {0: "channel", -1: "tensor"}.get(group, f"g{group}")
    name = f"int{bits}-{strategy}" + ("" if symmetric else "-asym")
    found = written.read(path).quantized
    assert {t.fmt.name for t in found} == {name}
    scheme = schemes.parse(name)
    assert scheme is not None
    assert [t.nbytes for t in found] == [schemes.nbytes(scheme, t.shape, 4) for t in found]


def test_quantos_folder_is_told_tensor_by_tensor(regrouped: Path) -> None:
    there = written.read(regrouped)
    told = {t.name: (t.fmt.name, t.nbytes) for t in there.quantized}
    shape = (hf_models.DIM, 256)
    for layer, name in enumerate(("qint4", "qint8", "qint2")):
        nbytes = formats.nbytes(formats.get(name), shape, 4)
        assert told[DOWN.format(layer)] == (name, nbytes)
    assert there.weights == checkpoint.read(regrouped.parent / "wide").weights


def test_inspect_shows_it(mixed: Path) -> None:
    found = inspection.look(mixed)
    page = inspection.text(found)
    assert "int2-g32      7 tensors" in page
    assert "self_attn.q_proj int4-g32" in page
    assert found.document()["bytes"] == (mixed / "model.safetensors").stat().st_size


def test_stages_that_need_a_reference_refuse_it(mixed: Path, regrouped: Path) -> None:
    for path in (mixed, regrouped):
        with pytest.raises(ModelFileError, match="quantized already .* start from the original"):
            checkpoint.read(path)
    assert not written.is_written(mixed.parent / "source")


# --- opened and run ----------------------------------------------------------------------------


def test_logits_are_those_of_plain_from_pretrained(mixed: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(mixed)
    with opened(mixed) as model:
        np.testing.assert_array_equal(logits(model), scored(plain))
        assert model.facts.weights == written.read(mixed).weights
        assert "compressed-tensors" in model.engine


@pytest.mark.parametrize("layer", [0, 2])
def test_weights_are_the_packed_numbers(mixed: Path, layer: int) -> None:
    name = DOWN.format(layer)
    with opened(mixed) as model:
        found, matrices = model.original(name)
        part, _ = model.some(name, np.array([3, 5]))
    assert matrices == 1
    own = unpacked(mixed, name.removesuffix(".weight"), {0: 4, 2: 2}[layer])
    np.testing.assert_array_equal(found, own)
    np.testing.assert_array_equal(part, own[[3, 5]])
    # and they are what the forward multiplies with: the scheme of each layer, not of the first
    assert len(np.unique(own[0, :32])) <= {0: 16, 2: 4}[layer]


@pytest.mark.parametrize("bits", [2, 4])
def test_zero_points_are_read_too(source: Path, tmp_path: Path, bits: int) -> None:
    """Where compressed-tensors itself has no room for them (0.20)."""
    groups = {LAST: {"weights": int_weights(bits, symmetric=False)}}
    path = written_models.compressed(source, tmp_path / "q", groups)
    with opened(path) as model:
        found, _ = model.original(DOWN.format(2))
    own = unpacked(path, DOWN.format(2).removesuffix(".weight"), bits)
    np.testing.assert_allclose(found, own, rtol=1e-6, atol=0)  # one product each, rounded once


def test_inputs_are_rounded_while_it_runs(source: Path, tmp_path: Path) -> None:
    groups = {"Linear": {"weights": int_weights(8, 0), "input_activations": TOKENWISE}}
    path = written_models.compressed(source, tmp_path / "q", groups)
    there = written.read(path)
    assert there.rounds_activations
    assert {t.fmt.name for t in there.quantized} == {"w8a8"}
    with opened(path) as model:
        found = logits(model)
        weights = {t.name: model.original(t.name)[0] for t in there.quantized}
    np.testing.assert_array_equal(
        found, scored(transformers.AutoModelForCausalLM.from_pretrained(path))
    )
    # the same by torch alone: rounded weights, and inputs rounded one scale for each token
    plain = hf_models.plain(source, "llama")
    for name, values in weights.items():
        module = plain.get_submodule(name.removesuffix(".weight"))
        module.weight.copy_(torch.from_numpy(values))
    only_weights = scored(plain)
    hooks = [
        plain.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(rounded_inputs)
        for n in weights
    ]
    assert len(hooks) == 21
    np.testing.assert_allclose(found, scored(plain), atol=2e-5)  # sums in another order
    assert np.abs(found - only_weights).max() > 1e-3


def rounded_inputs(_: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Each token's inputs as whole numbers from -128 to 127 of its own scale."""
    (values,) = args
    scale = values.abs().amax(-1, keepdim=True) / 127.5
    return torch.round(values / scale).clamp(-128, 127) * scale


def test_quantos_folder_runs_as_quanto_runs_it(regrouped: Path) -> None:
    from optimum.quanto import QuantizedModelForCausalLM

    theirs = QuantizedModelForCausalLM.from_pretrained(regrouped)
    with opened(regrouped) as model:
        np.testing.assert_array_equal(logits(model), scored(theirs))
        for layer in range(3):
            weight = theirs.get_submodule(DOWN.format(layer).removesuffix(".weight")).weight
            found, _ = model.original(DOWN.format(layer))
            np.testing.assert_array_equal(found, weight.dequantize().detach().numpy())
        assert "optimum-quanto" in model.engine
        told = {t.name: t for t in model.tensors}
        assert told[DOWN.format(2)].shape == (hf_models.DIM, 256)
        assert told[DOWN.format(2)].fmt.name == "qint2"


def test_its_weights_stay_what_they_are(mixed: Path) -> None:
    with opened(mixed) as model:
        model.hold({})
        with pytest.raises(RuntimeFailure, match="quantized already"):
            model.hold({DOWN.format(0): formats.get("int4-g32")})


def test_block_outputs_against_the_references(mixed: Path) -> None:
    with (
        hf_models.opened(mixed.parent / "source") as reference,
        opened(mixed) as model,
    ):
        found = dict(model.output_errors(reference, ROWS))
        assert sorted(found) == [0, 1, 2]
        own = dict(reference_errors(reference, model))
    for layer, errors in found.items():
        assert errors.shape == (ROWS.size,)
        np.testing.assert_allclose(errors, own[layer], rtol=1e-4)


def reference_errors(reference: Any, model: Any) -> list[tuple[int, npt.NDArray[np.float64]]]:
    """By hooks on plain modules: each of the model's blocks called as the reference's was."""
    calls: dict[int, Any] = {}
    blocks = reference.model.model.layers
    for i, block in enumerate(blocks):

        def keep(_: Any, args: Any, kwargs: Any, out: Any, i: int = i) -> None:
            calls[i] = (args, kwargs, out)

        block.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        reference.model(torch.from_numpy(ROWS.astype(np.int64)), use_cache=False)
        found = []
        for i, (args, kwargs, out) in calls.items():
            other = model.model.model.layers[i](*args, **kwargs)
            gap = (out - other).double().square().sum(-1) / out.double().square().sum(-1)
            found.append((i, gap.ravel().numpy()))
    return found


def test_evaluate_takes_it_as_a_candidate(mixed: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    rng = np.random.default_rng(4)
    text.write_text(" ".join(f"w{i}" for i in rng.integers(0, 90, 200)))
    setting = Setting(
        eval_text=[str(text)], ctx=hf_models.CTX, eval_windows=4, threads=1, device="cpu"
    )
    source = mixed.parent / "source"
    found = cli_measure.compare(source, [mixed], setting, tmp_path, True, True, lambda *_: None)
    (one,) = found.evaluation.candidates
    assert found.quality is not None
    assert found.quality == artifacts.load(tmp_path / "quality.json", Quality)
    assert found.quality.candidate.value("kl") == one.value("kl")
    assert found.quality.layers[0].output_relative is not None
    assert (one.name, one.how) == ("mixed", "file")
    assert one.bytes == (mixed / "model.safetensors").stat().st_size
    kl, error = one.value("kl"), one.stderr("kl")
    assert kl is not None
    assert error is not None
    assert kl > 2 * error > 0
    # the same figures as those of the formats in the reference's own weights
    types = {t.name: t.fmt for t in written.read(mixed).quantized}
    with hf_models.opened(source) as model:
        rows = text_windows(model, text.read_text(), 4)
        own = [divergence.reference(x) for x in model.logits(rows)]
        with model.rounded(types):
            pairs = zip(own, model.logits(rows), strict=True)
            assert kl == pytest.approx(np.mean([divergence.kl(r, x) for r, x in pairs]), rel=1e-4)
    with pytest.raises(ModelFileError, match="quantized already"):
        cli_measure.compare(mixed, [mixed], setting, tmp_path, True, False, lambda *_: None)


def text_windows(model: Any, body: str, count: int) -> npt.NDArray[np.int32]:
    found = windows(body, model.tokenize, ctx=model.ctx, count=count, bos=model.bos, source="test")
    return found.tokens


def test_experts_that_transformers_loses_are_opened(tmp_path: Path) -> None:
    """Attention alone is quantized; 5.17 would go on with random experts, 5.23 refuses."""
    source = hf_models.write("mixtral", tmp_path / "source")
    groups = {r"re:^model\.layers\.[012]\.self_attn\..*_proj$": {"weights": int_weights(4)}}
    path = written_models.compressed(source, tmp_path / "q", groups)
    with pytest.raises(RuntimeError):
        transformers.AutoModelForCausalLM.from_pretrained(path)
    with opened(path) as found, hf_models.opened(source) as reference:
        types = {n: "int4-g32" for n in reference.layout.weights if "self_attn" in n}
        assert {t.name: t.fmt.name for t in found.tensors if not t.fmt.is_float} == types
        with reference.rounded({n: formats.get(f) for n, f in types.items()}):
            assert np.array_equal(logits(found), np.stack([*reference.logits(ROWS)]))


# --- what lies ---------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def changed(path: Path, change: Change) -> None:
    told = json.loads((path / "config.json").read_text())
    change(told["quantization_config"])
    (path / "config.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda q: q.update(quant_method="gptq"), "quantized by 'gptq'; bitplan opens"),
        (lambda q: q.update(dequantize=True), "does not say that the weights are stored"),
        (lambda q: q.update(run_compressed=False), "does not say that the weights are stored"),
        (lambda q: q.update(quantization_status="frozen"), "does not say that the weights are"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme, which bitplan"),
        (lambda q: q.update(config_groups=[]), "has no config_groups"),
        (lambda q: q.update(config_groups={"a": 3}), "has no config_groups"),
        (lambda q: q.update(ignore=[3]), "names no targets"),
        (lambda q: q.update(ignore=["re:(a+)+$"]), "could take for ever"),
        (lambda q: q.update(ignore=["re:.*.*.*.*.*x"]), "could take for ever"),
        (lambda q: q.update(ignore=["re:("]), "no regular expression"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(copied: Path, change: Change, why: str) -> None:
    changed(copied, change)
    with pytest.raises(ModelFileError, match=why):
        opened(copied)


def test_a_layer_of_other_bits_than_the_config_says_is_refused(copied: Path) -> None:
    changed(copied, lambda q: q["config_groups"]["group_1"]["weights"].update(num_bits=3))
    with pytest.raises(ModelFileError, match="weight_packed"):
        opened(copied)


def test_a_layer_that_no_target_names_is_refused(copied: Path) -> None:
    changed(copied, lambda q: q["config_groups"].pop("group_1"))
    with pytest.raises(ModelFileError, match="do not hold"):
        opened(copied)


Tensors = dict[str, npt.NDArray[Any]]
PACKED, SCALE, SHAPE = (f"{DOWN.format(2)}_{p}" for p in ("packed", "scale", "shape"))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda t: t.update({SHAPE: np.array([64, 9600])}), "which it cannot be"),
        (lambda t: t.update({SHAPE: np.array([65, 96])}), "which it cannot be"),
        (lambda t: t.update({SHAPE: np.array([64, 93])}), "does not know|which its layer has not"),
        (lambda t: t.pop(SHAPE), "does not know"),
        (lambda t: t.pop(SCALE), "does not know"),
        (lambda t: t.update({SCALE: t[SCALE] * np.nan}), "NaN or infinite"),
        (lambda t: t.update({SCALE: t[SCALE][:, :2]}), "which it cannot|config.json|does not know"),
        (lambda t: t.pop("model.norm.weight"), "do not hold"),
    ],
)
def test_damaged_tensors_are_refused(
    copied: Path, damage: Callable[[Tensors], object], why: str
) -> None:
    tensors: Tensors = load_file(copied / "model.safetensors")
    damage(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=why):
        opened(copied)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.layers.0.mlp.up_proj.weight._data._data", "hold no such weight"),
        ("model.layers.0.mlp.up_proj.weight._shift", "hold no such weight"),
        ("model.layers.1.mlp.up_proj.weight._scale", "hold no such weight"),
        ("model.norm.weight", "do not hold"),
    ],
)
def test_what_quanto_would_leave_unset_is_refused(
    regrouped: Path, tmp_path: Path, name: str, why: str
) -> None:
    path = Path(shutil.copytree(regrouped, tmp_path / "q"))
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=why):
        opened(path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.mlp.up_proj.weight._shift", lambda a: a[:1]),
        ("model.layers.0.mlp.up_proj.weight._scale", lambda a: a.reshape(1, -1)),
        ("model.layers.1.mlp.up_proj.weight._scale", lambda a: a[:1]),
        ("model.layers.1.self_attn.k_proj.weight._data", lambda a: a.T.copy()),
        ("model.layers.2.mlp.up_proj.weight._scale", lambda a: a.astype(np.float16)),
    ],
)
def test_what_quanto_would_repeat_or_turn_is_refused(
    regrouped: Path, tmp_path: Path, name: str, change: Callable[[Any], Any]
) -> None:
    path = Path(shutil.copytree(regrouped, tmp_path / "q"))
    tensors = load_file(path / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitplanError, match=name.replace(".", "[.]")):
        opened(path)


def test_a_map_that_is_no_quantos_is_refused(regrouped: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(regrouped, tmp_path / "q"))
    told = json.loads((path / "quanto_qmap.json").read_text())
    told["model.layers.0.mlp.up_proj"]["weights"] = "os.system"
    (path / "quanto_qmap.json").write_text(json.dumps(told))
    with pytest.raises(BitplanError, match="says of .*up_proj. what optimum-quanto does not"):
        written.read(path)
