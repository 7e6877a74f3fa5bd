"""LayerMoE: new languages as layer-wise experts beside a frozen dense model (arXiv 2505.22582), with its competitors.

Every layer of a dense language model may get new feed-forward experts, more of them where languages look less alike. A
router mixes them with the original FFN, which stays frozen as expert 0; on some layers a classifier sends whole
sequences of the old languages to that FFN alone. `expansion` builds such a model, `modeling` is what transformers
loads.
"""
