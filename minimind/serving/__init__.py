"""The service: OpenAI's API over HTTP, for one or several models, safe by default."""
