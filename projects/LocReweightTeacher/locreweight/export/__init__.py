"""Export of trained detectors: plain Detectron2, TorchScript, ONNX."""
