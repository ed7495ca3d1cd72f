"""Weights in 4 and 8 bits: readers of MXFP4, bitsandbytes, compressed-tensors, GPTQ and AWQ; results in MXFP4 and fp8. At most 106 names."""

from workbench.ground.parts import Part

PART = Part(
    weights={
        "mxfp4": "quantized.mxfp4.fold",
        "bitsandbytes": "quantized.bitsandbytes.fold",
        "compressed-tensors/pack-quantized": "quantized.compressed.fold",
        "compressed-tensors/nvfp4-pack-quantized": "quantized.compressed.fold",
        "gptq/4": "quantized.transposed.fold_gptq",
        "awq/4": "quantized.transposed.fold_awq",
    },
    outputs="quantized.outputs",
)
