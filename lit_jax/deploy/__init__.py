"""Models for other programs and machines: StableHLO, ONNX, the hub, one folder for a laptop."""
