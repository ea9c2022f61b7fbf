"""Tokenize records: chat template, prompt boundary, EOS, truncation."""
