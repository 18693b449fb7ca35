"""Semi-supervised trainers for nnU-Net v2. Importing this package imports nothing else."""

__version__ = "0.2.0"
