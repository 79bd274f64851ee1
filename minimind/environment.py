"""Environment variables that several parts of the product read."""

KEY_VARIABLE = "MINIMIND_API_KEY"  # the key of a service: it asks for it, and clients send it
