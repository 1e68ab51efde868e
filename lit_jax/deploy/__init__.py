"""Models for other programs: StableHLO, ONNX."""
