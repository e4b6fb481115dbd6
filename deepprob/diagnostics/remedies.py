"""Next steps that several checks name."""

from __future__ import annotations

RICHER_GUIDE = (
    "Try a richer guide (guide='multivariate_normal' or 'flow'), or fit for longer: dp.extend(posterior, data)."
)
RICHER_ENCODER = (
    "Train on, dp.extend(posterior, data); or try a larger encoder or a richer guide (full covariance, flow)."
)
