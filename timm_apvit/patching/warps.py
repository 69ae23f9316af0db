"""Warps: patch-local points -> patch-local points, before a patch is scaled, turned and moved to its place.

Two of them. A projective one, ``V(u) = u / (1 + v . u)``, under which a patch is denser at one end than at the other;
and a thin-plate spline (Bookstein 1989, "Principal warps"), ``V(u) = u + d(u)`` with the smoothest displacement d that
takes what it is given at 4 x 4 control points. Both keep the patch's centre, u = 0, where it is, and none at all is the
identity, to the last bit. Jacobians are in closed form: they say how densely each part of a patch is sampled.
"""

import math

import torch
from torch import Tensor, nn

# Control points along each side of a patch, on its edges too.
CONTROL_POINTS = 4
# Largest strain, the norm of a spline's displacement gradient, below 1, at which patches could fold. So no direction of
# a patch is stretched by more than 1 + this or shrunk by more than 1 - this.
MAX_STRAIN = 0.8
# Of the strain, the most that a grid of STRAIN_GRID points a side can miss between its points, for any displacements.
STRAIN_GRID, STRAIN_MARGIN = 13, 1.3
# Strain that displacements of 1 of the control points can cause, at most; likewise for any displacements.
STRAIN_OF_DISPLACEMENT = 7.9
# Points along each side at which the outline of a spline is looked at, and by how much it may leave the chords between
# them, at most, for displacements of 1.
OUTLINE_POINTS, OUTLINE_MARGIN = 12, 0.064


def lattice(device: torch.device, dtype: torch.dtype, count: int = CONTROL_POINTS) -> Tensor:
    """Points from edge to edge of a patch, ``count`` along each side, row by row: ``(count^2, 2)``."""
    side = torch.arange(count, device=device, dtype=dtype) * (2 / (count - 1)) - 1
    return torch.stack([side[None, :].expand(count, count), side[:, None].expand(count, count)], dim=-1).reshape(-1, 2)


def spline_basis(points: Tensor) -> tuple[Tensor, Tensor]:
    """What splines are sums of, at points ``(P, 2)``: values ``(P, 19)`` and gradients ``(P, 19, 2)``.

    The kernel ``r^2 log r`` about each control point, then 1, x and y (Bookstein 1989, eq. 1-3).
    """
    tiny = 1e-30  # keeps the logarithm finite at a control point, where the kernel is 0
    away = points.unsqueeze(1) - lattice(points.device, points.dtype)  # (P, 16, 2)
    squared = away.square().sum(dim=-1, keepdim=True)
    log_squared = torch.log(squared.clamp(min=tiny))
    one, zero = torch.ones_like(points[:, :1]), torch.zeros_like(points)
    along = torch.eye(2, device=points.device, dtype=points.dtype).expand(points.shape[0], 2, 2)
    values = torch.cat([(squared * log_squared / 2).squeeze(-1), one, points], dim=1)
    gradients = torch.cat([away * (log_squared + 1), zero.unsqueeze(1), along], dim=1)
    return values, gradients


def solve_spline() -> list[list[float]]:
    """The coefficients of a spline from its displacements at the control points, less the one at u = 0: 19 x 16.

    Solved in float64, as numbers rather than as a buffer, which a cast would round and the meta device would lose.
    """
    points = lattice(torch.device('cpu'), torch.float64)
    values, _ = spline_basis(points)
    system = torch.zeros(19, 19, dtype=torch.float64, device='cpu')
    system[:16], system[16:, :16] = values, values[:, 16:].T
    solution = torch.linalg.inv(system)[:, :16]
    at_centre, _ = spline_basis(torch.zeros(1, 2, dtype=torch.float64, device='cpu'))
    solution[16] -= (at_centre @ solution)[0]
    rows: list[list[float]] = solution.tolist()
    return rows


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of float32 that neither autocast nor TF32 rounds: in float64, where they could."""
    # In float32 it takes half the time, and Apple's GPUs know nothing else.
    plain = a.device.type == 'mps' or (a.device.type == 'cpu' and not torch.is_autocast_enabled('cpu'))
    return a @ b if plain else (a.double() @ b.double()).to(a.dtype)


def spline_values(spline: Tensor, points: Tensor) -> Tensor:
    """Displacements of splines ``(B, N, 19, 2)`` at points ``(P, 2)``: ``(B, N, P, 2)``."""
    values, _ = spline_basis(points)
    return exact_product(spline.transpose(2, 3), values.T).transpose(2, 3)


def spline_gradients(spline: Tensor, points: Tensor) -> Tensor:
    """Gradients of these displacements: ``(B, N, 2, 2, P)``, the second 2 that of the derivative."""
    _, gradients = spline_basis(points)
    flat = gradients.permute(1, 2, 0).flatten(1)  # (19, 2 * P)
    product = exact_product(spline.transpose(2, 3), flat)
    return product.reshape(*spline.shape[:2], 2, 2, points.shape[0])


class Spline(nn.Module):
    """Displacements of the control points -> coefficients of a thin-plate spline that keeps u = 0 and never folds.

    The displacement field is scaled down as a whole, smoothly, so that its strain stays below `MAX_STRAIN` all over the
    patch: ``u + d(u)`` is then one-to-one, with a positive Jacobian.
    """

    def __init__(self) -> None:
        super().__init__()
        self.solution = solve_spline()

    def forward(self, displacements: Tensor) -> Tensor:
        """Solve for splines: ``(B, N, 16, 2)``, in the patch's half-extents, row by row -> ``(B, N, 19, 2)``."""
        # Without waiting for the device, if it is another one.
        solution = torch.tensor(self.solution, dtype=displacements.dtype).to(displacements.device, non_blocking=True)
        spline = exact_product(displacements.transpose(2, 3), solution.T).transpose(2, 3)
        points = lattice(spline.device, spline.dtype, STRAIN_GRID)
        # Squares, as the norm itself has no gradient at zero, where every patch begins.
        squared = spline_gradients(spline, points).square().sum(dim=(2, 3)).amax(dim=2)
        return spline * torch.rsqrt(1 + squared / (MAX_STRAIN / STRAIN_MARGIN) ** 2).unsqueeze(-1).unsqueeze(-1)


def warped(perspective: Tensor | None, spline: Tensor | None, points: Tensor) -> Tensor:
    """Warp points ``(P, 2)`` by ``(B, N, 2)`` or ``(B, N, 19, 2)``: ``(B, N, P, 2)``; without both ``(1, 1, P, 2)``."""
    u = points.unsqueeze(0).unsqueeze(0)
    if perspective is not None:
        v = perspective.unsqueeze(2)
        return u / (1 + v[..., :1] * u[..., :1] + v[..., 1:] * u[..., 1:])
    if spline is not None:
        return u + spline_values(spline, points)
    return u


def warp_jacobians(perspective: Tensor | None, spline: Tensor | None, points: Tensor) -> Tensor:
    """Jacobians of `warped` at points ``(P, 2)``: ``(B, N, 2, 2, P)``; without both ``(1, 1, 2, 2, 1)``.

    The points come last, also in memory, as arithmetic along an axis of 2 is up to 50 times slower.
    """
    identity = torch.eye(2, device=points.device, dtype=points.dtype).reshape(1, 1, 2, 2, 1)
    if perspective is not None:
        v = perspective.unsqueeze(2).unsqueeze(-1)  # (B, N, 1, 2, 1)
        u = points.t().contiguous().reshape(1, 1, 2, 1, -1)
        denominator = 1 + v[..., :1, :] * u[..., :1, :, :] + v[..., 1:, :] * u[..., 1:, :, :]  # (B, N, 1, 1, P)
        return (identity - u / denominator * v) / denominator
    if spline is not None:
        return identity + spline_gradients(spline, points)
    return identity


def perspective_stretch(max_perspective: float, patch_aspect: float) -> float:
    """Largest factor by which a projective warp can enlarge a footprint; the norm of its Jacobian at a corner.

    With d the denominator, the Jacobian ``(d I - u v^T) / d^2`` has the determinant ``1 / d^3`` and the squared
    Frobenius norm ``(2 d + |u|^2 |v|^2) / d^4``, which give its larger singular value.
    """
    denominator = 1 - max_perspective
    # |u| |v| in samples rather than half-extents.
    product = max_perspective * math.sqrt(1 + max(patch_aspect, 1 / patch_aspect) ** 2)
    return (product + math.sqrt(product * product + 4 * denominator)) / (2 * denominator * denominator)


def outline_points(points_per_side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Points along the sides of [-1, 1]^2, clockwise from its top-left corner: ``(4 * points_per_side, 2)``."""
    step = torch.arange(points_per_side, device=device, dtype=dtype) * (2 / points_per_side) - 1
    one = torch.ones_like(step)
    sides = [
        torch.stack([step, -one], dim=-1),
        torch.stack([one, step], dim=-1),
        torch.stack([-step, one], dim=-1),
        torch.stack([-one, -step], dim=-1),
    ]
    return torch.cat(sides)
