"""Softmax in pieces, as attention kernels need it: `kernel.py`."""
