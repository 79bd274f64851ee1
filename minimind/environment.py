"""Names of environment variables that several packages read."""

KEY_VARIABLE = "MINIMIND_API_KEY"  # API key: the service requires it, clients send it
