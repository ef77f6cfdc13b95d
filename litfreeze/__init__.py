"""litfreeze: fine-tune chosen layers of a language model."""

__version__ = "0.1.0"
