"""What leaves the house: ONNX, its check, speed, memory, the model card."""
