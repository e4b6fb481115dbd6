"""Images along lines through the latent space."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepprob.diagnostics import plots
from deepprob.diagnostics.case import Case
from deepprob.diagnostics.checks.collapse import active_dimensions
from deepprob.diagnostics.latent_walks import decoded_means, interpolated, plane, traversed
from deepprob.diagnostics.report import check
from deepprob.inference import svi
from deepprob.models import VAE
from deepprob.posteriors.posterior import Posterior


def fitted(*shape: int, latent_dim: int = 3) -> tuple[Posterior, torch.Tensor]:
    x = torch.rand(20, *shape, generator=torch.Generator().manual_seed(0)).round()
    program = VAE(shape, latent_dim=latent_dim, hidden_dims=(8,))
    return svi(program, x, steps=30, seed=0, progress=False), x


def test_a_traversal_moves_one_dimension_from_minus_two_to_two_sds() -> None:
    posterior, x = fitted(4, 5)
    rows = traversed(posterior, (x[:1],), [2, 0], 6, 5)
    assert [label.split(",")[0] for label in rows] == ["dimension 2", "dimension 0"]
    found = np.stack([*rows.values()])
    assert found.shape == (2, 5, 4, 5)
    # The prior's mean and sd are estimated from 500 rows.
    z = posterior.encode(x[:1]).mean.repeat(5, 1)
    z[:, 2] = torch.linspace(-2, 2, 5)
    assert np.allclose(found[0], decoded_means(posterior, z), atol=0.1)
    assert not np.allclose(found[0, 0], found[0, -1], atol=1e-3)


def test_a_traversal_begins_with_the_dimensions_that_tell_most() -> None:
    posterior, x = fitted(4, 5)
    nats = [float(label.split()[-2]) for label in traversed(posterior, (x[:1],), None, 2, 3)]
    assert len(nats) == 2
    assert nats == sorted(nats, reverse=True)


def test_the_nats_of_a_traversal_are_those_of_the_report() -> None:
    """Grey rows, whose bits are drawn anew, have codes of a larger sd than those of their bits."""
    x = torch.rand(50, 4, 5, generator=torch.Generator().manual_seed(0))
    posterior = svi(VAE((4, 5), latent_dim=2, hidden_dims=(8,)), x, steps=200, seed=0, progress=False)
    labels = traversed(posterior, (x,), [0, 1], 2, 3)
    kl = active_dimensions.answer(Case(posterior, x), 0.05).details["kl"]
    assert [float(label.split()[-2]) for label in labels] == pytest.approx(kl, rel=0.1)


def test_an_interpolation_begins_and_ends_at_the_rows() -> None:
    posterior, x = fitted(3, 4, 5)
    found = interpolated(posterior, x[:2], x[2:4], 6)
    assert found.shape == (2, 6, 3, 4, 5)
    ends = decoded_means(posterior, posterior.encode(x[:4]).mean)
    assert np.allclose(found[:, 0], ends[:2], atol=1e-5)
    assert np.allclose(found[:, -1], ends[2:], atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5), (4, 5, 3)])
def test_figures_of_grey_and_color_images(shape: tuple[int, ...]) -> None:
    posterior, x = fitted(*shape)
    assert len(plots.traversal(posterior, x[:1], most=2, columns=4).axes) == 8
    assert len(plots.interpolation(posterior, x[:3], x[3:6], columns=5).axes) == 15


def test_a_plane_of_codes_has_the_quantiles_of_the_prior() -> None:
    posterior, _ = fitted(4, 5, latent_dim=2)
    found = plane(posterior, 3).reshape(3, 5, 3, 6).swapaxes(1, 2)[..., :-1, :-1]  # rows and columns of images
    end = 0.9674  # of a standard normal at 5 / 6; the prior's mean and sd are estimated from 500 rows
    corners = decoded_means(posterior, torch.tensor([[-end, end], [end, end], [-end, -end], [end, -end]]))
    assert np.allclose(found[[0, 0, -1, -1], [0, -1, 0, -1]], corners, atol=0.1)
    assert not np.allclose(corners[1], corners[2], atol=0.1)


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5), (4, 5, 3)])
def test_a_plane_of_grey_and_color_images_is_one_image(shape: tuple[int, ...]) -> None:
    posterior, _ = fitted(*shape, latent_dim=2)
    found = plane(posterior, 3)
    assert found.shape == tuple(3 * (size + 1) if size in (4, 5) else size for size in shape)
    (axes,) = plots.manifold(posterior, columns=3).axes
    assert axes.images[0].get_array().shape[:2] == (15, 18)


def test_a_plane_needs_codes_of_two_numbers() -> None:
    posterior, _ = fitted(4, 5)
    with pytest.raises(ValueError, match="a plane needs codes of two numbers; got 3"):
        plots.manifold(posterior)


def test_a_report_has_a_plane_of_codes_of_two_numbers() -> None:
    names = []
    for latent_dim in (2, 3):
        posterior, x = fitted(4, 5, latent_dim=latent_dim)
        report = check(posterior, x, draws=20, particles=20)
        names.append({picture.name for picture in report.draw()})
    assert ["manifold" in each for each in names] == [True, False]


def test_rows_that_are_no_images_have_no_such_picture() -> None:
    posterior, x = fitted(6)
    with pytest.raises(ValueError, match="the rows must be images"):
        plots.traversal(posterior, x[:1])
    with pytest.raises(ValueError, match="the rows must be images"):
        plots.interpolation(posterior, x[:1], x[1:2])


def test_a_dimension_that_does_not_exist_is_refused() -> None:
    posterior, x = fitted(4, 5)
    with pytest.raises(ValueError, match="the code has 3 latent dimensions, from 0; got 3"):
        plots.traversal(posterior, x[:1], dims=[3])
