"""Anthropic's API: schemas of requests, and endpoints."""
