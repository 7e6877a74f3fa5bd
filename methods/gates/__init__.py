"""GATES: spatial domains of a tissue section (arXiv 2410.20159).

A graph attention auto-encoder gives every spot or cell an embedding made of its own expression, that of its
neighbours in space, and that of the cells anywhere that express similarly; a Gaussian mixture on the embedding gives
the domains. Call `tl.gates(adata, n_domains=7)` on an AnnData, or `tenfold run gates/demo`.
"""
