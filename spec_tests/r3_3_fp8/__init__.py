"""R 3.3: number formats, quantisation, tensor cores, FP8 training."""
