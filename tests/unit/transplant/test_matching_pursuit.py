"""Sparse combinations: the batched computations are what their definitions say, one vector at a time."""

import numpy as np
import pytest
import torch

from dilqur.transplant.matching_pursuit import matching_pursuit, sparsemax


def naive_pursuit(target, atoms, sparsity):
    """Orthogonal matching pursuit by the book: a whole least-squares problem at every step. float64, dense coefficients."""
    chosen, coefficients, rest = [], [], target
    while len(chosen) < sparsity and np.linalg.norm(rest) > 1e-6 * np.linalg.norm(target):
        cosines = np.abs(atoms @ rest) / np.linalg.norm(atoms, axis=1)
        cosines[chosen] = -1
        chosen.append(int(cosines.argmax()))
        coefficients, *_ = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)
        rest = target - atoms[chosen].T @ coefficients
    out = np.zeros(len(atoms))
    out[chosen] = coefficients
    return out


def dense(found, atoms):
    out = torch.zeros(len(found[0]), atoms)
    return out.scatter_add_(1, *found).numpy()


@pytest.mark.parametrize("sparsity", [1, 4, 12])
def test_the_pursuit_is_the_one_with_least_squares_at_every_step(sparsity):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(30, 12, generator=generator) * torch.rand(30, 1, generator=generator)  # of unlike lengths
    targets = torch.randn(50, 12, generator=generator)
    found = dense(matching_pursuit(targets, atoms, sparsity), 30)
    for got, target in zip(found, targets.double().numpy(), strict=True):
        np.testing.assert_allclose(got, naive_pursuit(target, atoms.double().numpy(), sparsity), rtol=2e-3, atol=2e-4)


def test_a_target_made_of_few_atoms_is_found_again_and_takes_no_more():
    atoms = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1))).Q[:15]
    wanted = torch.zeros(3, 15)
    wanted[0, 4], wanted[1, [2, 9]], wanted[2, [0, 7, 14]] = (
        3.0,
        torch.tensor([1.0, -2.0]),
        torch.tensor([1.0, 1.5, 2.0]),
    )
    found = dense(matching_pursuit(wanted @ atoms, atoms, 8), 15)
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_the_same_atom_twice_one_of_zeros_and_a_target_of_zeros_do_no_harm():
    atoms = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 2, 0]])
    found = dense(matching_pursuit(torch.tensor([[3.0, 4, 0], [0, 0, 0]]), atoms, 3), 4)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found @ atoms.numpy(), [[3, 4, 0], [0, 0, 0]], atol=1e-6)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    scores = torch.randn(40, 7, generator=torch.Generator().manual_seed(2))
    found = sparsemax(scores)
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    assert (found >= 0).all() and (found == 0).any()
    for row, near in zip(scores.double().numpy(), found.numpy(), strict=True):
        low, high = row.min() - 1, row.max()  # the threshold by bisection: the weights above it add up to 1
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
        np.testing.assert_allclose(near, np.maximum(row - low, 0), atol=1e-6)
