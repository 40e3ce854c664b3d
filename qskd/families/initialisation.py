"""Where training starts: class prior, box head and reference points (boxes of about a fifth of the image)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PRIOR_PROBABILITY = 0.01  # focal loss (Lin et al., ICCV 2017): every class starts at this probability
START_SIZE_LOGIT = -1.4  # sigmoid gives 0.198 of the image's side


def grid_points(count: int) -> Tensor:
    """[count, 2] x, y in 0..1, spread evenly: rows of cells, rows as equal as can be, points in the cells' middles."""
    rows = max(1, round(math.sqrt(count)))
    points = []
    for row in range(rows):
        columns = count // rows + (row < count % rows)
        points += [((column + 0.5) / columns, (row + 0.5) / rows) for column in range(columns)]
    return torch.tensor(points, dtype=torch.float32)


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights (in place), as DETR's authors start the transformer. transformers' N(0, 0.02) is about that at
    width 256 with its wider layers, but six times too small at width 64: attention then starts, and long stays, flat."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def set_class_prior(head: nn.Linear) -> None:
    """Bias so that every class starts at `PRIOR_PROBABILITY`."""
    nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))


def zero_box_head(last: nn.Linear, size_logit: float = START_SIZE_LOGIT) -> None:
    """The last layer of a box head [.., 4]: start at the reference point, with the same size everywhere."""
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    with torch.no_grad():
        last.bias[2:] = size_logit


def fit_points(
    embedding: nn.Parameter, head: nn.Module, points: Tensor, steps: int = 300, head_too: bool = True
) -> None:
    """Fit query embeddings [Q, D] to `points` [Q, 2]; the network that reads logits of points off them too, or not."""
    parameters = [embedding, *(head.parameters() if head_too else ())]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    with torch.enable_grad():
        for _ in range(steps):
            loss = ((head(embedding).sigmoid() - points) ** 2).mean()
            # Not backward(): gradients must not be left on the parameters.
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def solve_points(embedding: Tensor, head: nn.Linear, points: Tensor) -> None:
    """Move embeddings [Q, D] (in place) by as little as makes a linear head [D -> 2] say logit(points)."""
    wanted = torch.logit(points) - head(embedding)
    embedding += wanted @ torch.linalg.pinv(head.weight).T
