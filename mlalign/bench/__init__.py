"""Speed side by side: what a step of ours costs against what a user would otherwise run.

Every comparison alternates its sides in one process, on the same weights, pairs and non-zero
adapter, and is worth nothing unless both computed the same: a row whose loss or log-probs differ is
invalid. ``mlalign bench`` prints the table.
"""
