"""Probes: one file each, all read from the same forwards of a fixed probe set (``_pass.py``)."""
