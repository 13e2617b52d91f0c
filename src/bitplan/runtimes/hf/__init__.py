"""The Hugging Face runtime: safetensors models in PyTorch. Needs the extra `hf`."""

from bitplan.runtimes.hf.devices import engine_version
from bitplan.runtimes.hf.model import HfModel
from bitplan.runtimes.hf.streamed import StreamedModel

__all__ = ["HfModel", "StreamedModel", "engine_version"]
