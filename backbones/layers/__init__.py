"""Layers that several families share. All take and give channels-last tokens (B, H, W, C)."""
