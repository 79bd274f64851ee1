"""Names of environment variables that several packages read."""

KEY_VARIABLE = "MINIMIND_API_KEY"  # the API key that the service requires and clients send
NATIVE_VARIABLE = "MINIMIND_NATIVE"  # "0": neither compile nor use C++ code
