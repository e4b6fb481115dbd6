"""What chains share: their kernels, step sizes and units."""
