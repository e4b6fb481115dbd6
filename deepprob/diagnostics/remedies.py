"""Next steps that several checks name."""

from __future__ import annotations

RICHER_GUIDE = "Try a richer guide (guide='multivariate_normal' or 'flow')."
RICHER_ENCODER = "Try a larger encoder or a richer guide (full covariance, flow), or train it for longer."

_FURTHER = {
    "multivariate_normal": "Try guide='flow', or reparameterize the model, such as by non-centered effects.",
    "flow": "Reparameterize the model, such as by non-centered effects, or draw from the posterior by a sampler.",
}


def possible(step: str, guide: object, *, extends: bool) -> str:
    """A next step, or another one if the fit has tried its guide, or cannot go on.

    Args:
        step: The next step.
        guide: The guide of the fit, by name.
        extends: Whether the fit can go on from where it ended.

    Examples:
        >>> possible(RICHER_GUIDE, "normal", extends=True) == RICHER_GUIDE
        True
        >>> possible(RICHER_GUIDE, "flow", extends=True).split(",")[0]
        'Reparameterize the model'
        >>> possible("Train on: dp.extend(posterior, data).", "normal", extends=False)
        'Fit again for longer: raise epochs= or steps=.'
    """
    if "dp.extend(" in step and not extends:
        return "Fit again for longer: raise epochs= or steps=."
    return _FURTHER.get(str(guide), step) if step == RICHER_GUIDE else step
