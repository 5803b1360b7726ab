"""The Megatron-Core plugin."""
