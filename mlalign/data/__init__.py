"""Preference files to batches: read, tokenise, collate. No generation, no scoring."""
