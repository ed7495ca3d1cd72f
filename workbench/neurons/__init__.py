"""The part analyzes neurons of a model by functions, sparsity, ablations, experts, facts and bricks, one module each with its result.

`pages` draws the results; no analysis imports it.
"""
