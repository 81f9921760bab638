"""Semi-supervised object detection via dynamic reweighting of localization error.

``locreweight.method`` is the paper's mathematics on torch alone; ``locreweight.modeling``,
``locreweight.data`` and ``locreweight.engine`` bind it to Detectron2. Importing this package
itself needs nothing but the standard library.
"""
