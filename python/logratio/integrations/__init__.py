"""The reference's half for those who train elsewhere: columns for any trainer, and for TRL's.

`logratio.integrations.table` writes a store's groups with their cached log-probs as a table, and
needs no torch. `logratio.integrations.trl` gives TRL's `DPOTrainer` its reference from the cache.
"""
