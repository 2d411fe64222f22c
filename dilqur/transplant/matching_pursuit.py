"""Sparse combinations of vectors: orthogonal matching pursuit and sparsemax, for many vectors at a time."""

import torch


def matching_pursuit(targets, atoms, sparsity):
    """(indices, coefficients): each target as a combination of at most `sparsity` atoms, greedily chosen.

    Orthogonal matching pursuit (Pati, Rezaiifar and Krishnaprasad 1993; for tokenizers Goddard and Fernandes Neto 2025,
    arXiv 2506.06607): take the atom with the largest |cosine| to what is left of the target, solve least squares over all atoms
    taken so far, go on with the new rest. The least squares are kept as a QR decomposition that grows by a column a step.

    targets: (n, d). atoms: (m, d), m ≥ 1, float32 on one device. Returns int64 (n, k) and float32 (n, k) with
    k = min(sparsity, m, d); a coefficient is 0 where a target needed fewer atoms.
    """
    n, d = targets.shape
    k = min(sparsity, len(atoms), d)
    lengths = atoms.norm(dim=1)
    unit = atoms / lengths.clamp(min=1e-12).unsqueeze(1)
    tolerance = 1e-6  # of the length of a vector: what is below is rounding
    rest, usable = targets.clone(), (lengths > 0).expand(n, -1).clone()
    basis = targets.new_zeros(n, k, d)
    triangle = torch.eye(k, device=targets.device).repeat(n, 1, 1)  # R, a 1 where a step took nothing
    chosen = torch.zeros(n, k, dtype=torch.int64, device=targets.device)
    onto = targets.new_zeros(n, k)
    enough = tolerance * targets.norm(dim=1)
    for step in range(k):
        best = (rest @ unit.T).abs_().masked_fill_(~usable, -1).max(1)
        atom = unit[best.indices]
        usable.scatter_(1, best.indices.unsqueeze(1), False)
        column = targets.new_zeros(n, k)
        new = atom.clone()
        for _ in range(2):  # Gram-Schmidt, twice: once loses digits
            part = torch.einsum("nkd,nd->nk", basis, new)
            new -= torch.einsum("nk,nkd->nd", part, basis)
            column += part
        length = new.norm(dim=1)
        takes = (length > tolerance) & (rest.norm(dim=1) > enough) & (best.values >= 0)
        direction = torch.where(takes.unsqueeze(1), new / length.clamp(min=1e-12).unsqueeze(1), torch.zeros_like(new))
        amount = (rest * direction).sum(1)
        rest -= amount.unsqueeze(1) * direction
        basis[:, step], chosen[:, step], onto[:, step] = direction, best.indices, amount
        triangle[:, :step, step] = column[:, :step] * takes.unsqueeze(1)
        triangle[:, step, step] = torch.where(takes, length, torch.ones_like(length))
    solved = torch.linalg.solve_triangular(triangle, onto.unsqueeze(2), upper=True).squeeze(2)
    return chosen, solved / lengths[chosen].clamp(min=1e-12)


def sparsemax(scores):
    """The point of the probability simplex nearest to each row of `scores` (n, m): most of its weights are exactly 0.

    Martins and Astudillo 2016, arXiv 1602.02068, algorithm 1. float32, rows sum to 1.
    """
    ordered = scores.sort(dim=1, descending=True).values
    above = ordered.cumsum(1) - 1
    ranks = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    support = (ordered * ranks > above).sum(1, keepdim=True)
    threshold = above.gather(1, support - 1) / support
    return (scores - threshold).clamp(min=0)
