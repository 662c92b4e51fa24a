"""Can a discriminator that never saw a class tell its generated images from its real ones?

    d_c = - 1/2 [ mean_{x real of c} log p(real | x) + mean_{x generated of c} log p(generated | x) ]

p is an L2-regularised logistic regression on standardised features,

    minimise  1/2 [ mean over real of log(1 + exp(-f)) + mean over generated of log(1 + exp(f)) ] + ridge/2 |w|^2,
    f(x) = w.x + b

fitted on the classes of even index for those of odd index, and the other way round, so a discriminator's overfitting
does not count as a difference. ln 2 = 0.693 nats is chance, 0 is certainty; 1 - d / ln 2 bounds the Jensen-Shannon
divergence of the two kinds from below. With few images the fit is poor and d exceeds ln 2: for equal distributions of
128 features and 10 images of each kind it is 0.70 with 659 classes, 0.72 with 200 and 0.81 with 60. Give the value of
real images against other real ones beside it.

Source: Goodfellow et al., Generative adversarial nets, 2014, theorem 1 (the divergence); Lopez-Paz, Oquab, Revisiting
classifier two-sample tests, 2017 (held-out discriminators as a measure). Departure: held out by class, not by image.
"""

from typing import NamedTuple

import numpy as np


class _Discriminator(NamedTuple):
    """f(x) = weight . (x - mean) / scale + bias."""

    mean: np.ndarray  # [D]
    scale: np.ndarray  # [D]
    weight: np.ndarray  # [D]
    bias: float


def discrimination(real: np.ndarray, generated: np.ndarray, *, ridge: float = 0.01) -> np.ndarray:
    """Return the cross-entropy of a held-out discriminator on every class.

    Args:
        real: features of real images [C, N, D].
        generated: features of generated images [C, M, D].
        ridge: of the weights on standardised features; more for fewer images.

    Returns:
        d [C], nats per image.

    Raises:
        ValueError: fewer than two classes, different C or D, no images, a ridge that is not positive, or features
            that are not finite.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    shapes = f"{list(real.shape)} and {list(generated.shape)}"
    if real.ndim != 3 or generated.ndim != 3 or real.shape[::2] != generated.shape[::2]:
        raise ValueError(f"expected features [C, N, D] and [C, M, D] of one critic for the same classes, got {shapes}")
    if len(real) < 2 or not real.shape[1] or not generated.shape[1]:
        raise ValueError(
            f"expected images of both kinds for at least 2 classes (half of them are fitted), got {shapes}"
        )
    if not ridge > 0:
        raise ValueError(f"expected ridge > 0 (without it separable classes have no finite fit), got {ridge}")
    finite = np.isfinite(real).all((1, 2)) & np.isfinite(generated).all((1, 2))
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(finite)} classes have features that are not finite, and every other class "
            "would be judged by them; find out why, or leave those classes out and say so"
        )
    values = np.empty(len(real))
    for fitted, scored in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        discriminator = _fit(_rows(real[fitted]), _rows(generated[fitted]), ridge)
        of_real = np.logaddexp(0, -_logit(discriminator, real[scored])).mean(1)
        of_generated = np.logaddexp(0, _logit(discriminator, generated[scored])).mean(1)
        values[scored] = (of_real + of_generated) / 2
    return values


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _logit(discriminator: _Discriminator, x: np.ndarray) -> np.ndarray:
    """Return log p(real | x) / p(generated | x) for x [..., D]."""
    mean, scale, weight, bias = discriminator
    return (x - mean) / scale @ weight + bias


def _fit(real: np.ndarray, generated: np.ndarray, ridge: float) -> _Discriminator:
    """Return the discriminator of features [N, D] and [M, D], both kinds of equal weight whatever their numbers."""
    x = np.concatenate([real, generated])
    sign = np.repeat([1.0, -1.0], [len(real), len(generated)])
    share = np.repeat([0.5 / len(real), 0.5 / len(generated)], [len(real), len(generated)])
    mean = share @ x
    scale = np.sqrt(share @ np.square(x - mean))
    scale = np.where(scale > 1e-12 * np.abs(mean), scale, 1.0)  # a constant feature tells nothing
    solution = _minimised(np.column_stack([(x - mean) / scale, np.ones(len(x))]), sign, share, ridge)
    return _Discriminator(mean, scale, solution[:-1], float(solution[-1]))


def _minimised(x: np.ndarray, sign: np.ndarray, share: np.ndarray, ridge: float) -> np.ndarray:
    """Return the minimum over w of sum_n share_n log(1 + exp(-sign_n x_n.w)) + ridge/2 |w|^2, the bias (last) free."""
    from scipy import optimize

    penalty = np.append(np.full(x.shape[1] - 1, ridge), 0.0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ w)
        wrong = np.exp(-np.logaddexp(0, margin))  # p of the other kind
        value = share @ np.logaddexp(0, -margin) + 0.5 * penalty @ np.square(w)
        return float(value), penalty * w - x.T @ (share * sign * wrong)

    options = {"maxiter": 1000, "maxfun": 2000, "ftol": 1e-14, "gtol": 1e-8}
    return optimize.minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options=options).x
