"""Benchmarks: one file each. Items, prompt, parser, score; answers are stored raw."""

NOT_METHODS = ("evaluate",)
"""Modules of this room that are no benchmark."""
