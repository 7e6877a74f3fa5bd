"""Losses between a student's and a teacher's next-token distributions.

`divergence` holds the definitions, `divergence_gradient` their analytic gradients, and `fused_linear` the form for
large vocabularies, which never builds a [tokens, vocabulary] tensor.
"""
