"""As of flash-attn."""
