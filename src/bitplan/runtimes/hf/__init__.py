"""The Hugging Face runtime: safetensors models in PyTorch. Needs the extra `hf`."""

from bitplan.runtimes.hf.model import HfModel, engine_version

__all__ = ["HfModel", "engine_version"]
