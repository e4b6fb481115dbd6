"""Posteriors: what every routine returns."""
