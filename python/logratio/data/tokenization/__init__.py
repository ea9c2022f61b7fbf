"""Records to token ids: chat template, boundary, EOS, truncation."""
