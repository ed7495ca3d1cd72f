"""Weights in 4 and 8 bits that other tools wrote: MXFP4, bitsandbytes, compressed-tensors, GPTQ and AWQ."""
