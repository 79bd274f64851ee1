"""The service: OpenAI's HTTP API for one or several models.

Reading order, the path of a request: protocol (HTTP with timeouts), observe, auth, body_limit
(middleware), app (routes), requests and schema (bodies), preparation (threads), engine_requests
(encoding), answers (from the engine's thread to the event loop), chat and completions (responses),
streaming.
"""
