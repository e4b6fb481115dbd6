"""The Laplace approximation of a fitted mode by the exact curvature of the log joint."""

from __future__ import annotations

import torch
from pyro.ops.hessian import hessian
from torch import Tensor

from deepprob.engine.random import RandomStream
from deepprob.programs.guides import attach_guide
from deepprob.programs.instance import ProgramInstance
from deepprob.programs.minibatch import Batch, num_rows
from deepprob.programs.run import Run, run_program


def finish_guide(instance: ProgramInstance, batch: Batch) -> None:
    """Finish a guide at the end of a fit: ``guide="laplace"`` turns a mode into a Gaussian; others stay as they are.

    Args:
        instance: The fitted program.
        batch: All of the data.

    Raises:
        ValueError: If the fit has not reached the mode that ``"laplace"`` needs.
    """
    if instance.guide_name == "laplace":
        laplace(instance, batch)


def laplace(instance: ProgramInstance, batch: Batch) -> None:
    r"""Replace a fitted mode by the Gaussian of the same curvature, in place.

    .. math:: q(z) = N(\hat z, H^{-1}), \qquad H = -\nabla^2 \log p(x, z) |_{z = \hat z}

    Args:
        instance: A program fitted with ``guide="laplace"``; afterwards its guide is a multivariate normal.
        batch: All of the data.

    Raises:
        ValueError: If the curvature is not that of a maximum.
    """
    program = instance.program
    location = program.current_guide.loc.detach().clone()
    root = root_of_inverse(precision_at_mode(instance, batch))
    scale = root.diagonal()
    instance.guide_name = attach_guide(program, "multivariate_normal")
    with RandomStream(0, instance.device).drawing():
        instance.dry_run(batch)
    guide = program.current_guide
    with torch.no_grad():
        guide.loc.copy_(location)
        guide.scale = scale
        guide.scale_tril = root / scale.unsqueeze(-1)
    with RandomStream(0, instance.device).drawing():
        instance.dry_run(batch)  # until then the store holds the old values


def precision_at_mode(instance: ProgramInstance, batch: Batch) -> Tensor:
    """The negative Hessian of the log joint, in unconstrained coordinates, ``(D, D)``.

    Args:
        instance: A program whose guide is a point over all latents at once, with the parameter ``loc``.
        batch: All of the data.
    """
    rows = torch.arange(num_rows(batch) if batch else instance.num_data, device=instance.device)
    # Incidental draws do not affect the curvature, and must not advance the caller's random state.
    with RandomStream(0, instance.device).drawing(), instance.running(), torch.enable_grad():
        prepared = instance.program.prepare(*batch)
        guide, model = run_program(Run(instance.program, prepared, rows, instance.num_data))
        loss = guide.log_prob_sum() - model.log_prob_sum()
        found: Tensor = hessian(loss, instance.program.current_guide.loc)
    return found.detach()


def root_of_inverse(precision: Tensor) -> Tensor:
    """The lower Cholesky factor of the inverse of a precision.

    Raises:
        ValueError: If the precision is not that of a maximum.
    """
    root, info = torch.linalg.cholesky_ex(0.5 * (precision + precision.mT))
    if int(info) or not bool(root.isfinite().all()):
        raise ValueError(NO_MODE)
    found: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(root))
    return found


NO_MODE = (
    "the Laplace approximation needs a mode, and the fit has not reached one (the curvature is not that of a maximum). "
    "Fit for longer: raise epochs= or steps=. A hierarchy whose scale may shrink to 0 has no mode: use "
    "svi(..., guide='multivariate_normal')."
)
