"""The HTTP applications: language models behind an OpenAI-compatible interface, on Ray Serve."""
