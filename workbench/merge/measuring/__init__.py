"""Measurements that merge methods share: Gram matrices, calibration texts, least squares, singular values."""
