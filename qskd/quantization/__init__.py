"""Students with few bits: fake quantisers with learned steps (LSQ, LSQ+), where they stand in a detector, and their file.

`restore_quantisers` (`qskd.quantization.files`) puts a saved student's back into a model that plain transformers loaded.
"""
