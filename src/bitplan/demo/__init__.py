"""The built-in model, its card, and the text it is measured on."""

from pathlib import Path

MODEL = Path(__file__).with_name("bitplan-demo.gguf")
