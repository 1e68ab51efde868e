"""Models for other programs and machines: StableHLO, ONNX, the hub."""
