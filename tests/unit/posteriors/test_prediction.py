"""Prediction: means, intervals, and uncertainty split in two."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

from deepprob.distributions.columns import Columns
from deepprob.posteriors.prediction import Prediction

K, B = 400, 3


def predict(distribution: dist.Distribution) -> Prediction:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Prediction(distribution, distribution.sample())


@pytest.mark.parametrize("event", [(), (2,)])
def test_variance_is_the_sum_of_its_parts(event: tuple[int, ...]) -> None:
    loc = torch.linspace(-1, 1, K).reshape(K, *(1,) * (1 + len(event))).expand(K, B, *event)
    p = predict(dist.Normal(loc, 0.5).to_event(len(event)))
    assert p.kind == "real"
    assert p.mean.shape == p.sd.shape == p.aleatoric.shape == p.epistemic.shape == (B, *event)
    assert torch.allclose(p.aleatoric, torch.tensor(0.5))
    assert torch.allclose(p.sd**2, p.aleatoric**2 + p.epistemic**2, atol=1e-5)
    low, high = p.interval(0.8)
    assert bool((low < p.mean).all() & (p.mean < high).all())
    assert len(p) == B
    assert repr(p) == "Prediction('y': real, 3 rows, 400 draws)"


def test_intervals_contain_their_mass() -> None:
    low, high = predict(dist.Normal(torch.zeros(20_000, 1), 1.0)).interval(0.9)
    assert float(low) == pytest.approx(-1.645, abs=0.05)
    assert float(high) == pytest.approx(1.645, abs=0.05)


def test_classes_in_nats() -> None:
    agree = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]])
    differ = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    doubt, dispute = (predict(dist.Categorical(p)) for p in (agree, differ))
    assert doubt.kind == "classes"
    assert float(doubt.aleatoric) == pytest.approx(math.log(2))
    assert float(doubt.epistemic) == pytest.approx(0.0, abs=1e-6)
    assert float(dispute.aleatoric) == pytest.approx(0.0, abs=1e-5)
    assert float(dispute.epistemic) == pytest.approx(math.log(2), abs=1e-5)
    assert torch.equal(dispute.mean, torch.tensor([[0.5, 0.5]]))
    assert torch.allclose(dispute.sd, torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"interval needs ordered values, but 'y' is categorical\. Use probs\."):
        doubt.interval()


def test_binary_and_counts() -> None:
    ones = predict(dist.Bernoulli(torch.tensor([[0.2], [0.8]])))
    assert ones.kind == "binary"
    assert float(ones.probs) == pytest.approx(0.5)
    assert float(ones.epistemic) > 0
    assert float(ones.aleatoric + ones.epistemic) == pytest.approx(math.log(2))
    assert float(ones.sd) == pytest.approx(0.5)
    assert predict(dist.Poisson(torch.ones(K, B))).kind == "count"


def test_log_prob_is_that_of_the_mixture() -> None:
    p = predict(dist.Normal(torch.tensor([[-1.0], [1.0]]), 0.1))
    expected = math.log(0.5) + dist.Normal(1.0, 0.1).log_prob(torch.tensor(1.0))
    assert float(p.log_prob([1.0])) == pytest.approx(float(expected), abs=1e-4)
    assert p.log_prob(torch.tensor([1.0], dtype=torch.float64)).dtype == torch.get_default_dtype()
    with pytest.raises(
        ValueError, match=r"y must have the shape of the prediction, \(1,\); got \(1, 1\)\. Reshape y\."
    ):
        p.log_prob(torch.ones(1, 1))


@pytest.mark.parametrize("mass", [0.0, 1.0, 90])
def test_mass_is_a_probability(mass: float) -> None:
    with pytest.raises(ValueError, match=r"mass must lie between 0 and 1; got .*\. Write interval\(0\.9\) for 90 %\."):
        predict(dist.Normal(torch.zeros(K, B), 1.0)).interval(mass)


def test_probs_are_for_classes() -> None:
    with pytest.raises(ValueError, match=r"probs needs a categorical or binary site, but 'y' is real\. Use mean, sd"):
        _ = predict(dist.Normal(torch.zeros(K, B), 1.0)).probs


def test_kind_of_masked_and_expanded_distributions() -> None:
    p = predict(dist.Categorical(torch.ones(2, 1, 4)).expand([2, 5]).mask(torch.ones(5, dtype=torch.bool)))
    assert p.kind == "classes"
    assert p.probs.shape == (5, 4)


def test_one_value_has_a_text_and_no_length() -> None:
    prediction = Prediction(dist.Normal(torch.zeros(5), 1.0), torch.zeros(5), "d")
    assert repr(prediction) == "Prediction('d': real, one value, 5 draws)"
    with pytest.raises(TypeError, match=r"site 'd' has no rows: it is one value\. Use mean, sd or draws"):
        len(prediction)


def test_frame_of_real_values() -> None:
    p = predict(dist.Normal(torch.zeros(K, B), 2.0))
    frame = p.to_frame(0.5)
    assert frame.index.name == "row" and [*frame.columns] == ["mean", "sd", "25%", "75%"] and len(frame) == B
    assert frame["sd"].tolist() == [2.0] * B
    assert frame["25%"].tolist() == pytest.approx(p.interval(0.5)[0].tolist())
    assert [*predict(dist.Poisson(torch.ones(K, B))).to_frame().columns] == ["mean", "sd", "5%", "95%"]
    with pytest.raises(ValueError, match=r"mass must lie between 0 and 1; got 'a'\. Write to_frame\(0\.9\) for 90 %\."):
        p.to_frame("a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mass must lie between 0 and 1"):
        p.to_frame(2.0)


@pytest.mark.parametrize(
    ("event", "names"),
    [((1,), ["mean"]), ((2,), ["mean[0]", "mean[1]"]), ((1, 2), ["mean[0, 0]", "mean[0, 1]"])],
)
def test_frame_of_several_columns(event: tuple[int, ...], names: list[str]) -> None:
    loc = torch.arange(float(B)).reshape(B, *[1] * len(event)).expand(K, B, *event)
    frame = predict(dist.Normal(loc, 1.0).to_event(len(event))).to_frame()
    assert [name for name in frame.columns if name.startswith("mean")] == names
    assert all(frame[name].tolist() == [0.0, 1.0, 2.0] for name in names)
    assert len(frame.columns) == 4 * len(names)


def test_frame_and_classes_of_a_categorical_site() -> None:
    probs = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]])
    p = predict(dist.Categorical(probs.expand(K, 2, 3)))
    assert p.classes.tolist() == [1, 0]
    frame = p.to_frame()
    assert [*frame.columns] == ["class", "prob[0]", "prob[1]", "prob[2]"]
    assert frame["class"].tolist() == [1, 0] and frame["prob[1]"].tolist() == pytest.approx([0.7, 0.2])
    assert predict(dist.OneHotCategorical(probs.expand(K, 2, 3))).classes.tolist() == [1, 0]
    many = predict(dist.Categorical(probs.expand(K, B, 2, 3)).to_event(1))
    assert many.classes.shape == (B, 2)
    assert [*many.to_frame().columns][:5] == ["class[0]", "prob[0][0]", "prob[0][1]", "prob[0][2]", "class[1]"]
    assert many.to_frame()["prob[1][0]"].tolist() == pytest.approx([0.5] * B)


def test_frame_and_classes_of_a_binary_site() -> None:
    p = predict(dist.Bernoulli(torch.tensor([0.2, 0.8]).expand(K, 2)))
    assert p.classes.tolist() == [0, 1]
    assert [*p.to_frame().columns] == ["class", "prob"]
    assert p.to_frame()["prob"].tolist() == pytest.approx([0.2, 0.8])


def test_frame_of_one_value() -> None:
    frame = predict(dist.Normal(torch.zeros(K), 1.0)).to_frame()
    assert frame.shape == (1, 4) and frame["sd"].tolist() == [1.0]


def test_real_values_have_no_classes() -> None:
    with pytest.raises(ValueError, match=r"classes needs a categorical or binary site, but 'y' is real\. Use mean\."):
        _ = predict(dist.Normal(torch.zeros(K, B), 1.0)).classes


def test_summary_shows_the_first_rows() -> None:
    text = predict(dist.Normal(torch.zeros(K, 12), 1.0)).summary(rows=2)
    assert text.splitlines()[0] == "Prediction('y': real, 12 rows, 400 draws)"
    assert len(text.splitlines()) == 6 and text.endswith("10 more rows")


def test_an_ordered_outcome_has_classes() -> None:
    cuts = torch.tensor([-1.0, 1.0])
    d = dist.OrderedLogistic(torch.zeros(500, 3), cuts)
    p = Prediction(d, d.sample(), "y")
    assert p.kind == "classes" and p.probs.shape == (3, 3)
    assert p.probs[0].tolist() == pytest.approx([0.269, 0.462, 0.269], abs=1e-3)


def test_moments_of_an_angle_are_those_of_its_draws() -> None:
    d = dist.VonMises(torch.zeros(4000, 2), torch.tensor(1.5))
    p = Prediction(d, d.sample(), "angle")
    assert (p.sd - p.draws.std(0, unbiased=False)).abs().max() == 0
    assert p.sd[0] > d.variance[0, 0].sqrt() + 0.1  # torch's variance is the circular one


def test_weights_by_row() -> None:
    """All weight on one component gives the moments, the density and the draws of that component."""
    d = dist.Normal(torch.tensor([[0.0, 1.0], [10.0, 20.0]]), torch.tensor([[1.0, 1.0], [2.0, 3.0]]))
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    p = Prediction(d, d.sample(), "y").reweighted(weights, draws=5)
    assert p.mean.tolist() == [0.0, 20.0] and p.sd.tolist() == [1.0, 3.0]
    assert p.aleatoric.tolist() == [1.0, 3.0] and p.epistemic.tolist() == [0.0, 0.0]
    y = torch.tensor([0.5, 19.0])
    expected = dist.Normal(torch.tensor([0.0, 20.0]), torch.tensor([1.0, 3.0])).log_prob(y)
    assert p.log_prob(y).tolist() == pytest.approx(expected.tolist())
    assert p.draws.shape == (5, 2) and (p.draws == p.draws[:1]).all()


@pytest.mark.parametrize("batch", [(), (2,)])
def test_columns_of_different_kinds_have_names(batch: tuple[int, ...]) -> None:
    age, smoker = dist.Normal(torch.full((K, B, *batch, 1), 40.0), 10.0), dist.Bernoulli(torch.tensor([0.25]))
    island, visits = dist.OneHotCategorical(torch.tensor([0.75, 0.25])), dist.Poisson(torch.tensor([3.0]))
    blocks = [(age, [0]), (smoker, [1]), (island, [2, 3]), (visits, [4])]
    names = ["age", "smoker", "island=a", "island=b", "visits"]
    shown = predict(Columns(blocks, names)).to_frame(0.8)
    own = ["class[smoker]", "prob[smoker]", "class[island]", "prob[island=a]", "prob[island=b]"]
    numbers = [[f"{part}[{name}]" for part in ("mean", "sd", "10%", "90%")] for name in ("age", "visits")]
    expected = [*numbers[0], *own, *numbers[1]]
    places = [f"{i}, " for i in range(2)] if batch else [""]
    assert {*shown.columns} == {name.replace("[", f"[{place}") for name in expected for place in places}
    if not batch:
        assert [*shown.columns] == expected
        assert (shown["mean[age]"] == 40).all() and (shown["class[island]"] == "a").all()
        assert shown["prob[island=b]"].to_list() == pytest.approx([0.25] * B)
