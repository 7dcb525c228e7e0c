"""Attention as few kernels of a GPU; `dispatch` decides for each call whether one of them computes it."""
