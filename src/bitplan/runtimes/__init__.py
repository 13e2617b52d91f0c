"""Runtimes: they open a model, run it, round its weights in place and watch its activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from bitplan.artifacts import ModelFacts
from bitplan.formats import Format
from bitplan.runtimes.statistics import Captured
from bitplan.tensors import Tensor
from bitplan.units import Grouping, Unit

Array = npt.NDArray[np.float32]


class Runtime(Protocol):
    """An open model. Scorers, metrics and studies know nothing else of it."""

    @property
    def path(self) -> Path:
        """The file, or the folder, that it was opened from."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What it consists of, as far as it matters to plans and importance matrices."""
        ...

    ctx: int
    """Tokens of a window."""
    threads: int
    parallel: int
    """Windows that go through one run; work is cut into groups of so many."""
    n_vocab: int
    """Width of the logits: of the vocabulary, or of a classifier's labels."""

    label_names: Mapping[str, int]
    """A classifier's labels by name; of other models empty."""
    is_classifier: bool
    """Whether its windows are examples (see `runtimes.hf.batches`) and its logits labels."""

    @property
    def positions(self) -> int:
        """Scored positions of a window."""
        ...

    @property
    def engine(self) -> str:
        """The library that runs the model and its version: figures depend on it."""
        ...

    @property
    def device(self) -> str:
        """What it runs on; figures depend on that too."""
        ...

    @property
    def facts(self) -> ModelFacts:
        """Who the model is, its content hash included."""
        ...

    def units(self, grouping: Grouping = "tensor") -> list[Unit]:
        """Every quantizable weight, grouped into what shares a format."""
        ...

    def targets(self, windows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """What each scored position ought to predict, [n, positions]; -1 where nobody knows."""
        ...

    def fixed_bytes(self, added: Mapping[str, int | str]) -> int:
        """Bytes of a written model that no plan changes. added: metadata that a GGUF file gains."""
        ...

    def logits(self, windows: npt.NDArray[np.int32]) -> Iterator[Array]:
        """Per window [n, ctx], next-token logits of the scored positions [positions, vocabulary].

        Position i of the result predicts token ctx//2 + 1 + i of the window. The array is only
        valid until the next one is asked for.
        """
        ...

    def unreached(self) -> list[str]:
        """Tensors of units that a plain run of the model does not touch."""
        ...

    def rounded(
        self, assignment: Mapping[str, Format], importance: Mapping[str, Array] | None = None
    ) -> AbstractContextManager[None]:
        """Within the block these tensors hold rounded values; the exact old ones after it."""
        ...

    def hold(
        self, assignment: Mapping[str, Format | None], importance: Mapping[str, Array] | None = None
    ) -> None:
        """As `rounded` (None: all zeros), but lasting; {} restores all. Costs what differs."""
        ...

    def put(self, tensor: str, values: Array) -> None:
        """From now on a tensor holds these values [rows, row] (of all experts, one after another),
        in its own type; `hold`, which knows nothing of them, puts it back."""
        ...

    def tokenize(self, text: str) -> npt.NDArray[np.int32]:
        """Text -> token ids, special tokens in front as the model wants them."""
        ...

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> list[list[int]]:
        """Examples of a classifier -> their tokens, at most `ctx` of each."""
        ...

    @property
    def bos(self) -> int | None:
        """The token that opens every window, where the vocabulary adds one."""
        ...

    def text(self, tokens: npt.NDArray[np.int32]) -> str:
        """The text that one row of tokens stands for; special tokens stand for none."""
        ...

    def text_bytes(self, tokens: npt.NDArray[np.int32]) -> int:
        """Bytes of text that these tokens stand for; special tokens stand for none."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...

    def beside(self, file: Path) -> AbstractContextManager[Runtime]:
        """Another model, opened with the same settings."""
        ...

    def capture(self, windows: npt.NDArray[np.int32], what: Sequence[str]) -> Captured:
        """Statistics of activations: `second_moments`, `similarity`, `peaks`."""
        ...

    def original(self, tensor: str, most_rows: int | None = None) -> tuple[Array, int]:
        """Weights of the reference [rows, row], and how many matrices (experts) they hold.

        most_rows: an evenly spaced sample of at most so many rows, the same rows of each matrix.
        """
        ...

    def round(
        self, weights: Array, fmt: Format, importance: Array | None = None, matrices: int = 1
    ) -> Array:
        """Weights [rows, row] after a round trip through a format; matrices: how many (experts)
        they hold, one after another."""
        ...


class Stage(Protocol):
    """A block of a model with its inputs for all windows, or what lies before or after blocks."""

    layer: int
    """The block's number; -1 for what comes before the blocks, their number for the rest."""
    tensors: frozenset[str]
    """Weights that its output may depend on; those outside the blocks are in two stages."""

    def errors(
        self, assignment: Mapping[str, Format], importance: Mapping[str, Array]
    ) -> npt.NDArray[np.float64]:
        """||y - y'||^2 / ||y||^2 of every token, windows one after another: y is what leaves the
        stage, y' the same while these tensors hold rounded values and its input is its own."""
        ...


@runtime_checkable
class Walker(Protocol):
    """A runtime that goes through a model one stage at a time; it need not fit in memory."""

    def walk(self, windows: npt.NDArray[np.int32]) -> Iterator[Stage]:
        """Each stage in turn, with the inputs of the reference; valid until the next one."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """A runtime that holds one block at a time and can say what that takes."""

    def needs(self, windows: npt.NDArray[np.int32]) -> int:
        """Bytes of memory at the peak of a walk, what the process has already included."""
        ...


@runtime_checkable
class Sliceable(Protocol):
    """A runtime that reads rows of a tensor, so that a large one need not lie whole in memory."""

    def rows(self, tensor: str, begin: int, end: int) -> Array:
        """These rows of the reference's weights [end - begin, row], as `Runtime.original` numbers
        them: those of all matrices one after another."""
        ...


@runtime_checkable
class Looker(Protocol):
    """A runtime that can round weights by what they are multiplied with."""

    def look(self, windows: npt.NDArray[np.int32], method: str = "gptq") -> None:
        """From now on `hold` and `rounded` choose numbers by the weights' inputs on these windows:
        integers by GPTQ, or with method `rtn` SpQR's formats alone, which always ask."""
        ...


@runtime_checkable
class Differentiable(Protocol):
    """A runtime that also gives gradients; PyTorch does, llama.cpp does not."""

    def gradients(
        self,
        window: npt.NDArray[np.int32],
        targets: npt.NDArray[np.int32] | None,
        rows: Mapping[str, npt.NDArray[np.int64]],
        seed: int,
    ) -> dict[str, Array]:
        """Gradients by these rows of these tensors, [matrices x rows, row] of each in float32.

        Of the sum of log p(target) over the scored positions of one window of `logits`, in nats;
        targets [positions], -1: drawn from the model's own prediction, by the seed. Without targets
        of a scalar, different for each seed, whose squared gradient has the diagonal of the Fisher
        information of these predictions as its mean. The same rows of each matrix are meant. Raises
        RuntimeFailure where the dtype cannot hold them.
        """
        ...

    def weighted_moments(
        self,
        window: npt.NDArray[np.int32],
        targets: npt.NDArray[np.int32] | None,
        seed: int,
    ) -> Captured:
        """Of one window, sum over tokens of |g|^2 x^2 for each weight [matrices, row], x its inputs
        and g the gradient by its outputs of the scalar that `gradients` has; and the tokens."""
        ...

    def some(self, tensor: str, rows: npt.NDArray[np.int64]) -> tuple[Array, int]:
        """These rows of the reference's weights, as `Runtime.original` gives them."""
        ...
