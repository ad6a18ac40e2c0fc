"""The vision side: `vit` (InternViT), `projector` (pixel shuffle and MLP), `tower` (both), `loader`, `passes`."""
