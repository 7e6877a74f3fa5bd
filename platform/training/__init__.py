"""Training: Ray Train outside, transformers.Trainer inside, DeepSpeed under it."""
