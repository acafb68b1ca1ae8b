"""Small state dicts in the original layout."""

import numpy as np
import torch


def position_table(width, grid):
    """Integer grid, [sin, cos] per axis; the first half of the features is the column."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = [np.outer(position, frequencies) for position in (column, row)]
    halves = [part for angle in angles for part in (np.sin(angle), np.cos(angle))]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()[None]


def original_state(width=32, depth=2, patch=2, channels=3, out=6, classes=5, grid=3):
    """Random weights under the original's names, written out as its modules have them."""
    random = torch.Generator().manual_seed(0)

    def linear(name, rows, columns):
        shapes = {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        return {key: torch.randn(shape, generator=random) * 0.1 for key, shape in shapes.items()}

    state = {
        "pos_embed": position_table(width, grid),
        "x_embedder.proj.weight": torch.randn(width, channels, patch, patch, generator=random),
        "x_embedder.proj.bias": torch.randn(width, generator=random),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": torch.randn(classes + 1, width, generator=random),
    }
    for i in range(depth):
        state |= linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        state |= linear(f"blocks.{i}.attn.proj", width, width)
        state |= linear(f"blocks.{i}.mlp.fc1", 4 * width, width)
        state |= linear(f"blocks.{i}.mlp.fc2", width, 4 * width)
        state |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    state |= linear("final_layer.linear", patch * patch * out, width)
    state |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return state
