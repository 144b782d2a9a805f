"""Muon for the matrices of equal layers, all of one shape in one batch, and AdamW for the rest."""

import torch
from torch import Tensor, nn


def orthogonalize(update: Tensor, rounds: int = 5) -> Tensor:
    """Bring the singular values of a batch of wide matrices near one by a quintic Newton-Schulz iteration.

    Source: Jordan et al. 2024, Muon, https://kellerjordan.github.io/posts/muon/.
    """
    matrix = update.bfloat16()
    matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = matrix @ matrix.mT
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix.to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; weight decay is decoupled."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        """Group the matrices by shape, taking tall ones by their transpose."""
        self._by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            self._by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
        self._momenta: dict[tuple[int, ...], Tensor] = {}
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all matrices."""
        lr, momentum, decay = (self.param_groups[0][name] for name in ("lr", "momentum", "decay"))
        for shape, matrices in self._by_shape.items():
            gradient = torch.stack([m.grad if m.shape[0] <= m.shape[1] else m.grad.T for m in matrices])
            average = self._momenta.setdefault(shape, torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - momentum)
            update = orthogonalize(gradient.lerp(average, momentum))
            torch._foreach_mul_(matrices, 1 - lr * decay)
            for matrix, one in zip(matrices, update.unbind(), strict=True):
                tall = matrix.shape[0] > matrix.shape[1]
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.add_(one.T if tall else one, alpha=-lr * scale)


def make_optimizers(model: nn.Module, matrix_lr: float, other_lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    layers = {id(parameter) for parameter in model.model.layers.parameters()}
    matrices = [p for p in model.parameters() if id(p) in layers and p.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=others[0].is_cuda)
    return [Muon(matrices, lr=matrix_lr, decay=decay), adam]
