"""Use cached reference log-probs in other trainers.

`logratio.integrations.table` writes the groups of a store with their cached log-probs as a table,
and does not need torch. `logratio.integrations.trl` is TRL's `DPOTrainer` with the cache as its
reference.
"""
