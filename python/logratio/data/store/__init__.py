"""Stores of token ids: build in one pass over the data, resume, open, report on every row."""
