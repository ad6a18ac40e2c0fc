"""Pictures to tiles: `tiling` chooses the grid, `image` decodes and cuts. No torch, no I/O."""
