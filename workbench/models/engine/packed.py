"""`Operations` for a CPU, which wants few and well-laid matrices."""

import torch
from torch import Tensor

from workbench.models.engine.decoder import Block, Decoder, Matrix
from workbench.models.engine.operations import Inward, Operations, feeding, fold, matrices


class Packed(Operations):
    """Matrices side by side, in the order in which a CPU multiplies one vector fastest.

    They are copies: twice the decoder's weights are held. On the CPUs measured, a wide matrix is
    read two to four times as fast when its columns are contiguous, and a narrow one when its rows
    are.

    Args:
        decoder: whose matrices are copied.
        by_place: as in `Operations`.
    """

    def __init__(self, decoder: Decoder, by_place: bool = False) -> None:
        super().__init__(by_place)
        self.inward = {id(block): _side_by_side(matrices(block)) for block in decoder.blocks}
        self.fed = {
            id(block): _side_by_side(feeding(block))
            for block in decoder.blocks
            if block.second_norm is not None
        }
        # In a parallel block both ways back to the residual stream are one matrix as well.
        self.back = {
            id(block): _end_to_end(block.out, block.down)
            for block in decoder.blocks
            if block.second_norm is None
        }
        self.head = _side_by_side((decoder.head,))

    def enter(self, block: Block, h: Tensor) -> tuple[Tensor, Inward]:
        """See `Operations.enter`."""
        normed = block.norm(h)
        matrix, sizes = self.inward[id(block)]
        return normed, matrix(normed).split(sizes, dim=-1)

    def leave(
        self, block: Block, h: Tensor, normed: Tensor, mixed: Tensor, inward: Inward
    ) -> Tensor:
        """See `Operations.leave`."""
        if block.second_norm is None:
            wide = fold(block, inward[-len(feeding(block)) :])
            return h + _narrow(self.back[id(block)], torch.cat([mixed, wide], dim=-1))
        h = h + _narrow(block.out, mixed)
        matrix, sizes = self.fed[id(block)]
        fed = matrix(block.second_norm(h)).split(sizes, dim=-1)
        return h + _narrow(block.down, fold(block, fed))

    def logits(self, decoder: Decoder, h: Tensor) -> Tensor:
        """See `Operations.logits`."""
        return self.head[0](decoder.norm(h))


def _side_by_side(some: tuple[Matrix, ...]) -> tuple[Matrix, tuple[int, ...]]:
    sizes = tuple(matrix.weight.shape[0] for matrix in some)
    weight = torch.cat([matrix.weight.detach() for matrix in some])
    biases = [
        matrix.weight.new_zeros(size) if matrix.bias is None else matrix.bias.detach()
        for matrix, size in zip(some, sizes, strict=True)
    ]
    bias = None if all(matrix.bias is None for matrix in some) else torch.cat(biases)
    if weight.shape[0] >= weight.shape[1]:
        weight = weight.T.contiguous().T
    return Matrix(weight, bias), sizes


def _end_to_end(one: Matrix, other: Matrix) -> Matrix:
    """Join two matrices whose results are added."""
    biases = [m.bias.detach() for m in (one, other) if m.bias is not None]
    weight = torch.cat([one.weight.detach(), other.weight.detach()], dim=1)
    return Matrix(weight, sum(biases) if biases else None)


def _narrow(matrix: Matrix, t: Tensor) -> Tensor:
    if t.shape[0] > 1:
        return matrix(t)
    if matrix.bias is None:
        return torch.mv(matrix.weight, t[0])[None]
    return torch.addmv(matrix.bias, matrix.weight, t[0])[None]
