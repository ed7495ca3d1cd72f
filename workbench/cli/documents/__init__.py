"""JSON documents that commands print with `--json`, one class each. A command imports only the module of its own document."""
