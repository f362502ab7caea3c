"""Requests to engines: names, admission, the proxy."""
