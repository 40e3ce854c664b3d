"""What a CUDA machine does with qskd: python -m benchmarks.gpu."""
