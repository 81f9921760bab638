"""The paper's mathematics, on torch alone. Equation numbers are those of the paper.

======================  ===================  =====================================================
module                  equation             contents
======================  ===================  =====================================================
:mod:`.localization`    4, 5, 8, 9           localization quality score, KL regression loss
:mod:`.reweighting`     11, 12, 13, 14       LER and PRC: the weights and the losses they weight
:mod:`.teacher`         Sec. 3.1             exponential moving average of the student
:mod:`.geometry`        Sec. 3.4             boxes carried from one augmented view to another
======================  ===================  =====================================================
"""
