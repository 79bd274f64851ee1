"""The web page: a client of the service over HTTP."""
