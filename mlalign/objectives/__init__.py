"""Preference objectives: one file each, token log-probs in, a loss per pair out."""
