"""Next steps that several checks name."""

from __future__ import annotations

RICHER_GUIDE = "Try a richer guide (guide='multivariate_normal' or 'flow')."
RICHER_ENCODER = "Try a larger encoder or a richer guide (full covariance, flow), or train it for longer."
