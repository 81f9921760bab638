"""Trained detectors for other programs: Detectron2 alone, TorchScript, ONNX."""
