"""Completions that branch from one image prefix: rows, masks, positions, log-probs. torch only."""
