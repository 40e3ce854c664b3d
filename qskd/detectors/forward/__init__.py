"""What a forward of transformers' model is made to do besides: more queries, less asked of the device, what it keeps, compiled."""
