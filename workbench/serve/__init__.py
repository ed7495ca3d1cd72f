"""Serve a configuration: an OpenAI-compatible endpoint in this process, or before a LoRA server."""
