"""Preference alignment for interpretable multimodal LLMs. Importing this loads no torch."""

__version__ = "0.1.0"
