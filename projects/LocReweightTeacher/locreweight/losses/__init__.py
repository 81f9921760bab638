"""Losses and weights in plain PyTorch. Equation numbers are the paper's.

======================  ===================  =====================================================
module                  equation             contents
======================  ===================  =====================================================
:mod:`.localization`    4, 5, 8, 9           localization quality score, KL regression loss
:mod:`.reweighting`     11, 12, 13, 14       LER and PRC: weights and weighted losses
:mod:`.focal`           (not in the paper)   focal loss of Unbiased Teacher
:mod:`.soft_labels`     (not in the paper)   cross-entropy to soft labels
======================  ===================  =====================================================
"""
