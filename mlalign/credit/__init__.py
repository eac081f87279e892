"""Which token gets how much of a reward: pure functions on tensors, torch only.

``spans.py`` lays scored spans on tokens; ``group.py`` is the credit of group methods (GRPO, RLOO,
with claims or steps), ``gae.py`` that of PPO; ``losses.py`` holds the clipped losses that take it.
Rows are completions (R), padded at the tail to T tokens; shape letters as in
``branching/batch.py``, J spans of all rows, G groups of K rows.
"""
