"""From a folder of safetensors (or a GGUF file) to a PyTorch model, distrusting what it reads.

Nothing is unpickled, no code of the folder is run unless asked, and weights that the file does not
hold are an error: transformers would fill them with random numbers and go on.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitplan import gguf_file
from bitplan.checkpoint import Checkpoint
from bitplan.errors import ModelFileError, RuntimeFailure, UsageError
from bitplan.runtimes.hf.dtypes import PLAIN

_POSITIONS = re.compile(r"(position[^.]*|wpe)$")
_REMOTE = "needs code of its own, which is not run unless you pass --trust-remote-code"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without bars and warnings: progress and errors are bitplan's to tell."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def config_of(checkpoint: Checkpoint, *, trust: bool = False) -> Any:
    """transformers' configuration. Raises ModelFileError for an architecture it does not know."""
    import transformers

    if checkpoint.needs_remote_code and not trust:
        raise ModelFileError(f"{checkpoint.path}: {_REMOTE}.")
    if checkpoint.layers > len(checkpoint.tensors):  # transformers would build them all
        raise ModelFileError(
            f"{checkpoint.path}: config.json promises {checkpoint.layers:,} layers, the files hold"
            f" {len(checkpoint.tensors)} tensors; correct config.json."
        )
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(
                checkpoint.path, local_files_only=True, trust_remote_code=trust
            )
    except Exception as error:  # what goes wrong is up to the file
        if checkpoint.model_type in transformers.CONFIG_MAPPING:
            raise unknown(checkpoint, error) from None
        raise ModelFileError(
            f"{checkpoint.path}: transformers {transformers.__version__} does not know"
            f" {checkpoint.architecture} (model type {checkpoint.model_type!r}):"
            f" {_first_line(error)}."
        ) from None


def class_of(checkpoint: Checkpoint) -> Any:
    """The auto class for what the checkpoint is."""
    import transformers

    if checkpoint.is_classifier:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


def skeleton(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, *, trust: bool = False
) -> nn.Module:
    """The model without weights (on the meta device): to look at, or to fill block by block."""
    config = config_of(checkpoint, trust=trust)
    config._experts_implementation = "eager"
    try:
        with quiet(), torch.device("meta"):
            model = class_of(checkpoint).from_config(
                config, dtype=dtype or dtype_of(checkpoint), trust_remote_code=trust
            )
    except Exception as error:  # what goes wrong is up to the file
        raise unknown(checkpoint, error) from None
    model.tie_weights()
    _check_described(checkpoint, model)
    return model.eval()


def _check_described(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Whether the files can be what config.json describes, before memory is taken for it."""
    found, named = type(model).__name__, checkpoint.architecture
    if found.lower() != named.lower():
        raise ModelFileError(
            f"{checkpoint.path}: config.json names {named}, but transformers opens its model type"
            f" {checkpoint.model_type!r} as {found}; only causal decoders and sequence classifiers"
            " are handled."
        )
    described = sum(p.numel() for p in model.parameters())
    if described > 2 * checkpoint.weights:
        raise ModelFileError(
            f"{checkpoint.path}: config.json describes {described:,} weights, the files hold"
            f" {checkpoint.weights:,}; the download is incomplete or config.json is wrong."
        )


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """What most weights of the files are stored in."""
    count: dict[str, int] = {}
    for t in checkpoint.tensors:
        count[t.fmt.name] = count.get(t.fmt.name, 0) + t.nbytes
    return PLAIN[max(count, key=count.__getitem__)]


def load(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    trust: bool = False,
    mend: Callable[[Any, Any], None] = lambda *_: None,
) -> nn.Module:
    """The model with its weights, ready to be run. Raises ModelFileError, RuntimeFailure.

    mend: given the model and transformers' notes on loading it, before those are checked.
    """
    skeleton(checkpoint, dtype, trust=trust)
    config = config_of(checkpoint, trust=trust)
    config._experts_implementation = "eager"  # the others hide which expert sees what
    try:
        with quiet():
            model, notes = class_of(checkpoint).from_pretrained(
                checkpoint.path, config=config, dtype=dtype or dtype_of(checkpoint),
                local_files_only=True, use_safetensors=True, trust_remote_code=trust,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except MemoryError:
        raise RuntimeFailure(f"{checkpoint.path}: does not fit in memory.") from None
    except Exception as error:  # what goes wrong is up to the file
        raise unknown(checkpoint, error) from None
    mend(model, notes)
    _check(checkpoint, model, notes)
    return _placed(model, device, checkpoint.path)


def load_gguf(path: Path, device: torch.device, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    """A GGUF file, dequantized by transformers, and its tokenizer. Raises ModelFileError."""
    import transformers

    gguf_file.read(path)  # its counts and offsets are checked there
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a bar that nothing switches off
            model, notes = transformers.AutoModelForCausalLM.from_pretrained(
                **where, dtype=dtype or torch.float32, output_loading_info=True
            )
            words = transformers.AutoTokenizer.from_pretrained(**where)
        if notes["missing_keys"]:
            raise ValueError(f"it finds no {min(notes['missing_keys'])} in it")
    except Exception as error:  # what goes wrong is up to the file
        raise ModelFileError(
            f"{path}: transformers cannot open this GGUF file ({_first_line(error)}); leave out"
            " --runtime hf, llama.cpp opens it."
        ) from None
    model.config._experts_implementation = "eager"
    return _placed(model, device, path), words


def tokenizer(checkpoint: Checkpoint, *, trust: bool = False) -> Any:
    """The folder's tokenizer. Raises ModelFileError where it is missing or damaged."""
    import transformers

    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(
                checkpoint.path, local_files_only=True, trust_remote_code=trust
            )
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ModelFileError(
            f"{checkpoint.path}: has no tokenizer that can be read ({_first_line(error)}); copy"
            " tokenizer.json and tokenizer_config.json of the model there."
        ) from None


def check_vocabulary(path: Path, words: Any, rows: int) -> None:
    """Raises ModelFileError when the tokenizer knows words that the model has no row for.

    Tokens that were added to it may lie beyond: transformers adds an end of text to a GGUF file's,
    which no text comes to. `check_tokens` sees to those that one does come to.
    """
    if words.vocab_size > rows:
        raise ModelFileError(
            f"{path}: its tokenizer has {words.vocab_size} tokens, its embedding only {rows} rows;"
            " they belong to different models."
        )


def check_tokens(path: Path, ids: Iterable[int], rows: int) -> None:
    """Raises ModelFileError for a token that the model has no row for."""
    beyond = next((i for i in ids if i >= rows), None)
    if beyond is not None:
        raise ModelFileError(
            f"{path}: its tokenizer made token {beyond} of this text, its embedding has only {rows}"
            " rows; use the tokenizer that the model was trained with."
        )


def reach(model: nn.Module) -> int | None:
    """Most tokens that a table of learned positions has room for; None for models without one.

    RoBERTa's begins behind the padding's row; OPT's own class counts two rows more than it has.
    """
    embedding = model.get_input_embeddings()
    found = [
        m.num_embeddings - (m.padding_idx + 1 if m.padding_idx is not None else 0)
        - int(getattr(m, "offset", 0))
        for name, m in model.named_modules()
        if isinstance(m, nn.Embedding) and m is not embedding and _POSITIONS.search(name)
    ]  # fmt: skip
    return min(found, default=None)


def check_context(path: Path, model: nn.Module, ctx: int) -> None:
    """Raises UsageError for windows that are longer than the model has positions for."""
    most = reach(model)
    if most is not None and ctx > most:
        raise UsageError(
            f"--ctx {ctx}: {path} has positions for {most} tokens only; take --ctx {most} or less."
        )


def _check(checkpoint: Checkpoint, model: nn.Module, notes: Any) -> None:
    """What transformers tells of loading: nothing made up, nothing of another shape or left over.

    Tensors that the model has no use for are none of its business, unless they are layers.
    """
    missing = sorted(notes["missing_keys"])
    if missing:
        raise lacking(checkpoint, missing)
    wrong = sorted(str(w[0]) for w in notes["mismatched_keys"])
    if wrong:
        shapes = next(tuple(w[1:3]) for w in notes["mismatched_keys"] if str(w[0]) == wrong[0])
        raise ModelFileError(
            f"{checkpoint.path}: {wrong[0]} has the shape {list(shapes[0])}, config.json asks for"
            f" {list(shapes[1])} (labels or vocabulary?); correct config.json."
        )
    known = {_unnumbered(name) for name in model.state_dict()}
    more = sorted(name for name in notes["unexpected_keys"] if _unnumbered(name) in known)
    if more:
        raise ModelFileError(
            f"{checkpoint.path}: the files hold {more[0]}, config.json describes only"
            f" {checkpoint.layers} layers; correct config.json."
        )


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def lacking(checkpoint: Checkpoint, missing: Sequence[str]) -> ModelFileError:
    """The error for a model that needs tensors which its files do not hold."""
    return ModelFileError(
        f"{checkpoint.path}: {checkpoint.architecture} needs {missing[0]}, which the files do not"
        f" hold ({len(missing)} missing in all); the download is incomplete or the architecture in"
        " config.json is another."
    )


def _placed(model: Any, device: torch.device, path: Path) -> nn.Module:
    try:
        return model.eval().requires_grad_(False).to(device)
    except RuntimeError as error:  # torch.OutOfMemoryError among them
        raise RuntimeFailure(f"{path}: does not fit on {device} ({_first_line(error)}).") from None


def unknown(checkpoint: Checkpoint, error: Exception) -> ModelFileError:
    """The error for a model that a library refuses, with its reason."""
    return ModelFileError(
        f"{checkpoint.path}: {checkpoint.architecture} cannot be opened: {_first_line(error)}."
    )


def _first_line(error: BaseException) -> str:
    """Of the error that is at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".:") if lines else type(error).__name__
