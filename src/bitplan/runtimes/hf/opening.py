"""From a folder of safetensors (or a GGUF file) to a PyTorch model, distrusting what it reads.

Nothing is unpickled, no code of the folder is run unless asked, and weights that the file does not
hold are an error: transformers would fill them with random numbers and go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitplan.checkpoint import Checkpoint
from bitplan.errors import ModelFileError, RuntimeFailure, UsageError

_CLASSIFIER = "ForSequenceClassification"
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
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(
                checkpoint.path, local_files_only=True, trust_remote_code=trust
            )
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelFileError(
            f"{checkpoint.path}: transformers {transformers.__version__} does not know"
            f" {checkpoint.architecture or 'its architecture'} (model type"
            f" {checkpoint.model_type!r}): {_first_line(error)}."
        ) from None


def _class_of(checkpoint: Checkpoint) -> Any:
    """The auto class for what the checkpoint is."""
    import transformers

    if checkpoint.is_classifier:
        return transformers.AutoModelForSequenceClassification
    return transformers.AutoModelForCausalLM


def skeleton(checkpoint: Checkpoint, *, trust: bool = False) -> nn.Module:
    """The model without weights (on the meta device): to look at, or to fill block by block."""
    config = config_of(checkpoint, trust=trust)
    config._experts_implementation = "eager"
    try:
        with quiet(), torch.device("meta"):
            model = _class_of(checkpoint).from_config(
                config, dtype=dtype_of(checkpoint), trust_remote_code=trust
            )
    except (ValueError, KeyError, TypeError) as error:
        raise _unknown(checkpoint, error) from None
    model.tie_weights()
    return model.eval()


def dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """What most weights of the files are stored in."""
    count: dict[str, int] = {}
    for t in checkpoint.tensors:
        count[t.fmt.name] = count.get(t.fmt.name, 0) + t.nbytes
    known = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    return known[max(count, key=count.__getitem__)]


def load(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, *, trust: bool = False
) -> nn.Module:
    """The model with its weights, ready to be run. Raises ModelFileError, RuntimeFailure."""
    config = config_of(checkpoint, trust=trust)
    config._experts_implementation = "eager"  # the others hide which expert sees what
    try:
        with quiet():
            model, notes = _class_of(checkpoint).from_pretrained(
                checkpoint.path, config=config, dtype=dtype or dtype_of(checkpoint),
                local_files_only=True, use_safetensors=True, trust_remote_code=trust,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
    except MemoryError:
        raise RuntimeFailure(f"{checkpoint.path}: does not fit in memory.") from None
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        raise _unknown(checkpoint, error) from None
    _check(checkpoint, notes)
    return _placed(model, device, checkpoint.path)


def load_gguf(path: Path, device: torch.device, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    """A GGUF file, dequantized by transformers, and its tokenizer."""
    import transformers

    try:
        with quiet():
            where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **where, dtype=dtype or torch.float32
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelFileError(
            f"{path}: transformers cannot open this GGUF file ({_first_line(error)}); leave out"
            " --runtime hf, llama.cpp opens it."
        ) from None
    return _placed(model, device, path), tokenizer


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
            f"{checkpoint.path}: its tokenizer cannot be read ({_first_line(error)}); copy"
            " tokenizer.json and tokenizer_config.json of the model there."
        ) from None


def check_vocabulary(path: Path, words: Any, rows: int) -> None:
    """Raises ModelFileError when the tokenizer knows tokens that the model has no row for."""
    if len(words) > rows:
        raise ModelFileError(
            f"{path}: its tokenizer has {len(words)} tokens, its embedding only {rows} rows; they"
            " belong to different models."
        )


def device_of(name: str) -> torch.device:
    """`auto` (cuda, then mps, then cpu) or a device's name. Raises UsageError."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"--device {name}: PyTorch cannot use it here ({_first_line(error)}); choose cpu, cuda"
            " or mps."
        ) from None
    return device


def _check(checkpoint: Checkpoint, notes: Any) -> None:
    missing = sorted(notes["missing_keys"])
    if missing:
        raise ModelFileError(
            f"{checkpoint.path}: {checkpoint.architecture} needs {missing[0]}, which the files do"
            f" not hold ({len(missing)} missing in all); the download is incomplete or the"
            " architecture in config.json is another."
        )
    wrong = sorted(str(w[0]) for w in notes["mismatched_keys"])
    if wrong:
        shapes = next(tuple(w[1:3]) for w in notes["mismatched_keys"] if str(w[0]) == wrong[0])
        raise ModelFileError(
            f"{checkpoint.path}: {wrong[0]} has the shape {list(shapes[0])}, config.json asks for"
            f" {list(shapes[1])} (labels or vocabulary?); correct config.json."
        )


def _placed(model: Any, device: torch.device, path: Path) -> nn.Module:
    try:
        return model.eval().requires_grad_(False).to(device)
    except RuntimeError as error:  # torch.OutOfMemoryError among them
        raise RuntimeFailure(f"{path}: does not fit on {device} ({_first_line(error)}).") from None


def _unknown(checkpoint: Checkpoint, error: Exception) -> ModelFileError:
    return ModelFileError(
        f"{checkpoint.path}: {checkpoint.architecture} cannot be opened: {_first_line(error)}."
    )


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
