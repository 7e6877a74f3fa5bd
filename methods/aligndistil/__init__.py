"""AlignDistil: alignment as token-level distillation (arXiv 2503.02832), with its competitors.

A DPO model and a reverse DPO model (preferences exchanged) disagree where a token matters. Their logits, extrapolated
at each token by as much as they disagree, are a teacher that is better than either; the policy is distilled into it by
a reverse KL at every token, on given responses or on its own.
"""
