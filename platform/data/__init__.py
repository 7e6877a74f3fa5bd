"""Data: files to examples, examples to token ids, rows to batches."""
